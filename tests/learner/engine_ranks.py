"""Two ranks of the engine tests, run as `python -m tests.learner.engine_ranks SPEC.json RANK` in the repository; `measure` also runs
in the test process, for the engine of one process.

Every case trains twice: plainly, and with naps, refused steps and exports of the average in between, which must change nothing.
"""

import dataclasses
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from hone.algos.algorithms import PPO
from hone.algos.algorithms.terms import KLPenalty
from hone.learner.engines import deepspeed
from hone.learner.engines.protocol import Engine
from hone.learner.errors import NumericsError
from hone.learner.learner import Learner
from hone.learner.packing import Shard, shards
from hone.learner.roles import StepResult
from tests.learner.ranks import _Poison, weights
from tests.learner.tiny import copies, make_batch, make_learner, own, score

LENGTHS = [7, 12, 3, 20, 9, 5, 16, 11, 2]
MAX_TOKENS = 24
BETA = 0.9
STEPS = 3
ROLES = ("policy", "critic", "reference")
ALGO = PPO(kl=KLPenalty(init_coef=0.0))


def part(learner: Learner, seed: int) -> Shard:
    return shards(score(make_batch(LENGTHS), seed=seed), ranks=copies(learner), max_tokens=MAX_TOKENS)[own(learner)]


def update(learner: Learner, seed: int) -> list[StepResult]:
    """One optimiser step of policy and critic."""
    return [learner.update_policy("policy", part(learner, seed), ALGO), learner.update_critic("critic", part(learner, seed), ALGO)]


def refused(learner: Learner, where: str) -> StepResult:
    """A step of the policy that is not finite on the last rank alone."""
    shard, hooks = part(learner, 50), []
    if learner.rank == learner.world_size - 1 and where == "loss":
        # Infinite through a constant: the loss is, the gradients are not.
        class Infinite:
            def loss(self, outputs: Any, scored: Any) -> Any:
                loss = ALGO.loss(outputs, scored)
                return dataclasses.replace(loss, total=loss.total + float("inf"))

        return learner.update_policy("policy", shard, Infinite())
    if learner.rank == learner.world_size - 1:
        module = learner.engines["policy"].module.causal_lm.base_model
        hooks = [module.norm.register_forward_hook(lambda _m, _i, output: _Poison.apply(output))]
    result = learner.update_policy("policy", shard, ALGO)
    for hook in hooks:
        hook.remove()
    return result


def state(learner: Learner) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold, copied."""
    return {f"{role}/{piece.key}": piece.values.clone() for role, one in learner.engines.items() for piece in one.pieces()}


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return sorted(one.keys() ^ other.keys()) + [name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])]


def held_bytes(engine: Engine) -> int:
    """Memory of an engine's parameters, shards included."""
    found = {}
    for parameter in engine.module.parameters():
        for tensor in (parameter.detach(), vars(parameter).get("ds_tensor")):
            if tensor is not None:
                storage = tensor.untyped_storage()
                found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def measure(build: Any, out: str | None = None) -> dict[str, Any]:
    """Both runs of a case, and what must be so of them."""
    plain: Learner = build(enable_sleep=False)
    trajectory = [weights(plain, "policy")]
    steps = []
    for step in range(STEPS):
        steps.append(update(plain, step))
        trajectory.append(weights(plain, "policy"))
    end, logp = state(plain), plain.logp("reference", part(plain, 0))
    plain.close()

    other: Learner = build(enable_sleep=True)
    result: dict[str, Any] = {"trajectory": trajectory, "norms": [[one.grad_norm for one in pair] for pair in steps]}
    again = [update(other, 0)]
    before = state(other)
    awake = {role: held_bytes(engine) for role, engine in other.engines.items()}
    result["policy slept while the critic trained"] = awake["policy"] == 0 and awake["critic"] > 0
    result["moved"] = other.sleep()
    result["held asleep"] = sum(held_bytes(engine) for engine in other.engines.values())
    result["saved asleep"] = differences(state(other), before)
    result["reference"] = torch.equal(other.logp("reference", part(other, 0)), logp)
    for where in ("loss", "gradient"):
        kept = weights(other, "policy")
        left_out = refused(other, where)
        result[where] = (left_out.applied, other.engines["policy"].steps, differences(weights(other, "policy"), kept))
        kept_state = {name: one for name, one in state(other).items() if name.startswith("policy")}
        result[f"{where} state"] = [name for name in differences(kept_state, before) if name.startswith("policy")]
    again += [update(other, 1)]
    now = weights(other, "policy")
    if out is not None:
        other.export("policy", out, average=True)
    engine = other.engines["policy"]
    engine.wake(training=True)
    with engine.averaged():
        result["average of two"] = weights(other, "policy")
    result["as before the average"] = differences(weights(other, "policy"), now)
    again += [update(other, step) for step in range(2, STEPS)]
    result["steps"] = [str(pair) for pair in zip(steps, again, strict=True) if pair[0] != pair[1]]
    result["end"] = differences(state(other), end)
    result["counters"] = other.engines["policy"].counters
    for attempt in range(3):  # two in a row are allowed
        try:
            refused(other, "gradient" if attempt % 2 else "loss")
        except NumericsError as error:
            result["gave up"] = (attempt, str(error))
    other.close()
    return result


def main(spec_file: str, rank: int) -> None:
    spec = json.loads(Path(spec_file).read_text())
    deepspeed.WHOLE_BELOW = 0  # else stage 3 would leave models this small alone
    results: dict[str, Any] = {}
    for case in spec["cases"]:
        ports = iter(case["ports"])

        def build(case: dict[str, Any] = case, ports: Any = ports, **ds: Any) -> Learner:
            return make_learner(
                dict.fromkeys(ROLES, spec["model"]),
                backend="deepspeed",
                stage=case["stage"],
                dtype=case["dtype"],
                rank=rank,
                world_size=2,
                port=next(ports),
                max_tokens=MAX_TOKENS,
                lr=1e-3,
                ema_beta=BETA,
                max_skipped_steps=2,
                **ds,
                optim=case.get("optim", "adam"),
                **case["ds"],
            )

        try:
            results[case["name"]] = measure(build, case["out"])
        except Exception:
            print(case["name"], traceback.format_exc(), flush=True)
            raise
    torch.save(results, f"{spec['results']}-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
