"""One rank of the tests of adapters and mixtures, run as `python -m tests.learner.model_ranks SPEC.json RANK` in the repository.

As `tests.learner.ranks`, with other settings; then some cases stop and go on. Both processes run the cases of one rank, each for itself.
"""

import itertools
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hone.learner.config import LoraConfig
from hone.learner.engines import deepspeed
from hone.learner.learner import Learner
from tests.learner.checkpoint_ranks import resume_case
from tests.learner.ranks import train
from tests.learner.tiny import make_learner

ROLES = ("policy", "critic", "reference")
LORA = LoraConfig(rank=3, alpha=6)
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"ds": {"lora": LORA}},
    "four bits": {"ds": {"lora": LORA, "load_in_4bit": True}},
    "mixture": {"trained": {"aux_loss_coef": 0.5}},
    "mixture lora": {"ds": {"lora": LORA}, "trained": {"aux_loss_coef": 0.5}},
    "frozen": {"trained": {"freeze": "*.layers.0.*,*norm.weight"}},
}


MEETINGS = itertools.count()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meeting(directory: Path, *, rank: int) -> int:
    """A port that rank 0 found free a moment ago: one that is reserved for minutes may be taken by then."""
    file = directory / str(next(MEETINGS))
    if rank == 0:
        file.with_suffix(".partial").write_text(str(free_port()))
        file.with_suffix(".partial").rename(file)
    while not file.exists():
        time.sleep(0.05)
    return int(file.read_text())


def main(spec_file: str, rank: int) -> None:
    spec = json.loads(Path(spec_file).read_text())
    deepspeed.WHOLE_BELOW = 0  # else stage 3 would leave models this small alone
    for case in spec["cases"]:
        place = {"rank": rank if case["ranks"] > 1 else 0, "world_size": case["ranks"], "max_tokens": spec["max_tokens"]}

        def build(case: dict[str, Any] = case, place: dict[str, int] = place) -> Learner:
            return make_learner(
                dict.fromkeys(ROLES, case["model"]),
                backend="deepspeed",
                stage=case["stage"],
                port=meeting(Path(spec["ports"]), rank=rank) if case["ranks"] > 1 else free_port(),
                dtype=case["dtype"],
                lr=spec["lr"],
                **place,
                **SETTINGS[case["settings"]],
            )

        learner = build()
        result = train(learner, **place)
        learner.export("policy", f"{case['out']}-export-{rank if case['ranks'] == 1 else 0}")
        learner.close()
        if case["resumed"]:
            result["resumed"] = resume_case(build, Path(f"{case['out']}-checkpoints"))
        torch.save(result, f"{case['out']}-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
