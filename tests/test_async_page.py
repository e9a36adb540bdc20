"""What docs/async.md shows is understood and breaks no rule; `tests/launch/test_async_run.py` carries such runs out."""

import re
import shlex
from pathlib import Path

import pytest

from tests.launch.asking import crossed, settled

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "async.md").read_text()
COMMANDS = [block.strip().replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[4].strip("-"))
def test_every_command_of_the_page_is_understood(command: str) -> None:
    words = shlex.split(command)
    assert words[:3] == ["uv", "run", "launch"]
    assert settled(" ".join(words[3:])).config.ahead and crossed(" ".join(words[3:])) == []


def test_the_page_names_every_flag_and_what_it_points_at_is_there() -> None:
    assert len(COMMANDS) == 3
    names = ("train.async-enable", "train.async-queue-size", "train.partial-rollout-enable", "rollout.over-sampling")
    for name in (*names, "rollout.straggler-policy", "rollout.max-staleness", "vllm.enable-sleep", "vllm.sleep-level"):
        assert f"--{name}" in PAGE
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
