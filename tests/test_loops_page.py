"""What docs/loops.md shows is what works: each of its commands is run, shortened."""

import re
import shlex
from pathlib import Path

import pytest

from hone.launch.cli import main
from hone.launch.loop_verbs import LOOPS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "loops.md").read_text()
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)]
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
SHORT = ["--rollout.batch-size", "4", "--rollout.n-samples-per-prompt", "4", "--train.batch-size", "4", "--train.max-epochs", "1"]
ONCE = [*SHORT, "--train.iterations", "1", "--train.measure-last", "False"]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.count(" ") == 3])
def test_every_loop_runs_without_arguments(command: str, hone_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    assert words[:3] == ["uv", "run", "launch"] and words[3] in LOOPS
    assert main([*words[3:], *ONCE, "--rollout.batch-size", "12"]) == 0
    assert next(tmp_path.glob("runs/*/model/config.json")).is_file()


def test_own_parts_and_going_on(hone_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = next(command for command in COMMANDS if "DIR" in command)
    on = next(command for command in COMMANDS if "--resume latest" in command)
    for name in ("examples",):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    from hone.launch.builtin import builtin_model

    words = [str(builtin_model()) if word == "DIR" else word for word in shlex.split(own)]
    here = ["--rollout.engine", "transformers", "--rollout.max-new-tokens", "4", "--train.measure-last", "False", *SHORT]
    assert main([*words[3:], *here]) == 0
    (run,) = tmp_path.glob("runs/rejection-sampling-*")
    assert (run / "iteration_2" / "model" / "config.json").is_file()
    assert main([*shlex.split(on)[3:], "--config", str(run / "config.toml")]) == 0  # nothing is left to do


def test_the_page_points_at_what_is_there() -> None:
    assert len(COMMANDS) == 5 and {command.split()[3] for command in COMMANDS} == set(LOOPS)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
