"""fp16 under DeepSpeed on two gloo ranks, every ZeRO stage: the steps of plain torch in fp16, and its loss scale's way with overflow."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from hone.learner.engines.single import SingleEngine
from tests.learner.engine_ranks import MAX_TOKENS
from tests.learner.processes import free_port, run_ranks
from tests.learner.settings_ranks import SCALE, take_steps
from tests.learner.tiny import make_learner, save_model

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("half")
    cases = {str(stage): {"stage": stage, "dtype": "fp16", "max_skipped_steps": 1, "port": free_port()} for stage in STAGES}
    spec = {"model": save_model(root / "model", "qwen3-tied"), "results": str(root / "results"), "cases": cases}
    (root / "spec.json").write_text(json.dumps(spec))
    run_ranks("tests.learner.settings_ranks", root / "spec.json", root=root, ranks=2, timeout_s=280)
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> list[dict[str, Any]]:
    return [torch.load(root / f"results-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def single(root: Path) -> dict[str, Any]:
    learner = make_learner({"policy": str(root / "model")}, dtype="fp16", max_tokens=MAX_TOKENS, lr=1e-3)
    engine = learner.engines["policy"]
    assert isinstance(engine, SingleEngine) and engine.loss_scale is not None
    engine.loss_scale.scale = SCALE
    return take_steps(learner)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_in_fp16_as_plain_torch(runs: list[dict[str, Any]], single: dict[str, Any], stage: int) -> None:
    ranks = [rank[str(stage)] for rank in runs]
    for rank in ranks:
        # fp16 keeps 11 bits, and the ranks cut the batch elsewhere: each micro-batch's gradient is rounded by itself.
        assert_close(rank["norms"], single["norms"], rtol=2**-8, atol=0)
        assert all(torch.equal(one, ranks[0]["weights"][name]) for name, one in rank["weights"].items())
    off = torch.cat([(ranks[0]["weights"][name] - one).abs().flatten() for name, one in single["weights"].items()])
    # In learning rates of 1e-3; Adam's first steps are lr times a sign, which is rounding where the gradient is.
    assert float(off.mean()) < 0.05 * 1e-3
    for figure in ("policy_loss", "entropy"):
        for step, known in enumerate(single["metrics"]):
            assert_close(sum(rank["metrics"][step][figure] for rank in ranks), known[figure], rtol=2**-6, atol=2e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_lowers_the_scale_and_counts_only_at_the_lowest(runs: list[dict[str, Any]], stage: int) -> None:
    for rank in runs:
        told = rank[str(stage)]["overflow"]
        assert told["begin"] == {"steps": 2, "muon": 0, "skipped_in_a_row": 0, "loss_scale": SCALE, "loss_scale_clean": 2}
        assert told["lowered"] == (False, {**told["begin"], "loss_scale": 2**25, "loss_scale_clean": 0})
        assert told["kept"] == (False, {**told["begin"], "skipped_in_a_row": 1, "loss_scale": 1, "loss_scale_clean": 0})
        assert told["same"]
        assert "2 times in a row" in told["ended"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_brings_the_loss_scale_and_its_count_back(runs: list[dict[str, Any]], stage: int) -> None:
    for rank in runs:
        counters, same = rank[str(stage)]["restored"]
        assert counters == rank[str(stage)]["overflow"]["begin"] and same
