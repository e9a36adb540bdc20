"""Between padded and packed: golden layouts, the round trip, gradients, and the worked example."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.padding import pack_padded, unpack_padded, valid_slots
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.reduce import Reduction, token_weights
from tests.algos.strategies import law

EXAMPLE = Path(__file__).parents[2] / "examples" / "algos_on_padded_tensors.py"
NAN = math.nan


def test_padding_on_either_side_golden():
    valid = torch.tensor([[True, True, False], [False, False, False], [False, True, True]])
    padded = torch.tensor([[1.0, 2.0, NAN], [NAN, NAN, NAN], [NAN, 3.0, 4.0]], requires_grad=True)
    packed, cu_seqlens = pack_padded(padded, valid)
    assert_close(packed.detach(), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert_close(cu_seqlens, torch.tensor([0, 2, 2, 4], dtype=torch.int32))
    assert_close(unpack_padded(packed, valid, fill=-1.0).detach(), torch.tensor([[1.0, 2, -1], [-1, -1, -1], [-1, 3, 4]]))
    (packed * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert_close(padded.grad, torch.tensor([[1.0, 2, 0], [0, 0, 0], [0, 3, 4]]))


def test_slots_golden():
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    right = [[True, True, False], [False, False, False], [True, True, True]]
    assert valid_slots(cu_seqlens).tolist() == right
    assert valid_slots(cu_seqlens, width=4, side="left").tolist() == [[False, *reversed(row)] for row in right]
    assert valid_slots(cu_seqlens[:1]).shape == (0, 0)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"a hole in row 1 \(1 such rows\); give the attention mask, not the action mask"):
        pack_padded(torch.zeros(2, 3), torch.tensor([[True, True, False], [True, False, True]]))
    with pytest.raises(ValueError, match="packed has 3 tokens, but valid has 2 slots"):
        unpack_padded(torch.zeros(3), torch.tensor([[True, True, False]]))
    with pytest.raises(ValueError, match="a row of 5 tokens does not fit a width of 4"):
        valid_slots(torch.tensor([0, 5], dtype=torch.int32), width=4)


@law
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.integers(0, 3),
    st.sampled_from(["right", "left"]),
    st.sampled_from([(), (3,), (2, 2)]),
)
def test_there_and_back_changes_nothing(lengths, extra, side, axes):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = torch.arange(4.0 * int(cu_seqlens[-1]))[: int(cu_seqlens[-1]) * math.prod(axes)]
    packed = packed.reshape(int(cu_seqlens[-1]), *axes).requires_grad_()
    valid = valid_slots(cu_seqlens, width=max(lengths) + extra, side=side)
    back, cu_seqlens_back = pack_padded(unpack_padded(packed, valid, fill=NAN), valid)
    assert_close(back, packed, rtol=0, atol=0)
    assert_close(cu_seqlens_back, cu_seqlens)
    assert_close(torch.autograd.grad(back.sum(), packed)[0], torch.ones_like(packed))


@law
@given(st.integers(0, 4), st.sampled_from(["right", "left"]), st.sampled_from(["token", "sequence"]))
def test_a_loss_is_the_same_for_any_padding(extra, side, over):
    cu_seqlens, generator = torch.tensor([0, 4, 5, 11], dtype=torch.int32), torch.Generator().manual_seed(0)
    logp, old_logp, advantages = (torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([False, True, True, False, True, False, True, False, True, True, True])

    def loss(*columns):
        *numbers, mask, cu_seqlens = columns
        weights = token_weights(mask, cu_seqlens, Reduction(over=over))
        return clipped_surrogate(*numbers, weights, mask, clip_low=0.2, clip_high=0.2).total

    valid = valid_slots(cu_seqlens, width=6 + extra, side=side)
    repacked = [pack_padded(unpack_padded(column, valid, fill=NAN), valid)[0] for column in (logp, old_logp, advantages)]
    repacked_mask, repacked_cu_seqlens = pack_padded(unpack_padded(mask, valid), valid)
    assert_close(loss(*repacked, repacked_mask, repacked_cu_seqlens), loss(logp, old_logp, advantages, mask, cu_seqlens), rtol=0, atol=0)


def test_offsets_are_refused_before_slots_are_made_of_them():
    for edges, message in (([1, 3], "runs from 1 to 3"), ([0, 3, 2], "falls somewhere"), ([], "is empty")):
        with pytest.raises(ValueError, match=f"valid_slots: cu_seqlens {message}"):
            valid_slots(torch.tensor(edges, dtype=torch.int32))


def test_nothing_is_packed_to_nothing_and_back():
    for shape in ((0, 3), (2, 0), (2, 3)):
        valid = torch.zeros(shape, dtype=torch.bool)
        packed, cu_seqlens = pack_padded(torch.full(shape, NAN), valid)
        assert packed.shape == (0,) and cu_seqlens.tolist() == [0] * (shape[0] + 1)
        assert_close(unpack_padded(packed, valid, fill=-1.0), torch.full(shape, -1.0))


@law
@given(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(["right", "left"]))
def test_masks_and_ids_keep_their_type_and_their_place(lengths, side):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    valid = valid_slots(cu_seqlens, width=4, side=side)
    assert valid.sum(1).tolist() == lengths
    edge = valid[:, 0] if side == "right" else valid[:, -1]
    assert edge.tolist() == [length > 0 for length in lengths]
    for packed in (torch.arange(int(cu_seqlens[-1])), torch.arange(int(cu_seqlens[-1])) % 2 == 0):
        padded = unpack_padded(packed, valid)
        assert padded.dtype == packed.dtype and padded.shape == (len(lengths), 4)
        assert_close(pack_padded(padded, valid)[0], packed)
        assert (padded[~valid] == 0).all()


def test_the_worked_example_runs_and_says_what_it_shows(capsys):
    runpy.run_path(str(EXAMPLE))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "packed 18 of 24 slots, 12 of them the policy's own; rows meet at [0, 4, 9, 12, 18]"
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines if line.startswith("step")]
    assert len(losses) == 3 and losses[-1] < losses[0]
    gains = {line.split(",")[0]: float(line.split("probability ")[1].split()[0]) for line in lines if line.startswith("answer")}
    assert gains["answer 0"] > 0 > gains["answer 1"] and gains["answer 3"] > 0 > gains["answer 2"]
    (preference,) = [line for line in lines if line.startswith("DPO")]
    assert float(preference.split("loss ")[1].split()[0]) < math.log(2) and preference.endswith("accuracy 1.00")
    assert "micro-batch additivity: broken" in lines and "poison off the mask: holds" in lines
