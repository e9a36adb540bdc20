"""Stop and resume: the run that was taken up from a checkpoint against the run that never stopped, bit for bit.

One and two gloo ranks of DeepSpeed and the engine of one process; then one number of ranks and ZeRO stage
taken up by another.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from hone.learner.checkpoint import directory as checkpoints
from hone.learner.checkpoint.export import export
from hone.learner.checkpoint.shard_file import RoleReader
from hone.learner.errors import CheckpointError
from tests.learner.checkpoint_ranks import MAX_TOKENS, ROLES, cross_case
from tests.learner.test_ranks import free_port, wait
from tests.learner.tiny import make_learner, save_model

# name -> stage (none: the engine of one process), number format, parameters left whole under stage 3, numbers of ranks
CASES = {
    "single": (None, "fp32", False, [1]),
    "single-bf16": (None, "bf16", False, [1]),
    "stage0": (0, "fp32", False, [1, 2]),
    "stage1": (1, "fp32", False, [2]),
    "stage2": (2, "fp32", False, [1, 2]),
    "stage3": (3, "fp32", False, [1, 2]),
    "stage3-whole": (3, "fp32", True, [2]),
    "stage2-bf16": (2, "bf16", False, [2]),
    "stage3-bf16": (3, "bf16", False, [2]),
    # one model over both ranks
    "stage0-tensor": (0, "fp32", False, [2]),
    "stage2-tensor": (2, "bf16", False, [2]),
    "stage3-tensor": (3, "fp32", False, [2]),
}
RESUMED = [(name, ranks) for name, case in CASES.items() for ranks in case[3]]
CROSS = [
    ("stage3", 2, 1, 1, 1),
    ("stage3", 2, 1, 0, 1),
    ("stage2", 1, 2, 3, 1),
    ("stage2", 1, 2, 1, 1),
    ("stage0-tensor", 2, 1, 2, 1),
    ("stage3-tensor", 2, 2, 3, 1),
    ("stage3-tensor", 2, 2, 1, 2),
    ("stage2", 1, 2, 0, 2),
    ("stage3", 2, 2, 3, 2),
]
"""Case and number of ranks that saved it; number of ranks, stage and ranks of one model it is taken up with."""


def folder(root: Path, name: str, ranks: int) -> Path:
    return root / f"{name}-{ranks}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases in one pair of processes."""
    root = tmp_path_factory.mktemp("resume")
    model = save_model(root / "model", "qwen3-tied")
    cases: list[dict[str, Any]] = []
    for name, ranks in RESUMED:
        stage, dtype, whole, _ = CASES[name]
        case = {"name": f"{name}-{ranks}", "cross": False, "path": str(folder(root, name, ranks))}
        tensor = 2 if name.endswith("tensor") else 1
        cases.append({**case, "ranks": ranks, "stage": stage, "dtype": dtype, "whole": whole, "tensor": tensor})
    for name, saved_by, ranks, stage, tensor in CROSS:
        case = {"name": f"{name}-{saved_by}-{ranks}-{stage}-{tensor}", "cross": True, "path": str(folder(root, name, saved_by) / "step_2")}
        cases.append({**case, "ranks": ranks, "stage": stage, "dtype": "fp32", "whole": False, "tensor": tensor})
    for case in cases:
        case["ports"] = [[free_port(), free_port()] for _ in range(2)]
    (root / "spec.json").write_text(json.dumps({"model": model, "out": str(root / "results"), "cases": cases}))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "error", "-m", "tests.learner.checkpoint_ranks", str(root / "spec.json")]
    logs = [root / f"rank{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            processes.append(subprocess.Popen([*command, str(rank)], env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        codes = wait(processes, timeout_s=280)
    finally:
        for process in processes:
            process.kill()
    if codes != [0, 0]:
        pytest.fail("\n".join(log.read_text()[-4000:] for log in logs))
    return {"root": root, "model": model, "results": [torch.load(root / f"results-{rank}.pt") for rank in range(2)]}


def assert_never_stopped(result: dict[str, Any]) -> None:
    assert result["fresh"] > 0 and result["moved"] > 0, "the comparison could not have failed"
    assert {name: result[name] for name in ("taken up", "steps", "end", "draw")} == {"taken up": [], "steps": [], "end": [], "draw": []}


@pytest.mark.parametrize(("name", "ranks"), RESUMED)
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(runs: dict[str, Any], name: str, ranks: int) -> None:
    for rank in range(2):
        assert_never_stopped(runs["results"][rank][f"{name}-{ranks}"])


@pytest.mark.parametrize(("name", "saved_by", "ranks", "stage", "tensor"), CROSS)
def test_other_ranks_and_stages_go_on_from_the_same_numbers(
    runs: dict[str, Any], name: str, saved_by: int, ranks: int, stage: int, tensor: int
) -> None:
    model, path = runs["model"], folder(runs["root"], name, saved_by) / "step_2"
    single = cross_case(lambda: make_learner(dict.fromkeys(ROLES, model), lr=1e-3, max_tokens=MAX_TOKENS, ema_beta=0.9), path)
    for result in [*(runs["results"][rank][f"{name}-{saved_by}-{ranks}-{stage}-{tensor}"] for rank in range(ranks)), single]:
        assert result["wrong"] == []
        for weight_name, weight in result["weights"].items():
            # One Adam step of 1e-3 whose gradient was summed in another order.
            expected = single["weights"][weight_name]
            assert_close(weight, expected, rtol=1e-5, atol=2e-5, msg=lambda text, name=weight_name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["stage0", "stage2-bf16", "stage3", "stage3-bf16", "stage0-tensor", "stage3-tensor"])
def test_a_checkpoint_of_two_ranks_exports_in_one_process(runs: dict[str, Any], name: str, tmp_path: Path) -> None:
    path = folder(runs["root"], name, 2) / "step_2"
    for role in ROLES:
        export(path, tmp_path / role, role=role)
        exported, reader = load_file(tmp_path / role / "model.safetensors"), RoleReader(path, role)
        assert exported.keys() == {one for one, _ in reader.layout}
        dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
        assert all(torch.equal(tensor, reader.whole("master", one).to(dtype)) for one, tensor in exported.items())


def test_a_checkpoint_of_another_model_or_other_roles_is_refused_before_anything_changes(runs: dict[str, Any], tmp_path: Path) -> None:
    path = folder(runs["root"], "stage3", 2) / "step_2"
    assert checkpoints.find(path.parent).path == path
    other = make_learner({"policy": save_model(tmp_path / "other", "llama-untied")})
    before = {name: tensor.clone() for name, tensor in other.weights("policy")}
    with pytest.raises(CheckpointError, match=r"another model: of \d+ weights of the policy, \d+ differ, the first model\.layers"):
        other.restore(str(path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.weights("policy"))
    averaging = make_learner({"policy": save_model(tmp_path / "same", "qwen3-tied")}, ema_beta=0.9)
    without = tmp_path / "step_1"
    without.mkdir()
    plain = make_learner({"policy": str(tmp_path / "same")})
    plain.save(str(without))
    assert plain.saved(True) is not None
    with pytest.raises(CheckpointError, match=r"has no ema of the policy; .*--train\.enable-ema"):
        averaging.restore(str(without))
    with pytest.raises(CheckpointError, match="0 files of role 'reference'"):
        make_learner(dict.fromkeys(("policy", "reference"), runs["model"])).restore(str(path))
