"""One signal asks, two insist; before there is anything to finish, one is enough."""

import os
import signal
import threading

import pytest

from hone.launch.errors import exit_code
from hone.launch.interrupt import Interrupt, Preempted


@pytest.mark.parametrize(("number", "error", "code"), [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, Preempted, 75)])
def test_the_first_signal_asks_and_the_second_ends(number: int, error: type[BaseException], code: int) -> None:
    said: list[str] = []
    before = signal.getsignal(number)
    with Interrupt(said.append) as interrupt:
        interrupt.patient = True
        os.kill(os.getpid(), number)
        for thread in threading.enumerate():
            if thread.name == "hone-notice":
                thread.join()
        assert interrupt.asked and len(said) == 1 and "again to stop now" in said[0]
        assert interrupt.preempted == (number == signal.SIGTERM)
        with pytest.raises(error) as raised:
            os.kill(os.getpid(), number)
    assert type(raised.value) is error and exit_code(raised.value) == code
    assert signal.getsignal(number) is before


def test_before_the_loop_one_is_enough() -> None:
    with Interrupt(lambda text: pytest.fail("nothing to finish")), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
