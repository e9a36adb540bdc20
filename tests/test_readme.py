"""What README.md and examples/ show is what works."""

import json
import re
from pathlib import Path

import pytest

from hone.launch.cli import main
from hone.launch.observe.run_directory import read_metrics

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_two_blocks_are_the_two_commands() -> None:
    assert BLOCKS[0].split("\n")[:-1] == ["pip install uv", "uv run launch ppo"]
    assert BLOCKS[1] == "uv run pytest -n 2\n"
    assert "uv run pytest -n 2" in (ROOT / ".ci" / "run").read_text()


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_example_reward_judges_the_example_rows(hone_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hone.launch.builtin import builtin_model

    monkeypatch.chdir(ROOT)
    command = BLOCKS[2].replace("\\\n", " ").replace("DIR", str(builtin_model())).split()
    assert command[:4] == ["uv", "run", "launch", "ppo"]
    shorter = ["--run.backend", "local", "--run.dir", str(tmp_path / "run"), "--train.max-steps", "2", "--rollout.max-new-tokens", "8"]
    assert main([*command[3:], *shorter]) == 0
    steps, _ = read_metrics(tmp_path / "run")
    assert len(steps) == 2 and 0.1 <= steps[0]["rollout/reward_mean"] < 0.7 and steps[0]["rollout/extra/answered"] > 0.9
    rows = [json.loads(line) for line in (ROOT / "examples" / "sums.jsonl").read_text().splitlines()]
    assert len(rows) == 90 and all(sum(map(int, row["question"].rstrip("=").split("+"))) == int(row["answer"]) for row in rows)
