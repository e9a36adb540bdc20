"""Adapters, 4-bit weights, mixtures and frozen parts under DeepSpeed: every ZeRO stage and number of ranks as one process of torch."""

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Qwen3Config

from tests.learner.model_ranks import ROLES, SETTINGS
from tests.learner.processes import run_ranks
from tests.learner.ranks import train
from tests.learner.test_adapters import plain_logp
from tests.learner.test_checkpoint_resume import assert_never_stopped
from tests.learner.tiny import MIXTURE, SHAPE, make_learner, save_config, save_model

CASES = [
    *(("lora", stage, "fp32", ranks) for stage in (0, 2, 3) for ranks in (1, 2)),
    ("lora", 3, "bf16", 2),
    ("four bits", 2, "fp32", 2),
    *(("mixture", stage, "fp32", 2) for stage in (0, 2, 3)),
    ("mixture", 3, "fp32", 1),
    ("mixture lora", 3, "fp32", 2),
    ("frozen", 3, "fp32", 2),
]
RESUMED = [("lora", 2, "fp32", 2), ("lora", 3, "fp32", 2), ("mixture", 3, "fp32", 2)]
LR = 1e-3
MAX_TOKENS = 42  # with these rows, rank 0 of two needs a filler


def name_of(settings: str, stage: int, dtype: str, ranks: int) -> str:
    return f"{settings.replace(' ', '-')}-{stage}-{dtype}-{ranks}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case in one pair of processes, and the same training by the engine of one process."""
    root, ports = tmp_path_factory.mktemp("ranks"), tmp_path_factory.mktemp("ports")
    models = {
        "lora": save_model(root / "model", "qwen3-tied"),
        "four bits": save_config(root / "wide", Qwen3Config(**{**SHAPE, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16})),
        "mixture": save_config(root / "mixture", MIXTURE),
    }
    models |= {"mixture lora": models["mixture"], "frozen": models["lora"]}
    cases = [
        {
            "settings": settings,
            "model": models[settings],
            "stage": stage,
            "dtype": dtype,
            "ranks": ranks,
            "resumed": (settings, stage, dtype, ranks) in RESUMED,
            "out": str(root / name_of(settings, stage, dtype, ranks)),
        }
        for settings, stage, dtype, ranks in CASES
    ]
    (root / "spec.json").write_text(json.dumps({"ports": str(ports), "max_tokens": MAX_TOKENS, "lr": LR, "cases": cases}))
    run_ranks("tests.learner.model_ranks", root / "spec.json", root=root, ranks=2, timeout_s=400)
    single = {}
    for settings, dtype in sorted({(settings, dtype) for settings, _, dtype, _ in CASES}):
        roles = dict.fromkeys(ROLES, models[settings])
        learner = make_learner(roles, lr=LR, max_tokens=MAX_TOKENS, dtype=dtype, **SETTINGS[settings])
        single[settings, dtype] = train(learner, rank=0, world_size=1, max_tokens=MAX_TOKENS)
    return {"root": root, "single": single, "models": models}


@pytest.mark.parametrize(("settings", "stage", "dtype", "ranks"), CASES)
def test_any_stage_and_ranks_train_as_one_process(runs: dict[str, Any], settings: str, stage: int, dtype: str, ranks: int) -> None:
    results = [torch.load(runs["root"] / f"{name_of(settings, stage, dtype, ranks)}-{rank}.pt") for rank in range(2)]
    single = runs["single"][settings, dtype]
    for role in ("policy", "critic"):
        for name, weight in single[role].items():
            assert torch.equal(results[0][role][name], results[1][role][name]), name
            if dtype == "fp32":
                assert_close(results[0][role][name], weight, rtol=1e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
        distances = torch.cat([(results[0][role][name] - weight).abs().flatten() for name, weight in single[role].items()])
        assert distances.mean() < 0.02 * LR, role
    assert_close(results[0]["norms"], single["norms"], rtol=1e-5 if dtype == "fp32" else 2**-6, atol=1e-5)
    parts = results if ranks == 2 else results[:1]
    for step, expected in enumerate(single["metrics"]):
        for role, metrics in enumerate(expected):
            total = {name: sum(part["metrics"][step][role].get(name, 0.0) for part in parts) for name in metrics}
            assert_close(total, metrics, rtol=1e-4 if dtype == "fp32" else 2**-5, atol=1e-5)
            assert ("mixture" in settings) == bool({"aux_loss", "critic_aux_loss"} & metrics.keys())


@pytest.mark.parametrize(("settings", "stage", "dtype", "ranks"), RESUMED)
def test_a_run_that_stops_goes_on_bit_for_bit(runs: dict[str, Any], settings: str, stage: int, dtype: str, ranks: int) -> None:
    for rank in range(2):
        assert_never_stopped(torch.load(runs["root"] / f"{name_of(settings, stage, dtype, ranks)}-{rank}.pt")["resumed"])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_adapter_two_ranks_export_is_the_merged_model(runs: dict[str, Any], stage: int) -> None:
    export = runs["root"] / f"{name_of('lora', stage, 'fp32', 2)}-export-0"
    base = AutoModelForCausalLM.from_pretrained(runs["models"]["lora"])
    alone = plain_logp(PeftModel.from_pretrained(base, export / "adapter"))
    assert_close(plain_logp(AutoModelForCausalLM.from_pretrained(export)), alone, rtol=1e-4, atol=1e-5)
