"""Two ranks that train by every offline algorithm, run as `python -m tests.learner.offline_ranks SPEC.json`; `train` also runs here.

Adam's epsilon is 1, so a step is about lr g, which rounding moves by as little as it moves g (see `ring_ranks`).
"""

import dataclasses
import json
import sys
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from hone.algos.algorithms.distillation import Distillation
from hone.algos.algorithms.dpo import DPO
from hone.algos.algorithms.kto import KTO
from hone.algos.algorithms.process_reward_model import ProcessRewardModel
from hone.algos.algorithms.reward_model import RewardModel
from hone.algos.algorithms.sft import SFT
from hone.algos.batch import Packed
from hone.algos.offline import weighed_demonstrations, weighed_judgements, weighed_pairs, weighed_steps, weighed_taught, with_anchor
from hone.algos.reduce import Reduction
from hone.learner.config import ActorConfig, AdamConfig, DeepSpeedConfig
from hone.learner.engines import deepspeed
from hone.learner.learner import Learner
from hone.learner.packing import Shard, shards
from hone.learner.roles import RoleSpec
from tests.learner.tiny import VOCABULARY, in_chunks, make_batch

LENGTHS = [7, 24, 4, 18, 9, 5, 16, 11]
ALGORITHMS = {
    "sft": ("policy", SFT()),
    "dpo": ("policy", DPO(nll_loss_coef=0.3)),
    "kto": ("policy", KTO(undesirable_loss_weight=2.0)),
    "rm": ("reward", RewardModel(centre_coef=0.01)),
    "prm": ("process", ProcessRewardModel()),
    "prm by tokens": ("policy", ProcessRewardModel(reward_tokens=(3, 17))),
    "kd": ("policy", Distillation(divergence="jsd", temperature=2.0)),
    "kd of top tokens": ("policy", Distillation(kd_coef=1.0)),
}


def rows_of(name: str) -> Packed:
    """Labelled rows for each of them, from a seed."""
    batch, generator = make_batch(LENGTHS, temperature=1.0), torch.Generator().manual_seed(5)
    rows = Packed(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(Packed)})
    rows = dataclasses.replace(rows, ref_logp=-4 + torch.randn(len(rows.tokens), generator=generator))
    if name == "sft":
        return weighed_demonstrations(rows, reduction=Reduction())
    if name in ("dpo", "rm"):
        return weighed_pairs(rows, margins=torch.arange(4) * 0.1)
    if name == "kto":
        return with_anchor(weighed_judgements(rows, torch.arange(8) % 3 > 0), torch.tensor([0.8, 4.0]))
    if name.startswith("prm"):
        ends = rows.action_mask & (torch.arange(len(rows.tokens)) % 4 == 3)
        share = torch.rand(len(rows.tokens), generator=generator)
        return weighed_steps(dataclasses.replace(rows, action_mask=ends), torch.stack([1 - share, share], -1), reduction=Reduction())
    teacher = torch.randn(len(rows.tokens), VOCABULARY, generator=generator).log_softmax(-1)
    if name == "kd":
        return weighed_taught(rows, teacher, reduction=Reduction())
    top = teacher.topk(5)
    return weighed_taught(rows, top.values, reduction=Reduction(), teacher_tokens=top.indices)


def build(
    model: str, *, backend: str, stage: int, ring: int, tensor: int, rank: int, world_size: int, port: int, max_tokens: int
) -> Learner:
    config = ActorConfig(adam=AdamConfig(lr=0.5, eps=1.0))
    learner = Learner(
        roles={kind: RoleSpec(kind=kind, model=model, config=config, total_steps=100) for kind in ("policy", "reward", "process")},
        ds=DeepSpeedConfig(zero_stage=stage, param_dtype="fp32", ring_attn_size=ring, tensor_parallel_size=tensor),
        backend=backend,
        rank=rank,
        world_size=world_size,
        master_addr="127.0.0.1",
        master_port=port,
        seed=0,
        max_tokens=max_tokens,
    )
    in_chunks(learner.engines["policy"].module.head, 3)  # so that ranks run different numbers of chunks
    return learner


def train(learner: Learner, *, rank: int, ranks: int, ring: int, tensor: int, max_tokens: int) -> dict[str, Any]:
    """Two steps of each algorithm: figures before and of the steps, norms, weights after; and what models say in the end."""

    def part(name: str) -> Shard:
        return shards(rows_of(name), ranks=ranks // (ring * tensor), max_tokens=max_tokens * ring)[rank // (ring * tensor)]

    result: dict[str, Any] = {"steps": {}}
    for name, (role, algo) in ALGORITHMS.items():
        before = learner.evaluate_offline(role, part(name), algo)
        outcomes = [learner.update_offline(role, part(name), algo) for _ in range(2)]
        weights = {weight: tensor.detach().clone() for weight, tensor in learner.weights(role)}
        norms, metrics = [one.grad_norm for one in outcomes], [one.metrics for one in outcomes]
        result["steps"][name] = {"before": before, "norms": norms, "metrics": metrics, "weights": weights}
    result["scores"] = learner.scores("reward", part("rm"))
    result["label_logits"] = learner.label_logits("process", part("prm"))
    result["top"] = learner.top_logp("policy", part("sft"), k=3, temperature=2.0)
    return result


def run(spec: dict[str, Any], rank: int) -> None:
    deepspeed.WHOLE_BELOW = 0  # else stage 3 would leave models this small alone
    for case in spec["cases"]:
        settings = case["settings"]
        learner = build(spec["model"], backend="deepspeed", rank=rank, world_size=2, port=case["port"], **settings)
        result = train(learner, rank=rank, ranks=2, **{name: settings[name] for name in ("ring", "tensor", "max_tokens")})
        learner.export("reward", case["out"] + "-reward")
        learner.close()
        torch.save(result, f"{case['out']}-{rank}.pt")


def main(spec_file: str) -> int:
    """Both ranks, forked from one process that has imported everything; 0 if both end well."""
    spec = json.loads(Path(spec_file).read_text())
    ranks = [get_context("fork").Process(target=run, args=(spec, rank)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    while (alive := [rank.sentinel for rank in ranks if rank.is_alive()]) and not any(rank.exitcode for rank in ranks):
        wait(alive)  # a rank that fails leaves its peer waiting in a collective
    failed = any(rank.exitcode for rank in ranks)
    for rank in ranks:
        rank.kill()
        rank.join()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
