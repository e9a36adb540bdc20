"""KL terms, importance weights and distillation, enumerated over a tiny policy: what each one's expected gradient really is."""

import math

import pytest
import torch
from torch.testing import assert_close

from hone.algos.advantages import discounted_returns, row_sums, spread
from hone.algos.corrections import correction_weights
from hone.algos.decoupled import decoupled_surrogate
from hone.algos.distillation import on_policy_distillation_advantages, reverse_kl, tempered_logp
from hone.algos.group_baselines import leave_one_out
from hone.algos.kl import kl_loss, kl_per_token
from hone.algos.mismatch import mismatch_figures
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.process import hard_process_loss, soft_process_loss
from hone.algos.ratios import importance_ratio
from hone.algos.reduce import weighted_sum
from hone.algos.soft_losses import cispo_loss, reinforce_loss, scaled_advantages
from hone.algos.trust_region import dppo_loss
from tests.algos.proofs.tabular import (
    LOGITS,
    REFERENCE,
    REWARDS,
    Enumerated,
    cosine,
    expected_reward,
    gradient,
    state_kl,
    trajectory_probabilities,
    visits,
)

BETA = 0.3


def _sequence_kl(logits):
    """Of whole rows: every state's, weighed by how often a row comes through it [nats]."""
    return (visits(logits) * state_kl(logits, REFERENCE)).sum()


def _local(divergence):
    """Every state's gradient, weighed by how often a row comes through it, as if that did not depend on the policy."""
    return gradient(lambda z: (visits(z).detach() * divergence(z)).sum())


def _on_policy(every, **settings):
    ref_logp = every.logp(REFERENCE)
    return gradient(lambda z: kl_loss(every.logp(z), ref_logp, every.weights(z), every.action_mask, coef=1.0, **settings).total)


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_values_of_k1_and_k3_are_unbiased_and_of_k2_are_not(estimator, unbiased):
    every = Enumerated(size=1)
    k = kl_per_token(every.logp(LOGITS), every.logp(REFERENCE), every.action_mask, estimator=estimator)
    gap = weighted_sum(k, every.weights(LOGITS), every.action_mask) - _sequence_kl(LOGITS)
    assert (abs(gap) < 1e-12) == unbiased


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_reverse_gradient_is_that_of_the_divergence_in_the_states_visited(estimator):
    every = Enumerated(size=1)
    assert_close(_on_policy(every, estimator=estimator, gradient="reverse"), _local(lambda z: state_kl(z, REFERENCE)))


def test_gradients_as_written_are_those_of_other_quantities():
    every = Enumerated(size=1)
    forward = _on_policy(every, estimator="k3", gradient="as_written")
    assert_close(forward, _local(lambda z: state_kl(REFERENCE, z)))  # KL(reference || policy)
    assert cosine(forward, _local(lambda z: state_kl(z, REFERENCE))) < 0.999
    assert_close(_on_policy(every, estimator="k1", gradient="as_written"), torch.zeros(3, 3, dtype=torch.float64), rtol=0, atol=1e-15)
    assert_close(_on_policy(every, estimator="k2", gradient="as_written"), _local(lambda z: state_kl(z, REFERENCE)))


def _in_reward(every, estimator):
    """The policy gradient of rewards less BETA times the estimator, with the reward to go: REINFORCE++ before its whitening."""
    k = kl_per_token(every.logp(LOGITS), every.logp(REFERENCE), every.action_mask, estimator=estimator)
    advantages = discounted_returns(every.per_token(REWARDS) - BETA * k, *every.rows, gamma=1.0)
    return -gradient(lambda z: reinforce_loss(every.logp(z), advantages, every.weights(z), every.action_mask).total)


def test_k1_in_the_reward_is_exact_for_whole_rows():
    every = Enumerated(size=1)
    truth = gradient(lambda z: expected_reward(z) - BETA * _sequence_kl(z))
    assert_close(_in_reward(every, "k1"), truth)
    # What no loss per token has: a step's effect on where later divergences are met.
    local = gradient(expected_reward) - BETA * _local(lambda z: state_kl(z, REFERENCE))
    assert_close(local[1:], truth[1:])
    assert (local[0] - truth[0]).abs().max() > 0.01
    for estimator in ("k2", "k3"):
        assert (_in_reward(every, estimator) - truth).abs().max() > 0.01


def _off_policy(every, advantages, correction):
    corrected = scaled_advantages(advantages, correction, every.action_mask)
    return -gradient(lambda z: reinforce_loss(every.logp(z), corrected, every.weights(REFERENCE), every.action_mask).total)


def _correction(every, **settings):
    return correction_weights(every.logp(LOGITS), every.logp(REFERENCE), *every.rows, **settings)


@pytest.mark.parametrize("size", [2, 3])
def test_the_product_of_ratios_is_unbiased_for_another_policys_samples(size):
    # The baseline is a constant for a row even so: its own expected score is that of the current policy, zero.
    every = Enumerated(size=size)
    scores = row_sums(every.per_token(REWARDS), *every.rows)
    advantages = spread(leave_one_out(scores, every.group, every.live), *every.rows)
    whole = _correction(every, level="sequence", mode="truncate", high=math.inf)
    assert_close(_off_policy(every, advantages, whole), gradient(expected_reward))
    bounds = {
        "truncated": {"level": "sequence", "mode": "truncate", "high": 1.5},
        "masked": {"level": "sequence", "mode": "mask", "low": 0.5, "high": 2.0},
        "geometric": {"level": "geometric", "mode": "truncate", "high": math.inf},
        "by token": {"level": "token", "mode": "truncate", "high": math.inf},
    }
    for name, settings in bounds.items():
        bias = _off_policy(every, advantages, _correction(every, **settings)) - gradient(expected_reward)
        assert bias.abs().max() > 0.01, name
    none = _off_policy(every, advantages, torch.ones_like(advantages)) - gradient(expected_reward)
    assert none.abs().max() > 0.05


def test_tokens_ratios_suffice_where_a_row_has_one_step():
    # The last state's step, given that the row got there: all of the row's future is in one token.
    every = Enumerated(size=1)
    last = every.action_mask & (every.states > 0)
    advantages = torch.where(last, every.per_token(REWARDS), 0.0)
    by_token = _off_policy(every, advantages, _correction(every, level="token", mode="truncate", high=math.inf))
    reached = visits(REFERENCE)
    assert_close(by_token, gradient(lambda z: (reached[1:] * (z.softmax(-1) * REWARDS)[1:].sum(-1)).sum()))


def _one_step(every):
    """Only what happens in the first state, with its reward: a bandit."""
    first = every.action_mask & (every.states == 0)
    return first, torch.where(first, every.per_token(REWARDS), 0.0)


ONE_STEP = {
    # (new, old, advantages, weights, mask): samples of `old`
    "ppo without a clip": lambda *a: clipped_surrogate(*a, clip_low=1.0, clip_high=math.inf),
    "cispo without a cap": lambda *a: cispo_loss(*a, cap=math.inf),
    "dppo without a threshold": lambda *a: dppo_loss(*a, divergence="tv", threshold=1.0),
    "decoupled": lambda new, old, *a: decoupled_surrogate(new, new.detach() + 0.1, old, *a, clip_low=1.0, clip_high=math.inf),
}


@pytest.mark.parametrize("name", sorted(ONE_STEP))
def test_losses_with_a_ratio_of_their_own_are_unbiased_for_one_step_of_another_policy(name):
    every = Enumerated(size=1)
    mask, advantages = _one_step(every)
    old = every.logp(REFERENCE)
    actual = -gradient(lambda z: ONE_STEP[name](every.logp(z), old, advantages, every.weights(REFERENCE), mask).total)
    assert_close(actual, gradient(lambda z: (z.softmax(-1) * REWARDS)[0].sum()))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_kl_loss_weighed_by_the_ratio_is_unbiased_for_another_policys_samples(estimator):
    # rho k3 of DeepSeek-V3.2, rho differentiable, has the gradient rho d: the "reverse" one with rho in the weight.
    every = Enumerated(size=1)
    mask, _ = _one_step(every)
    sampler = LOGITS.flip(0, 1)
    ref_logp = every.logp(REFERENCE)

    def loss(logits):
        logp = every.logp(logits)
        ratio = importance_ratio(logp, every.logp(sampler), mask).detach()
        return kl_loss(logp, ref_logp, every.weights(sampler) * ratio, mask, coef=1.0, estimator=estimator, gradient="reverse").total

    assert_close(gradient(loss), gradient(lambda z: state_kl(z, REFERENCE)[0]))

    def unweighed(logits):
        return kl_loss(every.logp(logits), ref_logp, every.weights(sampler), mask, coef=1.0, estimator=estimator, gradient="reverse").total

    assert (gradient(unweighed) - gradient(lambda z: state_kl(z, REFERENCE)[0])).abs().max() > 0.01


def test_the_gradient_of_the_ratio_times_k3_is_the_reverse_gradient_with_the_ratio_in_the_weight():
    every = Enumerated(size=1)
    old, ref_logp = every.logp(LOGITS.flip(0, 1)), every.logp(REFERENCE)

    def product(logits):
        logp = every.logp(logits)
        k3 = kl_per_token(logp, ref_logp, every.action_mask, estimator="k3")
        return weighted_sum(importance_ratio(logp, old, every.action_mask) * k3, every.weights(LOGITS), every.action_mask)

    def straight_through(logits):
        logp = every.logp(logits)
        weights = every.weights(LOGITS) * importance_ratio(logp, old, every.action_mask).detach()
        return kl_loss(logp, ref_logp, weights, every.action_mask, coef=1.0, estimator="k3", gradient="reverse").total

    assert_close(product(LOGITS), straight_through(LOGITS))
    assert_close(gradient(product), gradient(straight_through))


def test_mismatch_figures_are_unbiased_under_the_engines_samples():
    # Old is the learner, rollout the engine that sampled: KL(engine || learner) twice, and chi^2 of one step.
    every = Enumerated(size=1)
    first, _ = _one_step(every)
    for mask in (every.action_mask, first):
        figures = mismatch_figures(every.logp(LOGITS), every.logp(REFERENCE), every.weights(REFERENCE), mask, every.cu_seqlens)
        reached = visits(REFERENCE) if mask is every.action_mask else torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        kl = (reached * state_kl(REFERENCE, LOGITS)).sum()
        assert_close(figures["mismatch_k1"], kl)
        assert_close(figures["mismatch_k3"], kl)
        learner, engine = LOGITS.softmax(-1), REFERENCE.softmax(-1)
        assert_close(figures["mismatch_chi2"], (reached * ((learner.square() / engine).sum(-1) - 1)).sum())


def test_on_policy_distillation_is_the_reverse_divergence():
    every = Enumerated(size=1)
    teacher = every.logp(REFERENCE)
    immediate = on_policy_distillation_advantages(every.logp(LOGITS), teacher, every.action_mask)

    def of(advantages):
        return gradient(lambda z: reinforce_loss(every.logp(z), advantages, every.weights(z), every.action_mask).total)

    assert_close(of(immediate), _local(lambda z: state_kl(z, REFERENCE)))

    # The sum over the vocabulary in place of the sampled token: the same, token by token.
    def summed(logits):
        student = tempered_logp(logits[every.states], every.action_mask, temperature=1.0)
        teacher_logp = REFERENCE.log_softmax(-1)[every.states]
        return reverse_kl(student, teacher_logp, every.weights(logits), every.action_mask).total

    assert_close(gradient(summed), of(immediate))
    # Its reward to go is the divergence of whole rows.
    assert_close(of(discounted_returns(immediate, *every.rows, gamma=1.0)), gradient(_sequence_kl))


def test_soft_labels_are_the_mean_of_hard_ones():
    # A share of .3, .5, .2 as targets against labels drawn with these probabilities.
    logits, shares, mask = LOGITS[:1], torch.tensor([[0.3, 0.5, 0.2]], dtype=torch.float64), torch.tensor([True])
    one = torch.ones(1, dtype=torch.float64)
    drawn = gradient(lambda z: sum(q * hard_process_loss(z, torch.tensor([c]), one, mask).total for c, q in enumerate(shares[0])), logits)
    assert_close(gradient(lambda z: soft_process_loss(z, shares, one, mask).total, logits), drawn)


def test_the_two_policies_differ_enough_for_bias_to_show():
    ratio = trajectory_probabilities(LOGITS) / trajectory_probabilities(REFERENCE)
    assert ratio.min() < 0.3 and ratio.max() > 2.2
