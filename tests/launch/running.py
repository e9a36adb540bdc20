"""Runs of the command in a process of its own, as a shell would start it, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
COMMAND = "from hone.launch.cli import main; raise SystemExit(main())"


class Run:
    """A started run: its process, its directory, and every process it was seen to have."""

    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self.process, self.directory = process, directory
        self.seen: set[psutil.Process] = set()

    def metrics(self) -> list[dict[str, Any]]:
        file = self.directory / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for(self, condition: Callable[[], bool], *, limit_s: float = 240) -> None:
        """Poll until the condition holds; an assertion with the run's output if the run ends or the limit passes first."""
        deadline = time.monotonic() + limit_s
        while not condition():
            self.look()
            assert self.process.poll() is None, f"the run ended with {self.process.returncode}: {self.finish()}"
            assert time.monotonic() < deadline, f"not reached within {limit_s} s"
            time.sleep(0.1)
        self.look()

    def look(self) -> None:
        """Remember every process the run has now."""
        try:
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def core(self) -> psutil.Process | None:
        """The vLLM engine core, which is a process of its own; the kernel keeps 15 letters of its name."""
        for process in self.seen:
            try:
                if "EngineCor" in f"{process.name()} {process.cmdline()}":
                    return process
            except psutil.NoSuchProcess:
                continue  # one of the short-lived ones
        return None

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self, *, limit_s: float = 120) -> str:
        """What the run printed, once it has ended."""
        output, _ = self.process.communicate(timeout=limit_s)
        return output

    def kill(self) -> None:
        """The process and all it started, as a machine that goes down would; Ray's own would linger."""
        self.look()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for left in self.seen:
            try:
                left.kill()
            except psutil.NoSuchProcess:
                continue

    def survivors(self) -> list[str]:
        """Processes of the run that are still there."""
        return [" ".join(process.cmdline()) for process in self.seen if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def plainly(directory: Path) -> list[str]:
    """The command in this interpreter."""
    return [sys.executable, "-c", COMMAND]


def by_uv(directory: Path) -> list[str]:
    """As the README says it, but for --no-sync: the environment the tests run in must stay as it is under them."""
    return ["uv", "run", "--no-sync", "--project", str(ROOT), "launch"]


@contextmanager
def started(arguments: Sequence[str], directory: Path, *, command: Callable[[Path], list[str]] = plainly) -> Iterator[Run]:
    """`launch <arguments> --run.dir <directory>`, the directory named as seen from its parent, where the command is started.

    In a session of its own; killed with all it started if the test leaves it running.
    """
    process = subprocess.Popen(
        [*command(directory), *arguments, "--run.dir", directory.name],
        cwd=directory.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    run = Run(process, directory)
    try:
        yield run
    finally:
        run.look()
        if process.poll() is None:
            process.kill()
            for left in run.seen:
                with suppress(psutil.NoSuchProcess):
                    left.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
