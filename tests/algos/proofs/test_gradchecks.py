"""Every public loss of the table `losses.py`: where its gradient goes, and the laws of a weighted sum over masked items."""

import math

import pytest
import torch
from torch.testing import assert_close

from hone.algos.distillation import lumped_student_logp, tempered_logp
from hone.algos.kl import k1, k2, k3, kl_per_token
from hone.algos.masking import on_mask, upcast
from hone.algos.padding import pack_padded, unpack_padded
from hone.algos.pairs import row_logp, row_mean_logp, split_pairs
from hone.algos.preference import log1mexp
from hone.algos.process import reward_token_logits
from hone.algos.ratios import importance_ratio, log_ratio
from hone.algos.reduce import weighted_sum
from tests.algos.proofs.losses import ENTRIES, columns, evaluate

POISON = (math.nan, math.inf, -math.inf, 1e300, -1e300)
every_loss = pytest.mark.parametrize("label", sorted(ENTRIES))


def _wide(mask, column):
    return mask if column.ndim == 1 else mask[:, None]


def _figures(result):
    return {"total": result.total.detach(), **result.metrics}


@every_loss
@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_is_the_values_derivative_or_the_one_written_by_hand(label, seed):
    entry, given = ENTRIES[label], columns(seed=seed)
    if entry.slope is not None:
        (leaf,) = entry.leaves
        _, gradients = evaluate(entry, given)
        assert_close(gradients[leaf], torch.where(given.mask, entry.slope(given), 0.0))
        assert (gradients[leaf] != 0).any()
        return
    leaves = [given.numbers[name].clone().requires_grad_() for name in entry.leaves]
    assert torch.autograd.gradcheck(lambda *now: entry(given.replace(**dict(zip(entry.leaves, now, strict=True)))).total, leaves)


@every_loss
def test_no_gradient_reaches_a_constant(label):
    entry, given = ENTRIES[label], columns()
    constants = {name: given.numbers[name].clone().requires_grad_() for name in entry.constants}
    leaves = {name: given.numbers[name].clone().requires_grad_() for name in entry.leaves}
    total = entry(given.replace(**constants, **leaves)).total
    for name, numbers in constants.items():
        (gradient,) = torch.autograd.grad(total, numbers, retain_graph=True, allow_unused=True)
        assert gradient is None or (gradient == 0).all(), name


@every_loss
def test_figures_carry_no_gradient_and_at_least_single_precision(label):
    result, _ = evaluate(ENTRIES[label], columns())
    for name, figure in result.metrics.items():
        assert not figure.requires_grad and figure.ndim == 0 and figure.dtype == torch.float64, name


@every_loss
def test_poison_off_the_mask_changes_no_bit_and_gets_no_gradient(label):
    entry, given = ENTRIES[label], columns()
    clean, clean_gradients = evaluate(entry, given)
    for filler in POISON:

        def poisoned(_, column, filler=filler):
            garbage = torch.full_like(column, filler if column.is_floating_point() else -100)  # for booleans: True
            return torch.where(_wide(given.mask, column), column, garbage)

        dirty, dirty_gradients = evaluate(entry, given.map(poisoned))
        assert_close(_figures(dirty), _figures(clean), rtol=0, atol=0)
        assert_close(dirty_gradients, clean_gradients, rtol=0, atol=0)
        assert all((gradient[~given.mask] == 0).all() for gradient in dirty_gradients.values())


@every_loss
def test_an_empty_mask_gives_a_zero_attached_to_the_graph(label):
    given = columns().off().map(lambda _, column: torch.full_like(column, math.nan) if column.is_floating_point() else column)
    result, gradients = evaluate(ENTRIES[label], given)
    assert result.total.requires_grad
    assert all(figure == 0 for figure in _figures(result).values())
    assert all((gradient == 0).all() for gradient in gradients.values())


@every_loss
def test_half_precision_is_promoted_before_any_arithmetic(label):
    entry = ENTRIES[label]
    half = columns().map(lambda _, column: column.bfloat16() if column.is_floating_point() else column)
    full = half.map(lambda _, column: column.float() if column.is_floating_point() else column)
    low, low_gradients = evaluate(entry, half)
    high, high_gradients = evaluate(entry, full)
    assert_close(_figures(low), _figures(high), rtol=0, atol=0)
    assert all(figure.dtype == torch.float32 for figure in _figures(low).values())
    for name, gradient in low_gradients.items():
        assert gradient.dtype == torch.bfloat16
        assert_close(gradient.float(), high_gradients[name], rtol=2**-7, atol=1e-3)  # as far as bf16 can hold it


@every_loss
def test_doubled_weights_double_everything_to_the_bit(label):
    # So nothing inside divides by a sum of weights or a count.
    entry, given = ENTRIES[label], columns()
    once, once_gradients = evaluate(entry, given)
    twice, twice_gradients = evaluate(entry, given.replace(weights=2 * given.weights))
    assert_close(_figures(twice), {name: 2 * figure for name, figure in _figures(once).items()}, rtol=0, atol=0)
    assert_close(twice_gradients, {name: 2 * gradient for name, gradient in once_gradients.items()}, rtol=0, atol=0)


@pytest.mark.parametrize("label", sorted(label for label, entry in ENTRIES.items() if entry.rows != "nothing"))
def test_any_cut_of_any_order_adds_up(label):
    entry, given = ENTRIES[label], columns()
    given = given.single_items() if entry.rows == "items" else given
    count = len(given.lengths)
    order = [(7 * row + 3) % count for row in range(count)]
    assert sorted(order) == list(range(count))
    whole, gradients = evaluate(entry, given.take(order))
    in_place, _ = evaluate(entry, given)
    assert_close(_figures(in_place), _figures(whole))
    for at in range(count + 1):
        parts = [evaluate(entry, given.take(rows)) for rows in (order[:at], order[at:])]
        assert_close(_figures(parts[0][0] + parts[1][0]), _figures(whole))
        for name, gradient in gradients.items():
            assert_close(torch.cat([part[1][name] for part in parts]), gradient)


def test_only_the_covariance_losses_may_not_be_cut():
    assert {label for label, entry in ENTRIES.items() if entry.rows == "nothing"} == {
        "covariance_losses.clip_cov_loss",
        "covariance_losses.kl_cov_loss",
    }
    for label in ("covariance_losses.clip_cov_loss", "covariance_losses.kl_cov_loss"):
        whole, _ = evaluate(ENTRIES[label], columns())
        alone = [float(evaluate(ENTRIES[label], columns().take([row]))[0].total.detach()) for row in range(5)]
        assert abs(sum(alone) - whole.total) > 1e-3  # or the exception would be idle


def _masked(function):
    return lambda c, x: function(x, c.mask)


DIFFERENTIABLE = {
    # Functions that losses are made of; each takes (columns, leaf).
    "kl.k1": lambda c, x: k1(x, c.ref_logp),
    "kl.k2": lambda c, x: k2(x, c.ref_logp),
    "kl.k3": lambda c, x: k3(x, c.ref_logp),
    "kl.kl_per_token": lambda c, x: kl_per_token(x, c.ref_logp, c.mask, estimator="k3"),
    "masking.on_mask": _masked(on_mask),
    "masking.upcast": lambda c, x: upcast(x),
    "ratios.log_ratio": lambda c, x: log_ratio(x, c.old_logp, c.mask),
    "ratios.importance_ratio": lambda c, x: importance_ratio(x, c.old_logp, c.mask),
    "reduce.weighted_sum": lambda c, x: weighted_sum(x, c.weights, c.mask),
    "pairs.row_logp": lambda c, x: row_logp(x, c.mask, c.cu_seqlens),
    "pairs.row_mean_logp": lambda c, x: row_mean_logp(x, c.mask, c.cu_seqlens),
    "pairs.split_pairs": lambda c, x: torch.cat(split_pairs(x[: x.numel() // 2 * 2])),
    "preference.log1mexp": lambda c, x: log1mexp(x),
    "process.reward_token_logits": lambda c, x: reward_token_logits(x[:, None].expand(-1, 4) * c.logits, torch.tensor([2, 0])),
    "distillation.tempered_logp": lambda c, x: tempered_logp(x[:, None] * c.logits, c.mask, temperature=0.6),
    "distillation.lumped_student_logp": lambda c, x: lumped_student_logp(x[:, None] * c.logits, c.top, c.mask, temperature=0.6),
    "padding.pack_padded": lambda c, x: pack_padded(x[:16].reshape(4, 4), _staircase())[0],
    "padding.unpack_padded": lambda c, x: unpack_padded(x[:10], _staircase()),
}


def _staircase():
    return torch.ones(4, 4, dtype=torch.bool).tril()


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_what_losses_are_made_of_has_the_derivative_of_its_value(name):
    given = columns()
    leaf = given.chosen.clone().requires_grad_()  # below zero, as log1mexp asks
    assert torch.autograd.gradcheck(lambda x: DIFFERENTIABLE[name](given, x), (leaf,))
    assert (torch.autograd.grad(DIFFERENTIABLE[name](given, leaf).square().sum(), leaf)[0] != 0).any()
