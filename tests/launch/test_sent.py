"""A shard that travels arrives as it was, and is small on the way."""

import dataclasses

import pytest
import torch
from torch import Tensor

from hone.algos.batch import Batch, Scored
from hone.launch.sent import sent
from hone.learner.packing import Shard, shards

LENGTHS = (5, 1, 7, 3)


def batch(kind: type[Batch], **changes: Tensor) -> Batch:
    total, generator = sum(LENGTHS), torch.Generator().manual_seed(0)
    fields = {
        "tokens": torch.randint(0, 150_000, (total,), generator=generator),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS]),
        "action_mask": torch.rand(total, generator=generator) < 0.5,
        "rollout_logp": -torch.rand(total, generator=generator),
        "rewards": torch.rand(total, generator=generator),
        "version": torch.randint(0, 9, (total,), generator=generator),
        "group": torch.tensor([0, 0, 1, 1]),
        "truncated": torch.tensor([False, True, False, False]),
    }
    if kind is Scored:
        fields |= {"advantages": torch.rand(total), "weights": torch.rand(total), "old_logp": torch.rand(total)}
        fields["figures"] = {"gap": torch.tensor(0.5)}
    return kind(**fields | changes)


def same(found: object, expected: object) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
    return found == expected


@pytest.mark.parametrize("kind", [Batch, Scored])
def test_a_shard_arrives_as_it_was(kind: type[Batch]) -> None:
    for shard in shards(batch(kind), ranks=2, max_tokens=8):
        arrived = sent(shard).shard()
        assert type(arrived.batch) is kind
        for name in (field.name for field in dataclasses.fields(Shard) if field.name != "batch"):
            assert getattr(arrived, name) == getattr(shard, name)
        for name in (field.name for field in dataclasses.fields(kind)):
            assert same(getattr(arrived.batch, name), getattr(shard.batch, name)), name


def test_positions_that_do_not_count_up_travel_too() -> None:
    shifted = batch(Batch).position_ids + 2
    [shard] = shards(batch(Batch, position_ids=shifted), ranks=1, max_tokens=100)
    assert torch.equal(sent(shard).shard().batch.position_ids, shifted)


def test_a_token_takes_seventeen_bytes() -> None:
    [shard] = shards(batch(Batch), ranks=1, max_tokens=100)
    per_token = [value for value in sent(shard).tensors.values() if value.shape == (sum(LENGTHS),)]
    assert sum(value.nbytes for value in per_token) == 17 * sum(LENGTHS)


def test_a_number_beyond_32_bits_is_refused() -> None:
    tokens = batch(Batch).tokens
    tokens[3] = 2**40
    with pytest.raises(ValueError, match=f"tokens has numbers beyond 32 bits, the largest {2**40}"):
        sent(shards(batch(Batch, tokens=tokens), ranks=1, max_tokens=100)[0])
