"""OpenEnv: one of its servers over a WebSocket, one of its clients, or one of its environments in this process.

On the wire a connection is an episode: `{"type": "reset" | "step" | "close", "data": {...}}`, answered by `{"type": "observation",
"data": {"observation": {...}, "reward": number | null, "done": bool}}` or `{"type": "error", "data": {"message", "code"}}`. The
package is not needed for it.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import aiohttp

from hone.rollout.agents.blocking import called
from hone.rollout.env import Action, Turn
from hone.rollout.errors import EnvironmentFailure

_CONNECT_S = 10.0
_LARGEST_MESSAGE = 100 * 2**20
_OF_EVERY_OBSERVATION = ("done", "reward", "metadata")


class OpenEnv:
    """An `Env` over one OpenEnv environment; `source` is the URL of a server, a client, or an environment.

    `parse` makes the action of what the policy wrote: the object that the client or environment takes, or its fields for a server.
    `render` makes text of an observation; without it an observation must have one field of text. There is no truncation in this
    protocol: only running out of turns or tokens truncates.
    """

    def __init__(self, source: Any, *, parse: Callable[[str], Any], render: Callable[[Any], str] | None = None) -> None:
        self._source = _Connection(source) if isinstance(source, str) else source
        self._parse, self._render = parse, render or only_text

    async def reset(self, prompt: str, label: object, *, seed: int) -> str:
        """The prompt, then the first observation."""
        observation, _, _ = _read(await called(self._source.reset, seed=seed % 2**32))
        return prompt + self._render(observation)

    async def step(self, action: Action) -> Turn:
        """The environment's answer; it is asked once, since a step that is repeated is another step."""
        observation, reward, done = _read(await called(self._source.step, self._parse(action.text.strip())))
        feedback = "" if done else self._render(observation)
        return Turn(terminated=done, reward=None if reward is None else float(reward), feedback=feedback)

    async def close(self) -> None:
        """The source's own close."""
        await called(self._source.close)


def only_text(observation: Any) -> str:
    """The one field of text an observation has. Raises EnvironmentFailure where it has none or several."""
    fields = observation if isinstance(observation, Mapping) else vars(observation)
    texts = [value for name, value in fields.items() if isinstance(value, str) and name not in _OF_EVERY_OBSERVATION]
    if len(texts) != 1:
        raise EnvironmentFailure(
            f"the observation has {len(texts)} fields of text ({', '.join(map(str, fields)) or 'no field at all'}), so that what the "
            "policy reads must be said: OpenEnv(source, parse=..., render=FUNCTION OF THE OBSERVATION)"
        )
    return texts[0]


def _read(result: Any) -> tuple[Any, Any, bool]:
    """(observation, reward, done) of a server's answer, a client's result or an environment's observation."""
    if isinstance(result, Mapping):
        return result["observation"], result.get("reward"), bool(result["done"])
    return getattr(result, "observation", result), result.reward, bool(result.done)


class _Connection:
    """An episode at a server."""

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.rstrip("/").rpartition("://")
        self._url = f"{'wss' if scheme in ('https', 'wss') else 'ws'}://{rest}/ws"
        self._stack = AsyncExitStack()
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    async def reset(self, **settings: Any) -> Mapping[str, Any]:
        """Connect, and begin an episode."""
        session = await self._stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(sock_connect=_CONNECT_S)))
        try:
            connecting = session.ws_connect(self._url, max_msg_size=_LARGEST_MESSAGE)
            self._socket = await self._stack.enter_async_context(connecting)
        except aiohttp.ClientError as error:
            raise EnvironmentFailure(f"the server at {self._url} cannot be reached ({error}); see that it runs") from error
        return await self._asked("reset", settings)

    async def step(self, action: Mapping[str, Any]) -> Mapping[str, Any]:
        """One step."""
        return await self._asked("step", action)

    async def close(self) -> None:
        """End the episode and the connection."""
        if self._socket is not None and not self._socket.closed:
            await self._socket.send_json({"type": "close"})
        await self._stack.aclose()

    async def _asked(self, kind: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
        assert self._socket is not None, "an episode begins with reset"
        await self._socket.send_json({"type": kind, "data": dict(data)})
        message = await self._socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise EnvironmentFailure(f"the server at {self._url} hung up in {kind} ({message.data}); the episode is lost")
        answer = json.loads(message.data)
        if answer.get("type") != "observation":
            told = answer.get("data", {})
            raise EnvironmentFailure(f"the server at {self._url} answered {kind} with {told.get('code')}: {told.get('message')}")
        return answer["data"]
