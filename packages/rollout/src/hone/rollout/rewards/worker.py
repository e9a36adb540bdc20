"""The process that runs a reward function: receives lists of RewardItems, answers each with a tagged tuple.

Answers: ("ready", where) once the function is loaded; then for each item ("judged", Judgement) or ("failed", message).
"""

import ctypes
import faulthandler
import os
import signal
import sys
from multiprocessing.connection import Connection

from hone.rollout.errors import RewardError
from hone.rollout.rewards.function import RewardFunction, described, load
from hone.rollout.rewards.result import RewardItem, checked

_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """Serve one pool over the connection with this file descriptor, until the pool closes it."""
    # The user's function may start processes; they must not hold the pool's connection open.
    os.set_inheritable(descriptor, False)
    _end_with_parent()
    faulthandler.enable()
    channel = Connection(descriptor)
    source = channel.recv()
    try:
        function = load(source)
    except RewardError as error:
        channel.send(("failed", str(error)))
        return
    channel.send(("ready", function.where))
    while True:
        try:
            items = channel.recv()
        except EOFError:
            return
        for item in items:
            channel.send(_answer(function, item))


def _answer(function: RewardFunction, item: RewardItem) -> tuple[str, object]:
    try:
        result = function(item)
        return "judged", checked(result, function=function.where, prompt_id=item.prompt_id)
    except RewardError as error:
        return "failed", str(error)
    # The user's code may raise anything, SystemExit included; it is passed on by name.
    except BaseException as error:
        return "failed", (
            f"reward function {function.where} raised {described(error, function.path)} for prompt {item.prompt_id!r}. "
            "Mend the function: a reward that fails stops the run, it is never counted as zero."
        )


def _end_with_parent() -> None:
    """Ctrl-C is the launcher's business; the parent's death is ours, even in the middle of a function that never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
