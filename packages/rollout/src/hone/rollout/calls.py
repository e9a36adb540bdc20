"""What every executor does with an engine: ask within a deadline, refuse nonsense, and stop together."""

import asyncio
import math
from collections.abc import Coroutine, Iterable, Sequence
from typing import TypeVar

from hone.rollout.errors import EngineError
from hone.rollout.types import Completion, Engine, Request

Result = TypeVar("Result")
_BEGUN_AT_ONCE = 32
# How far above zero rounding may carry the log-probability of a certain token [nats].
_ROUNDING = 1e-4


async def draw(engine: Engine, asked: Sequence[Request], *, of: Sequence[str], timeout_s: float) -> list[Completion]:
    """A sound completion for each request, in order; EngineError after `timeout_s`, or for nonsense. `of` names the prompts."""
    names = ", ".join(map(repr, of[:3])) + (f" and {len(of) - 3} more" if len(of) > 3 else "")
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            drawn = await engine.generate(asked)
    except TimeoutError:
        if not deadline.expired():
            raise
        raise EngineError(
            f"engine {engine.name} did not finish prompt {names} within {timeout_s:g} s; see the engine's log, "
            "raise rollout.timeout-s or lower rollout.max-new-tokens"
        ) from None
    if [completion.request_id for completion in drawn] != [request.request_id for request in asked]:
        raise EngineError(f"engine {engine.name} answered other requests than those of prompt {names}, or in another order")
    for completion, request in zip(drawn, asked, strict=True):
        _refuse_malformed(completion, request, engine.name)
    return drawn


async def all_of(work: Iterable[Coroutine[object, object, Result]]) -> list[Result]:
    """The results in order; the first failure cancels the rest, waits for them to end, and is raised as it is (not in a group).

    They are begun some at a time: ten thousand in one turn of the event loop would keep everybody else waiting for seconds.
    """
    tasks: list[asyncio.Future[Result]] = []
    try:
        for one in work:
            tasks.append(asyncio.ensure_future(one))
            if len(tasks) % _BEGUN_AT_ONCE == 0:
                await asyncio.sleep(0)
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _refuse_malformed(completion: Completion, request: Request, engine: str) -> None:
    tokens, logp, version = completion.tokens, completion.logp, completion.version
    if not 1 <= len(tokens) <= request.max_new_tokens or len(logp) != len(tokens) or len(version) != len(tokens):
        raise EngineError(
            f"engine {engine} answered request {request.request_id!r} with {len(tokens)} tokens, {len(logp)} log-probabilities and "
            f"{len(version)} versions; expected as many of each, from 1 to {request.max_new_tokens}"
        )
    for position, value in enumerate(logp):
        if not math.isfinite(value) or value > _ROUNDING:
            raise EngineError(
                f"engine {engine} reported log-probability {value} for token {position} of request {request.request_id!r}; the policy's "
                "logits are not finite, or this is no log-probability: check the weights of the last update"
            )
