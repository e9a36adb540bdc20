"""TRL's `environment_factory`: an object whose public methods are the policy's tools, played as an agent at the endpoint.

    reset(**row) -> None | str      # text is appended to the last user message; it must clear everything
    any_other_name(...)             # a tool: its docstring and annotations are what the policy is shown; sync or async
    get_reward() -> float           # once, at the end

A tool that raises, that is not there, or that is called with other arguments than it takes answers `{"error": ...}`, as in TRL, and
so does a call that is no JSON; the episode goes on until the policy calls nothing or its budget ends.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from transformers.utils.chat_template_utils import get_json_schema

from hone.rollout.agents.blocking import called
from hone.rollout.endpoint.tool_calls import PARSERS
from hone.rollout.errors import EnvironmentFailure

_OURS = ("reset", "get_reward")
_OUT_OF_BUDGET = ("budget_exhausted", "context_length_exceeded")


class ToolLoop:
    """Plays episodes with the object that `factory` makes, a new one each time; several by name are told apart by the row's column
    `environment`.
    """

    def __init__(self, factory: Callable[[], Any] | Mapping[str, Callable[[], Any]], *, path: Path) -> None:
        self._factory, self._path = factory, path

    async def play(self, base_url: str, api_key: str, model: str, row: Mapping[str, Any]) -> dict[str, float | None]:
        """One episode: its reward (None: it does not judge itself), how often tools were called, and how often that failed."""
        environment = self._made(row)
        tools = tools_of(environment)
        schemas = [get_json_schema(tool) for tool in tools.values()]
        messages = await _begun(environment, row)
        asked = failed = 0
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {api_key}"}) as client:
            while (reply := await _reply(client, base_url, {"model": model, "messages": messages, "tools": schemas})) is not None:
                messages.append(reply)
                answers = [await _answer(call, tools) for call in reply.get("tool_calls") or []]
                if not answers and any(parse(reply["content"] or "", {}).errors for parse in PARSERS.values()):
                    answers = [
                        ({"role": "user", "content": str({"error": "the tool call is no JSON object with a name and arguments"})}, 1)
                    ]
                if not answers:
                    break
                messages += [message for message, _ in answers]
                asked, failed = asked + len(answers), failed + sum(failures for _, failures in answers)
        judge = getattr(environment, "get_reward", None)
        reward = None if judge is None else await called(judge)
        return {"reward": reward, "tool_calls": float(asked), "tool_failures": float(failed)}

    def _made(self, row: Mapping[str, Any]) -> Any:
        if not isinstance(self._factory, Mapping):
            return self._factory()
        name = row["columns"].get("environment")
        if name not in self._factory:
            raise EnvironmentFailure(
                f"has no environment {name!r} (the row's column `environment`); environment_factory in {self._path} has "
                f"{', '.join(map(str, self._factory))}"
            )
        return self._factory[name]()


def tools_of(environment: Any) -> dict[str, Callable[..., Any]]:
    """The tools of an environment, by name: the public methods of its class but `reset` and `get_reward`."""
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    if "reset" not in names:
        raise EnvironmentFailure(f"made a {type(environment).__name__}, which has no reset")
    return {name: getattr(environment, name) for name in names if name not in _OURS and not name.startswith("_")}


async def _begun(environment: Any, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages to begin with: the row's, with what `reset` says appended. It is handed of the row what it takes."""
    prompt = row["prompt"]
    messages = [dict(message) for message in prompt] if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    given = {**row["columns"], "prompt": prompt, "label": row["label"], "seed": row["seed"]}
    takes = inspect.signature(environment.reset).parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values()):
        given = {name: value for name, value in given.items() if name in takes}
    observation = await called(environment.reset, **given)
    if observation is not None and not isinstance(observation, str):
        raise EnvironmentFailure(f"returned {observation!r:.200} ({type(observation).__name__}) from reset; only text can be shown")
    if observation:
        said = messages[-1]["content"]
        part = {"type": "text", "text": observation}
        messages[-1]["content"] = [*said, part] if isinstance(said, list) else said + observation
    return messages


async def _reply(client: aiohttp.ClientSession, base_url: str, body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The policy's next message; None where its budget or its context is used up."""
    async with client.post(f"{base_url}/chat/completions", json=body, timeout=aiohttp.ClientTimeout(total=None)) as response:
        answer = await response.json()
    if response.status == 200:
        return answer["choices"][0]["message"]
    if answer["error"]["code"] in _OUT_OF_BUDGET:
        return None
    raise EnvironmentFailure(f"could not be played: {answer['error']['message']}")


async def _answer(call: Mapping[str, Any], tools: Mapping[str, Callable[..., Any]]) -> tuple[dict[str, Any], int]:
    """(what the tool says, 1 if the call failed)."""
    name, failed = call["function"]["name"], 0
    try:
        arguments = json.loads(call["function"]["arguments"])
        if name not in tools:
            raise ValueError(f"Tool {name} not found.")
        inspect.signature(tools[name]).bind(**arguments)
        said = await called(tools[name], **arguments)
    except Exception as error:  # the policy's to mend: it reads what it did
        said, failed = {"error": str(error)}, 1
    return {"role": "tool", "tool_call_id": call["id"], "name": name, "content": str(said)}, failed
