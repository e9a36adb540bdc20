"""From the learner's policy to the engines, and the proof: one callable that both backends share.

The canary is a fixed sequence of token ids. After every update its log-probabilities are asked of every engine and of the
learner; `hone.rollout.weight_sync` compares versions, fingerprints and canaries, and stops the run when they disagree.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from hone.algos.batch import Attachment, Batch
from hone.rollout.errors import EngineLost
from hone.rollout.types import PauseMode, Prompt
from hone.rollout.weight_sync.protocol import Sent, ServedEngine, Synced, sync
from hone.rollout.weight_sync.verify import Canary, canary_tokens

Result = TypeVar("Result")
CANARY_TOKENS = 24


@runtime_checkable
class Served(Protocol):
    """The engines that are to be brought up to date: `rollout.fleet.Fleet`, or `Standing`."""

    async def settled(self) -> Sequence[ServedEngine]:
        """Those that serve, when no replacement is under way any more."""
        ...

    def lost(self, error: EngineLost) -> None:
        """One of them was found dead."""
        ...


@runtime_checkable
class Answering(Protocol):
    """Whose weights are published: a role group, of which one question is asked."""

    def logp(self, role: str, batch: Batch) -> Tensor:
        """Log-probabilities [nats] of every action token, [T]."""
        ...


class Standing:
    """Engines that nobody replaces."""

    def __init__(self, engines: Sequence[ServedEngine]) -> None:
        self._engines = engines

    async def settled(self) -> Sequence[ServedEngine]:
        """All of them."""
        return self._engines

    def lost(self, error: EngineLost) -> None:
        """Ends the run."""
        raise error


Tag = Literal["weights", "kv_cache"]
"""What of an engine is woken."""


@runtime_checkable
class Runner(Protocol):
    """An event loop that runs a coroutine for a caller outside it: `asyncio.Runner`, or `ahead.LoopThread`."""

    def run(self, coro: Coroutine[Any, Any, Result], /) -> Result:
        """What the coroutine returns."""
        ...

    def close(self) -> None:
        """End the loop."""
        ...


async def _awake(engines: Sequence[Any], tag: Tag) -> None:
    """For engines that never sleep."""


class Publisher:
    """`publisher(version)` brings the policy to every engine and returns the sync's figures; raises StaleWeights.

    `send` runs the sending end on every rank of the policy's group and returns the fingerprints it sent; `connect` points that
    end at the engines it is given, whenever they are others than before. An engine that dies in between is the fleet's to
    replace, and the update is begun anew with all of them. Where prompts have images, the canary is one of them (`shown`): a
    vision tower is seen through its images only. `pause` says what becomes of responses in flight: they are held (keep) or waited
    for. Engines that sleep while the learner learns are woken by `wake(engines, tag)`: their weights before they are sent, their
    cache after.
    """

    def __init__(
        self,
        *,
        served: Callable[[], Served],
        policy: Answering,
        send: Callable[[], dict[str, str]],
        connect: Callable[[Sequence[Any]], None],
        runner: Runner,
        vocabulary: int,
        tolerance: float,
        seed: int,
        timeout_s: float,
        drain_s: float = 1800.0,
        shown: Prompt | None = None,
        pause: PauseMode = "keep",
        wake: Callable[[Sequence[Any], Tag], Awaitable[None]] = _awake,
    ) -> None:
        self._pause: PauseMode = pause
        self._wake = wake
        self._served, self._policy, self._send, self._connect, self._runner = served, policy, send, connect, runner
        self._tokens = canary_tokens(vocabulary, seed, CANARY_TOKENS) if shown is None else list(shown.tokens)
        self._images = () if shown is None else shown.images
        self._tolerance, self._timeout_s, self._drain_s = tolerance, timeout_s, drain_s
        self._previous: dict[str, Canary] = {}
        self._connected: Sequence[ServedEngine] = ()
        self._version = 0
        self._alone = asyncio.Lock()
        self._held = False

    def __call__(self, version: int) -> dict[str, float]:
        """Publish, verify, measure."""
        start = time.monotonic()
        self._version = version
        self.free()
        synced = self._runner.run(self._publish())
        self._previous = synced.canaries
        return {"perf/sync_ms": 1000 * (time.monotonic() - start), "sync/canary_abs_diff_max": synced.gap}

    async def bring_up(self, engine: ServedEngine) -> None:
        """Bring the weights that the others serve to an engine that was just started. Raises EngineError."""
        await self._brought([engine])

    def hold(self) -> None:
        """From here on the learner is at work: its weights are no version, and its ranks are spoken for. Whoever is brought up waits."""
        self._runner.run(self._alone.acquire())
        self._held = True

    def free(self) -> None:
        """The learner is at rest, and its weights are those of the last version."""
        if self._held:
            self._held = False
            self._runner.run(self._released())

    async def _released(self) -> None:
        self._alone.release()

    async def _publish(self) -> Synced:
        served = self._served()
        while True:
            try:
                return await self._brought(await served.settled())
            except EngineLost as error:
                served.lost(error)

    async def _brought(self, engines: Sequence[ServedEngine]) -> Synced:
        async with self._alone:
            if [id(engine) for engine in engines] != [id(engine) for engine in self._connected]:
                self._connected = ()
                await asyncio.to_thread(self._connect, engines)
                self._connected = engines
            # The weights are final already: the learner answers for them while the engines are still pausing.
            row = _one_row(self._tokens, self._images)
            answering = asyncio.create_task(asyncio.to_thread(self._policy.logp, "policy", row))

            async def send() -> Sent:
                # One after the other: both are collectives, and every rank must meet them in the same order.
                logp = await answering
                await self._wake(engines, "weights")
                fingerprints = await asyncio.to_thread(self._send)
                await self._wake(engines, "kv_cache")
                return Sent(fingerprints=fingerprints, canary_logp=logp[1:].tolist())

            settings: dict[str, Any] = {
                **{"canary": self._tokens, "images": self._images, "tolerance": self._tolerance, "previous": self._previous},
                **{"pause": self._pause, "timeout_s": self._timeout_s, "drain_s": self._drain_s},
            }
            try:
                return await sync(engines, version=self._version, send=send, **settings)
            finally:
                await asyncio.gather(answering, return_exceptions=True)  # a thread cannot be cancelled, and the ranks answer in order


def _one_row(tokens: Sequence[int], images: tuple[Attachment, ...]) -> Batch:
    """The canary as a batch in which every token but the first counts as chosen."""
    length = len(tokens)
    action_mask = torch.ones(length, dtype=torch.bool)
    action_mask[0] = False
    return Batch(
        tokens=torch.tensor(tokens),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        position_ids=torch.arange(length),
        action_mask=action_mask,
        rollout_logp=torch.zeros(length),
        rewards=torch.zeros(length),
        version=torch.zeros(length, dtype=torch.long),
        group=torch.zeros(1, dtype=torch.long),
        truncated=torch.zeros(1, dtype=torch.bool),
        attached=(images,) if images else (),
    )
