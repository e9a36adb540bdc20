"""A stage in a process of its own, so that all it held is gone when it ends: memory, devices, and whatever its libraries changed."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from hone.launch.errors import exit_code, present


def isolated(function: Callable[..., None], *arguments: Any, debug: bool) -> int:
    """Call `function(*arguments)` in a fresh interpreter; its exit code. What stopped it is told there, on stderr.

    Ctrl-C and SIGTERM are handed on, and this process waits for the end that they bring about.
    """
    process = multiprocessing.get_context("spawn").Process(target=_carried_out, args=(function, arguments, debug), name="hone-stage")

    def hand_on(number: int, frame: FrameType | None) -> None:
        if process.pid is not None and process.exitcode is None:
            os.kill(process.pid, number)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process.start()
        process.join()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    code = process.exitcode
    assert code is not None, "a process that was waited for has an exit code"
    return code if code >= 0 else 128 - code


def _carried_out(function: Callable[..., None], arguments: tuple[Any, ...], debug: bool) -> None:
    try:
        function(*arguments)
    except (Exception, KeyboardInterrupt) as error:  # the edge of this process, as `cli.main` is of the command
        present(error, debug=debug)
        sys.exit(exit_code(error))
