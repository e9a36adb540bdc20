"""Who takes part in a weight sync, and its order: pause, send, version, cache, resume, canary, verify.

Flow: the learner's ranks run a Trainer (rank 0 drives the engines through a synchronous Client); the controller runs
`sync` against the same engines. Neither knows Ray: launch adapts actor handles to `Client` and `ServedEngine`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from hone.algos.batch import Attachment
from hone.rollout.errors import EngineLost, StaleWeights
from hone.rollout.types import PauseMode
from hone.rollout.weight_sync.verify import Canary, verify

Answer = TypeVar("Answer")


@runtime_checkable
class Client(Protocol):
    """The synchronous control plane of one or more engines, as a trainer drives it (vLLM's `VLLMWeightSyncClient`)."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the engine's end of the transport."""
        ...

    def start_weight_update(self) -> None:
        """Begin an update."""
        ...

    def update_weights(self, update_info: Any) -> None:
        """Receive and load what `update_info` describes."""
        ...

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the update."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """The learner's end of the transport; constructed and called on every learner rank, in step."""

    def send_weights(self) -> dict[str, str]:
        """Send every tensor to every engine and wait until it is loaded; the fingerprints sent, by name."""
        ...

    def close(self) -> None:
        """Release the transport."""
        ...


@runtime_checkable
class ServedEngine(Protocol):
    """An engine as the controller sees it during a sync."""

    name: str

    async def pause(self, mode: PauseMode) -> None:
        """Admit no new requests, and freeze those in flight (keep) or wait until they have ended (wait)."""
        ...

    async def resume(self) -> None:
        """Go on."""
        ...

    async def set_version(self, version: int) -> None:
        """Label the weights served from now on, and forget every cached prefix."""
        ...

    async def version(self) -> int:
        """The label of the weights served now."""
        ...

    async def fingerprints(self) -> dict[str, str]:
        """What the last update received, by name."""
        ...

    async def suspects(self) -> list[str]:
        """Parameters whose bytes the engine cannot vouch for after an update."""
        ...

    async def prompt_logp(self, tokens: Sequence[int], images: Sequence[Attachment] = ()) -> list[float]:
        """Log-probabilities [nats] of `tokens[1:]` under the weights served now."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What the learner sent: fingerprints by name, and its own log-probabilities of the canary under those weights."""

    fingerprints: Mapping[str, str]
    canary_logp: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Synced:
    """A verified sync: the canaries by engine (hand them to the next sync), the largest gap [nats], seconds by part."""

    version: int
    canaries: dict[str, Canary]
    gap: float
    seconds: dict[str, float]


class FanOut:
    """Several engines as one Client: every call goes to all of them at once and ends when the last has answered.

    At once, because nccl's rendezvous waits for all of its ranks; engine i takes the ranks after those of engine i - 1. An engine
    that is lost on the way is left out, so that the others end their update whole; `finish_weight_update` then raises EngineLost.
    """

    def __init__(self, clients: Sequence[Client], *, ranks_per_engine: int) -> None:
        self._clients = clients
        self._ranks_per_engine = ranks_per_engine
        self._lost: dict[int, EngineLost] = {}

    def _each(self, call: Callable[[int, Client], None]) -> None:
        left = {index: client for index, client in enumerate(self._clients) if index not in self._lost}
        with ThreadPoolExecutor(max_workers=len(self._clients)) as pool:
            answers = {index: pool.submit(call, index, client) for index, client in left.items()}
            for index, answer in answers.items():
                try:
                    answer.result()
                except EngineLost as error:
                    self._lost[index] = error
        if len(self._lost) == len(self._clients):
            raise next(iter(self._lost.values()))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open every engine's end; nccl's `rank_offset` is shifted by the ranks of the engines before."""

        def opened(index: int, client: Client) -> None:
            shift = {"rank_offset": init_info["rank_offset"] + index * self._ranks_per_engine} if "rank_offset" in init_info else {}
            client.init_weight_transfer_engine({**init_info, **shift})

        self._each(opened)

    def start_weight_update(self) -> None:
        """Begin an update on every engine."""
        self._each(lambda _, client: client.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        """Load the same tensors into every engine."""
        self._each(lambda _, client: client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the update on every engine."""
        self._each(lambda _, client: client.finish_weight_update(weight_version))
        if self._lost:
            raise next(iter(self._lost.values()))


async def sync(
    engines: Sequence[ServedEngine],
    *,
    version: int,
    send: Callable[[], Awaitable[Sent]],
    canary: Sequence[int],
    tolerance: float,
    previous: Mapping[str, Canary],
    images: Sequence[Attachment] = (),
    pause: PauseMode = "keep",
    timeout_s: float = 600.0,
    drain_s: float = 1800.0,
) -> Synced:
    """Bring every engine to `version` and prove it; raises StaleWeights or EngineError.

    `send` runs the trainer on every learner rank. `canary` are token ids, `images` what stands in them, `tolerance` [nats]. When
    sending fails the engines stay paused: one of them may hold a mixture of two versions, and nothing may be sampled from that.
    An engine that does not answer one of the phases within `timeout_s` is lost (EngineLost); `send` keeps deadlines of its own. Where
    pausing waits for the requests in flight (`pause="wait"`), it has their own deadline besides: `drain_s`.
    """
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(part: str) -> None:
        seconds[part] = time.perf_counter() - began - sum(seconds.values())

    async def each(phase: str, call: Callable[[ServedEngine], Awaitable[Answer]], more_s: float = 0.0) -> list[Answer]:
        calls = (_within(timeout_s, more_s, engine.name, f"{phase} version {version}", call(engine)) for engine in engines)
        return await asyncio.gather(*calls)

    draining = drain_s if pause == "wait" else 0.0
    await each("pausing for", lambda engine: engine.pause(pause), draining)
    lap("pause")
    sent = await send()
    lap("send")
    await each("labelling", lambda engine: engine.set_version(version))
    await each("resuming with", lambda engine: engine.resume())
    lap("resume")
    canaries = dict(await each("verifying", lambda engine: _verified(engine, version, sent, canary, images, tolerance, previous)))
    lap("verify")
    gap = max(abs(a - b) for one in canaries.values() for a, b in zip(one.learner, one.engine, strict=True))
    return Synced(version=version, canaries=canaries, gap=gap, seconds=seconds)


async def _within(timeout_s: float, more_s: float, engine: str, phase: str, answer: Awaitable[Answer]) -> Answer:
    """The answer, or EngineLost when it takes longer than both together."""
    deadline = asyncio.timeout(timeout_s + more_s)
    try:
        async with deadline:
            return await answer
    except TimeoutError:
        if not deadline.expired():
            raise
        limits = f"{timeout_s:g} s (--vllm.sync-timeout-s)" + f" and {more_s:g} s for its requests (--rollout.timeout-s)" * bool(more_s)
        what = f"did not answer within {limits}: the controller waits for it, {phase} of the weights"
        raise EngineLost(engine, what) from None


async def _verified(
    engine: ServedEngine,
    version: int,
    sent: Sent,
    canary: Sequence[int],
    images: Sequence[Attachment],
    tolerance: float,
    previous: Mapping[str, Canary],
) -> tuple[str, Canary]:
    """The engine's canary once everything agrees; on failure the engine is asked what it cannot vouch for."""
    answered = await engine.prompt_logp(canary, images)
    found, received = await engine.version(), await engine.fingerprints()

    def checked(suspects: Sequence[str]) -> None:
        verify(
            engine=engine.name,
            expected_version=version,
            engine_version=found,
            sent=sent.fingerprints,
            received=received,
            canary_learner=sent.canary_logp,
            canary_engine=answered,
            tolerance=tolerance,
            previous=previous.get(engine.name),
            suspects=suspects,
        )

    try:
        checked(())
    except StaleWeights:
        checked(await engine.suspects())
        raise
    return engine.name, Canary(version=version, learner=tuple(sent.canary_logp), engine=tuple(answered))
