"""One rank of the tests with images, run as `python -m tests.learner.vision_ranks SPEC.json RANK` in the repository.

Two optimiser steps on rows of which one rank has none with an image, for every case of the spec.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from hone.algos.algorithms import DrGRPO
from hone.algos.batch import Batch, select
from hone.learner.engines import deepspeed
from hone.learner.learner import Learner
from hone.learner.packing import Shard, shards
from tests.learner.model_ranks import meeting
from tests.learner.ranks import weights
from tests.learner.test_vision import batch_of, rows_of
from tests.learner.tiny import make_learner, score

MAX_TOKENS = 64
SETTINGS: dict[str, dict[str, Any]] = {"all": {}, "frozen": {"trained": {"freeze": "model.visual.*"}}}


def dealt(batch: Batch, *, rank: int, world_size: int) -> Shard:
    """Rank 0 gets the rows with images, in two micro-batches; rank 1 text, and a filler. Without ranks, all of them."""
    if world_size == 1:
        return shards(batch, ranks=1, max_tokens=MAX_TOKENS)[0]
    own = [[0, 2, 3], [1]][rank]
    micro_batches = [((0, 2), (1,)), ((0,), (0,))][rank]
    fillers = frozenset() if rank == 0 else frozenset({1})
    return Shard(batch=select(batch, own), micro_batches=micro_batches, fillers=fillers, rows=tuple(own))


def train(learner: Learner, model: str, *, rank: int, world_size: int) -> dict[str, Any]:
    """What must not depend on ranks and stage."""
    batch = batch_of(rows_of(model))
    result: dict[str, Any] = {"old_logp": learner.logp("policy", dealt(batch, rank=rank, world_size=world_size))}
    steps = [
        learner.update_policy("policy", dealt(score(batch, seed=step), rank=rank, world_size=world_size), DrGRPO()) for step in range(2)
    ]
    return {**result, "norms": [step.grad_norm for step in steps], "policy": weights(learner, "policy")}


def main(spec_file: str, rank: int) -> None:
    spec = json.loads(Path(spec_file).read_text())
    deepspeed.WHOLE_BELOW = 0  # else stage 3 would leave models this small alone
    for case in spec["cases"]:
        place = {"rank": rank, "world_size": 2}
        port = meeting(Path(spec["ports"]), rank=rank)
        settings = {"backend": "deepspeed", "stage": case["stage"], "port": port, "max_tokens": MAX_TOKENS, "lr": 1e-3}
        learner = make_learner({"policy": case["model"]}, **settings, **place, **SETTINGS[case["settings"]])
        torch.save(train(learner, case["model"], **place), f"{case['out']}-{rank}.pt")
        learner.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
