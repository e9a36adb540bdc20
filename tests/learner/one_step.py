"""The ranks of the one-step proof, run as `python -m tests.learner.one_step ROOT`, and its reference in plain transformers and torch.

One process imports everything once; the reference of each model and the ranks of each case are forked from it, so nothing of one
case is left for the next. What is run stands in ROOT/jobs.json, what came out in ROOT/<name>-<rank>.pt.

Adam's epsilon is 1: a step is then about lr g, which fp32 rounding moves by as little as it moves g. With the usual epsilon a
step is lr g / |g|, whose sign is rounding where the gradient is.
"""

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from hone.algos.algorithms import GRPO, GSPO, PPO
from hone.algos.algorithms.dpo import DPO
from hone.algos.algorithms.sft import SFT
from hone.algos.algorithms.terms import Clip, KLPenalty
from hone.algos.batch import Packed
from hone.algos.offline import weighed_demonstrations, weighed_pairs
from hone.algos.protocol import Loss, Outputs
from hone.algos.reduce import Reduction
from hone.learner.checkpoint.pieces import MASTER
from hone.learner.config import ActorConfig, AdamConfig, CriticConfig, DeepSpeedConfig, LoraConfig
from hone.learner.engines import deepspeed
from hone.learner.learner import Learner
from hone.learner.mixture import FIGURES
from hone.learner.packing import shards
from hone.learner.roles import RoleSpec
from tests.learner.ring_ranks import gradients
from tests.learner.tiny import SHAPE, make_batch, score

EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "mlp_only_layers": []}
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=False),
    "moe": Qwen3MoeConfig(**SHAPE, **EXPERTS, tie_word_embeddings=False),
    "tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "adapters": LlamaConfig(**SHAPE, tie_word_embeddings=False),
}
LORA = LoraConfig(rank=3, alpha=6)
"""Of the model called "adapters", whose own weights stand still: beside every linear layer W but the head, W + alpha / rank B A."""
ROWS = [7, 40, 1, 30, 9, 5, 16, 11, 2]
PAIRS = [7, 12, 9, 5, 16, 11, 2, 30, 6, 4]
"""Rows of the steps that learn from rewards or demonstrations, and of pairs; one has no action token, one is longer than some caps."""
PACKINGS: dict[str, dict[str, Any]] = {
    "one by one": {"max_tokens": 40, "max_rows": 1},
    "two rows": {"max_tokens": 80, "max_rows": 2},
    "tight": {"max_tokens": 44},
    "whole": {"max_tokens": 400},
}
"""How a rank's (or ring's) rows fall into micro-batches; of pairs, there are twice as many rows in each."""
KL = KLPenalty(init_coef=0.1, use_loss=True, estimator="k3")
STEPS: dict[str, Any] = {
    "sft": SFT(),
    "ppo": PPO(kl=KL, entropy_coef=0.01),
    "grpo": GRPO(kl=KL),
    "gspo": GSPO(clip=Clip(low=0.2, high=0.3)),
    "dpo": DPO(nll_loss_coef=0.1),
    "critic": PPO(),
}
"""One optimiser step of each, all from the same weights and a fresh optimiser; the last is the critic's, all others the policy's."""
ADAM = AdamConfig(lr=0.5, eps=1.0, weight_decay=0.01)
SETTINGS: dict[str, Any] = {"adam": ADAM, "lr_scheduler": "constant", "lr_warmup_ratio": 0.0, "max_norm": 0.5}
BALANCE = 0.2
"""Weight of the load-balancing loss of the mixture of experts."""
RANKS_AT_ONCE = 4


def batch_of(step: str, logp_of: Callable[[Packed], Tensor]) -> Packed:
    """The rows of a step, whole. Old and reference log-probabilities are the policy's (`logp_of`) and a little off, as they would be."""
    number = list(STEPS).index(step)
    source = make_batch(PAIRS if step == "dpo" else ROWS, seed=number)
    noise = torch.randn(2, source.tokens.numel(), generator=torch.Generator().manual_seed(number)) * 0.1
    policy = logp_of(source).float()
    fields = {"old_logp": policy + noise[0], "ref_logp": policy + noise[1]}
    if step in ("sft", "dpo"):
        rows = Packed(**{one.name: getattr(source, one.name) for one in dataclasses.fields(Packed)})
        if step == "sft":
            return weighed_demonstrations(rows, reduction=Reduction())
        return weighed_pairs(dataclasses.replace(rows, ref_logp=fields["ref_logp"]))
    return dataclasses.replace(score(source, seed=number), **fields)


def one_by_one(batch: Packed, of_row: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Packed per-token results of a function of one row of T_i tokens, which says nothing (T_i - 1 results) of the row's first."""
    starts = batch.cu_seqlens.tolist()
    rows = [of_row(batch.tokens[start:end]) for start, end in itertools.pairwise(starts)]
    whole = [torch.cat([torch.cat([part.new_zeros(1), part]) for part in parts]) for parts in zip(*rows, strict=True)]
    return tuple(torch.where(batch.action_mask, one, 0.0) for one in whole)


def reference(model: str, dtype: torch.dtype) -> dict[str, Any]:
    """Every step on plain transformers models, a row at a time: its batch, gradients before clipping, norm, figures, weights."""
    plain: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "experts_implementation": "eager"}
    policy = AutoModelForCausalLM.from_pretrained(model, **plain).eval()
    backbone = AutoModel.from_pretrained(model, **plain).eval()
    head = nn.Linear(SHAPE["hidden_size"], 1, bias=False, dtype=dtype)
    # Not zero, as a fresh head is: nothing would reach the layers below it.
    head.weight.data = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    make = Adapted if Path(model).name == "adapters" else Plain
    parts = {"policy": make(policy, prefix=""), "critic": make(backbone, prefix="model.")}
    named = {"policy": parts["policy"].trained(), "critic": {**parts["critic"].trained(), "score.weight": head.weight}}

    def tokens_under_policy(row: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        distribution = (parts["policy"](row).logits[0, :-1] / temperature).log_softmax(-1)
        return distribution.gather(1, row[1:, None])[:, 0], -(distribution.exp() * distribution).sum(-1)

    def values(row: Tensor) -> tuple[Tensor]:
        return (head(parts["critic"](row).last_hidden_state[0, :-1])[:, 0],)

    def logp_of(rows: Packed) -> Tensor:
        with torch.no_grad():
            return one_by_one(rows, lambda row: tokens_under_policy(row, rows.temperature))[0]

    start = {role: {name: one.detach().clone() for name, one in own.items()} for role, own in named.items()}
    result: dict[str, Any] = {}
    for step, algo in STEPS.items():
        role = role_of(step)
        own = named[role]
        for name, one in own.items():
            one.data.copy_(start[role][name])
        batch = batch_of(step, logp_of)
        parts[role].heard.clear()
        if role == "critic":
            loss = algo.value_loss(one_by_one(batch, values)[0], batch)
        else:
            logp, entropy = one_by_one(batch, lambda row, batch=batch: tokens_under_policy(row, batch.temperature))
            loss = algo.loss(Outputs(logp=logp, entropy=entropy), batch)
        if "moe" in Path(model).name:
            loss += parts[role].balance(FIGURES[role][0])
        for one in own.values():
            one.grad = None
        loss.total.backward()
        found = {name: one.grad.clone() for name, one in own.items()}
        norm = float(nn.utils.clip_grad_norm_(own.values(), SETTINGS["max_norm"]))
        adamw_of(own).step()
        weights = parts[role].weights() | ({"score.weight": head.weight.detach().clone()} if role == "critic" else {})
        metrics = {name: float(value) for name, value in loss.metrics.items()}
        told = {"batch": batch, "start": {name: one.float() for name, one in start[role].items()}}
        result[step] = {**told, "gradients": found, "norm": norm, "metrics": metrics, "weights": weights}
    return result


class Plain:
    """A transformers model, all of which trains; its weights are called `prefix` and its own names."""

    def __init__(self, model: nn.Module, *, prefix: str) -> None:
        self.model, self.prefix = model, prefix
        self.routed = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
        self.heard: list[tuple[Tensor, ...]] = []

    def __call__(self, row: Tensor) -> Any:
        output = self.model(input_ids=row[None], use_cache=False, **self.routed)
        if self.routed:
            self.heard.append(output.router_logits)
        return output

    def balance(self, figure: str) -> Loss:
        """Transformers' own load-balancing loss over all rows that were heard."""
        logits = tuple(torch.cat(layer) for layer in zip(*self.heard, strict=True))
        loss = load_balancing_loss_func(logits, EXPERTS["num_experts"], EXPERTS["num_experts_per_tok"])
        return Loss(total=BALANCE * loss, metrics={figure: loss.detach()})

    def trained(self) -> dict[str, nn.Parameter]:
        return {f"{self.prefix}{name}": one for name, one in self.model.named_parameters()}

    def weights(self) -> dict[str, Tensor]:
        return {name: one.detach().clone() for name, one in self.trained().items()}


class Adapted(Plain):
    """The same with adapters by their formula: W + alpha / rank B A is put in W's place for every call."""

    def __init__(self, model: nn.Module, *, prefix: str) -> None:
        super().__init__(model, prefix=prefix)
        generator = torch.Generator().manual_seed(7)
        self.own: dict[str, nn.Parameter] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                for kind, shape in {"A": (LORA.rank, layer.in_features), "B": (layer.out_features, LORA.rank)}.items():
                    drawn = torch.randn(shape, generator=generator) * 0.1
                    self.own[f"{name}.lora_{kind}.weight"] = nn.Parameter(drawn.to(layer.weight.dtype))

    def merged(self) -> dict[str, Tensor]:
        """The weights that have adapters, with them."""
        layers = [name.removesuffix(".lora_A.weight") for name in self.own if ".lora_A." in name]
        product = {name: self.own[f"{name}.lora_B.weight"] @ self.own[f"{name}.lora_A.weight"] for name in layers}
        return {f"{name}.weight": self.model.get_parameter(f"{name}.weight") + LORA.alpha / LORA.rank * product[name] for name in layers}

    def __call__(self, row: Tensor) -> Any:
        return functional_call(self.model, self.merged(), (), {"input_ids": row[None], "use_cache": False})

    def trained(self) -> dict[str, nn.Parameter]:
        return {f"{self.prefix}{name}": one for name, one in self.own.items()}

    def weights(self) -> dict[str, Tensor]:
        whole = dict(self.model.named_parameters()) | self.merged()
        return {f"{self.prefix}{name}": one.detach().clone() for name, one in whole.items()}


def adamw_of(own: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    groups = [
        {"params": [one for one in own.values() if one.dim() > 1], "weight_decay": ADAM.weight_decay},
        {"params": [one for one in own.values() if one.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=ADAM.lr, betas=ADAM.betas, eps=ADAM.eps)


class Weights:
    """Weights as a checkpoint of a run that has not taken a step: see `checkpoint.pieces.Source`."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights, self.counters = weights, {"steps": 0}

    def sections(self, name: str) -> frozenset[str]:
        return frozenset({MASTER})

    def read(self, section: str, name: str, *, start: int, numel: int, columns: tuple[int, int] | None = None) -> Tensor:
        whole = self.weights[name]
        return (whole if columns is None else whole[:, columns[0] : columns[1]]).flatten()[start : start + numel]


def role_of(step: str) -> str:
    return "critic" if step == "critic" else "policy"


def build(model: str, case: dict[str, Any], *, rank: int, port: int) -> Learner:
    settings = SETTINGS | {"gradient_checkpointing_enable": case["recompute"], "aux_loss_coef": BALANCE * (case["model"] == "moe")}
    configs = {"policy": ActorConfig(**settings), "critic": CriticConfig(**settings)}
    plain, lora = case["stage"] is None, LORA if case["model"] == "adapters" else LoraConfig()
    return Learner(
        roles={role: RoleSpec(kind=role, model=model, config=config, total_steps=100) for role, config in configs.items()},
        ds=DeepSpeedConfig(
            zero_stage=case["stage"] or 0,
            param_dtype="fp32",
            ring_attn_size=case["ring"],
            tensor_parallel_size=case["tensor"],
            lora=lora,
        ),
        backend="single" if plain else "deepspeed",
        rank=rank,
        world_size=case["ranks"],
        master_addr="127.0.0.1",
        master_port=port,
        seed=0,
        max_tokens=-(-2 * PACKINGS[case["packing"]]["max_tokens"] // case["ring"]),
    )


def fused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's experts, which it has one by one, as transformers' models hold them."""
    result = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for stem in sorted({name.split(".experts.")[0] for name in weights.keys() - result.keys()}):
        own = [f"{stem}.experts.{expert}" for expert in range(sum(name.startswith(f"{stem}.experts.") for name in weights) // 3)]
        gates_and_ups = [torch.cat([weights[f"{one}.gate_proj.weight"], weights[f"{one}.up_proj.weight"]]) for one in own]
        result[f"{stem}.experts.gate_up_proj"] = torch.stack(gates_and_ups)
        result[f"{stem}.experts.down_proj"] = torch.stack([weights[f"{one}.down_proj.weight"] for one in own])
    return result


def train(learner: Learner, case: dict[str, Any], known: dict[str, dict[str, Any]], *, rank: int) -> dict[str, Any]:
    """Every step through the learner: gradients, norm, this rank's share of the figures, weights."""
    result = {}
    for step, algo in STEPS.items():
        role, unit = role_of(step), 2 if step == "dpo" else 1
        packing = {name: unit * value for name, value in PACKINGS[case["packing"]].items()}
        sharing = case["ring"] * case["tensor"]
        part = shards(known[step]["batch"], ranks=case["ranks"] // sharing, **packing)[rank // sharing]
        engine, seen = learner.engines[role], {}
        engine.restore(Weights(known[step]["start"]))
        own_step = engine.step
        engine.step = lambda seen=seen, role=role, own_step=own_step: (seen.update(gradients(learner, role)), own_step())[1]
        update = learner.update_critic if role == "critic" else learner.update_policy
        outcome = update(role, part, algo)
        engine.step = own_step
        weights = fused({name: tensor.detach().clone() for name, tensor in learner.weights(role)})
        result[step] = {"gradients": seen, "norm": outcome.grad_norm, "metrics": outcome.metrics, "weights": weights}
    return result


def run_reference(root: Path, name: str) -> None:
    """The truth in fp64; `rounding` has how far each gradient and weight of the same in fp32 is from it, at most."""
    exact, single = (reference(str(root / name), dtype) for dtype in (torch.float64, torch.float32))
    for step, known in exact.items():
        known["rounding"] = {
            kind: {name: float((single[step][kind][name] - one).abs().max()) for name, one in known[kind].items()}
            for kind in ("gradients", "weights")
        }
    torch.save(exact, root / f"reference-{name}.pt")


def run_rank(root: Path, name: str, case: dict[str, Any], rank: int, port: int) -> None:
    deepspeed.WHOLE_BELOW = 0  # else stage 3 would leave models this small alone
    with (root / f"{name}-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    known = torch.load(root / f"reference-{case['model']}.pt", weights_only=False)
    learner = build(str(root / case["model"]), case, rank=rank, port=port)
    result = train(learner, case, known, rank=rank)
    learner.close()
    torch.save(result, root / f"{name}-{rank}.pt")


def main(root: Path) -> None:
    """All jobs, as many at a time as make `RANKS_AT_ONCE` processes. A case that fails leaves its ranks' logs and no results."""
    from tests.learner.processes import free_port

    spec = json.loads((root / "jobs.json").read_text())
    deepspeed._import()
    context = get_context("fork")
    together([[context.Process(target=run_reference, args=(root, name))] for name in spec["models"]])
    cases = sorted(spec["cases"].items(), key=lambda named: -named[1]["ranks"])
    jobs = []
    for name, case in cases:
        port = free_port()
        jobs.append([context.Process(target=run_rank, args=(root, name, case, rank, port)) for rank in range(case["ranks"])])
    together(jobs)


def together(jobs: list[list[Any]]) -> None:
    """Runs processes, those of one job at the same time. One that fails ends its job: its peers wait for it in a collective."""
    waiting, running = list(jobs), []
    while waiting or running:
        while waiting and sum(map(len, running)) + len(waiting[0]) <= max(RANKS_AT_ONCE, len(waiting[0])):
            running.append(waiting.pop(0))
            for process in running[-1]:
                process.start()
        wait([process.sentinel for job in running for process in job if process.is_alive()], timeout=1)
        for job in list(running):
            if any(process.exitcode for process in job):
                for process in job:
                    process.kill()
            if not any(process.is_alive() for process in job):
                running.remove(job)


if __name__ == "__main__":
    began = time.monotonic()
    main(Path(sys.argv[1]))
    print(f"{time.monotonic() - began:.0f} s")
