"""An engine that answers from a script: for tests of what lies around an engine, and of what an engine seldom does."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hone.algos.batch import Attachment
from hone.rollout.types import Completion, Request


@dataclass(kw_only=True)
class ScriptedEngine:
    """Answers each request with the ids that `script` gives for it, cut to the request's length.

    `delay_s` is how long a call takes [s], by its first request. Every token has log-probability `logp` [nats] and the
    version served when the call began. An exception from `script` is the engine's. `calls` keeps what was asked.
    """

    script: Callable[[Request], Sequence[int]]
    name: str = "scripted"
    delay_s: Callable[[Request], float] = lambda _: 0.0
    logp: float = -1.0
    version: int = 0
    calls: list[list[Request]] = field(default_factory=list)

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The scripted ids of every request, in the order asked."""
        self.calls.append(list(requests))
        version = self.version
        await asyncio.sleep(self.delay_s(requests[0]))
        return [self._completion(request, version) for request in requests]

    async def check_health(self) -> None:
        """A script is always well."""

    def close(self) -> None:
        """Nothing was started."""

    async def prompt_logp(self, tokens: Sequence[int], images: Sequence[Attachment] = ()) -> list[float]:
        """`logp` for every token but the first."""
        return [self.logp] * (len(tokens) - 1)

    def _completion(self, request: Request, version: int) -> Completion:
        script = tuple(self.script(request))
        tokens = script[: request.max_new_tokens]
        return Completion(
            request_id=request.request_id,
            tokens=tokens,
            logp=(self.logp,) * len(tokens),
            version=(version,) * len(tokens),
            finish_reason="stop" if len(script) == len(tokens) else "length",
            cached_tokens=0,
        )
