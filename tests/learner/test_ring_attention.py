"""Ring = one process: rows cut over k virtual ranks attend, and send gradients back, as the same rows packed do."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from hone.learner.attention.blocks import Block, block_backward, block_forward, merge
from hone.learner.attention.ring_forms import ring_attention
from hone.learner.attention.varlen import packed_attention, row_arguments
from hone.learner.context import Cut, Piece, cut_rows, piece_of
from tests.learner.virtual_ring import QueueWire, on_ring

SCALE = 0.3


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([sum(lengths[:row]) for row in range(len(lengths) + 1)], dtype=torch.int32)


def states(tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Query of 4 heads, key and value of 2, and what pulls at the result."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, heads, tokens, 8, generator=generator, dtype=dtype) for heads in (4, 2, 2, 4))


def packed(lengths: list[int], *inputs: Tensor, window: int | None) -> list[Tensor]:
    """Result [T, heads, dim], then the gradients of query, key and value [heads, T, dim]."""
    query, key, value, pull = inputs
    leaves = [one.clone().requires_grad_() for one in (query, key, value)]
    out, _ = packed_attention(nn.Module(), *leaves, None, scaling=SCALE, sliding_window=window, **row_arguments(bounds(lengths)))
    return [out.detach()[0], *(gradient[0] for gradient in torch.autograd.grad(out, leaves, pull.transpose(1, 2)))]


def over_ring(
    lengths: list[int], size: int, *inputs: Tensor, window: int | None = None, head_stride: int | None = None, cut: Cut | None = None
) -> tuple[list[Tensor], list[int]]:
    """As `packed`, every token's share from the rank that holds it; and the bytes each rank sent."""
    layout = cut_rows(lengths, size=size, max_tokens=10**9) if cut is None else cut

    def rank_of(wire: QueueWire) -> tuple[Piece, list[Tensor]]:
        piece = piece_of(layout, bounds(lengths), wire=wire, head_stride=head_stride)
        query, key, value, pull = (one[:, :, piece.index].clone() for one in inputs)
        leaves = [one.requires_grad_() for one in (query, key, value)]
        out, _ = packed_attention(nn.Module(), *leaves, None, scaling=SCALE, sliding_window=window, **piece.row_arguments())
        gradients = torch.autograd.grad(out, leaves, pull.transpose(1, 2))
        return piece, [out.detach()[0], *(gradient[0] for gradient in gradients)]

    ranks, sent = on_ring(size, rank_of)
    whole = [torch.full_like(inputs[0][0].transpose(0, 1), torch.inf), *(torch.full_like(one[0], torch.inf) for one in inputs[:3])]
    for piece, results in ranks:
        here = (piece.places >= 0).nonzero()[:, 0]
        whole[0][here] = results[0][piece.places[here]]
        for full, result in zip(whole[1:], results[1:], strict=True):
            full[:, here] = result[:, piece.places[here]]
    return whole, sent


def everything_cut(lengths: list[int], size: int) -> Cut:
    return cut_rows(lengths, size=size, max_tokens=1)


@settings(max_examples=30, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    size=st.sampled_from([2, 4, 8]),
    form=st.sampled_from(["zigzag", "gathered 1", "gathered 2", "window 1", "window 5", "window 40"]),
    cut_all=st.booleans(),
)
def test_a_virtual_ring_is_packed_attention(lengths: list[int], size: int, form: str, cut_all: bool) -> None:
    kind, _, number = form.partition(" ")
    window = int(number) if kind == "window" else None
    inputs = states(sum(lengths))
    ours, _ = over_ring(
        lengths,
        size,
        *inputs,
        window=window,
        head_stride=int(number) if kind == "gathered" else None,
        cut=everything_cut(lengths, size) if cut_all else None,
    )
    for got, expected in zip(ours, packed(lengths, *inputs, window=window), strict=True):
        assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_the_derivative_in_double_precision() -> None:
    lengths, inputs = [23, 5, 30], states(58, dtype=torch.float64)
    for head_stride in (None, 1):
        ours, _ = over_ring(lengths, 2, *inputs, head_stride=head_stride, cut=everything_cut(lengths, 2))
        for got, expected in zip(ours, packed(lengths, *inputs, window=None), strict=True):
            assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head_stride", [None, 1])
def test_half_precision_rounds_once_however_many_blocks(head_stride: int | None) -> None:
    lengths = [300, 212]
    half = states(512, dtype=torch.bfloat16)
    exact = packed(lengths, *(one.double() for one in half), window=None)
    cut = everything_cut(lengths, 8)
    for got, expected in zip(over_ring(lengths, 8, *half, head_stride=head_stride, cut=cut)[0], exact, strict=True):
        # Blocks' results are rounded to 8 bits before fp32 adds them up: the error is that of one rounding, not of 16.
        assert float((got.double() - expected).norm() / expected.norm()) < 2**-8


@pytest.mark.parametrize("form", [{}, {"head_stride": 1}, {"window": 7}])
def test_garbage_in_another_row_changes_nothing(form: dict[str, int]) -> None:
    lengths, size = [40, 9, 52, 1], 4
    inputs = states(sum(lengths))
    cut = everything_cut(lengths, size)
    assert len(cut.long) == 3  # the row of one token cannot be
    clean, _ = over_ring(lengths, size, *inputs, cut=cut, **form)
    spoiled = tuple(one.clone() for one in inputs)
    for one in spoiled:
        one[:, :, 49:101] = torch.nan
    dirty, _ = over_ring(lengths, size, *spoiled, cut=cut, **form)
    others = torch.cat([torch.arange(49), torch.arange(101, 102)])
    assert dirty[0][49:101].isnan().all()
    assert torch.equal(dirty[0][others], clean[0][others])
    assert all(torch.equal(got[:, others], expected[:, others]) for got, expected in zip(dirty[1:], clean[1:], strict=True))


def test_neighbours_in_another_order_change_nothing() -> None:
    lengths, order, size = [40, 9, 52, 17], [2, 0, 3, 1], 4
    inputs, starts = states(sum(lengths)), bounds(lengths).tolist()
    moved = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in order])
    first, _ = over_ring(lengths, size, *inputs)
    again, _ = over_ring([lengths[row] for row in order], size, *(one[:, :, moved] for one in inputs))
    assert torch.equal(again[0], first[0][moved])
    assert all(torch.equal(got, expected[:, moved]) for got, expected in zip(again[1:], first[1:], strict=True))


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("head_stride", [None, 1])
def test_no_more_bytes_travel_than_the_formula_says(size: int, head_stride: int | None) -> None:
    """k - 1 steps of 2 c g d numbers forward (keys and values), twice that backward (and their gradients); c tokens per rank.

    Late chunks stay away from ranks that do not see them: of the two chunks of every owner, half of the readers need one
    only, so 3/4 of it.
    """
    lengths = [64 * size, 32 * size]
    _, sent = over_ring(lengths, size, *states(sum(lengths)), head_stride=head_stride, cut=everything_cut(lengths, size))
    formula = 3 * (size - 1) * 2 * (sum(lengths) // size) * 2 * 8 * 4
    assert max(sent) <= formula
    assert sum(sent) == 3 * formula * size // 4


def test_rows_kept_whole_send_nothing() -> None:
    lengths = [10, 11, 12, 9] * 2
    _, sent = over_ring(lengths, 2, *states(sum(lengths)))
    assert sent == [0, 0]


def test_blocks_join_to_one_softmax() -> None:
    # Two keys with scores log 1 and log 3 and values 0 and 8, one at a time: 8 * 3 / (1 + 3) = 6, log-sum-exp log 4.
    query = torch.ones(1, 1, 1)
    keys, values = torch.tensor([1.0, 3.0]).log().reshape(2, 1, 1, 1), torch.tensor([0.0, 8.0]).reshape(2, 1, 1, 1)
    one = Block((1,), (1,), causal=False)
    out, log_sums = torch.zeros(1, 1, 1), torch.full((1, 1), -torch.inf)
    for key, value in zip(keys, values, strict=True):
        merge(out, log_sums, *block_forward(query, key, value, one, scale=1.0))
    assert_close(out.flatten(), torch.tensor([6.0]))
    assert_close(log_sums.flatten(), torch.tensor([4.0]).log())
    # d out / d score of the second key = p2 (v2 - out) = 0.75 * 2, times the query; d out / d value = 0.75
    _, dk, dv = block_backward(torch.ones(1, 1, 1), query, keys[1], values[1], out, log_sums, one, scale=1.0)
    assert_close((float(dk), float(dv)), (1.5, 0.75))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a CUDA device; none here")
@pytest.mark.parametrize(
    "block", [Block((9, 5), (9, 5), True), Block((9, 5), (4, 7), False), Block((3, 5), (9, 7), True), Block((3, 5), (9, 7), True, 4)]
)
def test_the_cuda_kernel_computes_the_same_blocks(block: Block) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 16) for lengths, heads in zip((block[0], block[1], block[1], block[0]), (4, 2, 2, 4), strict=True)]
    query, key, value, pull = (torch.randn(*shape, generator=generator).bfloat16() for shape in shapes)
    exact = [states.float() for states in (query, key, value)]
    expected = block_forward(*exact, block, scale=SCALE)
    device = [states.cuda() for states in (query, key, value)]
    out, log_sums = block_forward(*device, block, scale=SCALE)
    assert_close((out.float().cpu(), log_sums.cpu()), expected, rtol=2e-2, atol=2e-2)
    gradients = block_backward(pull.cuda(), *device, out, log_sums, block, scale=SCALE)
    for ours, plain in zip(gradients, block_backward(pull.float(), *exact, *expected, block, scale=SCALE), strict=True):
        assert_close(ours.float().cpu(), plain, rtol=5e-2, atol=5e-2)


def test_what_has_no_kernel_is_refused() -> None:
    lengths = [40, 40, 40]
    query, key, value, _ = states(120)
    (messages, _) = on_ring(2, lambda wire: refused(wire, lengths, query, key, value))
    assert all(
        "does not divide the 2 key heads; choose a divisor of 2" in heads and "of one size, not 8 and 4" in size for heads, size in messages
    )


def refused(wire: QueueWire, lengths: list[int], query: Tensor, key: Tensor, value: Tensor) -> tuple[str, str]:
    said = []
    for head_stride, wide in ((3, value), (None, value[..., :4])):
        piece = piece_of(everything_cut(lengths, 2), bounds(lengths), wire=wire, head_stride=head_stride)
        assert piece.ring is not None
        inputs = (one[0][:, piece.index].transpose(0, 1) for one in (query, key, wide))
        with pytest.raises(ValueError) as caught:
            ring_attention(*inputs, piece.ring, scale=SCALE, window=None)
        said.append(str(caught.value))
    return said[0], said[1]
