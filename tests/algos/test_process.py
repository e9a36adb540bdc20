"""Process reward losses: golden values, the reference, and what stands between the steps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.process import hard_process_loss, reward_token_columns, reward_token_logits, soft_process_loss
from hone.algos.reduce import Reduction, token_weights
from tests.algos.strategies import law
from tests.reference import numpy_offline

NAN = math.nan
MASK = torch.tensor([False, True, False])


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def _logits(*live):
    return torch.stack([_fp64(*[NAN] * len(live)), _fp64(*live), _fp64(*[math.inf] * len(live))]).requires_grad_()


@pytest.mark.parametrize(("label", "expected", "accuracy"), [(1, 1.701413, 0.0), (0, 0.201413, 1.0)])
def test_hard_labels_golden(label, expected, accuracy):
    logits = _logits(1.2, -0.3)  # log(1 + exp(1.5)) and log(1 + exp(-1.5))
    loss = hard_process_loss(logits, torch.tensor([-100, label, 7]), _fp64(NAN, 1.0, NAN), MASK)
    loss.total.backward()
    assert_close(loss.total.detach(), _fp64(expected).squeeze(), rtol=0, atol=1e-6)
    assert_close(loss.metrics, {"prm_loss": loss.total.detach(), "accuracy": _fp64(accuracy).squeeze()})
    bad = 0.182426  # sigmoid(-1.5)
    expected_gradient = _fp64(1 - bad, bad - 1) if label == 1 else _fp64(-bad, bad)
    assert_close(logits.grad[1], expected_gradient, rtol=0, atol=1e-6)
    assert (logits.grad[~MASK] == 0).all()


def test_soft_labels_golden():
    logits, share = _logits(1.2, -0.3), torch.tensor([NAN, 0.25, NAN])
    loss = soft_process_loss(logits, torch.stack([1 - share, share], -1), _fp64(NAN, 1.0, NAN), MASK)
    loss.total.backward()
    assert_close(loss.total.detach(), _fp64(0.576413).squeeze(), rtol=0, atol=1e-6)  # .25 * 1.701413 + .75 * .201413
    assert loss.metrics["accuracy"] == 1.0
    assert_close(logits.grad[1], _fp64(0.817574 - 0.75, 0.182426 - 0.25), rtol=0, atol=1e-6)  # p - q
    assert (logits.grad[~MASK] == 0).all()


def test_reward_tokens_become_columns():
    logits, tokens = torch.arange(10.0).reshape(2, 5), torch.tensor([4, 1])
    assert_close(reward_token_logits(logits, tokens), torch.tensor([[4.0, 1.0], [9.0, 6.0]]))
    columns = reward_token_columns(torch.tensor([4, -100, 1]), tokens, torch.tensor([True, False, True]))
    assert columns.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="1 steps have labels such as 3"):
        reward_token_columns(torch.tensor([4, 3, -100]), tokens, torch.tensor([True, True, False]))
    for wrong in ([4], [4, 1, 4]):
        with pytest.raises(ValueError, match="at least 2 different tokens"):
            reward_token_logits(logits, torch.tensor(wrong))


def test_only_the_reward_tokens_share_the_softmax():
    logits = torch.tensor([[1.2, 50.0, -0.3]], dtype=torch.float64)
    chosen = reward_token_logits(logits, torch.tensor([0, 2]))
    loss = hard_process_loss(chosen, torch.tensor([0]), torch.ones(1), torch.tensor([True]))
    assert_close(loss.total, _fp64(0.201413).squeeze(), rtol=0, atol=1e-6)


def test_without_labels_the_loss_is_zero_and_attached_to_the_graph():
    logits = torch.full((2, 3), NAN, requires_grad=True)
    for loss in (
        hard_process_loss(logits, torch.full((2,), -100), torch.zeros(2), torch.zeros(2, dtype=torch.bool)),
        soft_process_loss(logits, torch.full((2, 3), NAN), torch.zeros(2), torch.zeros(2, dtype=torch.bool)),
    ):
        assert loss.total == 0
        assert (torch.autograd.grad(loss.total, logits)[0] == 0).all()


@st.composite
def steps(draw):
    """(logits, targets, columns, weights, mask) of a few packed tokens with three columns."""
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=1, max_size=7)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = 3 * torch.randn(mask.numel(), 3, generator=generator, dtype=torch.float64)
    targets = torch.randn(mask.numel(), 3, generator=generator, dtype=torch.float64).softmax(-1)
    columns = torch.randint(0, 3, (mask.numel(),), generator=generator)
    weights = token_weights(mask, torch.tensor([0, mask.numel()], dtype=torch.int32), Reduction()).double()
    return logits, targets, columns, weights, mask


@law
@given(steps())
def test_both_losses_equal_the_reference(example):
    logits, targets, columns, weights, mask = example
    soft, hard = soft_process_loss(logits, targets, weights, mask), hard_process_loss(logits, columns, weights, mask)
    live = mask.nonzero().flatten().tolist()
    one_hot = torch.nn.functional.one_hot(columns, 3).double()
    for loss, shares in ((soft, targets), (hard, one_hot)):
        expected = sum(float(weights[t]) * numpy_offline.cross_entropy(logits[t].tolist(), shares[t].tolist()) for t in live)
        assert_close(loss.total, _fp64(expected).squeeze())
    assert_close(soft_process_loss(logits, one_hot, weights, mask).metrics, hard.metrics)


@law
@given(steps(), st.data())
def test_poison_and_cuts_change_nothing(example, data):
    logits, targets, columns, weights, mask = example
    cut = data.draw(st.integers(0, mask.numel()))
    for loss, labels, garbage in ((soft_process_loss, targets, NAN), (hard_process_loss, columns, -100)):
        whole = loss(logits, labels, weights, mask)
        dirty_labels = torch.where(mask[:, None] if labels.ndim == 2 else mask, labels, garbage)
        leaf = torch.where(mask[:, None], logits, NAN).requires_grad_()
        dirty = loss(leaf, dirty_labels, torch.where(mask, weights, NAN), mask)
        assert_close(dirty.total.detach(), whole.total, rtol=0, atol=0)
        assert_close(dirty.metrics, whole.metrics, rtol=0, atol=0)
        assert (torch.autograd.grad(dirty.total, leaf)[0][~mask] == 0).all()
        parts = [loss(logits[part], labels[part], weights[part], mask[part]) for part in (slice(0, cut), slice(cut, None))]
        assert_close((parts[0] + parts[1]).total, whole.total)
        assert_close((parts[0] + parts[1]).metrics, whole.metrics)


def test_gradients_are_the_derivatives_of_the_values():
    logits = _fp64(1.2, -0.3, 0.4, 0.1, 0.2, -2.0).reshape(2, 3).requires_grad_()
    weights, mask = _fp64(0.3, 0.7), torch.tensor([True, True])
    targets = _fp64(0.2, 0.3, 0.5, 1.0, 0.0, 0.0).reshape(2, 3)
    assert torch.autograd.gradcheck(lambda x: soft_process_loss(x, targets, weights, mask).total, (logits,))
    assert torch.autograd.gradcheck(lambda x: hard_process_loss(x, torch.tensor([2, 0]), weights, mask).total, (logits,))


def test_extreme_logits_have_finite_losses_and_gradients():
    one, mask = torch.ones(1), torch.tensor([True])
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.tensor([[1e4, -1e4]], dtype=dtype, requires_grad=True)
        for loss in (
            hard_process_loss(logits, torch.tensor([1]), one, mask),
            soft_process_loss(logits, torch.tensor([[0.5, 0.5]]), one, mask),
        ):
            assert loss.total.isfinite() and loss.total.dtype == torch.float32
            assert torch.autograd.grad(loss.total, logits)[0].isfinite().all()
    ruled_out = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    loss = soft_process_loss(ruled_out, torch.tensor([[0.25, 0.75, 0.0]]), one, mask)
    assert loss.total.isfinite() and torch.autograd.grad(loss.total, ruled_out)[0].isfinite().all()
