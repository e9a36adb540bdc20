"""The threads a kernel's shares run in: every share once, whatever OpenMP does; signals lose nothing; forks and callers do not meet."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="the native path on a CPU needs numba: install hone-algos[fast]")

from numba import carray

from hone.algos.advantages import gae
from hone.algos.kernels import threads
from hone.algos.kernels.threads import entry, in_threads, number_of_thread, number_of_threads, pointer, shares_of_work


@entry
def count(data):
    """Adds one to the place of every share, after some work."""
    job = carray(data, (2,), np.int64)
    shares = job[0]
    done = carray(pointer(job[1]), (shares,), np.int64)
    share = np.int64(number_of_thread())
    while share < shares:
        done[share] += 1
        share += np.int64(number_of_threads())


@pytest.fixture(params=["openmp", "one thread"])
def pool(request, monkeypatch):
    if request.param == "one thread":  # as where OpenMP comes with fewer than asked for
        monkeypatch.setattr(threads, "_parallel", None)
    elif threads._parallel is None:
        pytest.skip("torch was built without OpenMP here")


def counted(shares):
    done = np.zeros(shares, dtype=np.int64)
    in_threads(count, (shares,), (done,), shares=shares)
    return done.tolist()


@pytest.mark.parametrize("shares", [1, 2, 7])
def test_every_share_runs_once(pool, shares):
    assert counted(shares) == [1] * shares


def test_callers_in_two_threads_do_not_meet(pool):
    with ThreadPoolExecutor(4) as callers:
        assert list(callers.map(counted, [3] * 200)) == [[1] * 3] * 200


def large(rows=64, length=2048):
    bounds = torch.arange(rows + 1) * length
    return torch.ones(rows * length), torch.zeros(rows * length), torch.ones(rows * length, dtype=torch.bool), bounds


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer signals on this platform")
def test_a_signal_waits_and_loses_neither_work_nor_itself():
    """Were Python run inside, ctypes would print what a handler raises there, and go on with memory that nobody wrote."""
    rung = 0

    def ring(*_):
        nonlocal rung
        rung += 1
        raise TimeoutError

    batch = large()
    expected = gae(*batch, gamma=1.0, lambd=1.0)[0]
    caught = 0
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for turn in range(300):
            found = None
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + turn % 150))
                found = gae(*batch, gamma=1.0, lambd=1.0)[0]
                time.sleep(0.01)
            except Exception:  # checkers of types raise their own from it
                caught += 1
            assert found is None or found.equal(expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.set_grad_enabled(True)  # a handler that raises may have struck while no_grad was being left
    assert rung == caught > 250


@pytest.mark.parametrize("count_of_threads", [1, 2, 7])
@pytest.mark.parametrize("row", [0, 31, 63])
@pytest.mark.parametrize("gap", [False, True])
def test_what_is_not_finite_is_seen_in_any_share(count_of_threads, row, gap):
    rewards, values, mask, bounds = large()
    rewards[row * 2048 + 100] = float("nan")
    if gap:
        mask[row * 2048 + 50] = False
    before = torch.get_num_threads()
    torch.set_num_threads(count_of_threads)
    try:
        with pytest.raises(ValueError, match=f"gae: 1 of {int(mask.sum())} rewards are not finite, at index {row * 2048 + 100}"):
            gae(rewards, values, mask, bounds, gamma=1.0, lambd=1.0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 and on, of any fork beside threads
def test_a_forked_child_works_alone():
    """OpenMP's threads stay with the parent; asked for, they would never come."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert shares_of_work() == 2
        counted(2)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if shares_of_work() == 1 and counted(shares_of_work()) == [1] else 1)
        for _ in range(600):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            time.sleep(0.05)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the child hangs")
        assert status == 0
        assert shares_of_work() == 2
    finally:
        torch.set_num_threads(before)
