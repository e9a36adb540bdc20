import os
import subprocess
import sys
import threading

import psutil
import pytest

from hone.launch.observe import peak_memory
from hone.launch.observe.peak_memory import PeakMemory, sample

# Three generations below the test; the last holds 200 MB of its own, and all wait for their input to close.
HOLDER = "import sys; held = bytearray(b'x' * 200_000_000); print('held', flush=True); sys.stdin.read()"
MIDDLE = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDER!r}])"
CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {MIDDLE!r}])"


@pytest.fixture
def family():
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    yield child
    child.stdin.close()
    child.stdout.close()
    child.wait()


def test_children_of_children_count(family):
    seen = sample(family.pid)
    assert seen.processes == 3 and seen.gone == 0
    # The 200 MB, and three Python interpreters of at most some tens of MB.
    assert 0.2 < seen.gb < 0.3


def test_a_process_that_vanishes_is_counted_as_gone(monkeypatch):
    read = peak_memory._bytes

    def vanishing(process):
        if process.pid != os.getpid():
            raise psutil.NoSuchProcess(process.pid)
        return read(process)

    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(peak_memory, "_bytes", vanishing)
    children = len(psutil.Process().children(recursive=True))  # this one, and what earlier tests have left running
    seen = sample(os.getpid())
    child.communicate()
    assert (seen.processes, seen.gone) == (1, children)


def test_where_pss_is_kept_from_us_the_resident_size_is_taken(monkeypatch):
    def denied(self):
        raise psutil.AccessDenied(self.pid)

    monkeypatch.setattr(psutil.Process, "memory_full_info", denied)
    process = psutil.Process()
    assert peak_memory._bytes(process) == pytest.approx(process.memory_info().rss, rel=0.1)


def test_another_fault_is_not_swallowed(monkeypatch):
    def broken(process):
        raise RuntimeError("planted")

    monkeypatch.setattr(peak_memory, "_bytes", broken)
    with pytest.raises(RuntimeError, match="planted"):
        sample(os.getpid())


def test_the_peak_stays_when_the_memory_is_given_back(monkeypatch):
    sizes = iter([5e9, 7e9, 6e9])
    monkeypatch.setattr(peak_memory, "sample", lambda root: peak_memory.Sample(gb=next(sizes) / 1e9, processes=1, gone=0))
    memory = PeakMemory(os.getpid())
    for _ in range(3):
        memory.look()
    assert (memory.now_gb, memory.peak_gb) == (6.0, 7.0)


def test_the_thread_ends_with_the_block():
    with PeakMemory(os.getpid(), interval_s=0.01) as memory:
        assert memory.peak_gb > 0
    assert "hone-peak-memory" not in {thread.name for thread in threading.enumerate()}
