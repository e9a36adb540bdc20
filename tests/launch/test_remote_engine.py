"""An engine actor of real Ray, without what makes an engine heavy: who stops waiting for samples has them aborted there."""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from hone.launch.cluster import start
from hone.launch.remote import RemoteEngine


class Slow:
    """Samples for ever, and knows what became of it."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    async def generate(self, requests: object) -> None:
        self.heard.append("begun")
        try:
            await asyncio.sleep(1000)
        finally:
            self.heard.append("aborted")

    async def told(self) -> list[str]:
        return self.heard


@pytest.fixture
def slow() -> Iterator[ray.actor.ActorHandle]:
    with tempfile.TemporaryDirectory(prefix="hone-ray-", ignore_cleanup_errors=True) as scratch:  # a short path: sockets lie in it
        start(Path(scratch))
        yield ray.remote(Slow).options(max_concurrency=8, num_cpus=0).remote()
        ray.shutdown()


def test_samples_nobody_waits_for_are_aborted(slow: ray.actor.ActorHandle) -> None:
    def heard() -> list[str]:
        return ray.get(slow.told.remote())

    def wait_for(expected: list[str]) -> None:
        deadline = time.monotonic() + 60
        while heard() != expected:
            assert time.monotonic() < deadline, heard()
            time.sleep(0.05)

    async def give_up() -> None:
        waiting = asyncio.ensure_future(engine.generate([]))
        await asyncio.to_thread(wait_for, ["begun"])
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    engine = RemoteEngine("slow", slow)
    asyncio.run(give_up())
    wait_for(["begun", "aborted"])
