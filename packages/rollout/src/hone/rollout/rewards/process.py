"""One worker process as its owner sees it: started, asked with a deadline, killed with everything it has started."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from hone.rollout.errors import RewardError
from hone.rollout.rewards.result import Judgement, RewardItem

# Running the user's file may import heavy libraries; only a file that never finishes should meet this limit.
_START_DEADLINE_S = 120.0
_EXIT_DEADLINE_S = 5.0
_POLL_S = 0.25


class WorkerGone(RewardError):
    """The worker hung or died; it must be replaced."""


class WorkerProcess:
    """A process that has been told to load `source`; what it prints goes to `log`, or where ours goes.

    Not a multiprocessing.Process: that one imports the main module again, whatever it is (a Ray worker, a test runner).
    """

    def __init__(self, source: str, *, log: Path | None) -> None:
        self.source = source
        self.where = source
        self._killed = False
        self._channel, theirs = Pipe()
        program = f"import sys; sys.path[:] = {sys.path!r}; from hone.rollout.rewards.worker import main; main({theirs.fileno()})"
        # A session of its own: a terminal's Ctrl-C does not reach it, and killing its group takes its children along.
        # Unbuffered (-u), so that what a function printed before it was killed is not lost.
        with ExitStack() as ours:
            ours.callback(theirs.close)
            output = None if log is None else ours.enter_context(log.open("ab"))
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        with suppress(BrokenPipeError):  # its end is reported by await_ready
            self._channel.send(source)

    @property
    def pid(self) -> int:
        """Process id, which is also that of its process group."""
        return self._process.pid

    def await_ready(self) -> None:
        """Wait until the function is loaded; RewardError if it cannot be, or if loading does not end."""
        try:
            kind, content = self._receive(_START_DEADLINE_S)
        except TimeoutError:
            raise RewardError(
                f"reward file {self.source} was still loading after {_START_DEADLINE_S:g} s; move slow work out of the import, "
                "into the function"
            ) from None
        except EOFError:
            raise RewardError(f"reward file {self.source} ended its process while loading ({self._ending()}); mend the file") from None
        if kind == "failed":
            raise RewardError(content)
        self.where = content

    def send(self, items: Sequence[RewardItem]) -> None:
        """Hand over responses to judge; `answer` then gives one answer for each, in order."""
        with suppress(BrokenPipeError, ConnectionResetError):  # a worker that is gone is reported by answer
            self._channel.send(items)

    def answer(self, item: RewardItem, timeout_s: float) -> Judgement:
        """The judgement of the next response, `item`; RewardError if the function fails, WorkerGone if the worker does."""
        try:
            kind, content = self._receive(timeout_s)
        except TimeoutError:
            raise WorkerGone(
                f"reward function {self.where} did not answer within {timeout_s:g} s for prompt {item.prompt_id!r} "
                f"(query {_clipped(item.query)}); mend the function or raise reward.timeout-s"
            ) from None
        except EOFError:
            raise WorkerGone(
                f"reward function {self.where} ended its process ({self._ending()}) on prompt {item.prompt_id!r} "
                f"(query {_clipped(item.query)}); mend the function: it must return, not exit or crash"
            ) from None
        if kind == "failed":
            raise RewardError(content)
        return content

    def kill(self) -> None:
        """End the process with its group, and reap it. Only once: afterwards the number may belong to somebody else."""
        if not self._killed:
            self._killed = True
            with suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says so with the second
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Kill, then give back the pipe; only the thread that reads it may do so."""
        self.kill()
        self._channel.close()

    def _receive(self, timeout_s: float) -> tuple[str, Any]:
        deadline = time.monotonic() + timeout_s
        # In slices: a child that the function has forked may hold the pipe open after the worker is gone.
        while (remaining := deadline - time.monotonic()) > 0:
            if self._channel.poll(min(remaining, _POLL_S)):
                try:
                    return self._channel.recv()
                except ConnectionResetError as error:
                    raise EOFError from error
            if self._process.poll() is not None and not self._channel.poll():
                raise EOFError
        raise TimeoutError

    def _ending(self) -> str:
        """How the process ended, in words."""
        try:
            status = self._process.wait(_EXIT_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _clipped(text: str, length: int = 80) -> str:
    return repr(text if len(text) <= length else f"{text[:length]}...")
