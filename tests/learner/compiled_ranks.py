"""Two ranks of the compiled engine's test, run as `python -m tests.learner.compiled_ranks SPEC.json RANK` in the repository."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from hone.learner.engines import compiled
from tests.learner.engine_ranks import ALGO, MAX_TOKENS, part
from tests.learner.ranks import weights
from tests.learner.tiny import make_learner


def main(spec_file: str, rank: int) -> None:
    spec = json.loads(Path(spec_file).read_text())
    # Traces forward and backward as the usual backend does, and runs what it traced: without minutes in a C++ compiler.
    compiled.BACKEND = "aot_eager"
    results: dict[str, Any] = {}
    for case, settings in spec["cases"].items():
        common = {"rank": rank, "world_size": 2, "port": settings.pop("port"), "max_tokens": MAX_TOKENS, "lr": 1e-3}
        learner = make_learner({"policy": spec["model"]}, backend="deepspeed", **common, **settings)
        torch._dynamo.reset()  # else the code of the case before serves this one
        counters.clear()
        norms = [learner.update_policy("policy", part(learner, step), ALGO).grad_norm for step in range(2)]
        found: dict[str, Any] = {"norms": norms, "graphs": counters["stats"]["unique_graphs"]}
        found |= {"logp": learner.logp("policy", part(learner, 0)), "weights": weights(learner, "policy")}
        learner.close()
        results[case] = found
    torch.save(results, f"{spec['results']}-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
