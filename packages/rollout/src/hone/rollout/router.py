"""Several engines behind one: each call goes to the engine with the fewest requests in flight."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from hone.rollout.errors import EngineError
from hone.rollout.types import Completion, Engine, Request


class LeastLoaded:
    """An Engine over `engines`. The requests of one call stay together, so that they share their prompt's prefix cache.

    Ties go to the engine named first. An error says which engine it came from.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        if not engines:
            raise ValueError("no engines to route to; vllm.num-engines must be at least 1")
        self.name = f"{len(engines)} engines ({', '.join(engine.name for engine in engines)})"
        self._engines = tuple(engines)
        self._in_flight = [0] * len(engines)

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Draw all samples of one prompt on one engine."""
        async with self._least_loaded(len(requests)) as engine:
            return await engine.generate(requests)

    async def prompt_logp(self, tokens: Sequence[int]) -> list[float]:
        """Log-probabilities [nats] of `tokens[1:]` from one engine; the canary of a weight sync asks each engine itself."""
        async with self._least_loaded(1) as engine:
            return await engine.prompt_logp(tokens)

    @asynccontextmanager
    async def _least_loaded(self, requests: int) -> AsyncIterator[Engine]:
        chosen = min(range(len(self._engines)), key=self._in_flight.__getitem__)
        engine = self._engines[chosen]
        self._in_flight[chosen] += requests
        try:
            yield engine
        except EngineError as error:
            if engine.name in str(error):
                raise
            raise type(error)(f"engine {engine.name}: {error}") from error
        except Exception as error:
            raise EngineError(f"engine {engine.name} failed: {type(error).__name__}: {error}") from error
        finally:
            self._in_flight[chosen] -= requests
