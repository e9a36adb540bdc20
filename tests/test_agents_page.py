"""What docs/agents.md shows is what works: each of its commands is run, on the laptop's own model or a small chat model."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from hone.launch.cli import main
from hone.launch.observe.run_directory import read_metrics
from tests.rollout.chatting import write_chat_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "agents.md").read_text()
COMMANDS = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)]
SHORTER = ["--run.backend", "local", "--train.max-steps", "1", "--rollout.batch-size", "2", "--rollout.n-samples-per-prompt", "2"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: Path(re.findall(r"examples/(\w+)\.py", command)[0]).stem)
def test_every_command_of_the_page_runs(command: str, hone_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    assert words[:4] == ["uv", "run", "launch", "grpo"]
    # Under `uv run`, `python` is the environment's.
    words = [word.replace("python ", f"'{sys.executable}' ") if word.startswith("python ") else word for word in words]
    sizes = [*SHORTER, "--train.batch-size", "4", "--rollout.max-new-tokens", "8"]
    if "DIR" in words:
        words[words.index("DIR")] = str(write_chat_model(tmp_path / "model"))
        sizes += ["--data.max-len", "1024"]
    assert main([*words[3:], *sizes, "--run.dir", str(tmp_path / "run")]) == 0
    (step,) = read_metrics(tmp_path / "run")[0]
    assert step["mismatch/logp_abs_diff_max"] <= 1e-4 and step["rollout/num_samples"] == 4


def test_the_page_names_every_flag_and_every_way() -> None:
    assert len(COMMANDS) == 6
    for name in ("agent-func-path", "agent-command", "max-turns", "agent-timeout-s", "agents-in-flight", "agent-history"):
        assert f"--rollout.{name}" in PAGE
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
