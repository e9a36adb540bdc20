"""The loop of `train.py` for a rollout that does not wait: the engines sample the next batches while the learner learns from this one.

Read it beside `train.py`; what is learnt from a batch is the same function. Batches come from `rollout` (`hone.rollout.producer`), which
begins prompts as its buffer has room: no token is trained more versions late than `hone.rollout.buffer` proves. What is left of the
gap between the policy that sampled and the one that learns, an algorithm's correction takes (`--algo.correction.level`).
"""

from collections.abc import Iterator

import torch

from hone.algos.protocol import Algorithm
from hone.launch.ahead import Rollout
from hone.launch.measure import rollout_metrics, staleness_metrics
from hone.launch.parts import Parts
from hone.launch.train import FRESH, Start, Step, learn_from


def train_async(
    algo: Algorithm,
    parts: Parts,
    *,
    rollout: Rollout,
    batch_size: int,
    max_epochs: int,
    max_steps: int,
    critic_only_steps: int,
    seed: int,
    start: Start = FRESH,
    max_gap: float | None = None,
) -> Iterator[Step]:
    """Reinforcement learning of the policy in `parts`, a step at a time; arguments as in `train`."""
    shuffle = torch.Generator().manual_seed(seed)
    if start.shuffle is not None:
        shuffle.set_state(torch.frombuffer(bytearray(start.shuffle), dtype=torch.uint8))
    parts.publish(version=start.step)  # before a token is sampled, the engines are shown to hold the learner's policy
    rollout.serve(start.step)  # from here on they sample whenever there is room

    for number in range(start.step + 1, max_steps + 1):
        with parts.phase("generation"):  # what is left to wait for: most of the batch was sampled during the step before
            groups = rollout.take()
        if not groups:
            return  # the data has ended

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
            rollout.serve(number)

        yield Step(
            number=number,
            groups=groups,
            shuffle=shuffle.get_state().numpy().tobytes(),
            metrics={
                **rollout_metrics(groups),
                **metrics,
                **staleness_metrics(batch, version=number - 1),
                **rollout.figures(),
                **synced,
                **parts.measured(batch),
            },
        )
