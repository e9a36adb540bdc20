"""Four real gloo ranks in rings of 1, 2 and 4 against one process: the same gradients, the same steps, for every kind of loss."""

import json
from typing import Any

import pytest
import torch

from tests.learner.processes import free_port, run_once
from tests.learner.ring_ranks import CRITIC, POLICY, build, same_results, same_step, train
from tests.learner.tiny import save_model

CASES = {
    "ring 1 zero 2": {"ring": 1, "stage": 2, "head_stride": None, "max_tokens": 44},
    "ring 2 zero 3": {"ring": 2, "stage": 3, "head_stride": None, "max_tokens": 24},
    "ring 4 zero 0": {"ring": 4, "stage": 0, "head_stride": None, "max_tokens": 12},
    "ring 4 zero 2, gathered": {"ring": 4, "stage": 2, "head_stride": 1, "max_tokens": 12},
}
"""With fewer tokens per rank than the longest row has, except in rings of one. Rings of two also recompute activations."""
STEPS = [*POLICY, *CRITIC, "tiny"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case on four ranks, in one set of processes; and the same training in this one."""
    root = tmp_path_factory.mktemp("ring")
    model = save_model(root / "model", "qwen3-tied")
    cases = [{"settings": case, "port": free_port(), "out": str(root / name)} for name, case in CASES.items()]
    (root / "spec.json").write_text(json.dumps({"model": model, "cases": cases}))
    run_once("tests.learner.ring_ranks", root / "spec.json", root=root, timeout_s=240)
    alone = build(model, backend="single", stage=0, ring=1, head_stride=None, rank=0, world_size=1, port=0, max_tokens=200)
    single = train(alone, rank=0, rings=1, ring=1, max_tokens=200)
    return {"single": single, **{name: [torch.load(root / f"{name}-{rank}.pt") for rank in range(4)] for name in CASES}}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_over_a_ring_is_the_step_of_one_process(runs: dict[str, Any], case: str, step: str) -> None:
    same_step([rank["steps"][step] for rank in runs[case]], runs["single"]["steps"][step])


@pytest.mark.parametrize("case", CASES)
def test_every_rank_of_a_ring_evaluates_the_whole_shard(runs: dict[str, Any], case: str) -> None:
    same_results(runs[case], runs["single"], ring=CASES[case]["ring"], max_tokens=CASES[case]["max_tokens"])
