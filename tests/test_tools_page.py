"""What docs/tools.md shows is what works: each of its commands is run, on the built-in model or a small one."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hone.launch.cli import main
from tests.launch.conftest import write_rows
from tests.launch.running import COMMAND
from tests.rollout.chatting import write_chat_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tools.md").read_text()
COMMANDS = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.strip()[14:40])
def test_every_command_of_the_page_runs(command: str, hone_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    if words[0] == "echo":  # its words are piped into the next command
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{words[1]}\n"))
        assert main(words[words.index("|") + 4 :]) == 0
        return
    assert words[:3] == ["uv", "run", "launch"]
    if "DIR" in words:
        words[words.index("DIR")] = str(write_chat_model(tmp_path / "model"))
        write_rows(tmp_path / "gsm8k.jsonl", [{"question": "1 + 1 = ?", "answer": "It is two.\n#### 2"}])
        words += ["--run.backend", "local", "--data.max-len", "512", "--rollout.max-new-tokens", "4"]
    if words[3] != "serve-rm":
        assert main([*words[3:], "--data.max-samples", "8"]) == 0
        return
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words[3:], "--server.port", "0"], stdout=subprocess.PIPE, env=dict(os.environ), text=True
    )
    assert process.stdout is not None and process.stdout.readline().startswith("rewards at http://127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_the_page_points_at_what_is_there() -> None:
    assert len(COMMANDS) == 6
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
