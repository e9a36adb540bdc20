"""Where rows lie on a ring: every token once, work and tokens even, only what must be cut is; and what is refused."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hone.learner.attention.ring import Ring
from hone.learner.context import BALANCE, Cut, cut_rows, piece_of
from hone.learner.errors import ModelError
from hone.learner.learner import Learner
from hone.learner.logprobs import predicting_states, scored_positions
from hone.learner.model import PolicyModel, load_policy
from hone.learner.packing import HIDDEN_SIZE
from hone.learner.ring_probe import check_cut
from tests.learner.tiny import make_learner, save_model
from tests.learner.virtual_ring import QueueWire, Shared, on_ring

TILE = 128
"""Queries, and keys, that a kernel takes at a time: what a block computes is counted in tiles."""


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([sum(lengths[:row]) for row in range(len(lengths) + 1)], dtype=torch.int32)


def log_normal(rows: int, *, longest: int, seed: int = 0) -> list[int]:
    """Lengths as benchmarks have them: median a quarter of the longest, spread 0.8, one of them the longest."""
    draws = torch.randn(rows - 1, generator=torch.Generator().manual_seed(seed))
    return [longest, *(0.25 * longest * (0.8 * draws).exp()).long().clamp(16, longest).tolist()]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=20), size=st.sampled_from([2, 3, 4, 8]), tight=st.booleans())
def test_every_token_lies_on_one_rank_and_its_label_is_scored_once(lengths: list[int], size: int, tight: bool) -> None:
    cap = -(-sum(lengths) // size) if tight else 10**9
    cut = cut_rows(lengths, size=size, max_tokens=cap)
    pieces = [piece_of(cut, bounds(lengths), wire=QueueWire(rank, size, Shared(size)), head_stride=None) for rank in range(size)]
    holders = torch.stack([piece.places >= 0 for piece in pieces])
    assert torch.equal(holders.sum(0), torch.ones(sum(lengths), dtype=torch.long))
    for piece in pieces:
        here = (piece.places >= 0).nonzero()[:, 0]
        assert torch.equal(piece.index[piece.places[here]], here)
        assert len(piece.index) == max(1, len(here))  # never empty, and no more than its own
    if tight and all(length >= 2 * size for length in lengths):
        assert max(len(piece.index) for piece in pieces) <= cap
    positions = scored_positions(bounds(lengths), torch.ones(sum(lengths), dtype=torch.bool))
    scored = [predicting_states(positions, piece.places) for piece in pieces]
    assert torch.equal(torch.cat([labels for labels, _ in scored]).sort().values, positions)
    for piece, (labels, states) in zip(pieces, scored, strict=True):
        assert torch.equal(piece.index[states], labels - 1)  # the state of the token before, wherever the token itself is


def test_a_row_in_zigzag_by_hand() -> None:
    # 10 tokens over 2 ranks: chunks of 2, and the 2 left over one to each rank. Rank 0 holds chunks 0 and 3, rank 1 holds 1 and 2.
    cut = cut_rows([10], size=2, max_tokens=5)
    assert cut.chunks == ((3, 3, 2, 2),)
    pieces = [piece_of(cut, bounds([10]), wire=QueueWire(rank, 2, Shared(2)), head_stride=None) for rank in range(2)]
    assert [piece.index.tolist() for piece in pieces] == [[0, 1, 2, 8, 9], [3, 4, 5, 6, 7]]


def test_short_rows_stay_whole_and_long_ones_are_cut() -> None:
    cut = cut_rows([100, 10, 10, 10, 10], size=2, max_tokens=70)
    assert cut.long == (0,) and sorted(cut.whole) == [(1, 3), (2, 4)]
    assert cut_rows([50, 50], size=2, max_tokens=50).long == ()
    assert cut_rows([3], size=2, max_tokens=1).long == ()  # no token for every chunk


@pytest.mark.parametrize("size", [2, 4, 8])
def test_work_is_even(size: int) -> None:
    for seed in range(20):
        lengths = log_normal(2 * size, longest=16_384, seed=seed)
        cut = cut_rows(lengths, size=size, max_tokens=10**9)
        work = [0.0] * size
        for rank, rows in enumerate(cut.whole):
            work[rank] += sum(lengths[row] * (1 + lengths[row] / (12 * HIDDEN_SIZE)) for row in rows)
        for row in cut.long:
            for rank in range(size):
                work[rank] += lengths[row] * (1 + lengths[row] / (12 * HIDDEN_SIZE)) / size
        assert max(work) <= 1.01 * BALANCE * sum(work) / size  # a token more or less per chunk


def tiles(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], *, causal: bool) -> int:
    """Tiles that a kernel computes: all of them, or those not wholly above the diagonal."""
    count = 0
    for queries, keys in zip(query_lengths, key_lengths, strict=True):
        for last in range(TILE, queries + TILE, TILE):
            seen = keys - queries + min(last, queries) if causal else keys
            count += -(-seen // TILE)
    return count


def computed_tiles(cut: Cut, size: int) -> list[int]:
    """Tiles that each rank computes of the cut rows."""
    chunks, counts = tuple(zip(*cut.chunks, strict=True)), []
    for rank in range(size):
        ring = Ring(wire=QueueWire(rank, size, Shared(size)), chunks=chunks, whole=0, head_stride=None, device=torch.device("cpu"))
        blocks = [block for owner in range(size) for _, _, block in ring.pairs(owner)]
        counts.append(sum(tiles(block.query_lengths, block.key_lengths, causal=block.causal) for block in blocks))
    return counts


def test_tiles_by_hand() -> None:
    assert tiles((3 * TILE,), (3 * TILE,), causal=True) == 1 + 2 + 3
    assert tiles((TILE + 1,), (TILE,), causal=False) == 2


@pytest.mark.parametrize("size", [2, 4, 8])
def test_zigzag_computes_little_that_one_device_would_not(size: int) -> None:
    """Tiles of the rows on one device, over ranks times those of the busiest rank: 0.92 at least."""
    lengths = (32_768, 20_000, 16_384)
    computed = computed_tiles(cut_rows(lengths, size=size, max_tokens=1), size)
    assert tiles(lengths, lengths, causal=True) / (size * max(computed)) >= 0.92


@pytest.mark.parametrize("size", [4, 8])
def test_keeping_short_rows_whole_halves_what_travels(size: int) -> None:
    cut_tokens, all_tokens = 0, 0
    for seed in range(10):
        lengths = log_normal(3 * size, longest=16_384, seed=seed)
        cut = cut_rows(lengths, size=size, max_tokens=10**9)
        cut_tokens += sum(lengths[row] for row in cut.long)
        all_tokens += sum(lengths)
    assert 0 < 2 * cut_tokens <= all_tokens  # bytes are proportional to the tokens cut


def test_rings_that_do_not_come_out_even_are_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path, "qwen3-tied")
    monkeypatch.setattr(Learner, "_engine", lambda *_: pytest.fail("loaded something"))
    with pytest.raises(ValueError, match=r"3 ranks do not fall into rings of 2; --ds\.ring-attn-size must divide"):
        make_learner({"policy": model}, backend="deepspeed", world_size=3, ring=2)
    with pytest.raises(ValueError, match=r"--ds\.ring-attn-head-stride 3 does not divide the 2 key heads of .*; choose a divisor of 2"):
        make_learner({"policy": model}, backend="deepspeed", world_size=2, ring=2, head_stride=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_looks_past_a_cut_by_other_ways_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    name = save_model(tmp_path, "llama-untied")
    models = [load_policy(name, dtype=dtype, device=torch.device("cpu")) for _ in range(2)]
    on_ring(2, lambda wire: check_cut(models[wire.rank], name, wire=wire, head_stride=None))
    for model in models:
        layer = model.causal_lm.base_model.layers[0]
        layer.mlp = nn.Sequential(layer.mlp, Neighbour())
    said, _ = on_ring(2, lambda wire: refusal(models[wire.rank], wire))
    assert said[0] == said[1] and "of a row cut over 2 ranks differ" in said[0] and "--ds.ring-attn-size 1" in said[0]


class Neighbour(nn.Module):
    """Adds to every token what the one before it has, as a convolution does."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + states.roll(1, 1)


def refusal(model: PolicyModel, wire: QueueWire) -> str:
    with pytest.raises(ModelError) as caught:
        check_cut(model, "the model", wire=wire, head_stride=None)
    return str(caught.value)
