"""Four real gloo ranks in rings of 1, 2 and 4 against one process: the same gradients, the same steps, for every kind of loss."""

import json
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from hone.algos.batch import Batch
from hone.learner.packing import shards, unshard
from tests.learner.processes import free_port, run_once
from tests.learner.ring_ranks import CRITIC, LENGTHS, POLICY, build, train
from tests.learner.tiny import make_batch, save_model

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


def close(got: torch.Tensor, expected: torch.Tensor, *, what: str) -> None:
    """Equal but for fp32 rounding, measured against the tensor's largest entry."""
    assert_close(got, expected, rtol=1e-5, atol=1e-5 * max(float(expected.abs().max()), 1e-3), msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_over_a_ring_is_the_step_of_one_process(runs: dict[str, Any], case: str, step: str) -> None:
    expected, ranks = runs["single"]["steps"][step], [rank["steps"][step] for rank in runs[case]]
    assert expected["norm"] > 0.01, "a step without a gradient shows nothing"
    for rank in ranks:
        assert rank["gradients"].keys() == rank["weights"].keys() == expected["weights"].keys()
        for name, weight in expected["weights"].items():
            close(rank["gradients"][name], expected["gradients"][name], what=f"gradient of {name}")
            close(rank["weights"][name], weight, what=name)
        assert_close(rank["norm"], expected["norm"], rtol=1e-5, atol=1e-8)
    for name, value in expected["metrics"].items():
        # Figures add up over all ranks: each ring tells its own once.
        assert_close(
            sum(rank["metrics"].get(name, 0.0) for rank in ranks),
            value,
            rtol=1e-5,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("case", CASES)
def test_every_rank_of_a_ring_evaluates_the_whole_shard(runs: dict[str, Any], case: str) -> None:
    batch: Batch = make_batch(LENGTHS)
    ring, max_tokens = CASES[case]["ring"], CASES[case]["max_tokens"]
    assert ring == 1 or max_tokens < max(LENGTHS)
    cut, alone = (shards(batch, ranks=ranks, max_tokens=tokens) for ranks, tokens in ((4 // ring, max_tokens * ring), (1, 200)))
    for name in ("logp", "values"):
        arrays = [rank[name] for rank in runs[case]]
        assert all(torch.equal(array, arrays[rank // ring * ring]) for rank, array in enumerate(arrays))
        together = unshard(cut, arrays[::ring], cu_seqlens=batch.cu_seqlens)
        assert_close(together, unshard(alone, [runs["single"][name]], cu_seqlens=batch.cu_seqlens), rtol=1e-5, atol=1e-5)
