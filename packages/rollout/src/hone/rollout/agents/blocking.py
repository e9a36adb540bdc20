"""Calls that block, kept off the event loop, in threads that cannot hold a process back when it ends."""

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any


async def called(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What `function` answers: awaited here if it is a coroutine function, else called in a thread of its own.

    A thread cannot be stopped: one whose caller has given up goes on, is forgotten, and ends with the process.
    """
    if inspect.iscoroutinefunction(function):
        return await function(*arguments, **named)
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not answer.done():
            answer.set_result(result) if error is None else answer.set_exception(error)

    def run() -> None:
        try:
            outcome = function(*arguments, **named), None
        except BaseException as error:
            # A future refuses StopIteration, and SystemExit would end the loop.
            outcome = None, error if isinstance(error, Exception) and not isinstance(error, StopIteration) else RuntimeError(repr(error))
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="environment", daemon=True).start()
    result = await answer
    return await result if inspect.isawaitable(result) else result
