"""Rings by the ring-flash-attn package itself, its two kernels of flash-attn stood in for by torch: the same steps as one process.

On a GPU with flash-attn, the package against our own form. Elsewhere it is refused.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Qwen3Config

from hone.learner.attention import ring_flash
from hone.learner.attention.ring_flash import check_ring_flash
from hone.learner.attention.varlen import packed_attention, row_arguments
from hone.learner.attention.wire import GroupWire
from hone.learner.context import slice_of
from hone.learner.errors import ModelError
from hone.learner.learner import Learner
from tests.learner.processes import free_port, run_once
from tests.learner.ring_ranks import CRITIC, POLICY, build, same_results, same_step, train
from tests.learner.tiny import SHAPE, make_learner, save_config

CASES = {
    "ring 2 zero 3": {"ring": 2, "stage": 3, "head_stride": None, "max_tokens": 24, "impl": "ring-flash-attn"},
    "ring 4 zero 2, by heads": {"ring": 4, "stage": 2, "head_stride": 1, "max_tokens": 12, "impl": "ring-flash-attn"},
}
STEPS = [*POLICY, *CRITIC, "tiny"]
LAYERS = ["sliding_attention", "full_attention"]
WINDOWED = Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=6, layer_types=LAYERS, tie_word_embeddings=True)
needs_package = pytest.mark.skipif(
    find_spec("ring_flash_attn") is None, reason="ring-flash-attn is not installed: hone-learner[ring-flash]"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case on four ranks, in one set of processes; and the same training in this one, on our attention."""
    root = tmp_path_factory.mktemp("ring-flash")
    model = save_config(root / "model", WINDOWED)
    cases = [{"settings": case, "port": free_port(), "out": str(root / name)} for name, case in CASES.items()]
    (root / "spec.json").write_text(json.dumps({"model": model, "cases": cases}))
    run_once("tests.learner.ring_ranks", root / "spec.json", root=root, timeout_s=240)
    alone = build(model, backend="single", stage=0, ring=1, head_stride=None, rank=0, world_size=1, port=0, max_tokens=200)
    single = train(alone, rank=0, rings=1, ring=1, max_tokens=200)
    return {"single": single, **{name: [torch.load(root / f"{name}-{rank}.pt") for rank in range(4)] for name in CASES}}


@needs_package
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_step_of_one_process(runs: dict[str, Any], case: str, step: str) -> None:
    same_step([rank["steps"][step] for rank in runs[case]], runs["single"]["steps"][step])


@needs_package
@pytest.mark.parametrize("case", CASES)
def test_every_rank_evaluates_the_whole_shard(runs: dict[str, Any], case: str) -> None:
    same_results(runs[case], runs["single"], ring=CASES[case]["ring"], max_tokens=CASES[case]["max_tokens"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="only a machine without CUDA refuses")
def test_without_a_gpu_it_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learner, "_engine", lambda *_: pytest.fail("loaded something"))
    with pytest.raises(
        ModelError, match=r"ring-flash-attn runs on CUDA only, and this rank computes on the cpu; choose --ds\.ring-attn-impl"
    ):
        make_learner({"policy": "no/such/model"}, backend="deepspeed", world_size=2, ring=2, ring_attn_impl="ring-flash-attn")


def test_what_it_cannot_compute_with_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"bf16 and fp16 only, not in fp32; .* --ds\.param-dtype bf16"):
        check_ring_flash(torch.device("cuda"), "fp32")
    monkeypatch.setattr(ring_flash, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"ring-flash-attn and flash-attn not installed; .*hone-learner\[ring-flash\], pip install flash-attn"
    ):
        check_ring_flash(torch.device("cuda"), "bf16")
    monkeypatch.setattr(ring_flash, "find_spec", lambda name: None if name == "flash_attn" else object())
    with pytest.raises(ModelError, match=r"^flash-attn not installed"):
        check_ring_flash(torch.device("cuda"), "fp16")
    monkeypatch.setattr(ring_flash, "find_spec", lambda name: object())
    check_ring_flash(torch.device("cuda"), "bf16")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("ring_flash_attn") is None or find_spec("flash_attn") is None,
    reason="needs CUDA, flash-attn and ring-flash-attn",
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("window", [None, 6])
def test_on_a_gpu_it_is_our_own_attention(window: int | None) -> None:
    """On a ring of one, which has all of the package's calls: this machine may have one GPU only."""
    torch.distributed.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        assert group is not None
        bounds = torch.tensor([0, 9, 30, 31, 60], dtype=torch.int32, device="cuda")
        piece = slice_of(bounds, wire=GroupWire(group), head_stride=1)
        generator = torch.Generator("cuda").manual_seed(0)
        states = (torch.randn(1, heads, 60, 16, generator=generator, device="cuda").bfloat16() for heads in (4, 2, 2, 4))
        query, key, value, pull = states
        found = []
        for arguments in (row_arguments(bounds), piece.row_arguments()):
            leaves = [one.clone().requires_grad_() for one in (query, key, value)]
            out, _ = packed_attention(nn.Module(), *leaves, None, sliding_window=window, **arguments)
            found.append([out, *torch.autograd.grad(out, leaves, pull.transpose(1, 2))])
        for ours, theirs in zip(*found, strict=True):
            assert_close(theirs, ours, rtol=2e-2, atol=2e-2)
    finally:
        torch.distributed.destroy_process_group()
