"""Acting ahead of the learner: an event loop in a thread of its own, and in it the producer that keeps the engines busy."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from hone.rollout.executor import Group
from hone.rollout.producer import Kept, Producer

Result = TypeVar("Result")


@runtime_checkable
class Rollout(Protocol):
    """What `train_async` takes its batches from."""

    def serve(self, version: int) -> None:
        """The engines serve this version from now on."""
        ...

    def take(self) -> list[Group]:
        """The groups of the next step, as soon as there are enough of them; none where the data has ended."""
        ...

    def figures(self) -> dict[str, float]:
        """What was dropped or passed by since the last call."""
        ...


class LoopThread:
    """`asyncio.Runner` whose loop goes on between two calls of `run`: what was started in it keeps going while the caller computes."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hone-rollout", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """What the coroutine returns, or raises. An interrupt while it runs cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the loop, and whatever still runs in it."""
        self.run(_cancel_the_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


async def _cancel_the_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """A producer, called from another thread than its loop's.

    `hold` and `free` say when the learner is at work and when at rest: at rest alone it can bring its weights to an engine that
    replaces another (`publish.Publisher`). It is while a batch is waited for.
    """

    producer: Producer
    runner: LoopThread
    hold: Callable[[], None] = lambda: None
    free: Callable[[], None] = lambda: None

    def serve(self, version: int) -> None:
        """The engines serve this version from now on."""
        self.runner.run(self.producer.serve(version))
        self.hold()

    def take(self) -> list[Group]:
        """The groups of the next step, as soon as there are enough of them; none where the data has ended."""
        self.free()
        groups = self.runner.run(self.producer.take())
        self.hold()
        return groups

    def figures(self) -> dict[str, float]:
        """What was dropped or passed by since the last call."""
        return self.runner.run(self._figures())

    async def _figures(self) -> dict[str, float]:
        return self.producer.figures()

    def at_rest(self, ask: Callable[[Kept], Result]) -> Result:
        """What `ask` says of what is open, while nothing changes: it runs in the loop's own thread."""
        return self.runner.run(self._at_rest(ask))

    async def _at_rest(self, ask: Callable[[Kept], Result]) -> Result:
        return ask(self.producer.kept())

    def end(self, reason: str) -> None:
        """Give up whatever is open, dropped for `reason` where there is one."""
        self.runner.run(self.producer.end(reason))
