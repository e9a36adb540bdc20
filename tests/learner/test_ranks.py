"""Two gloo ranks under every ZeRO stage against one process of plain torch: the same numbers, and the same refusals."""

import json
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hone.algos.batch import Batch
from hone.learner.packing import shards, unshard
from tests.learner.processes import free_port, run_ranks
from tests.learner.ranks import LENGTHS, train
from tests.learner.tiny import make_batch, make_learner, save_model

CASES = [
    *(("qwen3-tied", stage, "fp32") for stage in range(4)),
    *(("llama-untied", stage, "fp32") for stage in (2, 3)),
    *(("qwen3-tied", stage, "bf16") for stage in range(4)),
]
LR = 1e-3
NORM_RTOL = {"fp32": 1e-5, "bf16": 2**-7}
METRIC_RTOL = {"fp32": 1e-4, "bf16": 2**-5}
VALUE_ATOL = {"fp32": 1e-4, "bf16": 1e-3}
"""Two ranks cut the batch elsewhere, and bf16 rounds each micro-batch's gradient to 8 bits: norms agree to a unit of that, metrics of
the second step to a few, because the KL estimate exponentiates; the values come after it, too (measured: 3e-4 of 0.03)."""
BF16_DRIFT = 0.02
"""Mean distance of weights after the two steps, in learning rates. Adam's step is about lr g / |g|: where the gradient is rounding
noise its sign is too, so single weights may be 4 lr apart, but few are (measured: mean 0.004). A wrong scale moves all of them."""
MAX_TOKENS = 42  # with these rows, rank 0 needs a filler


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case on two ranks, in one pair of processes; and the same training on one rank of the single-process engine."""
    root = tmp_path_factory.mktemp("ranks")
    models = {kind: save_model(root / kind, kind) for kind in ("qwen3-tied", "llama-untied")}
    cases = [
        {
            "roles": dict.fromkeys(("policy", "critic", "reference"), models[kind]),
            "stage": stage,
            "port": free_port(),
            "dtype": dtype,
            "out": str(root / f"{kind}-{stage}-{dtype}"),
            "break": ["loss" if stage % 2 else "gradient"] if kind == "qwen3-tied" else ["gradient" if stage % 2 else "loss"],
        }
        for kind, stage, dtype in CASES
    ]
    spec = {"world_size": 2, "max_tokens": MAX_TOKENS, "lr": LR, "cases": cases}
    (root / "spec.json").write_text(json.dumps(spec))
    run_ranks("tests.learner.ranks", root / "spec.json", root=root, ranks=2, timeout_s=240)
    single = {
        (kind, dtype): train(
            make_learner(dict.fromkeys(("policy", "critic", "reference"), models[kind]), lr=LR, max_tokens=MAX_TOKENS, dtype=dtype),
            rank=0,
            world_size=1,
            max_tokens=MAX_TOKENS,
        )
        for kind, dtype in sorted({(kind, dtype) for kind, _, dtype in CASES})
    }
    return {"root": root, "single": single}


def load(runs: dict[str, Any], kind: str, stage: int, dtype: str) -> list[dict[str, Any]]:
    return [torch.load(runs["root"] / f"{kind}-{stage}-{dtype}-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("kind", "stage", "dtype"), CASES)
def test_two_ranks_train_as_one_process(runs: dict[str, Any], kind: str, stage: int, dtype: str) -> None:
    ranks, single = load(runs, kind, stage, dtype), runs["single"][kind, dtype]
    full = sum(weight.numel() for weight in single["policy"].values())
    assert [rank["resident"] for rank in ranks] == [0 if stage == 3 else full] * 2  # stage 3 holds shards, not parameters
    for role in ("policy", "critic"):
        assert ranks[0][role].keys() == single[role].keys()
        for name, weight in single[role].items():
            assert torch.equal(ranks[0][role][name], ranks[1][role][name]), name
            if dtype == "fp32":
                # Two Adam steps of 1e-3; where a gradient is near Adam's eps, its rounding is what is divided by.
                assert_close(ranks[0][role][name], weight, rtol=1e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
        distances = [(ranks[0][role][name] - weight).abs().flatten() for name, weight in single[role].items()]
        assert torch.cat(distances).mean() < BF16_DRIFT * LR, role
    assert_close(ranks[0]["norms"], single["norms"], rtol=NORM_RTOL[dtype], atol=1e-5)
    for step, expected in enumerate(single["metrics"]):
        for role, metrics in enumerate(expected):
            total = {name: sum(rank["metrics"][step][role].get(name, 0.0) for rank in ranks) for name in metrics}
            assert_close(total, metrics, rtol=METRIC_RTOL[dtype], atol=1e-5)


@pytest.mark.parametrize(("kind", "stage", "dtype"), CASES)
def test_what_two_ranks_evaluate_comes_back_in_the_batchs_order(runs: dict[str, Any], kind: str, stage: int, dtype: str) -> None:
    ranks, single = load(runs, kind, stage, dtype), runs["single"][kind, dtype]
    batch: Batch = make_batch(LENGTHS)
    one, two = (shards(batch, ranks=count, max_tokens=MAX_TOKENS) for count in (1, 2))
    assert any(part.fillers for part in two), "the case is meant to need a filler"
    for name in ("old_logp", "ref_logp", "values"):
        together = unshard(two, [rank[name] for rank in ranks], cu_seqlens=batch.cu_seqlens)
        alone = unshard(one, [single[name]], cu_seqlens=batch.cu_seqlens)
        assert_close(together, alone, rtol=1e-4, atol=VALUE_ATOL[dtype], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("kind", "stage", "dtype"), CASES)
def test_every_rank_refuses_a_step_that_is_not_finite_on_one(runs: dict[str, Any], kind: str, stage: int, dtype: str) -> None:
    for rank in load(runs, kind, stage, dtype):
        (where,) = {"loss", "gradient"} & rank.keys()
        said = {"loss": "micro-batch losses are not finite", "gradient": "the gradient norm is not finite"}[where]
        assert rank[where].startswith("policy: ") and said in rank[where] and "at optimiser step 2" in rank[where]
        assert all(torch.equal(weight, rank["policy"][name]) for name, weight in rank[f"policy after {where}"].items())


@pytest.mark.parametrize(("kind", "stage", "dtype"), CASES)
def test_an_export_of_two_ranks_loads_in_transformers(runs: dict[str, Any], kind: str, stage: int, dtype: str) -> None:
    exported = dict(AutoModelForCausalLM.from_pretrained(runs["root"] / f"{kind}-{stage}-{dtype}-policy").named_parameters())
    trained = load(runs, kind, stage, dtype)[0]["policy"]
    assert exported.keys() == trained.keys()
    assert all(torch.equal(weight.float(), trained[name]) for name, weight in exported.items())
