"""The main loop: act, judge, learn, publish.

Read it top to bottom; it is the whole algorithm of a run. What it acts and learns with comes from `parts.py` (built from
Ray actors by `cluster.py`, in this process by `local.py`); what an advantage or a loss is comes from `hone.algos`. It
yields what happened at every step, so display, logs and stopping early belong to the caller (`programs/`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from hone.algos.algorithms.remax import with_greedy
from hone.algos.batch import Batch, pack
from hone.algos.judging import judge, optimiser_steps
from hone.algos.protocol import Algorithm
from hone.launch.gap import check_gap
from hone.launch.measure import figure_metrics, mismatch_metrics, rollout_metrics, staleness_metrics, training_metrics
from hone.launch.parts import Parts
from hone.rollout.executor import Group


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the loop: its number from 1, what was sampled, what was measured, and where the loop's generator stands after it."""

    number: int
    groups: Sequence[Group]
    metrics: dict[str, float]
    shuffle: bytes


@dataclass(frozen=True, kw_only=True)
class Start:
    """After which step the loop goes on, and where its generator then stood (`Step.shuffle`; None: freshly seeded)."""

    step: int = 0
    shuffle: bytes | None = None


FRESH = Start()


def train(
    algo: Algorithm,
    parts: Parts,
    *,
    batch_size: int,
    max_epochs: int,
    max_steps: int,
    critic_only_steps: int,
    seed: int,
    start: Start = FRESH,
    max_gap: float | None = None,
) -> Iterator[Step]:
    """Reinforcement learning of the policy in `parts`, a step at a time.

    batch_size: samples of one optimiser step; max_epochs: passes over a rollout; max_steps: steps of the whole run, those before
    `start` included; critic_only_steps: steps at the start in which the policy stands still; max_gap: of engine and
    learner, averaged over a step's action tokens [nats]. Raises what its parts raise, and GapExceeded; a step that was yielded is complete.
    """
    shuffle = torch.Generator().manual_seed(seed)
    if start.shuffle is not None:
        shuffle.set_state(torch.frombuffer(bytearray(start.shuffle), dtype=torch.uint8))
    parts.publish(version=start.step)  # before a token is sampled, the engines are shown to hold the learner's policy

    for number, prompts in enumerate(islice(parts.prompts(), max_steps - start.step), start=start.step + 1):
        with parts.phase("generation"):
            groups = parts.act(prompts, step=number)
        if not groups:
            return  # all of the data's last prompts were filtered out

        policy_too = number > critic_only_steps
        batch, metrics = learn_from(
            groups,
            algo,
            parts,
            version=number - 1,
            batch_size=batch_size,
            max_epochs=max_epochs,
            policy_too=policy_too,
            shuffle=shuffle,
            max_gap=max_gap,
        )

        with parts.phase("broadcast"):
            synced = parts.publish(version=number)

        yield Step(
            number=number,
            groups=groups,
            shuffle=shuffle.get_state().numpy().tobytes(),
            metrics={
                **rollout_metrics(groups),
                **metrics,
                **staleness_metrics(batch, version=number - 1),
                **synced,
                **parts.measured(batch),
            },
        )


def learn_from(
    groups: Sequence[Group],
    algo: Algorithm,
    parts: Parts,
    *,
    version: int,
    batch_size: int,
    max_epochs: int,
    policy_too: bool,
    shuffle: torch.Generator,
    max_gap: float | None,
) -> tuple[Batch, dict[str, float]]:
    """Judge a rollout and learn from it, policy version `version`; the batch as it was recomputed, and what was measured."""
    with parts.phase("make_experience"):
        batch = pack([segment for group in groups for sample in group.samples for segment in sample.segments])
        batch = parts.recompute(batch, algo.needs)
        check_gap(batch, version=version, limit=max_gap)
        if "greedy_scores" in algo.needs:
            rewards = [math.nan if group.greedy is None else group.greedy.reward for group in groups]
            batch = with_greedy(batch, torch.tensor(rewards), torch.arange(len(groups)))
        scored = judge(algo, batch)

    with parts.phase("ppo_train"):
        learned = [
            parts.learn(minibatch, algo, policy_too=policy_too)
            for _ in range(max_epochs)
            for minibatch in optimiser_steps(scored, batch_size=batch_size, reduction=algo.reduction, generator=shuffle)
        ]
    return batch, {**mismatch_metrics(batch), **figure_metrics(scored.figures), **training_metrics(learned)}
