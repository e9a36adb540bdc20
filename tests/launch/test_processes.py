"""What a run started is gone when it ends, orphans included; what was there before stays."""

import subprocess
import sys

import psutil
import pytest

from hone.launch.processes import Descendants, adopt_orphans

# A child that starts a grandchild in a session of its own, tells its id, and dies: the grandchild is an orphan that ignores SIGTERM.
ORPHANER = """import subprocess, sys
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)"""
SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans")
def test_orphans_end_with_the_run_and_older_processes_stay() -> None:
    adopt_orphans()
    older = subprocess.Popen(SLEEPER)
    try:
        with Descendants():
            told = subprocess.run([sys.executable, "-c", ORPHANER], stdout=subprocess.PIPE, text=True, check=True).stdout
            orphan = psutil.Process(int(told))
            newer = subprocess.Popen(SLEEPER)
            assert orphan.is_running()
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
        assert newer.poll() is not None
        assert older.poll() is None
    finally:
        older.kill()
        older.wait()
