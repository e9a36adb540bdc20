"""RingAttention on a virtual ring of threads in this process: what travels, what is computed twice, and the time beside one device.

All ranks share this machine's cores, so time shows what cutting costs in arithmetic, not what a ring gains. The peer is
the same ring with every row cut; the roof is packed attention on one device. Lengths are log-normal (median a quarter of the
longest, spread 0.8), one of them the longest, three rows to a rank; one mix is timed, and whether it needs a cut at all depends
on it, so `times_more_bytes_than_ours` is counted over twenty. `zigzag_efficiency` is counted, not timed: tiles of 128 by
128 that one device computes for rows of 32k, 20k and 16k tokens, over the ranks times those of the busiest one.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.bench_roof import beside
from hone.learner.attention.varlen import packed_attention, row_arguments
from hone.learner.context import Cut, cut_rows, piece_of
from tests.learner.test_ring_plan import bounds, computed_tiles, log_normal, tiles
from tests.learner.virtual_ring import QueueWire, on_ring

HEADS, KEY_HEADS, DIM, LONGEST = 8, 2, 32, 1024
BYTES = 4


def attention(query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, object]) -> tuple[Tensor, ...]:
    """Result and gradients of an equal pull on every number."""
    leaves = [states.clone().requires_grad_() for states in (query, key, value)]
    out, _ = packed_attention(nn.Module(), *leaves, None, **arguments)
    return out.detach()[0], *torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.parametrize("head_stride", [None, 1], ids=["zigzag", "all_gather"])
@pytest.mark.parametrize("size", [4, 8])
def test_ring(benchmark: BenchmarkFixture, size: int, head_stride: int | None) -> None:
    lengths = log_normal(3 * size, longest=LONGEST)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, heads, sum(lengths), DIM, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    placed, all_cut = (cut_rows(lengths, size=size, max_tokens=tokens) for tokens in (10**9, 1))

    def over(cut: Cut) -> tuple[Tensor, int]:
        def rank_of(wire: QueueWire) -> tuple[Tensor, Tensor]:
            piece = piece_of(cut, bounds(lengths), wire=wire, head_stride=head_stride)
            out, *_ = attention(*(one[:, :, piece.index] for one in states), piece.row_arguments())
            here = (piece.places >= 0).nonzero()[:, 0]
            return here, out[piece.places[here]]

        ranks, sent = on_ring(size, rank_of)
        whole = torch.empty(sum(lengths), HEADS, DIM)
        for here, out in ranks:
            whole[here] = out
        return whole, sum(sent)

    def plain() -> Tensor:
        return attention(*states, row_arguments(bounds(lengths)))[0]

    (ours, ours_bytes), (peer, peer_bytes) = over(placed), over(all_cut)
    assert_close(ours, plain(), rtol=1e-4, atol=1e-5)
    assert_close(peer, plain(), rtol=1e-4, atol=1e-5)
    # k - 1 steps of 2 c g d numbers forward, twice that backward, on each of k ranks, if every row is cut.
    formula = size * 3 * (size - 1) * 2 * (sum(lengths) / size) * KEY_HEADS * DIM * BYTES
    benchmark.extra_info.update(
        rows=len(lengths),
        rows_cut=len(placed.long),
        ours_mib=ours_bytes / 2**20,
        every_row_cut_mib=peer_bytes / 2**20,
        formula_mib=formula / 2**20,
        times_more_bytes_than_ours=saving(size),
        zigzag_efficiency=efficiency([32_768, 20_000, 16_384], size),
    )
    assert ours_bytes <= peer_bytes <= formula and saving(size) >= 2
    beside(benchmark, lambda: over(placed), peers={"every_row_cut": lambda: over(all_cut)}, roof=plain, rounds=3)


def saving(size: int) -> float:
    """Tokens over the tokens of cut rows, which is what bytes are proportional to, in twenty mixes such as the one timed."""
    cut_tokens, all_tokens = 0, 0
    for seed in range(20):
        lengths = log_normal(3 * size, longest=LONGEST, seed=seed)
        cut_tokens += sum(lengths[row] for row in cut_rows(lengths, size=size, max_tokens=10**9).long)
        all_tokens += sum(lengths)
    return all_tokens / cut_tokens


def efficiency(lengths: list[int], size: int) -> float:
    """See above."""
    cut = cut_rows(lengths, size=size, max_tokens=1)
    long = tuple(lengths[row] for row in cut.long)
    return tiles(long, long, causal=True) / (size * max(computed_tiles(cut, size)))
