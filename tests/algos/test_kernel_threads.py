"""The threads a kernel's shares run in: every share once, failures come out, callers and forks do not meet."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hone.algos.kernels import threads
from hone.algos.kernels.threads import in_threads, shares_of_work


@pytest.fixture(params=["openmp", "python"])
def pool(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(threads, "_parallel", None)
    elif threads._parallel is None:
        pytest.skip("torch was built without OpenMP here")


@pytest.mark.parametrize("shares", [1, 2, 7])
def test_every_share_runs_once(pool, shares):
    done = []
    in_threads(done.append, shares)
    assert sorted(done) == list(range(shares))


def test_what_a_share_raises_comes_out(pool):
    def share(i):
        if i == 1:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        in_threads(share, 3)


def test_callers_in_two_threads_do_not_meet(pool):
    def caller(_):
        done = []
        in_threads(done.append, 2)
        return sorted(done)

    with ThreadPoolExecutor(4) as callers:
        assert list(callers.map(caller, range(200))) == [[0, 1]] * 200


def test_a_forked_child_works_alone():
    """OpenMP's threads stay with the parent; asked for, they would never come."""
    in_threads(lambda _: None, 2)
    pid = os.fork()
    if pid == 0:
        alone = []
        in_threads(alone.append, shares_of_work())
        os._exit(0 if alone == [0] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert shares_of_work() == torch.get_num_threads()
