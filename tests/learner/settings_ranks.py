"""Two ranks that take a few steps of a policy, run as `python -m tests.learner.settings_ranks SPEC.json RANK` in the repository: for
settings of the engine whose numbers must be another's.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from hone.learner.engines import compiled, deepspeed, zero_settings
from hone.learner.errors import NumericsError
from hone.learner.learner import Learner
from tests.learner.checkpoint_ranks import save
from tests.learner.engine_ranks import ALGO, MAX_TOKENS, part, refused
from tests.learner.ranks import weights
from tests.learner.tiny import make_learner

SCALE = 2**10
"""A loss scale in fp16 at which no gradient of these steps overflows, as some do at the first one."""


def take_steps(learner: Learner) -> dict[str, Any]:
    """Two steps, and what they made of the policy."""
    steps = [learner.update_policy("policy", part(learner, step), ALGO) for step in range(2)]
    found = {"norms": [step.grad_norm for step in steps], "metrics": [step.metrics for step in steps]}
    return {**found, "logp": learner.logp("policy", part(learner, 0)), "weights": weights(learner, "policy")}


def overflow(learner: Learner) -> dict[str, Any]:
    """Steps in fp16 that overflow at a scale that is far too high, then ones that no lower scale could mend, until the run ends."""
    engine: Any = learner.engines["policy"]
    before, scaler = weights(learner, "policy"), engine.scaler
    told: dict[str, Any] = {"begin": engine.counters}
    scaler.cur_scale = 2.0**26
    lowered = learner.update_policy("policy", part(learner, 5), ALGO)
    told |= {"lowered": (lowered.applied, engine.counters)}
    scaler.cur_scale = 1.0
    kept = refused(learner, "gradient")
    told |= {"kept": (kept.applied, engine.counters)}
    told["same"] = all(torch.equal(before[name], one) for name, one in weights(learner, "policy").items())
    try:
        refused(learner, "loss")
    except NumericsError as error:
        told["ended"] = str(error)
    return told


def main(spec_file: str, rank: int) -> None:
    spec = json.loads(Path(spec_file).read_text())
    deepspeed.WHOLE_BELOW = 0  # else stage 3 would leave models this small alone
    # Traces forward and backward as the usual backend does, and runs what it traced: without minutes in a C++ compiler.
    compiled.BACKEND = "aot_eager"
    results: dict[str, Any] = {}
    for case, settings in spec["cases"].items():
        common = {"rank": rank, "world_size": 2, "port": settings.pop("port"), "max_tokens": MAX_TOKENS, "lr": 1e-3}
        if settings.get("dtype") == "fp16" and not zero_settings.has_fp16(torch.device("cpu")):
            pretend_fp16()
        torch._dynamo.reset()  # else the code of the case before serves this one
        counters.clear()
        learner = make_learner({"policy": spec["model"]}, backend="deepspeed", **common, **settings)
        if (parts := vars(learner.engines["policy"])).get("scaler") is not None:
            parts["scaler"].cur_scale = float(SCALE)
        results[case] = {**take_steps(learner), "graphs": counters["stats"]["unique_graphs"]}
        before = weights(learner, "policy")
        if settings.get("dtype") == "fp16":
            saved = save(learner, Path(f"{spec['results']}-{case}"), 2)
            results[case]["overflow"] = overflow(learner)
            learner.restore(str(saved))
            engine: Any = learner.engines["policy"]
            results[case]["restored"] = (
                engine.counters,
                all(torch.equal(one, before[name]) for name, one in weights(learner, "policy").items()),
            )
        learner.close()
    torch.save(results, f"{spec['results']}-{rank}.pt")


def pretend_fp16() -> None:
    """Torch computes in fp16 on any processor, if slowly; DeepSpeed, and so the learner, asks for one that has it. All else is real."""
    deepspeed._import()
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    zero_settings.has_fp16 = lambda device: True


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
