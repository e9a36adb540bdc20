"""Figures of a judged rollout become metrics; what is not finite reaches the record as a word."""

import json
from pathlib import Path

import pytest
import torch

from hone.algos.algorithms import DAPO
from hone.algos.algorithms.correction import Correction
from hone.algos.batch import Batch, Scored
from hone.algos.judging import judge
from hone.launch.measure import figure_metrics, mismatch_metrics
from hone.launch.observe.metrics import check_names
from hone.launch.observe.run_directory import RunDirectory, read_metrics


def batch(gap: list[float]) -> Batch:
    """Two prompts of two one-token samples, the first pair of equal score, and the gap old_logp - rollout_logp of each [nats]."""
    rows = torch.arange(4)
    return Batch(
        tokens=rows,
        cu_seqlens=torch.arange(5, dtype=torch.int32),
        position_ids=torch.zeros(4, dtype=torch.long),
        action_mask=torch.ones(4, dtype=torch.bool),
        rollout_logp=torch.full((4,), -200.0),
        old_logp=torch.tensor(gap) - 200.0,
        rewards=torch.tensor([1.0, 1.0, 0.0, 1.0]),
        version=torch.zeros(4, dtype=torch.long),
        group=rows // 2,
        truncated=torch.zeros(4, dtype=torch.bool),
    )


def judged(gap: list[float], correction: Correction) -> Scored:
    return judge(DAPO(correction=correction), batch(gap))


def test_figures_have_the_names_and_values_of_metrics() -> None:
    # ratios 1, 1, 2, 4: mean 2 -> chi2 = (1 + 1 + 4 + 16) / 4 - 1; ESS = 8^2 / (4 x 22); ppl ratio = (1 + 1 + 1/2 + 1/4) / 4
    two, four = 0.6931471805599453, 1.3862943611198906
    gap = [0.0, 0.0, two, four]
    assert figure_metrics(judged(gap, Correction()).figures) == pytest.approx(
        {
            "mismatch/kl": -3 * two / 4,
            "mismatch/k3": (1 - two + 3 - four) / 4,
            "mismatch/chi2": 4.5,
            "mismatch/perplexity_ratio": 0.6875,
            "mismatch/ess": 64 / 88,
            "rollout/groups": 2,
            "rollout/groups_of_one": 0,
            "rollout/groups_of_equals": 1,
        },
        rel=1e-4,
    )
    # a mask in [0, 3] rejects the last: 1, 1, 2, 0
    corrected = figure_metrics(judged(gap, Correction(level="token", mode="mask", high=3.0)).figures)
    assert {name: value for name, value in corrected.items() if "correction" in name} == pytest.approx(
        {"mismatch/correction_ess": 16 / 24, "mismatch/correction_mean": 1.0, "mismatch/correction_rejected": 0.25}, rel=1e-4
    )
    assert not corrected.keys() & mismatch_metrics(batch(gap)).keys()  # nothing is measured twice
    check_names(corrected)


def test_a_figure_without_a_name_is_refused_by_the_table() -> None:
    with pytest.raises(ValueError, match="mismatch_k9"):
        check_names(figure_metrics({"mismatch_k9": torch.tensor(1.0)}))


def test_a_figure_that_is_not_finite_is_written_as_a_word(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "dapo")
    metrics = figure_metrics(judged([0.0, 0.0, 0.0, 100.0], Correction()).figures)  # e^200 is beyond fp32
    run.append_metrics({"step": 1, **metrics})
    line = json.loads((run.path / "metrics.jsonl").read_text())
    assert line["mismatch/chi2"] == "inf" and line["mismatch/k3"] == "inf"
    assert read_metrics(run.path)[0][0]["mismatch/chi2"] == float("inf")
