"""Attention over packed rows on a CPU: ours beside padded rows and beside one block-diagonal mask, forward and backward.

N rows of log-normal lengths, T packed tokens, longest row S. The padded form is [N, heads, S, dim] with a causal call; the
mask form is one call over [heads, T, dim] with a [T, T] mask. The roof is the arithmetic of the rows alone, done as one
square product: 7 length^2 dim heads multiply-adds in all (two causal products forward, five backward).
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from benchmarks.bench_roof import beside
from hone.learner.attention.varlen import packed_attention, row_arguments

HEADS, KEY_HEADS, DIM = 14, 2, 64  # Qwen 0.5B's


def log_normal_lengths(rows: int, longest: int) -> list[int]:
    """Rows whose median is a quarter of the longest; one fills it."""
    lengths = (longest / 4 * torch.randn(rows, generator=torch.Generator().manual_seed(0)).mul(0.8).exp()).long().clamp(16, longest)
    lengths[0] = longest
    return lengths.tolist()


@pytest.mark.parametrize(("rows", "longest"), [(16, 1024)])
def test_attention(benchmark: BenchmarkFixture, rows: int, longest: int) -> None:
    lengths = log_normal_lengths(rows, longest)
    total = sum(lengths)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, total, DIM, generator=generator).requires_grad_() for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    pull = torch.randn(total, HEADS, DIM, generator=generator)
    arguments = row_arguments(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32))
    row = torch.repeat_interleave(torch.arange(rows), torch.tensor(lengths))
    allowed = (row[:, None] == row[None, :]).tril_()
    real = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    # A learner with padding holds its states padded from the embedding on; padding them is not timed.
    table = [
        pad_sequence(list(states[0].detach().transpose(0, 1).split(lengths)), batch_first=True).transpose(1, 2).requires_grad_()
        for states in (query, key, value)
    ]
    table_pull = pad_sequence(list(pull.split(lengths)), batch_first=True)

    def ours() -> list[Tensor]:
        result, _ = packed_attention(nn.Module(), query, key, value, None, **arguments)
        return [result[0].detach(), *torch.autograd.grad((result[0] * pull).sum(), (query, key, value))]

    def padded() -> list[Tensor]:
        result = scaled_dot_product_attention(*table, is_causal=True, enable_gqa=True).transpose(1, 2)
        return [result.detach(), *torch.autograd.grad((result * table_pull).sum(), table)]

    def masked() -> list[Tensor]:
        result = scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True)[0].transpose(0, 1)
        return [result.detach(), *torch.autograd.grad((result * pull).sum(), (query, key, value))]

    side = int((3.5 * HEADS * DIM * sum(length**2 for length in lengths)) ** (1 / 3))
    square = torch.randn(side, side)
    for one, packed, by_mask, by_table in zip(("result", "query", "key", "value"), ours(), masked(), padded(), strict=True):
        assert_close(packed, by_mask, rtol=1e-4, atol=1e-4, msg=lambda text, one=one: f"{one}: {text}")
        rows_of_table = by_table if one == "result" else by_table.transpose(1, 2)
        assert_close(packed if one == "result" else packed[0].transpose(0, 1), rows_of_table[real], rtol=1e-4, atol=1e-4)
    benchmark.extra_info["padding"] = 1 - total / (rows * longest)
    beside(benchmark, ours, peers={"padded": padded, "block_mask": masked}, roof=lambda: square @ square, rounds=3)
