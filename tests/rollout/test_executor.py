"""The single-turn executor: what it locks.

1. Groups come back in the order of the prompts, samples in the order of their seeds, whatever finishes first.
2. A trajectory is the prompt, unmasked, and the sampled ids, masked, as they were sampled; the reward stands on the last one.
3. The judge sees prompt and response text as the user's functions expect them.
4. An engine that misses the deadline, or answers nonsense, is an EngineError with its name and the prompt.
5. The first failure is raised as it is, and everything else is cancelled.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from hone.algos.batch import SamplerContract, pack
from hone.rollout.config import RolloutConfig
from hone.rollout.engines.scripted import ScriptedEngine
from hone.rollout.errors import EngineError, RewardError
from hone.rollout.executor import Group, SingleTurn
from hone.rollout.rewards.pool import RewardPool
from hone.rollout.rewards.result import Judgement, RewardItem
from hone.rollout.sampling import seed_of
from hone.rollout.types import Completion, Prompt, Request

END = 1


class Letters:
    """Ids are code points; like sentencepiece's, this tokenizer drops a space at the very start. 1 is the end token, "$"."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        end = "" if skip_special_tokens else "$"
        text = "".join(end if token == END else chr(token) for token in token_ids)
        return text.removeprefix(" ")


@dataclass
class Judge:
    """The reward is the response's length [characters]; `seen` keeps what was asked, `delay_s` holds a prompt back."""

    delay_s: dict[str, float] = field(default_factory=dict)
    seen: list[RewardItem] = field(default_factory=list)

    async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
        self.seen += items
        await asyncio.sleep(self.delay_s.get(items[0].prompt_id, 0.0))
        lengths = [float(len(item.query) - len(item.prompt)) for item in items]
        return [Judgement(reward=length, score=length / 10, extra_logs={"length": length}) for length in lengths]


def prompt(text: str, *, label: object = None) -> Prompt:
    return Prompt(prompt_id=f"id-{text}", tokens=tuple(map(ord, text)), text=text, label=label)


def ids(text: str) -> list[int]:
    return [END if letter == "$" else ord(letter) for letter in text]


def single_turn(
    engine: ScriptedEngine,
    judge: Judge | RewardPool,
    *,
    n: int = 1,
    timeout_s: float = 60.0,
    max_len: int = 100,
    prompts_per_call: int = 1,
    samples_in_flight: int = 1024,
) -> SingleTurn:
    return SingleTurn(
        engine=engine,
        judge=judge,
        tokenizer=Letters(),
        config=RolloutConfig(n_samples_per_prompt=n, max_new_tokens=8, temperature=0.7, timeout_s=timeout_s),
        run_seed=5,
        max_len=max_len,
        engine_version="scripted 1",
        tokenizer_hash="t",
        template_hash="c",
        prompts_per_call=prompts_per_call,
        samples_in_flight=samples_in_flight,
    )


def collect(executor: SingleTurn, prompts: Sequence[Prompt], on_group: Callable[[Group], None] | None = None) -> list[Group]:
    return asyncio.run(executor.collect(prompts, step=3, on_group=on_group))


def test_a_sample_is_what_was_fed_drawn_and_judged() -> None:
    engine = ScriptedEngine(script=lambda _: ids(" 42$"), logp=-0.5, version=6)
    judge = Judge()
    (group,) = collect(single_turn(engine, judge), [prompt("1+1=", label=["2", {"a": 3}])])
    (sample,) = group.samples
    trajectory = sample.trajectory
    assert (trajectory.prompt_id, trajectory.sample, trajectory.truncated, trajectory.score) == ("id-1+1=", 0, False, 0.4)
    assert trajectory.tokens.tolist() == ids("1+1= 42$")
    assert trajectory.action_mask.tolist() == [False] * 4 + [True] * 4
    assert_close(trajectory.rollout_logp, torch.tensor([0.0] * 4 + [-0.5] * 4))
    assert_close(trajectory.rewards, torch.tensor([0.0] * 7 + [4.0]))
    assert trajectory.version.tolist() == [6] * 8
    assert trajectory.contract == SamplerContract(
        temperature=0.7, top_p=1.0, top_k=0, seed=seed_of(5, 3, "id-1+1=", 0), engine="scripted 1", tokenizer="t", template="c"
    )
    assert (sample.prompt_text, sample.response_text, sample.label) == ("1+1=", " 42$", ["2", {"a": 3}])
    assert (sample.reward, sample.score, sample.extra_logs) == (4.0, 0.4, {"length": 4.0})
    label = ["2", {"a": 3}]
    # The plain response is what trainers that decode it by itself hand over: no end token, no leading space.
    assert judge.seen == [RewardItem(prompt_id="id-1+1=", query="1+1= 42$", prompt="1+1=", label=label, response="42")]


def test_a_response_that_reached_its_limit_is_truncated() -> None:
    engine = ScriptedEngine(script=lambda _: ids("abcdefghijklm$"))
    (by_new_tokens,) = collect(single_turn(engine, Judge()), [prompt("xy")])
    (by_length,) = collect(single_turn(engine, Judge(), max_len=5), [prompt("xy")])
    assert [group.samples[0].response_text for group in (by_new_tokens, by_length)] == ["abcdefgh", "abc"]
    assert by_new_tokens.samples[0].trajectory.truncated
    assert by_length.samples[0].trajectory.truncated
    with pytest.raises(ValueError, match=r"'id-xyz' has 3 tokens, which leaves no room for a response in 3; raise data.max-len"):
        collect(single_turn(engine, Judge(), max_len=3), [prompt("xyz")])


@pytest.mark.parametrize("prompts_per_call", [1, 2, 5])
def test_order_is_that_of_the_prompts_and_seeds_whatever_finishes_first(prompts_per_call: int) -> None:
    prompts = [prompt(letter) for letter in "abcde"]
    # The later a prompt, the sooner it is drawn and judged.
    engine = ScriptedEngine(script=lambda r: [*r.tokens, r.contract.seed % 26 + 65, END], delay_s=lambda r: (ord("e") - r.tokens[0]) * 0.02)
    judge = Judge(delay_s={p.prompt_id: (ord("e") - p.tokens[0]) * 0.02 for p in prompts})
    finished: list[str] = []
    groups = collect(
        single_turn(engine, judge, n=3, prompts_per_call=prompts_per_call), prompts, lambda group: finished.append(group.prompt.text)
    )
    assert finished == list("edcba")
    assert [group.prompt for group in groups] == prompts
    assert [len(requests) for requests in engine.calls] == {1: [3] * 5, 2: [6, 6, 3], 5: [15]}[prompts_per_call]
    for group in groups:
        assert [sample.trajectory.sample for sample in group.samples] == [0, 1, 2]
        letters = [chr(seed_of(5, 3, group.prompt.prompt_id, sample) % 26 + 65) for sample in range(3)]
        assert [sample.response_text for sample in group.samples] == [f"{group.prompt.text}{letter}$" for letter in letters]
    batch = pack([sample.trajectory for group in groups for sample in group.samples])
    assert batch.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


def test_no_more_samples_in_flight_than_allowed() -> None:
    running: list[int] = []
    peak: list[int] = []

    class Counting(ScriptedEngine):
        async def generate(self, requests: Sequence[Request]) -> list[Completion]:
            running.append(len(requests))
            peak.append(sum(running))
            await asyncio.sleep(0.001)
            running.remove(len(requests))
            return await super().generate(requests)

    engine = Counting(script=lambda _: [END])
    collect(single_turn(engine, Judge(), n=4, samples_in_flight=10), [prompt(letter) for letter in "abcdefgh"])
    assert max(peak) == 8  # two prompts of four samples; a third would make twelve
    peak.clear()
    collect(single_turn(engine, Judge(), n=4, samples_in_flight=3), [prompt(letter) for letter in "abcd"])
    assert max(peak) == 4  # one prompt at least


def test_a_deadline_missed_names_engine_and_prompt() -> None:
    engine = ScriptedEngine(name="vllm-1", script=lambda _: [END], delay_s=lambda r: 60.0 if r.tokens[0] == ord("b") else 0.0)
    with pytest.raises(EngineError, match=r"engine vllm-1 did not finish prompt 'id-b' within 0.1 s; .* raise rollout.timeout-s"):
        collect(single_turn(engine, Judge(), timeout_s=0.1), [prompt("a"), prompt("b")])
    with pytest.raises(EngineError, match=r"prompt 'id-b', 'id-c', 'id-d' and 1 more within"):
        collect(single_turn(engine, Judge(), timeout_s=0.1, prompts_per_call=4), [prompt(letter) for letter in "bcde"])


def test_the_engines_own_timeout_is_not_taken_for_the_deadline() -> None:
    def fail(_: Request) -> list[int]:
        raise TimeoutError("a socket's")

    with pytest.raises(TimeoutError, match="a socket's"):
        collect(single_turn(ScriptedEngine(script=fail), Judge()), [prompt("a")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logp": (-1.0,)}, r"'3:id-a:0' with 2 tokens, 1 log-probabilities and 2 versions; expected as many of each, from 1 to 8"),
        ({"version": ()}, "2 tokens, 2 log-probabilities and 0 versions"),
        ({"tokens": (), "logp": (), "version": ()}, "0 tokens"),
        ({"tokens": (2,) * 9, "logp": (-1.0,) * 9, "version": (0,) * 9}, "9 tokens"),
        ({"logp": (-1.0, float("nan"))}, "log-probability nan for token 1 of request '3:id-a:0'"),
        ({"logp": (float("-inf"), -1.0)}, "log-probability -inf for token 0"),
        ({"request_id": "other"}, "answered other requests than those of prompt 'id-a'"),
    ],
)
def test_nonsense_from_an_engine_is_an_error_with_its_name(change: dict[str, object], message: str) -> None:
    class Broken(ScriptedEngine):
        async def generate(self, requests: Sequence[Request]) -> list[Completion]:
            return [dataclasses.replace(completion, **change) for completion in await super().generate(requests)]

    with pytest.raises(EngineError, match=message) as caught:
        collect(single_turn(Broken(script=lambda _: [50, END]), Judge()), [prompt("a")])
    assert str(caught.value).startswith("engine scripted ")


def test_the_first_failure_is_raised_and_the_rest_cancelled() -> None:
    cancelled: list[str] = []

    class Slow(Judge):
        async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
            if items[0].prompt == "b":
                raise RewardError("no reward for id-b")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(items[0].prompt)
                raise
            raise AssertionError("not reached")

    with pytest.raises(RewardError, match="no reward for id-b"):
        collect(single_turn(ScriptedEngine(script=lambda _: [END]), Slow()), [prompt(letter) for letter in "abc"])
    assert cancelled == ["a", "c"]


def test_with_a_reward_file(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text(
        "def reward_func(queries, prompts, labels):\n"
        "    response = queries[0][len(prompts[0]):].removesuffix('$')\n"
        "    if response == 'zz':\n"
        "        raise ValueError('zz is not judged')\n"
        "    return {'rewards': [response == labels[0]], 'extra_logs': {'length': len(response)}}\n"
    )
    engine = ScriptedEngine(script=lambda r: [r.tokens[0], r.tokens[0], END])
    pool = RewardPool(str(path), workers=2, timeout_s=60.0)
    try:
        executor = single_turn(engine, pool, n=2)
        groups = collect(executor, [prompt("a", label="aa"), prompt("b", label="aa")])
        assert [[sample.reward for sample in group.samples] for group in groups] == [[1.0, 1.0], [0.0, 0.0]]
        assert groups[0].samples[0].extra_logs == {"length": 2.0}
        with pytest.raises(RewardError, match=r"raised ValueError: zz is not judged at .*reward.py:4 for prompt 'id-z'"):
            collect(executor, [prompt("a", label="aa"), prompt("z", label="zz")])
    finally:
        pool.close()


@pytest.mark.parametrize("prompts_per_call", [1, 2])
def test_a_greedy_response_is_drawn_and_judged_beside_the_samples(prompts_per_call: int) -> None:
    engine = ScriptedEngine(script=lambda request: ids("yes$" if request.greedy else "no$"))
    executor = dataclasses.replace(single_turn(engine, Judge(), n=2, prompts_per_call=prompts_per_call), greedy=True)
    for group in collect(executor, [prompt("a"), prompt("b"), prompt("c")]):
        assert [sample.response_text for sample in group.samples] == ["no$", "no$"]
        assert group.greedy is not None and group.greedy.response_text == "yes$" and group.greedy.reward == 4.0
    assert sum(request.greedy for call in engine.calls for request in call) == 3
