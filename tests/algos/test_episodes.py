"""Episodes of several segments: together they are one sample of their group, one row of the loss, and one draw of a step."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from hone.algos.algorithms import ALGORITHMS
from hone.algos.batch import Batch, SamplerContract, Trajectory, pack
from hone.algos.judging import judge, optimiser_steps
from hone.algos.reduce import Reduction

CONTRACT = SamplerContract(temperature=1.0, top_p=1.0, top_k=0, seed=0, engine="", tokenizer="", template="")


def trajectory(sample: int, reward: float, *, segment: int = 0, actions: int = 3, prompt_id: str = "p") -> Trajectory:
    rewards = torch.zeros(2 + actions)
    rewards[-1] = reward
    return Trajectory(
        prompt_id=prompt_id,
        sample=sample,
        tokens=torch.arange(2 + actions),
        action_mask=torch.arange(2 + actions) >= 2,
        rollout_logp=torch.full((2 + actions,), -1.0),
        rewards=rewards,
        version=torch.zeros(2 + actions, dtype=torch.long),
        truncated=False,
        score=reward,
        contract=CONTRACT,
        segment=segment,
    )


def filled(trajectories: list[Trajectory]) -> Batch:
    batch = pack(trajectories)
    return dataclasses.replace(batch, old_logp=batch.rollout_logp, ref_logp=batch.rollout_logp, values=torch.zeros(batch.tokens.numel()))


# Sample 1 compacted its history once: two segments, each with the reward of its episode.
WHOLE = [trajectory(0, 0.0), trajectory(1, 1.0, actions=4), trajectory(2, 0.5)]
CUT = [trajectory(0, 0.0), trajectory(1, 1.0, actions=1), trajectory(1, 1.0, segment=1), trajectory(2, 0.5)]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_baseline", "opo"])
def test_a_cut_episode_is_worth_what_the_whole_one_is(name: str) -> None:
    algo = ALGORITHMS[name]()
    whole, cut = judge(algo, filled(WHOLE)), judge(algo, filled(CUT))
    assert_close(cut.advantages[cut.action_mask], whole.advantages[whole.action_mask])
    assert_close(cut.weights[cut.action_mask], whole.weights[whole.action_mask])
    assert cut.figures["groups"] == 1 and cut.figures["groups_of_one"] == 0


def test_every_segment_carries_the_reward_for_algorithms_that_look_at_rows_alone() -> None:
    scored = judge(ALGORITHMS["reinforce"](), filled(CUT))
    assert scored.rewards[scored.action_mask].sum() == 2.5 and scored.rewards_once.sum() == 1.5


def test_steps_are_cut_between_episodes() -> None:
    scored = judge(ALGORITHMS["grpo"](), filled(CUT))
    reduction = Reduction(over="sequence")
    for seed in range(8):
        steps = list(optimiser_steps(scored, batch_size=1, reduction=reduction, generator=torch.Generator().manual_seed(seed)))
        assert sorted(step.rows for step in steps) == [1, 1, 2]
        for step in steps:
            assert_close(step.weights.sum(), torch.tensor(1.0))
    (two,) = [step for step in steps if step.rows == 2]
    assert two.action_mask.sum() == 4 and set(two.weights[two.action_mask].tolist()) == {0.25}


def test_rows_without_segments_are_as_they_were() -> None:
    batch = pack(WHOLE)
    assert batch.episode is None and batch.episode_cu_seqlens is batch.cu_seqlens and batch.rewards_once is batch.rewards


def test_a_segment_out_of_its_place_is_refused() -> None:
    for wrong in ([CUT[2]], [CUT[0], CUT[2]], [CUT[1], trajectory(1, 1.0, segment=2)]):
        with pytest.raises(ValueError, match=r"segment . of sample 1 of 'p' does not stand behind the one before it"):
            pack(wrong)
