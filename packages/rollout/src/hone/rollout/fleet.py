"""Several engines behind one: a call goes to the least loaded; an engine that dies or hangs is replaced and its calls go elsewhere.

An engine is serving, or lost: its process died, or a health probe found no answer. A lost one's calls are asked again whole, of
another engine: a request carries its seed, so nothing is sampled twice and nothing is lost. A replacement serves only when
`replace` has brought it up to date; without one the fleet has one engine fewer, and below its minimum the run ends.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

from hone.algos.batch import Attachment
from hone.rollout.errors import EngineError, EngineLost
from hone.rollout.types import Completion, Engine, Request

Result = TypeVar("Result")

ATTEMPTS = 3
"""Engines that one call may lose: what kills every engine it meets is the call's own fault, and is named."""
PROBE_EVERY_S = 5.0
"""Time between health probes while calls are open [s]."""


@runtime_checkable
class Supervised(Engine, Protocol):
    """An engine that can be asked whether it lives."""

    async def check_health(self) -> None:
        """Returns when the engine's core answers; raises EngineLost where it is dead."""
        ...

    def close(self) -> None:
        """End the engine and its processes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much loss a fleet bears: replacements in a run, engines below which it ends, and a probe's deadline [s]."""

    replacements: int = 0
    fewest: int = 1
    health_timeout_s: float = 60.0


@dataclass(eq=False)
class _Place:
    engine: Supervised
    in_flight: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    why: EngineLost | None = None


class Fleet:
    """An Engine over `engines`. The requests of one call stay together, so that they share their prompt's prefix cache.

    Ties go to the engine named first. An error says which engine it came from. `replace(lost)` ends what is left of an engine,
    starts another of its name and brings the current weights to it. `event(kind, **fields)` hears of losses and replacements.
    All coroutines belong to one event loop, which may stand still between them.
    """

    def __init__(
        self,
        engines: Sequence[Supervised],
        *,
        replace: Callable[[Supervised], Awaitable[Supervised]] | None = None,
        limits: Limits = Limits(),
        event: Callable[..., None] = lambda kind, **fields: None,
    ) -> None:
        if not engines:
            raise ValueError("no engines to route to; vllm.num-engines must be at least 1")
        self.name = engines[0].name if len(engines) == 1 else f"{len(engines)} engines ({', '.join(engine.name for engine in engines)})"
        self._places = [_Place(engine) for engine in engines]
        self._order = {engine.name: index for index, engine in enumerate(engines)}
        self._replace, self._limits, self._event = replace, limits, event
        self._replacements = 0
        self._replacing: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._prober: asyncio.Task[None] | None = None
        self._broken: BaseException | None = None
        self._losses: list[str] = []

    @property
    def serving(self) -> list[Supervised]:
        """The engines that calls may go to now."""
        return [place.engine for place in self._places]

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Draw all samples of one prompt on one engine."""
        names = ", ".join(request.request_id for request in requests[:3]) + ("" if len(requests) < 4 else f" and {len(requests) - 3} more")
        return await self._asked(len(requests), names, lambda engine: engine.generate(requests))

    async def prompt_logp(self, tokens: Sequence[int], images: Sequence[Attachment] = ()) -> list[float]:
        """Log-probabilities [nats] of `tokens[1:]` from one engine; the canary of a weight sync asks each engine itself."""
        return await self._asked(1, "a prompt's log-probabilities", lambda engine: engine.prompt_logp(tokens, images))

    async def settled(self) -> list[Supervised]:
        """The serving engines, each just heard from, when no replacement is under way any more. Raises EngineError below the minimum."""
        while True:
            await asyncio.gather(*(self._probe(place) for place in list(self._places)))
            if not self._replacing:
                self._check_size()
                return self.serving
            await asyncio.gather(*self._replacing.values())

    def lost(self, error: EngineLost) -> None:
        """Take an engine that was found dead elsewhere (in a weight sync, say) out of service, and have it replaced."""
        for place in self._places:
            if place.engine.name == error.engine:
                self._lose(place, error)
                return

    async def close(self) -> None:
        """Give up replacements under way and end every engine; the first error is raised when all have been tried."""
        for task in self._replacing.values():
            task.cancel()
        await asyncio.gather(*self._replacing.values(), return_exceptions=True)
        ended = await asyncio.gather(*(asyncio.to_thread(engine.close) for engine in self.serving), return_exceptions=True)
        for one in ended:
            if isinstance(one, BaseException):
                raise one

    async def _asked(self, weight: int, what: str, ask: Callable[[Supervised], Awaitable[Result]]) -> Result:
        for attempt in range(1, ATTEMPTS + 1):
            place = await self._least_loaded()
            try:
                return await self._on(place, weight, ask)
            except EngineLost as error:
                self._lose(place, error)
                if attempt == ATTEMPTS:
                    raise EngineError(f"{what} met the loss of {ATTEMPTS} engines in a row, the last: {error}") from error
                self._event("calls_reissued", engine=place.engine.name, requests=what, attempt=attempt + 1)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _on(self, place: _Place, weight: int, ask: Callable[[Supervised], Awaitable[Result]]) -> Result:
        """The answer of one engine; EngineLost as soon as it is known to be gone, whoever found that out."""
        place.in_flight += weight
        call, gone = asyncio.ensure_future(ask(place.engine)), asyncio.ensure_future(place.gone.wait())
        self._watch()
        try:
            await asyncio.wait((call, gone), return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                assert place.why is not None
                raise place.why
            return call.result()
        except EngineError as error:
            if place.engine.name in str(error):
                raise
            raise type(error)(f"engine {place.engine.name}: {error}") from error
        except Exception as error:
            raise EngineError(f"engine {place.engine.name} failed: {type(error).__name__}: {error}") from error
        finally:
            call.cancel()
            gone.cancel()
            place.in_flight -= weight
            if self._prober is not None and not any(other.in_flight for other in self._places):
                # Left waiting, its deadline could pass while the loop stands still.
                self._prober.cancel()
                self._prober = None

    async def _least_loaded(self) -> _Place:
        while True:
            self._check_size()
            if self._places:
                return min(self._places, key=lambda place: place.in_flight)
            self._changed.clear()
            await self._changed.wait()

    def _check_size(self) -> None:
        if self._broken is not None:
            raise self._broken
        if len(self._places) + len(self._replacing) < self._limits.fewest:
            raise EngineError(
                f"{len(self._places)} engines are left and the run needs {self._limits.fewest} (--vllm.min-engines); "
                f"{self._replacements} were replaced (--vllm.max-replacements {self._limits.replacements}); lost: {'; '.join(self._losses)}"
            )

    def _lose(self, place: _Place, error: EngineLost) -> None:
        if place not in self._places:
            return
        self._places.remove(place)
        place.why = error
        place.gone.set()
        name = place.engine.name
        self._losses.append(str(error))
        self._event("engine_lost", engine=name, error=str(error))
        if self._replaceable:
            self._replacing[name] = asyncio.ensure_future(self._replaced(place.engine))
        else:
            self._event("engine_retired", engine=name)
        self._changed.set()

    @property
    def _replaceable(self) -> bool:
        return self._replace is not None and self._replacements < self._limits.replacements

    async def _replaced(self, engine: Supervised) -> None:
        """Try until there is another in its place, or the run's replacements are used up."""
        try:
            while self._replaceable:
                assert self._replace is not None
                self._replacements += 1
                try:
                    fresh = await self._replace(engine)
                except EngineError as error:
                    self._losses.append(str(error))
                    self._event("replacement_failed", engine=engine.name, error=str(error))
                    continue
                self._places.append(_Place(fresh))
                self._places.sort(key=lambda place: self._order[place.engine.name])
                self._event("engine_replaced", engine=fresh.name, replacements=self._replacements)
                return
            self._event("engine_retired", engine=engine.name)
        except Exception as error:  # handed to whoever asks next: nobody awaits this task
            self._broken = error
        finally:
            del self._replacing[engine.name]
            self._changed.set()

    def _watch(self) -> None:
        if self._prober is None or self._prober.done():
            self._prober = asyncio.ensure_future(self._probing())

    async def _probing(self) -> None:
        while True:
            await asyncio.sleep(PROBE_EVERY_S)
            await asyncio.gather(*(self._probe(place) for place in list(self._places)))

    async def _probe(self, place: _Place) -> None:
        limit = self._limits.health_timeout_s
        try:
            await asyncio.wait_for(place.engine.check_health(), limit)
        except TimeoutError:
            self._lose(place, EngineLost(place.engine.name, f"did not answer a health probe within {limit:g} s (--vllm.health-timeout-s)"))
        except EngineLost as error:
            self._lose(place, error)
        except EngineError as error:
            self._lose(place, EngineLost(place.engine.name, f"failed a health probe: {error}"))
