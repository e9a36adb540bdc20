"""One rank of the resume tests, run as `python -m tests.learner.checkpoint_ranks SPEC.json RANK` in the repository.

A process of its own even for one rank: where the suite checks types at calls, the checks draw from Python's generator.

For every case: train, save, go on; a second learner takes the checkpoint up and goes on from there; whatever differs is written down.
Then checkpoints are taken up by another number of ranks at another stage. Both processes run the cases of one rank, each for itself,
for DeepSpeed counts parameters per process and its ranks must agree on the count.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hone.algos.algorithms import PPO
from hone.algos.algorithms.terms import KLPenalty
from hone.learner.checkpoint import directory as checkpoints
from hone.learner.checkpoint.files import Files
from hone.learner.checkpoint.shard_file import RoleReader
from hone.learner.engines import deepspeed
from hone.learner.learner import Learner
from hone.learner.packing import shards
from hone.learner.roles import StepResult
from tests.learner.tiny import copies, make_batch, make_learner, own, score

LENGTHS = [7, 12, 3, 20, 9, 5, 16, 11, 2]
MAX_TOKENS = 21
ROLES = ("policy", "critic")
ALGO = PPO(kl=KLPenalty(init_coef=0.0))


def update(learner: Learner, *, seed: int) -> list[StepResult]:
    """One optimiser step of policy and critic."""
    part = shards(score(make_batch(LENGTHS), seed=seed), ranks=copies(learner), max_tokens=MAX_TOKENS)[own(learner)]
    return [learner.update_policy("policy", part, ALGO), learner.update_critic("critic", part, ALGO)]


def drawn_update(learner: Learner) -> list[StepResult]:
    """One step on data drawn from all of this process's generators, so that a rank whose generators are off trains on other data."""
    return update(learner, seed=int(torch.randint(10_000, (1,))) + random.randrange(10_000) + int(np.random.randint(10_000)))


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def state(learner: Learner) -> dict[str, torch.Tensor]:
    """Everything the rank holds: its pieces and the weights the forward pass sees, copied."""
    held = {f"{role}/{piece.key}": piece.values.clone() for role in ROLES for piece in learner.engines[role].pieces()}
    seen = {f"{role}/weight/{name}": tensor.clone() for role in ROLES for name, tensor in learner.weights(role)}
    return held | seen


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return sorted(one.keys() ^ other.keys()) + [name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])]


def save(learner: Learner, root: Path, number: int) -> Path:
    """A whole checkpoint, with the collectives that a controller's calls stand for elsewhere."""
    files, partial = Files(), root / f"step_{number}{checkpoints.PARTIAL}"
    together = learner.world_size > 1
    if learner.rank == 0:
        checkpoints.begin(files, root, number)
    if together:
        torch.distributed.barrier()
    learner.save(str(partial))
    outcome = learner.saved(wait=True)
    assert outcome is not None and not outcome.error, outcome
    outcomes: list[Any] = [outcome]
    if together:
        outcomes = [None] * learner.world_size
        torch.distributed.all_gather_object(outcomes, outcome)
    if learner.rank == 0:
        checkpoints.complete(files, partial, [file for one in outcomes for file in one.files], {})
    if together:
        torch.distributed.barrier()
    return root / f"step_{number}"


def resume_case(build: Any, root: Path) -> dict[str, Any]:
    """Two steps, a save, two steps; and the same two steps from the checkpoint. What differs, by the name of what was compared."""
    learner: Learner = build()
    seed_all(100 + own(learner))
    for _ in range(2):
        drawn_update(learner)
    path = save(learner, root, 2)
    at_save = state(learner)
    never_stopped = [drawn_update(learner) for _ in range(2)]
    end, draw = state(learner), float(torch.rand(1))
    learner.close()

    again: Learner = build()
    seed_all(7)
    before = differences(state(again), at_save)
    again.restore(str(path))
    taken_up = differences(state(again), at_save)
    resumed = [drawn_update(again) for _ in range(2)]
    result = {
        "fresh": len(before),
        "taken up": taken_up,
        "steps": [str(pair) for pair in zip(never_stopped, resumed, strict=True) if pair[0] != pair[1]],
        "end": differences(state(again), end),
        "draw": [] if float(torch.rand(1)) == draw else ["torch.rand"],
        "moved": len(differences(end, at_save)),
    }
    again.close()
    return result


def cross_case(build: Any, path: Path) -> dict[str, Any]:
    """The checkpoint of another group: masters and moments as they are in its files, and what the next step makes of them."""
    learner: Learner = build()
    checkpoints.verify(path)  # not before: joining waits for the rank that wrote it
    learner.restore(str(path))
    wrong = []
    for role in ROLES:
        reader = RoleReader(path, role)
        for piece in learner.engines[role].pieces():
            saved = reader.read(piece.section, piece.name, start=piece.start, numel=piece.values.numel(), columns=piece.columns)
            wrong += [] if torch.equal(saved, piece.values) else [f"{role}/{piece.key}"]
        for name, weight in learner.weights(role):
            wrong += [] if torch.equal(reader.whole("master", name).to(weight.dtype), weight) else [f"{role}/weight/{name}"]
    update(learner, seed=77)
    weights = {f"{role}/{name}": tensor.float().clone() for role in ROLES for name, tensor in learner.weights(role)}
    learner.close()
    return {"wrong": wrong, "weights": weights}


def main(spec_file: str, rank: int) -> None:
    spec = json.loads(Path(spec_file).read_text())
    roles, whole_below = dict.fromkeys(ROLES, spec["model"]), deepspeed.WHOLE_BELOW

    def builder(case: dict[str, Any]) -> Any:
        ports = iter(case["ports"][rank if case["ranks"] == 1 else 0])

        def build() -> Learner:
            deepspeed.WHOLE_BELOW = whole_below if case["whole"] else 0  # else stage 3 would leave models this small alone
            common = {
                "rank": rank if case["ranks"] > 1 else 0,
                "world_size": case["ranks"],
                "max_tokens": MAX_TOKENS,
                "dtype": case["dtype"],
                "lr": 1e-3,
                "ema_beta": 0.9,
            }
            if case["stage"] is None:
                return make_learner(roles, **common)
            settings = {"stage": case["stage"], "tensor_parallel_size": case["tensor"]}
            return make_learner(roles, backend="deepspeed", port=next(ports), **settings, **common)

        return build

    results: dict[str, Any] = {}
    for case in spec["cases"]:
        path = Path(case["path"])
        if case["cross"]:
            results[case["name"]] = cross_case(builder(case), path)
        else:
            results[case["name"]] = resume_case(builder(case), path if case["ranks"] > 1 or rank == 0 else path.with_suffix(".rank1"))
    torch.save(results, f"{spec['out']}-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
