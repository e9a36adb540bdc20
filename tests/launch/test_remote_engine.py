"""An engine actor of real Ray, without what makes an engine heavy: who stops waiting for samples has them aborted there."""

import subprocess
import sys

# In a process of its own, as a run is: Ray looks at its environment once, and takes its signals.
PROGRAM = """
import asyncio, tempfile, time
from pathlib import Path
from hone.launch.processes import prepare_environment
prepare_environment()
import ray
from hone.launch.cluster import start
from hone.launch.remote import RemoteEngine

class Slow:
    def __init__(self):
        self.heard = []
    async def generate(self, requests):
        self.heard.append("begun")
        try:
            await asyncio.sleep(1000)
        finally:
            self.heard.append("aborted")
    async def told(self):
        return self.heard

async def give_up(slow):
    waiting = asyncio.ensure_future(RemoteEngine("slow", slow).generate([]))
    while await slow.told.remote() != ["begun"]:
        await asyncio.sleep(0.05)
    waiting.cancel()
    try:
        await waiting
    except asyncio.CancelledError:
        return
    raise AssertionError("it went on")

with tempfile.TemporaryDirectory(prefix="hone-ray-", ignore_cleanup_errors=True) as scratch:
    start(Path(scratch))
    slow = ray.remote(Slow).options(max_concurrency=8, num_cpus=0).remote()
    asyncio.run(give_up(slow))
    while ray.get(slow.told.remote()) != ["begun", "aborted"]:
        time.sleep(0.05)
    ray.shutdown()
print("aborted")
"""


def test_samples_nobody_waits_for_are_aborted() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240)
    assert ended.stdout.splitlines()[-1:] == ["aborted"], ended.stderr
