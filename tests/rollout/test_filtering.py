"""Dynamic sampling: what is kept, what is drawn in its place, and what happens when there is no more."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from hone.algos.batch import SamplerContract, Trajectory
from hone.rollout.errors import EngineError, RewardError
from hone.rollout.executor import Group, Sample
from hone.rollout.filtering import Filtering, Varied, WithinRange
from hone.rollout.types import Prompt


def prompt(name: str) -> Prompt:
    return Prompt(prompt_id=name, tokens=(1,), text=name, label=None)


def trajectory(of: Prompt, score: float) -> Trajectory:
    one = torch.ones(1)
    contract = SamplerContract(temperature=1.0, top_p=1.0, top_k=0, seed=0, engine="e", tokenizer="t", template="c")
    per_token = {"tokens": one.long(), "action_mask": one.bool(), "rollout_logp": -one, "rewards": one, "version": one.long()}
    return Trajectory(prompt_id=of.prompt_id, sample=0, **per_token, truncated=False, score=score, contract=contract)


def group(of: Prompt, *scores: float, rewards: Sequence[float] | None = None) -> Group:
    samples = [
        Sample(
            trajectory=trajectory(of, score),
            prompt_text="",
            response_text="",
            label=None,
            reward=reward,
            score=score,
            extra_logs={},
            cached_tokens=0,
        )
        for score, reward in zip(scores, rewards or scores, strict=True)
    ]
    return Group(prompt=of, samples=tuple(samples))


@dataclass
class Scores:
    """An executor that gives each prompt the scores written down for it, after its own delay; "g..." prompts are good ones."""

    delays: Callable[[str], float] = lambda _: 0.0
    most: int = 0
    out: int = 0
    asked: list[str] = field(default_factory=list)

    async def collect(self, prompts: Sequence[Prompt], *, step: int, on_group: Callable[[Group], None] | None = None) -> list[Group]:
        return list(await asyncio.gather(*(self._one(one, on_group) for one in prompts)))

    async def _one(self, one: Prompt, on_group: Callable[[Group], None]) -> Group:
        self.asked.append(one.prompt_id)
        self.out += 1
        self.most = max(self.most, self.out)
        await asyncio.sleep(self.delays(one.prompt_id))
        self.out -= 1
        if one.prompt_id.startswith("broken"):
            raise EngineError("engine a: gone")
        found = group(one, *((0.0, 1.0) if one.prompt_id.startswith("g") else (1.0, 1.0)))
        on_group(found)
        return found


def filtering(executor: Scores, fresh: Sequence[str] = (), *, most_batches: int = 10) -> tuple[Filtering, list[str]]:
    waiting, dropped = [prompt(name) for name in fresh], []
    return Filtering(
        executor=executor,
        verdict=Varied(),
        more=lambda: waiting.pop(0) if waiting else None,
        dropped=lambda group, reason: dropped.append(f"{group.prompt.prompt_id} {reason}"),
        most_batches=most_batches,
    ), dropped


def collected(filtering: Filtering, *names: str) -> list[str]:
    groups = asyncio.run(filtering.collect([prompt(name) for name in names], step=1))
    return [group.prompt.prompt_id for group in groups]


def test_a_rejected_prompt_is_replaced_at_once_and_accepted_ones_keep_the_order_drawn() -> None:
    # g1 is slow: replacements of the bad ones are asked before it is done.
    executor = Scores(delays=lambda name: 0.1 if name == "g1" else 0.0)
    under_test, dropped = filtering(executor, ["b3", "g4", "g5", "g6"])
    assert collected(under_test, "g1", "b1", "b2") == ["g1", "g4", "g5"]
    assert executor.asked == ["g1", "b1", "b2", "b3", "g4", "g5"] and executor.most == 3  # never more than are missing
    assert dropped == [f"b{index} filtered: all 2 rewards are 1" for index in (1, 2, 3)]
    assert under_test.figures() == {"rollout/filtering_pass_rate": 0.5, "rollout/filtering_reward_mean": 0.75}
    assert under_test.figures() == {}


def test_when_the_data_ends_what_was_accepted_is_kept() -> None:
    under_test, dropped = filtering(Scores(), ["b2", "g2"])
    assert collected(under_test, "g1", "b1", "b3", "b4") == ["g1", "g2"] and len(dropped) == 4
    empty, _ = filtering(Scores())
    assert collected(empty, "b1", "b2") == []


def test_a_step_draws_so_many_batches_and_no_more() -> None:
    executor = Scores()
    under_test, _ = filtering(executor, [f"b{index}" for index in range(5, 100)], most_batches=3)
    assert collected(under_test, "g1", "b1") == ["g1"]
    assert len(executor.asked) == 6
    hopeless, _ = filtering(Scores(), [f"b{index}" for index in range(5, 100)], most_batches=3)
    with pytest.raises(RewardError, match=r"not one of 6 prompts in step 1 .* 'filtered: all 2 rewards are 1'.*dynamic-filtering off"):
        collected(hopeless, "b1", "b2")


def test_a_failure_ends_what_is_under_way() -> None:
    executor = Scores(delays=lambda name: 30.0 if name == "g1" else 0.0)
    under_test, _ = filtering(executor, ["broken"])

    async def scenario() -> None:
        before = asyncio.all_tasks()
        with pytest.raises(EngineError, match="gone"):
            await under_test.collect([prompt("g1"), prompt("b1")], step=1)
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(scenario(), 20))


@pytest.mark.parametrize(
    ("scores", "kept"), [((0.0, 0.0), False), ((1.0, 1.0), False), ((0.0, 1.0), True), ((-1.0, 1.0), False), ((0.2, 0.2), True)]
)
def test_a_range_is_of_the_mean_score_and_open(scores: Sequence[float], kept: bool) -> None:
    verdict = WithinRange(low=0.0, high=1.0)(group(prompt("a"), *scores, rewards=(5.0, 5.0)))
    assert (verdict is None) is kept
    assert kept or verdict.startswith("filtered: mean score ")


def test_variance_is_of_rewards() -> None:
    assert Varied()(group(prompt("a"), 1.0, 1.0, rewards=(0.5, 0.6))) is None
    assert Varied()(group(prompt("a"), 1.0, 0.0, rewards=(0.5, 0.5))) == "filtered: all 2 rewards are 0.5"
