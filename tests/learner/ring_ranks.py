"""Four ranks of the ring tests, run as `python -m tests.learner.ring_ranks SPEC.json`; `train` also runs in the test process.

Adam's epsilon is 1: a step is then about lr g, which fp32 rounding moves by as little as it moves g. With the usual epsilon a
step is lr g / |g|, whose sign is rounding where the gradient is.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from hone.algos.algorithms import GRPO, GSPO, PPO
from hone.algos.algorithms.terms import Clip, KLPenalty
from hone.algos.batch import Batch, Scored, rows_of_tokens
from hone.algos.protocol import Loss, Outputs
from hone.learner import learner as learner_module
from hone.learner.config import ActorConfig, AdamConfig, CriticConfig, DeepSpeedConfig, RefConfig
from hone.learner.engines import deepspeed
from hone.learner.learner import Learner
from hone.learner.packing import Shard, shards, unshard
from hone.learner.roles import RoleSpec
from hone.learner.supervised import NextToken
from hone.learner.tensor_parallel.cut import cut_of
from tests.learner import flash_stand_in
from tests.learner.tiny import make_batch, score

LENGTHS = [7, 40, 1, 30, 9, 5, 16, 11, 2]
TINY = [1, 2, 3]
"""A step in which ranks of a ring of four have no token at all."""


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """A loss of every row's summed log-ratio, as preference losses have it: wrong if any of a row's tokens is missing."""

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        ratio = torch.where(scored.action_mask, outputs.logp - scored.require("ref_logp"), 0.0)
        sums = torch.zeros(scored.rows).index_add(0, rows_of_tokens(scored.cu_seqlens), ratio)
        live = torch.zeros(scored.rows).index_add(0, rows_of_tokens(scored.cu_seqlens), scored.weights) > 0
        total = -(logsigmoid(0.3 * sums) * live).sum()
        return Loss(total=total, metrics={"row_sums": total.detach()})


KL = KLPenalty(init_coef=0.1, use_loss=True, estimator="k3")
POLICY = {
    "sft": NextToken(),
    "ppo": PPO(kl=KL, entropy_coef=0.01),
    "grpo": GRPO(kl=KL),
    "gspo": GSPO(clip=Clip(low=0.99, high=99.0)),  # wide, or no row would be left to learn from
    "row sums": RowSums(),
}
CRITIC = {"critic": POLICY["ppo"]}


def build(
    model: str,
    *,
    backend: str,
    stage: int,
    ring: int,
    head_stride: int | None,
    rank: int,
    world_size: int,
    port: int,
    max_tokens: int,
    impl: Literal["own", "ring-flash-attn"] = "own",
) -> Learner:
    adam = AdamConfig(lr=0.5, eps=1.0)
    configs = {
        "policy": ActorConfig(adam=adam, gradient_checkpointing_enable=ring == 2),
        "critic": CriticConfig(adam=adam),
        "reference": RefConfig(),
    }
    return Learner(
        roles={role: RoleSpec(kind=role, model=model, config=config, total_steps=100) for role, config in configs.items()},
        ds=DeepSpeedConfig(
            zero_stage=stage, param_dtype="fp32", ring_attn_size=ring, ring_attn_head_stride=head_stride, ring_attn_impl=impl
        ),
        backend=backend,
        rank=rank,
        world_size=world_size,
        master_addr="127.0.0.1",
        master_port=port,
        seed=0,
        max_tokens=max_tokens,
    )


def gradients(learner: Learner, role: str) -> dict[str, torch.Tensor]:
    """The summed gradient of every parameter that trains, in full, after the step's last backward."""
    named = [(name, parameter) for name, parameter in learner.engines[role].module.named_weights() if parameter.requires_grad]
    if learner.backend == "single" or learner.engines[role].stage == 0:
        return {name: whole(parameter, parameter.grad) for name, parameter in named if parameter.grad is not None}
    from deepspeed.utils import safe_get_full_grad

    return {name: whole(parameter, safe_get_full_grad(parameter)) for name, parameter in named}


def whole(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A copy of a parameter's gradient, over tensor-parallel ranks put together."""
    cut = cut_of(parameter)
    return gradient.clone() if cut is None else cut.whole(gradient)


def train(learner: Learner, *, rank: int, rings: int, ring: int, max_tokens: int) -> dict[str, Any]:
    """What must not depend on the ring: results per token, and every step's gradient, norm, figures and weights."""

    def part(batch: Any) -> Shard:
        return shards(batch, ranks=rings, max_tokens=max_tokens * ring)[rank // ring]

    batch = make_batch(LENGTHS)
    result: dict[str, Any] = {"logp": learner.logp("reference", part(batch)), "steps": {}}
    for number, (name, algo) in enumerate([*POLICY.items(), *CRITIC.items(), ("tiny", POLICY["ppo"])]):
        source = make_batch(TINY) if name == "tiny" else batch
        scored = dataclasses.replace(score(source, seed=number), ref_logp=score(source, seed=20 + number).old_logp)
        role = "critic" if name == "critic" else "policy"
        engine, seen = learner.engines[role], {}
        step = engine.step
        engine.step = lambda seen=seen, role=role, step=step: (seen.update(gradients(learner, role)), step())[1]
        update = learner.update_critic if role == "critic" else learner.update_policy
        outcome = update(role, part(scored), algo)
        engine.step = step
        weights = {weight: tensor.detach().clone() for weight, tensor in learner.weights(role)}
        result["steps"][name] = {"gradients": seen, "norm": outcome.grad_norm, "metrics": outcome.metrics, "weights": weights}
    result["values"] = learner.values("critic", part(batch))
    return result


def close(got: torch.Tensor, expected: torch.Tensor, *, what: str) -> None:
    """Equal but for fp32 rounding, measured against the tensor's largest entry."""
    assert_close(got, expected, rtol=1e-5, atol=1e-5 * max(float(expected.abs().max()), 1e-3), msg=lambda text: f"{what}: {text}")


def same_step(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """What every rank says of a step is what one process says."""
    assert expected["norm"] > 0.01, "a step without a gradient shows nothing"
    for rank in ranks:
        assert rank["gradients"].keys() == rank["weights"].keys() == expected["weights"].keys()
        for name, weight in expected["weights"].items():
            close(rank["gradients"][name], expected["gradients"][name], what=f"gradient of {name}")
            close(rank["weights"][name], weight, what=name)
        assert_close(rank["norm"], expected["norm"], rtol=1e-5, atol=1e-8)
    for name, value in expected["metrics"].items():
        # Figures add up over all ranks: each ring tells its own once.
        assert_close(
            sum(rank["metrics"].get(name, 0.0) for rank in ranks),
            value,
            rtol=1e-5,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def same_results(ranks: list[dict[str, Any]], single: dict[str, Any], *, ring: int, max_tokens: int) -> None:
    """Every rank has its ring's whole shard, and the shards together are what one process has."""
    batch: Batch = make_batch(LENGTHS)
    assert ring == 1 or max_tokens < max(LENGTHS)
    cut, alone = (shards(batch, ranks=count, max_tokens=tokens) for count, tokens in ((4 // ring, max_tokens * ring), (1, 200)))
    for name in ("logp", "values"):
        arrays = [rank[name] for rank in ranks]
        assert all(torch.equal(array, arrays[rank // ring * ring]) for rank, array in enumerate(arrays))
        together = unshard(cut, arrays[::ring], cu_seqlens=batch.cu_seqlens)
        assert_close(together, unshard(alone, [single[name]], cu_seqlens=batch.cu_seqlens), rtol=1e-5, atol=1e-5)


def run(spec: dict[str, Any], rank: int) -> None:
    deepspeed.WHOLE_BELOW = 0  # else stage 3 would leave models this small alone
    if any(case["settings"].get("impl") == "ring-flash-attn" for case in spec["cases"]):
        flash_stand_in.enter()
        learner_module.check_ring_flash = lambda *_: None  # which refuses the CPU, and fp32
    for case in spec["cases"]:
        settings = case["settings"]
        learner = build(spec["model"], backend="deepspeed", rank=rank, world_size=4, port=case["port"], **settings)
        result = train(learner, rank=rank, rings=4 // settings["ring"], ring=settings["ring"], max_tokens=settings["max_tokens"])
        learner.close()
        torch.save(result, f"{case['out']}-{rank}.pt")


def main(spec_file: str) -> int:
    """All four ranks, forked from one process that has imported everything; 0 if all of them end well."""
    spec = json.loads(Path(spec_file).read_text())
    ranks = [get_context("fork").Process(target=run, args=(spec, rank)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    # A rank that fails leaves its peers waiting in a collective.
    # Asked once a round: between two askings the last rank may end, and waiting for none of them would never return.
    while (alive := [rank.sentinel for rank in ranks if rank.is_alive()]) and not any(rank.exitcode for rank in ranks):
        wait(alive)
    failed = any(rank.exitcode for rank in ranks)
    for rank in ranks:
        rank.kill()
        rank.join()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
