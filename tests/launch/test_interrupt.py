"""One signal asks, two insist; before there is anything to finish, one is enough."""

import os
import signal
import threading

import pytest

from hone.launch import interrupt
from hone.launch.errors import exit_code
from hone.launch.interrupt import Interrupt, Preempted


@pytest.mark.parametrize(("number", "error", "code"), [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, Preempted, 75)])
def test_the_first_signal_asks_and_the_second_ends(
    number: int, error: type[BaseException], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "SAME_PRESS_S", 0.0)
    said: list[str] = []
    before = signal.getsignal(number)
    with Interrupt(said.append) as asking:
        asking.patient = True
        os.kill(os.getpid(), number)
        for thread in threading.enumerate():
            if thread.name == "hone-notice":
                thread.join()
        assert asking.asked and len(said) == 1 and "again to stop now" in said[0]
        assert asking.preempted == (number == signal.SIGTERM)
        with pytest.raises(error) as raised:
            os.kill(os.getpid(), number)
    assert type(raised.value) is error and exit_code(raised.value) == code
    assert signal.getsignal(number) is before


def test_before_the_loop_one_is_enough() -> None:
    with Interrupt(lambda text: pytest.fail("nothing to finish")), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_passed_on_once_more_is_the_same_press() -> None:
    said: list[str] = []
    with Interrupt(said.append) as asking:
        asking.patient = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert asking.asked
