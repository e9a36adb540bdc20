"""Agents that own their loop and ask the endpoint: a function in this process, or a command in one of its own.

    async def agent(base_url, api_key, model, row): ...     # or without async: then in a thread of its own

`row` has "prompt" and "label" as they stand in the data, "columns" with the row's others, "prompt_id", "sample" and "seed". What
it returns, or a command prints as its last line in JSON, is the reward: a number, an object with "reward" or, one for each reply,
"rewards" (and "score", and figures for the logs), or nothing where a reward function judges.
"""

import asyncio
import json
import math
import numbers
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hone.rollout.agents.blocking import called
from hone.rollout.env import Scalar
from hone.rollout.errors import EnvironmentFailure

MODEL = "policy"
_TAIL_BYTES = 4096
_LAST_LINE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an agent made of its episode; `reward` None: it does not judge itself. Of `turns`, the rewards of the replies in their
    order (none: there is only the episode's), it is the sum.
    """

    reward: float | None
    score: float | None = None
    extra_logs: Mapping[str, float] = field(default_factory=dict)
    turns: tuple[float, ...] = ()


@runtime_checkable
class CallingAgent(Protocol):
    """What plays one episode after another."""

    @property
    def where(self) -> str:
        """Its name for messages."""
        ...

    async def play(self, base_url: str, api_key: str, row: Mapping[str, Any]) -> Outcome:
        """One episode; whatever it raises is the agent's own. Cancelled when its time is up, it leaves nothing running."""
        ...


@dataclass(frozen=True, kw_only=True)
class FunctionAgent:
    """A function of the user's; one that blocks has a thread, which cannot be stopped: it meets a closed session."""

    function: Callable[..., Any]
    where: str

    async def play(self, base_url: str, api_key: str, row: Mapping[str, Any]) -> Outcome:
        """What the function returns."""
        return outcome(await called(self.function, base_url, api_key, MODEL, dict(row)))


@dataclass(frozen=True, kw_only=True)
class CommandAgent:
    """A command, started for every episode with the row as JSON on its standard input and the endpoint in its environment."""

    command: str

    @property
    def where(self) -> str:
        """The command as it was given."""
        return f"`{self.command}`"

    async def play(self, base_url: str, api_key: str, row: Mapping[str, Any]) -> Outcome:
        """What its last line says. Its process group ends with it, or when its time is up."""
        process = await asyncio.create_subprocess_exec(
            *shlex.split(self.command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(base_url, api_key),
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        printed = asyncio.ensure_future(_tail(process.stdout, _LAST_LINE_BYTES))
        complained = asyncio.ensure_future(_tail(process.stderr, _TAIL_BYTES))
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it need not read its row
                process.stdin.write(json.dumps(row).encode())
                await process.stdin.drain()
            process.stdin.close()
            status = await process.wait()
        finally:
            with suppress(ProcessLookupError, PermissionError):  # nobody is left
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            # With the group dead both pipes end, unless a child left the group and holds them.
            done, held = await asyncio.wait([printed, complained], timeout=1.0)
            for reading in held:
                reading.cancel()
        if status:
            ended = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
            raise EnvironmentFailure(f"{ended}; the end of its standard error:\n{_shown(complained, done)}")
        return outcome(_last_json(printed.result() if printed in done else b""))


def check_command(command: str) -> None:
    """EnvironmentFailure unless the command can be read as a shell would and its program is there; runs none of it."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise EnvironmentFailure(f"agent command {command!r} cannot be read: {error}; quote it as for a shell") from error
    if not words or shutil.which(words[0]) is None:
        program = words[0] if words else ""
        raise EnvironmentFailure(f"agent command {command!r} names the program {program!r}, which is not to be found; give its full path")


def environment(base_url: str, api_key: str) -> dict[str, str]:
    """The environment of a command: ours, with the endpoint where both client libraries look for it."""
    of_ours = {name: value for name, value in os.environ.items() if name != "ANTHROPIC_AUTH_TOKEN"}
    past_proxies = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1")))
    return {
        **of_ours,
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_KEY": api_key,
        "ANTHROPIC_BASE_URL": base_url.removesuffix("/v1"),
        "ANTHROPIC_API_KEY": api_key,
        "HONE_MODEL": MODEL,
        "NO_PROXY": past_proxies,
        "no_proxy": past_proxies,
    }


def outcome(value: object) -> Outcome:
    """What an agent returned or printed, as an Outcome. Raises EnvironmentFailure for anything else than a reward."""
    if value is None:
        return Outcome(reward=None)
    if isinstance(value, Mapping):
        turns = _of_turns(value["rewards"]) if value.get("rewards") is not None else ()
        given = {str(name): _number(one, str(name)) for name, one in value.items() if one is not None and name != "rewards"}
        reward, score = given.pop("reward", sum(turns) if turns else None), given.pop("score", None)
        if turns and not math.isclose(reward or 0.0, sum(turns), abs_tol=1e-6):
            raise EnvironmentFailure(f"gave the reward {reward:g} and rewards of turns that sum to {sum(turns):g}; leave the reward out")
        return Outcome(reward=reward, score=score, extra_logs=given, turns=turns)
    return Outcome(reward=_number(value, "reward"))


def _of_turns(value: object) -> tuple[float, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise EnvironmentFailure(f"gave the rewards {value!r:.200}, not a list with one number for each reply")
    return tuple(_number(one, f"reward of turn {turn}") for turn, one in enumerate(value, start=1))


def _number(value: Any, name: str) -> float:
    plain = value.item() if isinstance(value, Scalar) else value
    if not isinstance(plain, numbers.Real) or not math.isfinite(plain):
        raise EnvironmentFailure(f"gave the {name} {value!r:.200}, not a finite number; return a number, or an object with reward")
    return float(plain)


def _last_json(printed: bytes) -> object:
    """The value of the last line, if it is one; None where the command printed nothing of the kind."""
    lines = printed.decode(errors="replace").strip().splitlines()
    try:
        value = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return value if isinstance(value, dict | int | float) else None


async def _tail(stream: asyncio.StreamReader, size: int) -> bytes:
    """The last `size` bytes of a stream, read to its end: a full pipe would hold up whoever writes into it."""
    kept = b""
    while piece := await stream.read(2**16):
        kept = (kept + piece)[-size:]
    return kept


def _shown(complained: "asyncio.Future[bytes]", done: Sequence[object] | set[Any]) -> str:
    text = complained.result().decode(errors="replace").strip() if complained in done else ""
    return text or "(nothing)"
