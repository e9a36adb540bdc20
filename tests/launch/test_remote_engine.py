"""An engine actor of real Ray, without what makes an engine heavy.

Who stops waiting for samples has them aborted there; whoever answers no call of a weight update in time is named, and who waits.
"""

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
from hone.launch.remote import EngineClient, RankLost, RemoteEngine, get
from hone.rollout.errors import EngineLost

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
    async def start_weight_update(self):
        await asyncio.sleep(1000)

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
    print("aborted")
    try:
        EngineClient("engine-3", slow, timeout_s=0.5).start_weight_update()
    except EngineLost as error:
        print(error)
    try:
        get([slow.told.remote(), slow.start_weight_update.remote()], who="group 'g'", timeout_s=0.5, doing="sending the weights")
    except RankLost as error:
        print(error)
    ray.shutdown()
"""


def test_samples_nobody_waits_for_are_aborted_and_whoever_is_waited_for_too_long_is_named() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240)
    aborted, engine, rank = ended.stdout.splitlines()[-3:] or ["", "", ended.stderr]
    assert aborted == "aborted", ended.stderr
    assert "engine engine-3 did not answer within 0.5 s" in engine and "the learner's rank 0 waits for its start_weight_update" in engine
    assert rank.startswith("group 'g' is not done sending the weights after 0.5 s: the controller waits for rank 1;")
