"""The proof of the learner: one optimiser step is the same however it is cut, and the same as plain torch takes, a row at a time.

Every loss (SFT, PPO with its critic, GRPO, GSPO, DPO) on every kind of model (Llama, Qwen3, a mixture of experts with its balancing
loss, tied embeddings, adapters beside frozen weights), in fp32, against transformers and torch in fp64, where an adapter is
W + alpha / rank B A as it is written: merged and unmerged are one. The options are covered pairwise, not as a full product: for any
two of model, ranks and ring, ZeRO stage, packing, recomputation, every combination of their values is in `CASES` (a test counts
them), and each case takes all six steps from the same weights. 960 combinations would take hours to say what 30 say in minutes.
Models over two ranks (tensor parallelism) have a table of their own, in which each dense kind of model meets each layout of ranks, and
each of both meets every ZeRO stage but one.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.learner.one_step import MODELS, PACKINGS, STEPS
from tests.learner.tiny import save_config

# model, (ranks, ring), ZeRO stage (none: the engine of one process), packing, recomputation
TABLE: list[tuple[str, tuple[int, int], int | None, str, bool]] = [
    ("llama", (1, 1), 3, "tight", False),
    ("llama", (2, 1), 2, "whole", True),
    ("llama", (2, 2), 0, "one by one", False),
    ("llama", (4, 1), 1, "two rows", True),
    ("llama", (4, 2), 1, "whole", False),
    ("llama", (4, 4), 0, "tight", True),
    ("qwen3", (1, 1), 2, "two rows", False),
    ("qwen3", (2, 1), 3, "one by one", True),
    ("qwen3", (2, 2), 1, "tight", True),
    ("qwen3", (4, 1), 0, "whole", False),
    ("qwen3", (4, 2), 3, "two rows", True),
    ("qwen3", (4, 4), 3, "whole", False),
    ("moe", (1, 1), 1, "one by one", True),
    ("moe", (2, 1), 0, "two rows", False),
    ("moe", (2, 2), 3, "whole", True),
    ("moe", (4, 1), 2, "tight", True),
    ("moe", (4, 2), 2, "one by one", True),
    ("moe", (4, 4), 1, "one by one", True),
    ("tied", (1, 1), 0, "whole", True),
    ("tied", (2, 1), 1, "tight", False),
    ("tied", (2, 2), 2, "two rows", True),
    ("tied", (4, 1), 3, "one by one", True),
    ("tied", (4, 2), 0, "tight", False),
    ("tied", (4, 4), 2, "two rows", True),
    ("adapters", (1, 1), 0, "one by one", True),
    ("adapters", (2, 1), 3, "two rows", True),
    ("adapters", (2, 2), 2, "tight", False),
    ("adapters", (4, 1), 1, "whole", True),
    ("adapters", (4, 2), 3, "one by one", False),
    ("adapters", (4, 4), 1, "tight", True),
    ("llama", (1, 1), None, "one by one", False),
    ("qwen3", (1, 1), None, "two rows", True),
    ("moe", (1, 1), None, "tight", False),
    ("tied", (1, 1), None, "whole", True),
    ("adapters", (1, 1), None, "tight", True),
]
# the same, of models over two ranks each: (ranks, ring of such pairs)
TENSOR_TABLE: list[tuple[str, tuple[int, int], int, str, bool]] = [
    ("llama", (2, 1), 0, "whole", False),
    ("llama", (4, 1), 3, "tight", True),
    ("llama", (4, 2), 2, "one by one", False),
    ("qwen3", (2, 1), 1, "two rows", True),
    ("qwen3", (4, 1), 0, "one by one", False),
    ("qwen3", (4, 2), 3, "whole", True),
    ("tied", (2, 1), 3, "one by one", True),
    ("tied", (4, 1), 2, "two rows", False),
    ("tied", (4, 2), 1, "tight", True),
]
CASES = {
    f"{model}, {ranks} ranks, ring {ring}{', model over 2' * (tensor > 1)}, {'no ZeRO' if stage is None else f'ZeRO {stage}'}, {packing}"
    f"{', recompute' * recompute}": {
        **{"model": model, "ranks": ranks, "ring": ring, "tensor": tensor, "stage": stage, "packing": packing, "recompute": recompute}
    }
    for tensor, table in ((1, TABLE), (2, TENSOR_TABLE))
    for model, (ranks, ring), stage, packing, recompute in table
}
pytestmark = pytest.mark.timeout(900)


def test_every_pair_of_options_is_in_the_table() -> None:
    options = [list(MODELS), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)], [0, 1, 2, 3], list(PACKINGS), [False, True]]
    for one, other in itertools.combinations(range(len(options)), 2):
        wanted = set(itertools.product(options[one], options[other]))
        assert wanted <= {(row[one], row[other]) for row in TABLE}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases on real gloo ranks, and the reference of every model."""
    root = tmp_path_factory.mktemp("one-step")
    for name, config in MODELS.items():
        save_config(root / name, config)
    (root / "jobs.json").write_text(json.dumps({"models": list(MODELS), "cases": CASES}))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "error", "-m", "tests.learner.one_step", str(root)]
    with (root / "main.log").open("w") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=840).returncode
    if code:
        pytest.fail((root / "main.log").read_text()[-8000:])
    return root


def load(root: Path, name: str) -> list[dict[str, Any]]:
    """What the ranks of a case have, or the end of their logs."""
    results = [root / f"{name}-{rank}.pt" for rank in range(CASES[name]["ranks"])]
    if not all(file.exists() for file in results):
        pytest.fail("\n".join(file.with_suffix(".log").read_text()[-4000:] for file in results))
    return [torch.load(file) for file in results]


def close(got: torch.Tensor, expected: torch.Tensor, rounding: float, *, what: str) -> None:
    """Equal but for fp32 rounding: 1e-5 of the tensor's largest entry, or 4 times what plain torch in fp32 is off, a row at a time."""
    allowed = max(1e-5 * max(float(expected.abs().max()), 1e-3), 4 * rounding)
    assert_close(got.double(), expected, rtol=1e-5, atol=allowed, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_step_of_plain_torch(root: Path, name: str) -> None:
    expected, ranks = torch.load(root / f"reference-{CASES[name]['model']}.pt", weights_only=False), load(root, name)
    for step in STEPS:
        known, first = expected[step], ranks[0][step]
        assert known["norm"] > 0.01, "a step without a gradient shows nothing"
        assert first["gradients"].keys() == known["gradients"].keys() and first["weights"].keys() == known["weights"].keys()
        assert_close(first["norm"], known["norm"], rtol=1e-5, atol=0)
        for gradient_name, gradient in known["gradients"].items():
            off = known["rounding"]["gradients"][gradient_name]
            close(first["gradients"][gradient_name], gradient, off, what=f"{step}, gradient of {gradient_name}")
        for weight_name, weight in known["weights"].items():
            close(first["weights"][weight_name], weight, known["rounding"]["weights"][weight_name], what=f"{step}, {weight_name}")
            assert all(torch.equal(rank[step]["weights"][weight_name], first["weights"][weight_name]) for rank in ranks)
        assert {rank[step]["norm"] for rank in ranks} == {first["norm"]}
        total = {figure: sum(rank[step]["metrics"].get(figure, 0.0) for rank in ranks) for figure in known["metrics"]}
        assert_close(total, known["metrics"], rtol=1e-5, atol=2e-6, msg=lambda text, step=step: f"{step}: {text}")


@pytest.mark.parametrize("model", MODELS)
def test_what_counts_as_rounding_is_small(root: Path, model: str) -> None:
    for step, known in torch.load(root / f"reference-{model}.pt", weights_only=False).items():
        for name, weight in known["weights"].items():
            assert known["rounding"]["weights"][name] <= 1e-6 * float(weight.abs().max()), (step, name)
        for name in known["gradients"]:
            assert known["rounding"]["gradients"][name] <= 1e-5 * max(known["norm"], 1.0), (step, name)


@pytest.mark.parametrize("model", MODELS)
def test_every_step_has_a_gradient_for_every_weight(root: Path, model: str) -> None:
    for step, known in torch.load(root / f"reference-{model}.pt", weights_only=False).items():
        assert [name for name, gradient in known["gradients"].items() if not gradient.any()] == [], step
