"""Agents at a real vLLM engine: programs that use the openai and anthropic packages, and functions in this process.

What is trained on equals direct generation, id for id and to 1e-4 nats of the learner's own log-probabilities, on every road.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import openai
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from hone.rollout.agents.calling import CallingAgent, CommandAgent, FunctionAgent
from hone.rollout.config import RolloutConfig
from hone.rollout.endpoint.rollout import Calling
from hone.rollout.endpoint.templates import served_template
from hone.rollout.engines.vllm import VLLMEngine
from hone.rollout.errors import EngineError
from hone.rollout.executor import Group, Sample
from hone.rollout.types import Completion, Prompt, Request
from tests.rollout.chatting import TOOL, write_chat_model
from tests.rollout.conftest import Loop, logp_of, request, start

# vllm, while it is imported, scripts a function by torch's old way.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

EXAMPLES = Path(__file__).parents[2] / "examples"


class Chat:
    """The model, its engine, and every request the engine was asked, by sample and by the ids it was sent."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(write_chat_model(directory)).eval()
        self.letters = AutoTokenizer.from_pretrained(directory)
        self.loop = Loop()
        self.engine = start(directory, "chat", max_model_len=1024)
        self.name, self.asked = "chat", dict[tuple[str, tuple[int, ...]], Request]()

    async def generate(self, requests: Any) -> list[Completion]:
        """As an Engine: it remembers, and asks the real one in its own loop."""
        self.asked |= {(one.request_id.rpartition(":")[2], one.tokens): one for one in requests}
        return await asyncio.wrap_future(self.loop.start(self.engine.generate(requests)))

    async def prompt_logp(self, tokens: Any) -> list[float]:
        return await asyncio.wrap_future(self.loop.start(self.engine.prompt_logp(tokens)))

    def collect(self, agent: CallingAgent, *, n: int, **settings: Any) -> Group:
        ends = (self.letters.eos_token_id,)
        calling = Calling(
            engine=self,
            agent=agent,
            judge=None,
            tokenizer=self.letters,
            served=served_template(self.letters, stop_ids=ends),
            stop_ids=ends,
            config=RolloutConfig(n_samples_per_prompt=n, max_new_tokens=24, temperature=1.2, **settings),
            run_seed=3,
            max_len=1024,
            engine_version="vllm",
            tokenizer_hash="",
            template_hash="",
        )
        (group,) = asyncio.run(calling.collect([Prompt(prompt_id="p", tokens=(), text="3+4=", label="7")], step=1))
        return group

    def check(self, sample: Sample) -> int:
        """Every run of actions is what the engine gives when it is asked directly; the learner agrees. Returns how many runs."""
        runs = 0
        for row in sample.segments:
            tokens, mask = row.tokens.tolist(), row.action_mask
            learner = torch.cat([torch.zeros(1), logp_of(self.model, tokens, temperature=1.2)])
            assert_close(row.rollout_logp[mask], learner[mask], atol=1e-4, rtol=0)
            begins = [place for place in range(1, len(tokens)) if mask[place] and not mask[place - 1]]
            for begin in begins:
                asked = self.asked[str(row.sample), tuple(tokens[:begin])]
                (direct,) = self.loop.run(self.engine.generate([asked]))
                end = begin + len(direct.tokens)
                assert tokens[begin:end] == list(direct.tokens) and bool(mask[begin:end].all())
                assert end == len(tokens) or not mask[end]
                assert_close(row.rollout_logp[begin:end], torch.tensor(direct.logp))
            runs += len(begins)
            assert int(mask.sum()) > 0 and bool((row.rollout_logp[~mask] == 0).all())
        return runs


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    served = Chat(tmp_path_factory.mktemp("chat"))
    yield served
    served.loop.run(served.engine.shutdown())
    served.loop.close()


@pytest.mark.parametrize("package", ["openai", "anthropic"])
def test_an_unmodified_program_is_trained_on_what_was_sampled(chat: Chat, package: str) -> None:
    group = chat.collect(CommandAgent(command=f"{sys.executable} {EXAMPLES / f'{package}_agent.py'}"), n=6)
    runs = [chat.check(sample) for sample in group.samples]
    assert max(runs) > 1, "no episode had a tool's answer; draw more"
    for sample, count in zip(group.samples, runs, strict=True):
        assert sample.extra_logs["endpoint/calls"] == count and not sample.earlier
        # The program's own account: every call but the last led to one of the tool, or four did.
        assert count - 1 <= sample.extra_logs["tool_calls"]
    assert any("<tool_response>" in sample.response_text for sample in group.samples)


async def compacting(client: Any, row: Any) -> None:
    """Two turns, a summary in their place, two branches from it, and one reply cut short."""
    said = [{"role": "user", "content": row["prompt"]}]
    for _ in range(2):
        reply = (await client.chat.completions.create(model="m", messages=said, tools=[TOOL])).choices[0].message
        answers = [{"role": "tool", "tool_call_id": call.id, "content": "7"} for call in reply.tool_calls or ()]
        said += [reply.model_dump(), *answers, {"role": "user", "content": "and?"}]
    short = [{"role": "user", "content": "In short: 7."}]
    first = (await client.chat.completions.create(model="m", messages=short, max_tokens=1)).choices[0].message
    short.append({"role": "assistant", "content": first.content})
    branches = ([*short, {"role": "user", "content": text}] for text in ("left", "right"))
    await asyncio.gather(*(client.chat.completions.create(model="m", messages=branch, stream=False) for branch in branches))


async def completing(client: Any, row: Any) -> None:
    text = row["prompt"]
    for stop in ("2", "5", None):
        text += (await client.completions.create(model="m", prompt=text, stop=stop, max_tokens=8)).choices[0].text + ";"


async def thanking(client: Any, row: Any) -> None:
    said: list[Any] = [{"role": "user", "content": row["prompt"]}]
    for _ in range(3):
        async with client.messages.stream(model="m", max_tokens=12, messages=said, system="Sum.") as stream:
            said += [{"role": "assistant", "content": (await stream.get_final_message()).content}, {"role": "user", "content": "thanks"}]


ROADS: dict[str, tuple[type[Any], Callable[[Any, Any], Awaitable[None]], int]] = {
    "compacted and branched": (openai.AsyncOpenAI, compacting, 3),
    "plain text": (openai.AsyncOpenAI, completing, 1),
    "messages": (anthropic.AsyncAnthropic, thanking, 1),
}


@pytest.mark.parametrize("road", sorted(ROADS))
def test_a_function_is_trained_on_what_was_sampled(chat: Chat, road: str) -> None:
    kind, play, segments = ROADS[road]

    async def agent(base_url: str, api_key: str, model: str, row: dict[str, Any]) -> dict[str, float]:
        async with kind(base_url=base_url, api_key=api_key, max_retries=0) as client:
            await play(client, row)
        return {"reward": 0.5, "score": 1.0}

    for sample in chat.collect(FunctionAgent(function=agent, where="agent"), n=3).samples:
        if road != "plain text":  # there, a stop string ends what direct generation goes on with
            chat.check(sample)
        assert len(sample.segments) == segments and (sample.reward, sample.score) == (0.5, 1.0)
        assert [float(row.rewards.sum()) for row in sample.segments] == [0.5] * segments
        assert [row.segment for row in sample.segments] == list(range(segments))
        for row in sample.segments:
            learner = torch.cat([torch.zeros(1), logp_of(chat.model, row.tokens.tolist(), temperature=1.2)])
            assert_close(row.rollout_logp[row.action_mask], learner[row.action_mask], atol=1e-4, rtol=0)


def test_2_an_answer_to_another_prompt_is_refused_with_both(chat: Chat) -> None:
    engine = VLLMEngine.__new__(VLLMEngine)
    engine.name, engine._half_loaded, engine._eos_token_ids, engine._version = "crossed", "", [], 0
    engine._reads_text, engine._adapter = False, None

    async def other(*asked: Any, **more: Any) -> Any:
        yield SimpleNamespace(outputs=[], prompt_token_ids=[7, 8, 10])

    engine._llm = SimpleNamespace(errored=False, generate=other)
    with pytest.raises(EngineError, match=r"id 2 of its prompt was \[7, 8, 9\] and came back as \[7, 8, 10\]"):
        asyncio.run(engine.generate([request([7, 8, 9], seed=0)]))
