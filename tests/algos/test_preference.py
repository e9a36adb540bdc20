"""Losses on pairs and on judged answers: golden values of F4, the references, the laws, and extreme inputs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.kto import anchor_sums, kl_anchor, kto_loss
from hone.algos.pairs import pair_weights, row_logp, row_mean_logp, split_pairs
from hone.algos.preference import conservative_dpo, dpo, ipo, ipo_summed, log1mexp, odds_ratio, orpo, robust_dpo, rpo, simpo
from hone.algos.reward_models import bradley_terry, log_exp, reward_centre
from tests.algos.strategies import law
from tests.reference import numpy_offline

NAN, INF = math.nan, math.inf
PAIRED = {
    "bt": lambda c, r, w, m: bradley_terry(c, r, torch.full_like(c, 0.3), w, m),
    "dpo": lambda c, r, w, m: dpo(c, r, w, m, beta=0.4),
    "cdpo": lambda c, r, w, m: conservative_dpo(c, r, w, m, beta=0.4, flip=0.1),
    "robust": lambda c, r, w, m: robust_dpo(c, r, w, m, beta=0.4, flip=0.1),
    "ipo": lambda c, r, w, m: ipo(c, r, w, m, beta=0.4),
    "simpo": lambda c, r, w, m: simpo(c, r, w, m, beta=0.4, gamma_beta_ratio=0.75),
    "orpo": lambda c, r, w, m: orpo(c, r, w, m, coef=0.4),
}
EXTRA = {
    "log-exp": log_exp,
    "centre": lambda c, r, w, m: reward_centre(c, r, w, m, coef=0.01),
    "rpo": lambda c, r, w, m: rpo(c, r, c, w, m, beta=0.4, nll_coef=0.1),
    "odds ratio": lambda c, r, w, m: odds_ratio(c, r, w, m, coef=0.1),
    "kto": lambda c, r, w, m: kto_loss(
        c - r, torch.arange(c.numel()) % 2 == 0, w, m, torch.tensor(0.3), beta=0.4, desirable_weight=1.3, undesirable_weight=0.7
    ),
}
losses = st.sampled_from(sorted(PAIRED | EXTRA)).map((PAIRED | EXTRA).__getitem__)


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def _golden(loss, chosen, rejected, *extra):
    """(total, d/dchosen) of one pair, after a pair off the mask that holds garbage."""
    chosen, rejected = _fp64(NAN, chosen).requires_grad_(), _fp64(INF, rejected).requires_grad_()
    weights, mask = _fp64(NAN, 1.0), torch.tensor([False, True])
    result = loss(chosen, rejected, *[_fp64(-INF, number) for number in extra], weights, mask)
    result.total.backward()
    for leaf in (chosen, rejected):
        assert leaf.grad is None or leaf.grad[0] == 0
    return float(result.total.detach()), float(chosen.grad[1])


# F4: sums -10 and -12 against the reference's -11 and -11.5: log-ratios 1 and -.5, h 1.5; lengths 4 and 5; beta .1.
@pytest.mark.parametrize(
    ("loss", "chosen", "rejected", "expected"),
    [
        (lambda *a: dpo(*a, beta=0.1), 1.0, -0.5, 0.620957),  # log(1 + exp(-.15))
        (lambda *a: conservative_dpo(*a, beta=0.1, flip=0.1), 1.0, -0.5, 0.635957),  # .9 * .620957 + .1 * .770957
        (lambda *a: robust_dpo(*a, beta=0.1, flip=0.1), 1.0, -0.5, 0.602207),  # (.9 * .620957 - .1 * .770957) / .8
        (lambda *a: ipo_summed(*a, beta=0.1), 1.0, -0.5, 12.25),  # (1.5 - 5)^2
        (lambda *a: ipo(*a, beta=0.1), 0.25, -0.1, 21.6225),  # means 1 / 4 and -.5 / 5: (.35 - 5)^2
        (lambda *a: simpo(*a, beta=2.0, gamma_beta_ratio=0.5), -2.5, -2.4, 1.463282),  # log(1 + exp(.2 + 1))
        (lambda *a: simpo(*a, beta=2.0, gamma_beta_ratio=0.25), -2.5, -2.4, 1.103186),
        (lambda *a: simpo(*a, beta=0.1, gamma_beta_ratio=5.0), -2.5, -2.4, 0.980313),  # TRL's defaults: gamma .5
        (lambda *a: odds_ratio(*a, coef=1.0), -2.5, -2.4, 0.749369),
        (lambda *a: orpo(*a, coef=0.1), -2.5, -2.4, 2.574937),  # 2.5 + .0749369
        (lambda *a: orpo(*a, coef=0.1), -0.2, -0.9, 0.214123),
        (lambda *a: log_exp(*a), 1.0, 0.5, 0.474077),  # log(1 + exp(-.5))
        (lambda *a: reward_centre(*a, coef=0.01), 1.0, 0.5, 0.0225),
    ],
)
def test_paired_golden(loss, chosen, rejected, expected):
    assert _golden(loss, chosen, rejected)[0] == pytest.approx(expected, abs=1e-6)


def test_dpo_gradient_golden():
    assert _golden(lambda *a: dpo(*a, beta=0.1), 1.0, -0.5)[1] == pytest.approx(-0.046257, abs=1e-6)  # -.1 sigmoid(-.15)
    total, slope = _golden(lambda *a: dpo(*a, beta=0.1), 2.0, 2.0)  # equal answers
    assert total == pytest.approx(math.log(2)) and slope == pytest.approx(-0.05)


def test_bradley_terry_golden():
    assert _golden(bradley_terry, 1.0, 0.5, 1.0)[0] == pytest.approx(0.974077, abs=1e-6)  # log(1 + exp(1 - .5))


def test_rpo_golden():
    summed = _golden(lambda *a: rpo(*a, beta=0.01, nll_coef=0.005), 1.0, -0.5, -10.0)
    assert summed[0] == pytest.approx(0.735675, abs=1e-6)  # log(1 + exp(-.015)) + .005 * 10
    averaged = _golden(lambda *a: rpo(*a, beta=0.1, nll_coef=1.0), 1.0, -0.5, -2.5)
    assert averaged[0] == pytest.approx(3.120957, abs=1e-6)  # .620957 + 10 / 4


def test_kto_golden():
    # Mismatched rows .4, -.2, .7 on two ranks: (.4 - .2 + .7) / 3 = .3, where the mean of the ranks' means would be .4.
    ranks = [anchor_sums(_fp64(0.4, NAN, -0.2), torch.tensor([True, False, True])), anchor_sums(_fp64(0.7), torch.tensor([True]))]
    anchor = kl_anchor(ranks[0] + ranks[1])
    assert_close(anchor, _fp64(0.3).squeeze())
    ratios = _fp64(1.0, NAN, -0.5).requires_grad_()
    desirable, mask = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    settings = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    loss = kto_loss(ratios, desirable, _fp64(0.5, NAN, 0.5), mask, anchor, **settings)
    assert_close(loss.total.detach(), _fp64(0.5 * (0.482507 + 0.480011)).squeeze(), rtol=0, atol=1e-6)
    figures = {name: round(float(figure), 9) for name, figure in loss.metrics.items() if name != "preference_loss"}
    assert figures == {"kl_anchor": 0.3, "chosen_reward": 0.05, "rejected_reward": -0.025}
    loss.total.backward()
    # sigma' = .482507 * .517493 and .480011 * .519989, times beta / 2, with opposite signs
    assert_close(ratios.grad, _fp64(-0.0124847, 0.0, 0.0124800), rtol=0, atol=1e-6)
    good_only = kto_loss(ratios.detach(), desirable, _fp64(1.0, NAN, 0.0), torch.tensor([True, False, False]), anchor, **settings)
    assert_close(good_only.total, _fp64(0.482507).squeeze(), rtol=0, atol=1e-6)


def test_an_anchor_needs_two_rows_and_is_never_negative():
    assert kl_anchor(_fp64(-3.0, 2.0)) == 0
    for count in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"has {int(count)} mismatched rows; .* raise train.batch_size"):
            kl_anchor(_fp64(1.0, count))


def test_rows_become_pairs():
    logp = _fp64(NAN, -1.0, -3.0, INF, -2.0, NAN, -4.0, -5.0).requires_grad_()
    mask = torch.tensor([False, True, True, False, True, False, True, True])
    cu_seqlens = torch.tensor([0, 4, 5, 6, 8], dtype=torch.int32)
    sums, means = row_logp(logp, mask, cu_seqlens), row_mean_logp(logp, mask, cu_seqlens)
    assert_close(sums.detach(), _fp64(-4.0, -2.0, 0.0, -9.0))
    assert_close(means.detach(), _fp64(-2.0, -2.0, 0.0, -4.5))
    chosen, rejected = split_pairs(means)
    assert_close(chosen.detach(), _fp64(-2.0, 0.0))
    assert_close(rejected.detach(), _fp64(-2.0, -4.5))
    means.sum().backward()
    assert_close(logp.grad, _fp64(0.0, 0.5, 0.5, 0.0, 1.0, 0.0, 0.5, 0.5))
    assert_close(pair_weights(torch.tensor([True, False, True])), torch.tensor([0.5, 0.0, 0.5]))
    with pytest.raises(ValueError, match="per_row has 3 rows"):
        split_pairs(torch.zeros(3))


def test_a_row_is_summed_beyond_single_precision():
    # -2^24 - 1 has no place in fp32: added up there, both ones would be lost on the way.
    logp, mask = torch.tensor([-(2.0**24), -1.0, -1.0, 2.0**24]), torch.ones(4, dtype=torch.bool)
    assert row_logp(logp, mask, torch.tensor([0, 4], dtype=torch.int32)) == -2.0


@st.composite
def pairs(draw):
    """(chosen, rejected, weights, mask) in fp64, below zero as ORPO's means must be."""
    count = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    chosen, rejected = (-torch.rand(count, generator=generator, dtype=torch.float64) * 3 - 0.01 for _ in range(2))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    return chosen, rejected, pair_weights(mask).double(), mask


def _evaluate(loss, chosen, rejected, weights, mask):
    leaves = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    result = loss(*leaves, weights, mask)
    return result, torch.stack(torch.autograd.grad(result.total, leaves, materialize_grads=True, allow_unused=True))


@law
@given(st.sampled_from(sorted(PAIRED)), pairs())
def test_paired_losses_equal_the_reference(name, batch):
    columns = zip(*[column.tolist() for column in batch], strict=True)
    expected = sum(w * numpy_offline.paired(name, c, r, beta=0.4, flip=0.1, margin=0.3) for c, r, w, live in columns if live)
    assert_close(PAIRED[name](*batch).total, _fp64(expected).squeeze(), rtol=1e-9, atol=1e-12)


@law
@given(pairs(), st.floats(0.0, 2.0))
def test_kto_equals_the_reference(batch, anchor):
    ratios, _, weights, mask = batch
    good = torch.arange(ratios.numel()) % 2 == 0
    actual = kto_loss(ratios, good, weights, mask, _fp64(anchor).squeeze(), beta=0.4, desirable_weight=1.3, undesirable_weight=0.7)
    columns = zip(ratios.tolist(), good.tolist(), weights.tolist(), strict=True)
    expected = sum(w * numpy_offline.kto(r, anchor, good=g, beta=0.4, scale=1.3 if g else 0.7) for r, g, w in columns)
    assert_close(actual.total, _fp64(expected).squeeze())


@law
@given(losses, pairs())
def test_poison_off_the_mask_changes_no_bit_and_gets_no_gradient(loss, batch):
    chosen, rejected, weights, mask = batch
    clean, clean_gradient = _evaluate(loss, *batch)
    for filler in (NAN, INF, -INF, 1e38):
        dirty, dirty_gradient = _evaluate(loss, *(torch.where(mask, column, filler) for column in (chosen, rejected, weights)), mask)
        assert_close(dirty.total, clean.total, rtol=0, atol=0)
        assert_close(dirty.metrics, clean.metrics, rtol=0, atol=0)
        assert_close(dirty_gradient, clean_gradient, rtol=0, atol=0)
        assert (dirty_gradient[:, ~mask] == 0).all()


@law
@given(st.sampled_from(sorted(set(PAIRED | EXTRA) - {"kto"})).map((PAIRED | EXTRA).__getitem__), pairs(), st.data())
def test_any_cut_in_any_order_adds_up_to_the_whole(loss, batch, data):
    order = torch.tensor(data.draw(st.permutations(range(batch[0].numel()))))
    cut = data.draw(st.integers(0, order.numel()))
    whole, gradient = _evaluate(loss, *batch)
    (first, first_gradient), (second, second_gradient) = (_evaluate(loss, *(c[part] for c in batch)) for part in (order[:cut], order[cut:]))
    assert_close((first + second).total, whole.total)
    assert_close((first + second).metrics, whole.metrics)
    assert_close(torch.cat([first_gradient, second_gradient], 1), gradient[:, order])


def test_kto_adds_up_with_one_anchor():
    ratios, good, weights = _fp64(1.0, -0.5, 2.0), torch.tensor([True, False, True]), _fp64(0.2, 0.3, 0.5)
    mask, anchor = torch.ones(3, dtype=torch.bool), _fp64(0.3).squeeze()
    parts = [
        kto_loss(ratios[part], good[part], weights[part], mask[part], anchor, beta=0.4, desirable_weight=1.3, undesirable_weight=0.7)
        for part in (slice(0, 3), slice(0, 1), slice(1, 3))
    ]
    assert_close((parts[1] + parts[2]).total, parts[0].total)
    assert_close((parts[1] + parts[2]).metrics, parts[0].metrics)


@pytest.mark.parametrize("name", sorted(PAIRED | EXTRA))
def test_gradients_are_the_derivatives_of_the_values(name):
    weights, mask = _fp64(0.3, 0.7, 0.4), torch.tensor([True, True, False])
    chosen, rejected = _fp64(-0.4, -1.3, -1.0).requires_grad_(), _fp64(-0.9, -0.2, -1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: (PAIRED | EXTRA)[name](c, r, weights, mask).total, (chosen, rejected))


@pytest.mark.parametrize("name", sorted(PAIRED | EXTRA))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("chosen", "rejected"), [(-1e4, -1.0), (-1.0, -1e4), (0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)])
def test_extreme_pairs_have_finite_losses_and_gradients(name, dtype, chosen, rejected):
    columns = torch.tensor([chosen], dtype=dtype), torch.tensor([rejected], dtype=dtype)
    result, gradient = _evaluate((PAIRED | EXTRA)[name], *columns, torch.ones(1), torch.tensor([True]))
    assert result.total.dtype == torch.float32
    assert result.total.isfinite() and gradient.isfinite().all()


def test_a_large_difference_costs_exactly_itself():
    one, mask = torch.ones(1), torch.tensor([True])
    assert log_exp(torch.tensor([-100.0]), torch.zeros(1), one, mask).total == 100.0


def test_log1mexp_is_accurate_at_both_ends():
    x = torch.tensor([-1e-7, -0.5, -0.6932, -40.0])
    expected = torch.tensor([math.log(-math.expm1(float(value))) if value > -1 else math.log1p(-math.exp(float(value))) for value in x])
    assert_close(log1mexp(x), expected, rtol=1e-6, atol=0)
    leaf = torch.tensor([0.0, -1e-30, -200.0], requires_grad=True)
    log1mexp(leaf).sum().backward()
    assert leaf.grad.isfinite().all()


def test_one_loss_in_another():
    chosen, rejected, weights, mask = _fp64(-0.4, -1.3), _fp64(-0.9, -0.2), _fp64(0.5, 0.5), torch.tensor([True, True])
    plain = dpo(chosen, rejected, weights, mask, beta=0.4).total
    assert_close(conservative_dpo(chosen, rejected, weights, mask, beta=0.4, flip=0.0).total, plain)
    assert_close(robust_dpo(chosen, rejected, weights, mask, beta=0.4, flip=0.0).total, plain)
    assert_close(simpo(chosen, rejected, weights, mask, beta=0.4, gamma_beta_ratio=0.0).total, plain)
    assert_close(log_exp(0.4 * chosen, 0.4 * rejected, weights, mask).total, plain)
    # SimPO without a margin on rows of 5 tokens is reference-free DPO at beta / 5: log(1 + exp(-.4 * 2)) on sums -10, -12.
    short = simpo(_fp64(-2.0), _fp64(-2.4), _fp64(1.0), mask[:1], beta=2.0, gamma_beta_ratio=0.0).total
    assert_close(short, _fp64(0.371101).squeeze(), rtol=0, atol=1e-6)
    assert_close(short, dpo(_fp64(-10.0), _fp64(-12.0), _fp64(1.0), mask[:1], beta=0.4).total)


@law
@given(pairs(), st.floats(0.0, 0.45))
def test_robust_dpo_is_unbiased_under_flipped_labels(batch, flip):
    chosen, rejected, weights, mask = batch
    true, swapped = (robust_dpo(*pair, weights, mask, beta=0.4, flip=flip).total for pair in ((chosen, rejected), (rejected, chosen)))
    assert_close((1 - flip) * true + flip * swapped, dpo(*batch, beta=0.4).total)


def test_figures_add_up_to_means():
    loss = dpo(_fp64(1.0, -2.0), _fp64(-0.5, 1.0), _fp64(0.25, 0.75), torch.tensor([True, True]), beta=0.1)
    assert {name: round(float(figure), 9) for name, figure in loss.metrics.items() if name != "preference_loss"} == {
        "chosen_reward": -0.125,  # .1 (.25 * 1 - .75 * 2)
        "rejected_reward": 0.0625,  # .1 (-.25 * .5 + .75 * 1)
        "accuracy": 0.25,
    }


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda *a: conservative_dpo(*a, beta=0.1, flip=0.6), r"flip is 0.6; .* \[0, 0.5\]"),
        (lambda *a: robust_dpo(*a, beta=0.1, flip=0.5), r"flip is 0.5; .* \[0, 0.5\)"),
        (lambda *a: ipo(*a, beta=0.0), "beta is 0.0"),
    ],
)
def test_settings_out_of_range_are_named(loss, message):
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.tensor([True]))
