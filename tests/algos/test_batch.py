"""Packing and selecting rows, and what a batch refuses."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.batch import Attachment, Batch, SamplerContract, Trajectory, pack, select
from tests.algos.strategies import law, scored_batches

CONTRACT = SamplerContract(temperature=0.7, top_p=1.0, top_k=0, seed=1, engine="fake", tokenizer="", template="")


def _trajectory(prompt_id, tokens, *, contract=CONTRACT):
    count = len(tokens)
    return Trajectory(
        prompt_id=prompt_id,
        sample=0,
        tokens=torch.tensor(tokens),
        action_mask=torch.tensor([False] + [True] * (count - 1)),
        rollout_logp=-torch.arange(count, dtype=torch.float32),
        rewards=torch.tensor([0.0] * (count - 1) + [1.0]),
        version=torch.full((count,), 3),
        truncated=count == 3,
        score=1.0,
        contract=contract,
    )


def test_pack_lays_rows_end_to_end_and_groups_them_by_prompt():
    batch = pack([_trajectory("b", [7, 8]), _trajectory("a", [1, 2, 3]), _trajectory("b", [9])])
    assert batch.tokens.tolist() == [7, 8, 1, 2, 3, 9]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 6]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 0]
    assert batch.group.tolist() == [0, 1, 0]
    assert batch.truncated.tolist() == [False, True, False]
    assert batch.rollout_logp.tolist() == [0, -1, 0, -1, -2, 0]
    assert batch.rewards.tolist() == [0, 1, 0, 0, 1, 1]
    assert batch.version.tolist() == [3] * 6
    assert batch.row_of_token.tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.lengths.tolist() == [2, 3, 1]
    assert (batch.rows, batch.temperature) == (3, 0.7)


def test_what_is_attached_to_a_row_goes_where_the_row_goes():
    picture = (Attachment(start=1, count=1, data=b"picture"),)
    rows = [_trajectory("a", [1, 2]), dataclasses.replace(_trajectory("b", [3, 4]), attached=picture), _trajectory("c", [5])]
    batch = pack(rows)
    assert batch.attached == ((), picture, ())
    assert select(batch, [2, 1]).attached == ((), picture) and select(batch, [0]).attached == ((),)
    assert pack(rows[:1]).attached == select(pack(rows[:1]), [0]).attached == ()
    with pytest.raises(ValueError, match="attached has 1 entries for 3 rows; give one for each row, or none at all"):
        dataclasses.replace(batch, attached=(picture,))


def test_pack_refuses_nothing_and_mixed_temperatures():
    with pytest.raises(ValueError, match="every prompt of the step was dropped"):
        pack([])
    hot = dataclasses.replace(CONTRACT, temperature=1.0)
    with pytest.raises(ValueError, match=r"different temperatures \[0\.7, 1\.0\]"):
        pack([_trajectory("a", [1]), _trajectory("a", [1], contract=hot)])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"top_p": 0.9}, "top_p 0.9"),
        ({"top_k": 5, "min_p": 0.1}, "top_k 5, min_p 0.1"),
        ({"min_tokens": 2}, "min_tokens 2"),
        ({"repetition_penalty": 1.1}, "repetition_penalty 1.1"),
        ({"structured_outputs": '{"regex": "a"}'}, 'structured_outputs {"regex": "a"}'),
    ],
)
def test_pack_refuses_samples_that_no_learner_can_recompute(changed, told):
    pack([_trajectory("a", [1], contract=dataclasses.replace(CONTRACT, stop=("x",), stop_token_ids=(3,)))])
    with pytest.raises(ValueError, match=f"sampled with {re.escape(told)} cannot be trained on"):
        pack([_trajectory("a", [1]), _trajectory("a", [1], contract=dataclasses.replace(CONTRACT, **changed))])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_contract_needs_a_temperature_above_zero(temperature):
    with pytest.raises(ValueError, match="above 0"):
        dataclasses.replace(CONTRACT, temperature=temperature)


@pytest.mark.parametrize("edges", [[0, 2], [1, 3], [0, 2, 1, 3], []])
def test_edges_of_rows_must_span_the_tokens_and_not_fall(edges):
    batch = pack([_trajectory("a", [1, 2, 3])])
    with pytest.raises(ValueError, match="cu_seqlens"):
        dataclasses.replace(batch, cu_seqlens=torch.tensor(edges, dtype=torch.int32))


@law
@given(scored_batches(), st.data())
def test_select_takes_rows_as_they_are_in_the_order_given(batch, data):
    rows = data.draw(st.lists(st.integers(0, batch.rows - 1), max_size=6))
    part = select(batch, rows)
    assert type(part) is type(batch)
    assert part.rows == len(rows)
    assert part.group.tolist() == [int(batch.group[row]) for row in rows]
    for position, row in enumerate(rows):
        own = slice(int(part.cu_seqlens[position]), int(part.cu_seqlens[position + 1]))
        source = slice(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1]))
        for name in ("tokens", "position_ids", "action_mask", "old_logp", "advantages", "weights"):
            assert_close(getattr(part, name)[own], getattr(batch, name)[source], rtol=0, atol=0)


def test_select_leaves_missing_fields_missing():
    part = select(pack([_trajectory("a", [1, 2])]), [0])
    assert type(part) is Batch
    assert part.old_logp is None
