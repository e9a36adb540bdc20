"""Every offline algorithm on two gloo ranks, under ZeRO 3, over a ring, and with one model over both, against one process: the same steps,
the same answers.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from hone.learner.packing import shards, unshard, unshard_rows
from tests.learner.offline_ranks import ALGORITHMS, build, rows_of, train
from tests.learner.test_ranks import free_port
from tests.learner.tiny import save_model

CASES = {
    "zero 2": {"ring": 1, "tensor": 1, "stage": 2, "max_tokens": 34},
    "zero 3": {"ring": 1, "tensor": 1, "stage": 3, "max_tokens": 50},
    "ring of 2": {"ring": 2, "tensor": 1, "stage": 3, "max_tokens": 18},
    "model over 2": {"ring": 1, "tensor": 2, "stage": 2, "max_tokens": 34},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case on two ranks, in one pair of processes; and the same training in this one, all rows in one micro-batch."""
    root = tmp_path_factory.mktemp("offline")
    model = save_model(root / "model", "qwen3-tied")
    cases = [{"settings": case, "port": free_port(), "out": str(root / name)} for name, case in CASES.items()]
    (root / "spec.json").write_text(json.dumps({"model": model, "cases": cases}))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "error", "-m", "tests.learner.offline_ranks", str(root / "spec.json")]
    with (root / "ranks.log").open("w") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=240).returncode
    if code:
        pytest.fail((root / "ranks.log").read_text()[-8000:])
    alone = build(model, backend="single", stage=0, ring=1, tensor=1, rank=0, world_size=1, port=0, max_tokens=200)
    single = train(alone, rank=0, ranks=1, ring=1, tensor=1, max_tokens=200)
    return {"root": root, "single": single, **{name: [torch.load(root / f"{name}-{rank}.pt") for rank in range(2)] for name in CASES}}


def close(got: torch.Tensor, expected: torch.Tensor, *, what: str) -> None:
    """Equal but for fp32 rounding, measured against the tensor's largest entry."""
    assert_close(got, expected, rtol=1e-4, atol=2e-5 * max(float(expected.abs().max()), 1e-3), msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("case", CASES)
def test_steps_of_two_ranks_are_those_of_one_process(runs: dict[str, Any], case: str, name: str) -> None:
    expected, ranks = runs["single"]["steps"][name], [rank["steps"][name] for rank in runs[case]]

    def added_up(figures: list[dict[str, float]]) -> dict[str, float]:
        return {figure: sum(one.get(figure, 0.0) for one in figures) for figure in figures[0]}

    assert_close(added_up([rank["before"] for rank in ranks]), expected["before"], rtol=1e-4, atol=1e-5)
    for step in range(2):
        assert_close(added_up([rank["metrics"][step] for rank in ranks]), expected["metrics"][step], rtol=1e-4, atol=1e-5)
    for rank in ranks:
        assert_close(rank["norms"], expected["norms"], rtol=1e-4, atol=0)
        for weight, tensor in expected["weights"].items():
            close(rank["weights"][weight], tensor, what=weight)
    assert expected["norms"][0] > 1e-3
    assert expected["metrics"][0] == pytest.approx(expected["before"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_what_models_say_comes_back_in_order(runs: dict[str, Any], case: str) -> None:
    settings, single = CASES[case], runs["single"]
    ring, sharing = settings["ring"], settings["ring"] * settings["tensor"]

    def cut(name: str) -> Any:
        return shards(rows_of(name), ranks=2 // sharing, max_tokens=settings["max_tokens"] * ring)

    ranks = runs[case][::sharing]
    close(unshard_rows(cut("rm"), [rank["scores"] for rank in ranks]), single["scores"], what="scores")
    steps = rows_of("prm")
    columns = [unshard(cut("prm"), [rank["label_logits"][:, label] for rank in ranks], cu_seqlens=steps.cu_seqlens) for label in range(2)]
    close(torch.stack(columns, -1), single["label_logits"], what="label logits")
    assert not single["label_logits"][~steps.action_mask].any() and single["label_logits"][steps.action_mask].all()
    for place in range(3):
        for index, what in enumerate(("tokens", "logp")):
            found = unshard(cut("sft"), [rank["top"][index][:, place].double() for rank in ranks], cu_seqlens=steps.cu_seqlens)
            close(found, single["top"][index][:, place].double(), what=what)


@pytest.mark.parametrize("case", ["zero 3", "model over 2"])
def test_a_reward_model_trained_by_two_ranks_is_transformers_own(runs: dict[str, Any], case: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(runs["root"] / f"{case}-reward", attn_implementation="eager")
    rows = rows_of("rm")
    bounds = rows.cu_seqlens.tolist()
    with torch.no_grad():
        scores = [model(input_ids=rows.tokens[None, start:end]).logits[0, 0] for start, end in pairwise(bounds)]
    assert_close(torch.stack(scores), runs["single"]["scores"], rtol=1e-3, atol=1e-4)
    assert runs["single"]["scores"].std() > 1e-3
