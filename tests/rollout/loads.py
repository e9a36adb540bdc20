"""Many rollouts at a time: an engine whose latency is known, agents of several calls, and what the process holds meanwhile."""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from hone.rollout.agents.calling import FunctionAgent
from hone.rollout.config import RolloutConfig
from hone.rollout.endpoint.rollout import Calling
from hone.rollout.endpoint.templates import served_template
from hone.rollout.engines.scripted import ScriptedEngine
from hone.rollout.env import Action, Observation, Turn
from hone.rollout.executor import SingleTurn
from hone.rollout.multi_turn import MultiTurn
from hone.rollout.rewards.result import Judgement, RewardItem
from hone.rollout.types import Completion, Prompt, Request
from tests.rollout.chatting import END as CHAT_END
from tests.rollout.chatting import tokenizer, user

END = 1
TURNS = 4
NAMES: dict[str, Any] = {"engine_version": "scripted", "tokenizer_hash": "", "template_hash": ""}


def latency(request: Request, *, median_s: float, longest_s: float) -> float:
    """Log-normal with sigma 1 [s], cut at `longest_s`; by the request's own seed, so the same in every run."""
    return min(longest_s, random.Random(request.contract.seed).lognormvariate(math.log(median_s), 1.0))


@dataclass(kw_only=True)
class Busy(ScriptedEngine):
    """Counts the calls that are under way, and keeps none of them; answers none before `together` were under way at once."""

    together: int
    in_flight: int = 0
    most: int = 0
    answered: int = 0
    full: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        if self.most >= self.together:
            self.full.set()
        try:
            async with asyncio.timeout(120):
                await self.full.wait()
            return await super().generate(requests)
        finally:
            self.calls.clear()
            self.in_flight -= 1
            self.answered += len(requests)


class Points:
    """Ids are code points."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return "".join(map(chr, token_ids)).replace(chr(END), "" if skip_special_tokens else "$")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]


class Length:
    """Rewards by length, after a pause as a server's would be."""

    async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
        await asyncio.sleep(0.01)
        return [Judgement(reward=float(len(item.response or "")), score=1.0, extra_logs={}) for item in items]


class Echo:
    """An environment that answers what was said, `TURNS` times."""

    def __init__(self) -> None:
        self.turns = 0

    async def reset(self, prompt: str, label: object, *, seed: int) -> Observation:
        return prompt

    async def step(self, action: Action) -> Turn:
        self.turns += 1
        return Turn(feedback=f"[{action.text}]", reward=1.0, terminated=self.turns == TURNS)

    async def close(self) -> None:
        pass


def prompts(count: int) -> list[Prompt]:
    texts = [f"question {index:06d}?" for index in range(count)]
    return [
        Prompt(prompt_id=text, tokens=tuple(map(ord, text)), text=text, label=index, given=[user(f"q{index};")])
        for index, text in enumerate(texts)
    ]


def engine(script: Callable[[Request], Sequence[int]], *, together: int = 1, median_s: float, longest_s: float) -> Busy:
    return Busy(script=script, together=together, delay_s=lambda request: latency(request, median_s=median_s, longest_s=longest_s))


def reversed_end(request: Request) -> list[int]:
    """The last six ids of the prompt, backwards: an answer that belongs to one request only."""
    return [*request.tokens[-2:-8:-1], END]


def single_turn(*, together: int = 1, median_s: float, longest_s: float) -> SingleTurn:
    return SingleTurn(
        engine=engine(reversed_end, together=together, median_s=median_s, longest_s=longest_s),
        judge=Length(),
        tokenizer=Points(),
        config=RolloutConfig(n_samples_per_prompt=1, max_new_tokens=16),
        run_seed=1,
        max_len=100,
        samples_in_flight=1_000_000,
        **NAMES,
    )


def multi_turn(*, together: int = 1, median_s: float, longest_s: float) -> MultiTurn:
    return MultiTurn(
        engine=engine(reversed_end, together=together, median_s=median_s, longest_s=longest_s),
        environment=Echo,
        where="echo",
        tokenizer=Points(),
        config=RolloutConfig(n_samples_per_prompt=1, max_new_tokens=16),
        run_seed=1,
        max_len=200,
        max_turns=8,
        step_timeout_s=60.0,
        **NAMES,
    )


@dataclass
class Visitors:
    """Agents that own their loop: `TURNS` calls each over HTTP, one connection each, and what they heard by the row's label."""

    heard: dict[int, list[str]] = field(default_factory=dict)

    async def play(self, base_url: str, api_key: str, model: str, row: dict[str, Any]) -> float:
        said, heard = list(row["prompt"]), self.heard.setdefault(row["label"], [])
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {api_key}"}, timeout=aiohttp.ClientTimeout()) as client:
            for turn in range(TURNS):
                async with client.post(f"{base_url}/chat/completions", json={"messages": said}) as answer:
                    assert answer.status == 200, await answer.text()
                    reply = (await answer.json())["choices"][0]["message"]
                heard.append(reply["content"])
                said += [reply, user(f"t{turn};")]
        return 1.0


def calling(visitors: Visitors, *, agents: int, together: int = 1, median_s: float, longest_s: float) -> Calling:
    letters = tokenizer()
    ends, question = (letters.eos_token_id,), letters.encode(";", add_special_tokens=False)[0]

    def last_question(request: Request) -> list[int]:
        """The last thing the user said, once more."""
        stop = max(place for place, token in enumerate(request.tokens) if token == question)
        return [*request.tokens[stop - 2 : stop], *letters.encode(CHAT_END, add_special_tokens=False)]

    return Calling(
        engine=engine(last_question, together=together, median_s=median_s, longest_s=longest_s),
        agent=FunctionAgent(function=visitors.play, where="visitors"),
        judge=None,
        tokenizer=letters,
        served=served_template(letters, stop_ids=ends),
        stop_ids=ends,
        config=RolloutConfig(n_samples_per_prompt=1, max_new_tokens=16, agents_in_flight=agents),
        run_seed=1,
        max_len=400,
        **NAMES,
    )


@dataclass
class Held:
    """The most a process held while something ran: memory [bytes] and descriptors, above what it began with; and the loop's lags [s]."""

    memory: int = 0
    descriptors: int = 0
    lags: list[float] = field(default_factory=list)

    def lag_s(self, share: float) -> float:
        """The lag that this share of the ticks stayed below."""
        return sorted(self.lags)[min(len(self.lags) - 1, int(share * len(self.lags)))]


@asynccontextmanager
async def watched(*, every_s: float = 0.01) -> AsyncIterator[Held]:
    """What is held while the block runs, looked at every `every_s`, as long as the loop lets it."""
    process, held, loop = psutil.Process(), Held(), asyncio.get_running_loop()
    memory, descriptors = process.memory_info().rss, process.num_fds()

    async def watch() -> None:
        while True:
            due = loop.time() + every_s
            await asyncio.sleep(every_s)
            held.lags.append(loop.time() - due)
            if len(held.lags) % 10 == 0:
                held.memory = max(held.memory, process.memory_info().rss - memory)
                held.descriptors = max(held.descriptors, process.num_fds() - descriptors)

    watching = asyncio.ensure_future(watch())
    try:
        yield held
    finally:
        watching.cancel()
