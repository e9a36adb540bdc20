"""One rank of the multi-rank tests, run as `python -m tests.learner.ranks SPEC.json RANK` in the repository.

For every case of the spec it builds a learner, trains policy and critic for two steps, and (rank 0) writes what came out.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from hone.algos.algorithms import PPO
from hone.algos.algorithms.terms import KLPenalty
from hone.learner.engines import deepspeed
from hone.learner.errors import NumericsError
from hone.learner.learner import Learner
from hone.learner.packing import shards
from tests.learner.tiny import in_chunks, make_batch, make_learner, score

LENGTHS = [7, 5, 3, 42, 9, 4, 6, 7, 2]  # one row is worth all others, so that its rank has no second micro-batch
ALGO = PPO(kl=KLPenalty(init_coef=0.1, use_loss=True, estimator="k3"), entropy_coef=0.01)


def weights(learner: Learner, role: str) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().float().clone() for name, tensor in learner.weights(role)}


def train(learner: Learner, *, rank: int, world_size: int, max_tokens: int) -> dict[str, object]:
    """Two optimiser steps of policy and critic; everything that must not depend on engine, stage, ranks or packing."""
    for role in ("policy", "reference"):
        in_chunks(learner.engines[role].module.head, 3)  # so that ranks run different numbers of chunks
    batch = make_batch(LENGTHS)
    own = shards(batch, ranks=world_size, max_tokens=max_tokens)[rank]
    result: dict[str, object] = {"old_logp": learner.logp("policy", own), "ref_logp": learner.logp("reference", own)}
    steps = []
    for step in range(2):
        scored = dataclasses.replace(score(batch, seed=step + 1), ref_logp=score(batch, seed=9).old_logp)
        part = shards(scored, ranks=world_size, max_tokens=max_tokens)[rank]
        steps.append([learner.update_policy("policy", part, ALGO), learner.update_critic("critic", part, ALGO)])
    result["norms"] = [[one.grad_norm for one in pair] for pair in steps]
    result["metrics"] = [[one.metrics for one in pair] for pair in steps]
    result["values"] = learner.values("critic", own)
    return {**result, "policy": weights(learner, "policy"), "critic": weights(learner, "critic")}


def break_and_catch(learner: Learner, *, rank: int, world_size: int, max_tokens: int, where: str) -> str:
    """A non-finite advantage or weight gradient on rank 1 only; every rank must refuse the step."""
    scored = dataclasses.replace(score(make_batch(LENGTHS)), ref_logp=torch.zeros(sum(LENGTHS)))
    part = shards(scored, ranks=world_size, max_tokens=max_tokens)[rank]
    hooks = []
    if rank == world_size - 1 and where == "loss":
        part = dataclasses.replace(part, batch=dataclasses.replace(part.batch, advantages=part.batch.advantages * float("nan")))
    if rank == world_size - 1 and where == "gradient":
        module = learner.engines["policy"].module.causal_lm.base_model
        hooks = [module.norm.register_forward_hook(lambda _m, _i, output: _Poison.apply(output))]
    try:
        learner.update_policy("policy", part, ALGO)
    except NumericsError as error:
        return str(error)
    finally:
        for hook in hooks:
            hook.remove()
    return "no error"


class _Poison(torch.autograd.Function):
    """Leaves values alone and makes every gradient infinite: a backward that overflows under a finite loss."""

    @staticmethod
    def forward(ctx: object, states: torch.Tensor) -> torch.Tensor:
        return states.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, float("inf"))


def main(spec_file: str, rank: int) -> None:
    spec = json.loads(Path(spec_file).read_text())
    deepspeed.WHOLE_BELOW = 0  # else stage 3 would leave models this small alone
    for case in spec["cases"]:
        common = {"rank": rank, "world_size": spec["world_size"], "max_tokens": spec["max_tokens"]}
        learner = make_learner(
            case["roles"], backend="deepspeed", stage=case["stage"], port=case["port"], dtype=case["dtype"], lr=spec["lr"], **common
        )
        result = train(learner, **common)
        result["resident"] = sum(parameter.numel() for parameter in learner.engines["policy"].module.parameters())
        learner.export("policy", case["out"] + "-policy")
        for where in case["break"]:
            result[where] = break_and_catch(learner, where=where, **common)
            result[f"policy after {where}"] = weights(learner, "policy")
        learner.close()
        torch.save(result, f"{case['out']}-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
