"""Estimators whose name promises the policy gradient: enumerated over a tiny policy, they give autograd's of the expected reward.

The others are measured: Dr. GRPO and the pass@k and MaxRL advantages give a known multiple of a known gradient, GRPO, whitening
and OPO's in-sample baseline another direction.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from hone.algos.advantages import discounted_returns, gae, group_centred, group_normalised, row_sums, spread, whiten
from hone.algos.covariance_losses import clip_cov_loss
from hone.algos.group_baselines import (
    action_counts,
    greedy_centred,
    leave_one_out,
    length_weighted_centred,
    max_rl,
    pass_at_k,
    pass_at_k_advantages,
)
from hone.algos.lambda_schedules import decoupled_gae
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.sequence_losses import gmpo_loss, gspo_loss, gspo_token_loss
from hone.algos.soft_losses import cispo_loss, reinforce_loss, sapo_loss
from hone.algos.turn_credit import turn_gae
from tests.algos.proofs.tabular import (
    LOGITS,
    REWARDS,
    TRAJECTORIES,
    Enumerated,
    cosine,
    expected_reward,
    gradient,
    trajectory_probabilities,
    trajectory_returns,
    true_values,
)

TRUTH = gradient(expected_reward)
ARBITRARY = torch.tensor([0.9, -1.3, 2.2], dtype=torch.float64)
"""Values of the three states that a bad critic might give."""
SUCCESS = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
"""Rewards of zero and one: two of the seven trajectories are right."""


def _of_rows(every, per_row):
    """Expected policy gradient of advantages per row."""
    return _of_tokens(every, spread(per_row, *every.rows))


def _of_tokens(every, advantages, *, scale=1.0):
    return -gradient(lambda z: reinforce_loss(every.logp(z), advantages, scale * every.weights(z), every.action_mask).total)


def _scores(every, table=REWARDS):
    return row_sums(every.per_token(table), *every.rows)


def _per_state(every, values):
    return every.per_token(values[:, None].expand(3, 3))


def test_the_enumeration_is_one():
    assert_close(trajectory_probabilities(LOGITS).sum().item(), 1.0)
    for size in (1, 2):
        every = Enumerated(size=size)
        assert len(every.trajectory) == size * 7**size
        first = every.weights(LOGITS)[every.cu_seqlens[:-1].long() + 1]
        assert_close(first.sum().item(), 1.0)
        assert_close((first * _scores(every)).sum(), expected_reward(LOGITS))
    # The policy gradient theorem against a difference quotient, so that the yardstick itself is no tautology.
    step = torch.zeros_like(LOGITS)
    step[1, 2] = 1e-5
    assert_close((expected_reward(LOGITS + step) - expected_reward(LOGITS - step)) / 2e-5, TRUTH[1, 2], rtol=1e-8, atol=0)


@pytest.mark.parametrize("size", [2, 3])
def test_leave_one_out_is_unbiased_and_the_plain_mean_short_by_one_row_in_n(size):
    every = Enumerated(size=size)
    assert_close(_of_rows(every, leave_one_out(_scores(every), every.group, every.live)), TRUTH)
    assert_close(_of_rows(every, group_centred(_scores(every), every.group)), (size - 1) / size * TRUTH)


@pytest.mark.parametrize("baseline", [0.0, 2.0, -0.7])
def test_a_greedy_baseline_of_any_height_is_unbiased(baseline):
    every = Enumerated(size=1)
    groups = torch.arange(len(TRAJECTORIES))
    greedy = torch.full((len(TRAJECTORIES),), baseline, dtype=torch.float64)
    assert_close(_of_rows(every, greedy_centred(_scores(every), every.group, every.live, greedy, groups)), TRUTH)


def test_plain_reinforce_with_the_reward_to_go_is_unbiased():
    every = Enumerated(size=1)
    assert_close(_of_tokens(every, discounted_returns(every.per_token(REWARDS), *every.rows, gamma=1.0)), TRUTH)
    # So is the whole row's return on every token, with more variance.
    assert_close(_of_rows(every, _scores(every)), TRUTH)


def test_discounted_returns_are_unbiased_if_the_token_is_discounted_too():
    every = Enumerated(size=1)
    gamma = 0.8
    truth = gradient(lambda z: (trajectory_probabilities(z) * trajectory_returns(REWARDS, gamma=gamma)).sum())
    to_go = discounted_returns(every.per_token(REWARDS), *every.rows, gamma=gamma)
    step = torch.where(every.states > 0, gamma, 1.0)
    assert_close(_of_tokens(every, to_go, scale=step), truth)
    # Without the token's own discount, as everywhere in the field, later states weigh more than their objective has it.
    usual = _of_tokens(every, to_go)
    assert_close(usual[0], truth[0])
    assert_close(gamma * usual[1:], truth[1:])


def test_gae_with_lambda_one_is_unbiased_whatever_the_critic_says():
    every = Enumerated(size=1)
    rewards, values = every.per_token(REWARDS), _per_state(every, ARBITRARY)
    advantages, _ = gae(rewards, values, *every.rows, gamma=1.0, lambd=1.0)
    assert_close(_of_tokens(every, advantages), TRUTH)
    advantages, _ = decoupled_gae(rewards, values, *every.rows, gamma=1.0, policy_lambd=1.0, value_lambd=0.3)
    assert_close(_of_tokens(every, advantages), TRUTH)
    advantages, _ = turn_gae(rewards, values, *every.rows, gamma=1.0, lambd=1.0)
    assert_close(_of_tokens(every, advantages), TRUTH)


@pytest.mark.parametrize("lambd", [0.0, 0.4, 0.95])
def test_gae_with_a_smaller_lambda_is_unbiased_for_the_true_values_only(lambd):
    every = Enumerated(size=1)
    rewards = every.per_token(REWARDS)
    advantages, _ = gae(rewards, _per_state(every, true_values(LOGITS, REWARDS)), *every.rows, gamma=1.0, lambd=lambd)
    assert_close(_of_tokens(every, advantages), TRUTH)
    advantages, _ = gae(rewards, _per_state(every, ARBITRARY), *every.rows, gamma=1.0, lambd=lambd)
    assert (_of_tokens(every, advantages) - TRUTH).abs().max() > 0.01
    # The bias is all in the step before a wrong value: the last step has none.
    assert_close(_of_tokens(every, advantages)[1:], TRUTH[1:])


def test_a_row_that_was_cut_off_is_unbiased_with_the_true_value_behind_the_cut():
    every = Enumerated(size=1)
    # Only the first action is kept; behind it stands the value of the state it leads to, none after action 0.
    first = every.action_mask & (every.states == 0)
    led_to = torch.tensor([trajectory[0] for trajectory in TRAJECTORIES])[every.trajectory]
    values = true_values(LOGITS, REWARDS)
    behind = torch.where(led_to > 0, values[led_to], 0.0)
    rewards, critic = every.per_token(REWARDS), _per_state(every, ARBITRARY)

    def of_the_first_step(bootstrap):
        advantages, _ = gae(rewards, critic, first, every.cu_seqlens, gamma=1.0, lambd=1.0, bootstrap=bootstrap)
        return _of_tokens(every, torch.where(first, advantages, 0.0))[0]

    assert_close(of_the_first_step(behind), TRUTH[0])
    assert (of_the_first_step(None) - TRUTH[0]).abs().max() > 0.01  # a cut taken for an end


POLICY_LOSSES = {
    "ppo": lambda new, old, a, w, e: clipped_surrogate(new, old, a, w, e.action_mask, clip_low=0.2, clip_high=0.2),
    "clip-cov": lambda new, old, a, w, e: clip_cov_loss(
        *(new, old, a, w, e.action_mask),
        **{"clip_low": 0.2, "clip_high": 0.2, "fraction": 0.5, "cov_low": 99.0, "cov_high": 100.0},
        generator=torch.Generator().manual_seed(0),
    ),
    "cispo": lambda new, old, a, w, e: cispo_loss(new, old, a, w, e.action_mask, cap=2.0),
    "sapo": lambda new, old, a, w, e: sapo_loss(new, old, a, w, e.action_mask),
    "gspo": lambda new, old, a, w, e: gspo_loss(new, old, a, w, *e.rows, clip_low=0.2, clip_high=0.2),
    "gspo by token": lambda new, old, a, w, e: gspo_token_loss(new, old, a, w, *e.rows, clip_low=0.2, clip_high=0.2),
    "gmpo": lambda new, old, a, w, e: gmpo_loss(new, old, a, w, *e.rows, log_clip_low=0.4, log_clip_high=0.4),
}


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_on_policy_every_clipped_loss_is_unbiased(name):
    every = Enumerated(size=2)
    advantages = spread(leave_one_out(_scores(every), every.group, every.live), *every.rows)
    old = every.logp(LOGITS)
    assert_close(-gradient(lambda z: POLICY_LOSSES[name](every.logp(z), old, advantages, every.weights(z), every).total), TRUTH)


def test_dividing_by_the_groups_deviation_is_biased():
    # GRPO with two rows is left with the sign of their difference: (r_i - r_j) / 2 over |r_i - r_j| / sqrt(2). So it climbs the
    # chance of beating another sample of the same policy, held fixed, whatever the distance: another direction, not another scale.
    every = Enumerated(size=2)
    actual = _of_rows(every, group_normalised(_scores(every), every.group, eps=0.0))
    returns = trajectory_returns(REWARDS)
    wins = (returns[:, None] - returns).sign() / math.sqrt(2)
    fixed = trajectory_probabilities(LOGITS)
    assert_close(actual, gradient(lambda z: trajectory_probabilities(z) @ wins @ fixed))
    assert cosine(actual, TRUTH) < 0.95
    # Larger groups come closer, since their deviation varies less ...
    larger = Enumerated(size=4)
    assert 0.95 < cosine(_of_rows(larger, group_normalised(_scores(larger), larger.group, eps=1e-6)), TRUTH) < 0.98
    # ... but a prompt whose rewards are ten times another's still pulls no harder, where the truth is ten times the gradient.
    tenfold = group_normalised(_scores(larger, 10 * REWARDS), larger.group, eps=0.0)
    assert_close(tenfold, group_normalised(_scores(larger), larger.group, eps=0.0))
    assert_close(_of_rows(larger, group_centred(_scores(larger, 10 * REWARDS), larger.group)), 7.5 * TRUTH)


def test_whitening_and_a_baseline_weighted_by_length_are_biased():
    every = Enumerated(size=2)
    # Each group a batch of its own.
    advantages = torch.cat([_whitened_alone(every, start) for start in range(0, len(every.trajectory), 2)])
    assert cosine(_of_tokens(every, advantages), TRUTH) < 0.99
    opo = length_weighted_centred(_scores(every), every.group, action_counts(*every.rows))
    assert cosine(_of_rows(every, opo), TRUTH) < 0.999
    # With equal lengths it is the plain mean, whose direction is right.
    equal = length_weighted_centred(_scores(every), every.group, torch.full_like(every.group, 5))
    assert_close(_of_rows(every, equal), TRUTH / 2)


def _whitened_alone(every, start):
    own = slice(int(every.cu_seqlens[start]), int(every.cu_seqlens[start + 2]))
    scores = spread(_scores(every), *every.rows)
    return whiten(scores[own], every.action_mask[own])


def _success(logits):
    return (trajectory_probabilities(logits) * trajectory_returns(SUCCESS)).sum()


@pytest.mark.parametrize(("size", "k"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 3), (4, 4)])
def test_pass_at_k_is_an_unbiased_estimate(size, k):
    # c of n are right with the binomial's probability: E[1 - C(n - c, k) / C(n, k)] = 1 - (1 - p)^k.
    p = 0.3
    correct = torch.arange(size + 1)
    probability = torch.tensor([math.comb(size, c) * p**c * (1 - p) ** (size - c) for c in range(size + 1)], dtype=torch.float64)
    expected = (probability * pass_at_k(correct, torch.full_like(correct, size), k=k)).sum()
    assert_close(expected.item(), 1 - (1 - p) ** k)


@pytest.mark.parametrize(("size", "k"), [(2, 1), (3, 1), (3, 2), (4, 2), (4, 3), (4, 4)])
def test_pass_at_k_advantages_times_their_deviation_point_where_pass_at_k_rises(size, k):
    # A sigma is (mean of the best over sets that hold the row) - rho. The former is n / k times an unbiased estimate, and rho's
    # own expected score is the whole gradient, of which a row has 1 / n: together 1 / k - 1 / n.
    every = Enumerated(size=size)
    scores = _scores(every, SUCCESS)
    correct = torch.zeros(7**size, dtype=torch.long).index_add_(0, every.group, scores.long())
    rho = pass_at_k(correct, torch.full_like(correct, size), k=k)
    deviation = ((rho * (1 - rho)).sqrt() + 1e-6)[every.group]
    undivided = deviation * pass_at_k_advantages(scores, every.group, every.live, k=k, eps=1e-6)
    truth = gradient(lambda z: 1 - (1 - _success(z)) ** k)
    assert_close(_of_rows(every, undivided), (1 / k - 1 / size) * truth)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_max_rl_climbs_the_truncated_likelihood(size):
    # log p = -sum_j (1 - p)^j / j. The mean score of the correct rows alone climbs the first n terms; taking the mean of all
    # rows' scores off where there is a correct one costs the last term, (1 - p)^(n - 1), so the advantages climb n - 1 terms.
    every = Enumerated(size=size)
    scores = _scores(every, SUCCESS)
    actual = _of_rows(every, max_rl(scores, every.group, every.live, eps=0.0))

    def truncated(terms):
        return gradient(lambda z: -sum((1 - _success(z)) ** j / j for j in range(1, terms + 1)))

    assert_close(actual, truncated(size - 1))
    # The missing term, from the groups without a success: they would get A = -1 each.
    mean = torch.zeros(7**size, dtype=torch.float64).index_add_(0, every.group, scores)[every.group]
    assert_close(_of_rows(every, torch.where(mean == 0, -1.0, max_rl(scores, every.group, every.live, eps=0.0))), truncated(size))
