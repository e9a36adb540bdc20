"""Lambdas per role and per length: golden values, and that they agree with plain GAE where they must."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.advantages import discounted_returns, gae
from hone.algos.batch import select
from hone.algos.group_baselines import action_counts
from hone.algos.lambda_schedules import decoupled_gae, length_adaptive_gae, length_adaptive_lambda
from tests.algos.strategies import law, scored_batches
from tests.reference.fixtures import f3

unit = st.floats(0.0, 1.0)


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_length_adaptive_lambda_golden():
    # 1 - 1 / (.05 l): l = 10 would give -1, l = 100 gives 1 - 1/5, l = 1000 1 - 1/50.
    lambd = length_adaptive_lambda(torch.tensor([0, 10, 20, 100, 1000]), alpha=0.05)
    assert_close(lambd, _fp64(0.0, 0.0, 0.0, 0.8, 0.98))
    with pytest.raises(ValueError, match=r"alpha is 0\.0"):
        length_adaptive_lambda(torch.tensor([1]), alpha=0.0)


def test_decoupled_golden_of_f3():
    rewards, values, mask, cu_seqlens = f3()
    advantages, returns = decoupled_gae(rewards, values, mask, cu_seqlens, gamma=1.0, policy_lambd=0.95, value_lambd=1.0)
    assert_close(advantages, _fp64(0.4379625, 0.35575, 0.0, 0.585, 0.3))  # as gae's, see test_advantages
    assert_close(returns, _fp64(1.0, 1.0, 0.0, 1.0, 1.0))  # the reward that came


def test_length_adaptive_gae_golden_of_f3():
    rewards, values, mask, cu_seqlens = f3()
    # Four action tokens (the environment's does not count), alpha .5: lambda = 1 - 1/2.
    # .3; .3 + .5 .3 = .45; -.2 + .5 .45 = .025; .1 + .5 .025 = .1125.
    advantages, returns = length_adaptive_gae(rewards, values, mask, cu_seqlens, gamma=1.0, alpha=0.5, value_lambd=1.0)
    assert_close(advantages, _fp64(0.1125, 0.025, 0.0, 0.45, 0.3))
    assert_close(returns, _fp64(1.0, 1.0, 0.0, 1.0, 1.0))


@law
@given(scored_batches(), unit, unit)
def test_equal_lambdas_are_plain_gae(batch, gamma, lambd):
    rows = (batch.rewards, batch.values, batch.action_mask, batch.cu_seqlens)
    plain = gae(*rows, gamma=gamma, lambd=lambd)
    assert_close(decoupled_gae(*rows, gamma=gamma, policy_lambd=lambd, value_lambd=lambd), plain)


@law
@given(scored_batches(), unit, st.floats(0.1, 2.0))
def test_each_role_gets_its_own_lambda(batch, gamma, alpha):
    rows = (batch.rewards, batch.values, batch.action_mask, batch.cu_seqlens)
    advantages, returns = length_adaptive_gae(*rows, gamma=gamma, alpha=alpha, value_lambd=1.0)
    assert_close(returns, discounted_returns(batch.rewards, batch.action_mask, batch.cu_seqlens, gamma=gamma))
    lengths = action_counts(batch.action_mask, batch.cu_seqlens)
    for row, length in enumerate(lengths.tolist()):
        alone = select(batch, [row])
        lambd = max(0.0, 1 - 1 / (alpha * length)) if length else 0.0
        own, _ = gae(alone.rewards, alone.values, alone.action_mask, alone.cu_seqlens, gamma=gamma, lambd=lambd)
        assert_close(advantages[int(batch.cu_seqlens[row]) : int(batch.cu_seqlens[row + 1])], own)


def test_results_are_constants_in_at_least_fp32():
    rewards, values, mask, cu_seqlens = f3()
    half = (rewards.bfloat16(), values.bfloat16().requires_grad_(), mask, cu_seqlens)
    for numbers in length_adaptive_gae(*half, gamma=1.0, alpha=0.5, value_lambd=1.0):
        assert numbers.dtype == torch.float32 and not numbers.requires_grad
