"""KL estimators and the KL loss: golden values of F1, exact categoricals, and cancellation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.kl import ESTIMATORS, k1, k2, k3, kl_loss, kl_per_token, weighted_kl_loss
from hone.algos.ratios import importance_ratio, log_ratio
from hone.algos.reduce import Reduction, token_weights
from tests.algos.strategies import law, scored_batches
from tests.reference import numpy_algos
from tests.reference.fixtures import f1

REVERSE = [0.04, -0.1, 0.2, 0.0, -0.3]  # d / 5 with d = .2, -.5, 1, 0, -1.5


@pytest.mark.parametrize(
    ("estimator", "gradient", "expected", "slope"),
    [
        ("k1", "as_written", -0.16, [0.2] * 5),  # mean d; 1 / 5 each
        ("k1", "reverse", -0.16, REVERSE),
        ("k2", "as_written", 0.354, REVERSE),  # (.04 + .25 + 1 + 0 + 2.25) / 10
        ("k2", "reverse", 0.354, REVERSE),
        ("k3", "as_written", 0.503404, [0.036254, -0.129744, 0.126424, 0.0, -0.696338]),  # (1 - exp(-d)) / 5
        ("k3", "reverse", 0.503404, REVERSE),
    ],
)
def test_kl_loss_golden(estimator, gradient, expected, slope):
    example = f1()
    mask = example.action_mask
    weights = token_weights(mask, example.cu_seqlens, Reduction()).double()
    loss = kl_loss(example.logp, example.ref_logp, weights, mask, coef=0.5, estimator=estimator, gradient=gradient)
    loss.total.backward()
    assert_close(loss.metrics["kl"], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(loss.total.detach(), 0.5 * loss.metrics["kl"])
    assert_close(example.logp.grad[mask], 0.5 * torch.tensor(slope, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (example.logp.grad[~mask] == 0).all()


def test_on_enumerated_categoricals_the_gradients_are_what_the_docstring_says():
    logits = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([0.0, 0.3, -0.4], dtype=torch.float64).log_softmax(-1)
    mask = torch.ones(3, dtype=torch.bool)

    def expected_gradient(estimator, gradient):
        # On policy: the probabilities are the weights, and constants, as sampling makes them.
        logp = logits.log_softmax(-1)
        loss = kl_loss(logp, ref_logp, logp.detach().exp(), mask, coef=1.0, estimator=estimator, gradient=gradient)
        return loss.metrics["kl"], torch.autograd.grad(loss.total, logits)[0]

    logp = logits.log_softmax(-1)
    (true_gradient,) = torch.autograd.grad((logp.exp() * (logp - ref_logp)).sum(), logits)
    assert_close(true_gradient, torch.tensor([0.105758, -0.176650, 0.070892], dtype=torch.float64), rtol=0, atol=1e-6)
    for estimator in ("k1", "k3"):
        assert_close(expected_gradient(estimator, "reverse")[0], torch.tensor(0.102848, dtype=torch.float64), rtol=0, atol=1e-6)
    for estimator in ("k1", "k2", "k3"):
        assert_close(expected_gradient(estimator, "reverse")[1], true_gradient)
    forward = torch.tensor([0.130381, -0.217779, 0.087397], dtype=torch.float64)
    assert_close(expected_gradient("k3", "as_written")[1], forward, rtol=0, atol=1e-6)
    assert_close(expected_gradient("k1", "as_written")[1], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@law
@given(scored_batches(), st.sampled_from(["k1", "k2", "k3"]))
def test_kl_per_token_equals_the_reference(batch, estimator):
    actual = kl_per_token(batch.rollout_logp, batch.ref_logp, batch.action_mask, estimator=estimator)
    pairs = zip(batch.rollout_logp.tolist(), batch.ref_logp.tolist(), strict=True)
    expected = torch.tensor([numpy_algos.kl(logp, ref, estimator=estimator) for logp, ref in pairs], dtype=torch.float64)
    assert_close(actual, torch.where(batch.action_mask, expected, 0.0))


def test_k3_does_not_cancel_in_single_precision():
    assert_close(k3(torch.tensor([1e-4]), torch.zeros(1)), torch.tensor([5e-9]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_half_precision_is_upcast_before_the_difference(estimator):
    logp, ref_logp = torch.tensor([-8.5], dtype=torch.bfloat16), torch.tensor([-0.00390625], dtype=torch.bfloat16)
    result = estimator(logp, ref_logp)
    assert result.dtype == torch.float32
    assert_close(result, estimator(logp.double(), ref_logp.double()).float())


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_the_reverse_gradient_is_finite_where_the_policy_has_left_the_reference(estimator):
    logp = torch.tensor([-100.0], requires_grad=True)
    one, mask = torch.ones(1), torch.tensor([True])
    kl_loss(logp, torch.zeros(1), one, mask, coef=1.0, estimator=estimator, gradient="reverse").total.backward()
    assert_close(logp.grad, torch.tensor([-100.0]))


@pytest.mark.parametrize("distance", [-1000.0, -100.0, 100.0, 1000.0])
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_value_and_gradient_stay_finite_and_pull_back_at_any_distance(estimator, distance):
    ref_logp, old_logp, one, mask = torch.tensor([-1000.0]), torch.tensor([-1000.0 - distance]), torch.ones(1), torch.tensor([True])
    losses = [
        lambda logp: kl_loss(logp, ref_logp, one, mask, coef=1.0, estimator=estimator, gradient="reverse"),
        lambda logp: weighted_kl_loss(logp, old_logp, ref_logp, one, mask, coef=1.0, estimator=estimator, ratio_cap=10.0),
    ]
    for loss, weight in zip(losses, (1.0, 10.0 if distance > 0 else 0.0), strict=True):
        logp = torch.tensor([-1000.0 + distance], requires_grad=True)
        total = loss(logp).total
        total.backward()
        assert total.isfinite()
        assert_close(logp.grad, torch.tensor([weight * distance]))


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_the_weighted_gradient_is_unbiased_under_the_old_policys_samples(estimator):
    # Samples from the old policy, enumerated: the expectation of rho d grad logp is the gradient of KL(policy || reference).
    logits = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-0.4, 0.3, 0.0], dtype=torch.float64).log_softmax(-1)
    ref = torch.tensor([0.0, 0.3, -0.4], dtype=torch.float64).log_softmax(-1)
    logp, mask = logits.log_softmax(-1), torch.ones(3, dtype=torch.bool)
    loss = weighted_kl_loss(logp, old, ref, old.exp(), mask, coef=1.0, estimator=estimator, ratio_cap=1e6)
    (actual,) = torch.autograd.grad(loss.total, logits, retain_graph=True)
    truth = (logp.exp() * (logp - ref)).sum()
    assert_close(actual, torch.autograd.grad(truth, logits)[0])
    if estimator != "k2":
        assert_close(loss.total, truth)


def test_a_value_saturates_at_a_million_nats():
    one, mask = torch.ones(1), torch.tensor([True])
    loss = kl_loss(-100 * one, 0 * one, one, mask, coef=1.0, estimator="k3", gradient="reverse")
    assert float(loss.total) == 1e6


def test_the_weighted_penalty_needs_a_finite_cap():
    one, mask = torch.zeros(1), torch.tensor([True])
    for cap in (0.0, float("inf")):
        with pytest.raises(ValueError, match="a finite ratio above 0 is needed"):
            weighted_kl_loss(one, one, one, one, mask, coef=1.0, estimator="k3", ratio_cap=cap)


def test_ratios_golden():
    example = f1()
    ratio = importance_ratio(example.logp, example.old_logp, example.action_mask)
    expected = torch.tensor([1.0, 1.349859, 0.670320, 1.648721, 0.904837], dtype=torch.float64)
    assert_close(ratio[example.action_mask].detach(), expected, rtol=0, atol=1e-6)
    assert (ratio[~example.action_mask] == 1).all()
    difference = log_ratio(example.logp, example.old_logp, example.action_mask)
    assert_close(difference.detach(), torch.tensor([0, 0, 0.3, 0, -0.4, 0, 0.5, -0.1, 0], dtype=torch.float64))
