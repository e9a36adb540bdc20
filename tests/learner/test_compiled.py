"""`--ds.deepcompile` on two gloo ranks: the numbers of the same engine that compiles nothing, and what it refuses in words."""

import json
from typing import Any, Literal

import pytest
import torch
from torch.testing import assert_close

from hone.learner.config import ActorConfig, DeepSpeedConfig, LoraConfig
from hone.learner.engines import zero_settings
from hone.learner.optim import Training
from tests.learner.processes import free_port, run_ranks
from tests.learner.tiny import make_learner, save_model

CASES: dict[str, dict[str, Any]] = {"stage1-recompute": {"stage": 1, "gradient_checkpointing": True}, "stage2": {"stage": 2}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("compiled")
    cases = {
        f"{name}-{how}": {**case, "port": free_port(), "ds": {"deepcompile": how == "compiled"}}
        for name, case in CASES.items()
        for how in ("plain", "compiled")
    }
    spec = {"model": save_model(root / "model", "qwen3-tied"), "results": str(root / "results"), "cases": cases}
    (root / "spec.json").write_text(json.dumps(spec))
    run_ranks("tests.learner.settings_ranks", root / "spec.json", root=root, ranks=2, timeout_s=580)
    return [torch.load(root / f"results-{rank}.pt") for rank in range(2)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_transformer_trains_as_it_does_uncompiled(runs: list[dict[str, Any]], name: str) -> None:
    for rank in runs:
        plain, compiled = rank[f"{name}-plain"], rank[f"{name}-compiled"]
        assert plain.pop("graphs") == 0 and compiled.pop("graphs") >= 4  # forward and backward around each layer's attention
        assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "device", "trained", "said"),
    [
        ({"adam_offload": True}, "cpu", 1, "--ds.deepcompile keeps gradients and parameters on the device"),
        ({"lora": LoraConfig(rank=4)}, "cpu", 1, "--ds.deepcompile is for whole models"),
        ({"zero_stage": 3}, "cpu", 1, "knows stage 3's gathers on CUDA only"),
        ({"zero_stage": 3}, "cuda", 2, "DeepCompile holds one model a process, and 2 train in each here"),
    ],
)
def test_what_cannot_be_compiled_is_said_before_a_model_is_loaded(settings: dict[str, Any], device: str, trained: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        zero_settings.check(DeepSpeedConfig(deepcompile=True, **settings), device=torch.device(device), world_size=2, trained=trained)


def test_the_engine_of_one_process_compiles_nothing() -> None:
    with pytest.raises(ValueError, match=r"--ds\.deepcompile are DeepSpeed's"):
        make_learner({}, deepcompile=True)


@pytest.mark.parametrize(("device", "stage", "asked"), [("cpu", 2, False), ("cuda", 2, True), ("cuda", 0, False)])
def test_deepspeeds_own_passes_are_asked_for_where_they_can_run(device: str, stage: Literal[0, 2], asked: bool) -> None:
    ds = DeepSpeedConfig(deepcompile=True, zero_stage=stage, param_dtype="fp32")
    training = Training(config=ActorConfig(), total_steps=1)
    found = zero_settings.settings(ds, training, whole_below=0, device=torch.device(device))
    assert found.get("compile") == ({"deepcompile": True} if asked else None)
    assert "compile" not in zero_settings.settings(ds, None, whole_below=0, device=torch.device(device))
