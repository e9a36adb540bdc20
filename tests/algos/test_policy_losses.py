"""The clipped surrogate and the entropy bonus: golden values of F1, the reference, and extreme ratios."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos import policy_losses
from hone.algos.policy_losses import clipped_surrogate, entropy_bonus
from hone.algos.reduce import Reduction, token_weights
from tests.algos.strategies import law, scored_batch, scored_batches
from tests.reference import numpy_algos
from tests.reference.fixtures import f1

TOKEN, SEQUENCE, SUM = Reduction(), Reduction(over="sequence"), Reduction(over="constant", length=1)
CLIPPED_PLUS = [-0.2, 0.0, -0.134064, 0.329744, 0.180967]  # -rho A / 5, zero where rho 1.35 > 1.2 with A > 0
CLIPPED_MINUS = [0.2, 0.269972, 0.0, 0.0, -0.180967]  # zero where rho .67 < .8 with A < 0, rho 1.65 > 1.2 with A > 0


def _surrogate_of_f1(sign, reduction, *, clip_low=0.2, clip_high=0.2, dual_clip=None):
    example = f1(sign=sign)
    weights = token_weights(example.action_mask, example.cu_seqlens, reduction).double()
    weights[~example.action_mask] = math.nan
    loss = clipped_surrogate(
        example.logp,
        example.old_logp,
        example.advantages,
        weights,
        example.action_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    loss.total.backward()
    assert (example.logp.grad[~example.action_mask] == 0).all()
    return loss, example.logp.grad[example.action_mask]


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("sign", "reduction", "clip_high", "expected", "gradient"),
    [
        (1.0, TOKEN, 0.2, -0.063352, CLIPPED_PLUS),  # (-1 - 1.2 - .670320 + 1.648721 + .904837) / 5
        (1.0, SEQUENCE, 0.2, 0.160003, [-0.166667, 0.0, -0.111720, 0.412180, 0.226209]),
        (1.0, SUM, 0.2, -0.158381, None),
        (-1.0, TOKEN, 0.2, 0.209004, CLIPPED_MINUS),  # (1 + 1.349859 + .8 - 1.2 - .904837) / 5
        (-1.0, SEQUENCE, 0.2, -0.001233, None),
        (1.0, TOKEN, 0.28, -0.079352, CLIPPED_PLUS),  # clip-higher: 1.28 for 1.2
        (-1.0, TOKEN, 0.28, 0.193004, CLIPPED_MINUS),
    ],
)
def test_clipped_surrogate_golden(sign, reduction, clip_high, expected, gradient):
    loss, actual_gradient = _surrogate_of_f1(sign, reduction, clip_high=clip_high)
    assert_close(loss.total.detach(), _fp64(expected).squeeze(), rtol=0, atol=1e-6)
    assert_close(loss.metrics["policy_loss"], loss.total.detach())
    if gradient is not None:
        assert_close(actual_gradient, _fp64(*gradient), rtol=0, atol=1e-6)


def test_figures_golden():
    loss, _ = _surrogate_of_f1(1.0, TOKEN)
    assert_close(loss.metrics["ppo_clip_ratio"], _fp64(0.2).squeeze())  # one token of five
    assert_close(loss.metrics["ppo_kl"], _fp64(-0.06).squeeze())  # -(0 + .3 - .4 + .5 - .1) / 5
    assert not any(figure.requires_grad for figure in loss.metrics.values())


@pytest.mark.parametrize(("dual_clip", "expected", "slope"), [(None, 10.0, 10.0), (3.0, 6.0, 0.0)])
def test_dual_clip_golden(dual_clip, expected, slope):
    logp = torch.tensor([math.log(5.0)], requires_grad=True)  # rho 5, A -2
    mask, one = torch.tensor([True]), torch.ones(1)
    loss = clipped_surrogate(logp, torch.zeros(1), -2 * one, one, mask, clip_low=0.2, clip_high=0.2, dual_clip=dual_clip)
    loss.total.backward()
    assert_close(loss.total.detach(), torch.tensor(expected))
    assert_close(logp.grad, torch.tensor([slope]))
    assert loss.metrics["ppo_clip_ratio"] == (0.0 if dual_clip is None else 1.0)


@pytest.mark.parametrize(("log_ratio", "advantage"), [(0.5, 1.0), (-0.5, -1.0)])
def test_at_the_bound_itself_the_gradient_still_passes(log_ratio, advantage):
    mask, one = torch.tensor([True]), torch.ones(1, dtype=torch.float64)
    logp = (log_ratio * one).requires_grad_()
    ratio = float(logp.detach().exp())  # between 1/2 and 2, so that 1 - ratio and 1 + (ratio - 1) are exact
    loss = clipped_surrogate(logp, 0 * one, advantage * one, one, mask, clip_low=max(1 - ratio, 0.0), clip_high=max(ratio - 1, 0.0))
    loss.total.backward()
    assert loss.metrics["ppo_clip_ratio"] == 0
    assert_close(logp.grad, -ratio * advantage * one)


@law
@given(scored_batches(), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.sampled_from([None, 1.1, 3.0]))
def test_clipped_surrogate_equals_the_reference(batch, clip_low, clip_high, dual_clip):
    loss = clipped_surrogate(
        batch.rollout_logp,
        batch.old_logp,
        batch.advantages,
        batch.weights,
        batch.action_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    expected = sum(
        float(batch.weights[t])
        * numpy_algos.clipped_surrogate(
            float(batch.rollout_logp[t]),
            float(batch.old_logp[t]),
            float(batch.advantages[t]),
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
        )
        for t in range(batch.tokens.numel())
    )
    assert_close(loss.total, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@law
@given(scored_batches(spread=0.0))
def test_on_policy_the_ratio_is_one_and_the_gradient_that_of_the_plain_policy_gradient(batch):
    logp = batch.rollout_logp.clone().requires_grad_()
    loss = clipped_surrogate(logp, batch.old_logp, batch.advantages, batch.weights, batch.action_mask, clip_low=0.0, clip_high=0.0)
    loss.total.backward()
    assert_close(loss.total.detach(), -(batch.weights * batch.advantages).sum())
    assert_close(logp.grad, -batch.weights * batch.advantages)
    assert loss.metrics["ppo_clip_ratio"] == 0 and loss.metrics["ppo_kl"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "value"),
    [
        (1e3, 1.0, -1.2),  # rho overflows behind the upper bound
        (1e3, 0.0, 0.0),  # 0 * inf
        (-1e3, 0.0, 0.0),
        (-1e3, 1.0, 0.0),  # rho underflows to zero: worth nothing, and no gradient
        (-1e3, -1.0, 0.8),
        (1e3, -1.0, 3.0),  # the dual bound
    ],
)
def test_extreme_ratios_have_finite_values_and_gradients(log_ratio, advantage, value, dtype):
    logp = torch.tensor([log_ratio, 0.0], dtype=dtype, requires_grad=True)
    old_logp, weights = torch.zeros(2, dtype=dtype), torch.tensor([1.0, 0.0])
    advantages, mask = torch.tensor([advantage, 0.0], dtype=dtype), torch.tensor([True, True])
    loss = clipped_surrogate(logp, old_logp, advantages, weights, mask, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    loss.total.backward()
    assert_close(loss.total.detach().double(), _fp64(value).squeeze(), rtol=1e-6, atol=1e-6)
    assert (logp.grad == 0).all()


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_a_token_without_advantage_is_at_no_bound(dual_clip):
    logp, mask = torch.tensor([1e3, -1e3], requires_grad=True), torch.tensor([True, True])
    weights, zeros = torch.full((2,), 0.5), torch.zeros(2)
    loss = clipped_surrogate(logp, zeros, zeros, weights, mask, clip_low=0.2, clip_high=0.2, dual_clip=dual_clip)
    loss.total.backward()
    assert loss.total == 0 and loss.metrics["ppo_clip_ratio"] == 0
    assert (logp.grad == 0).all()


def test_a_nan_on_the_mask_is_not_hidden():
    one, mask = torch.ones(1), torch.tensor([True])
    loss = clipped_surrogate(torch.tensor([math.nan]), one, one, one, mask, clip_low=0.2, clip_high=0.2)
    assert loss.total.isnan()


def test_differences_are_taken_after_the_upcast():
    # Near 8 the spacing of bf16 is 1/16: there the difference of these two, -8.49609375, would be -8.5.
    logp, old_logp = torch.tensor([-8.5], dtype=torch.bfloat16), torch.tensor([-0.00390625], dtype=torch.bfloat16)
    one, mask = torch.ones(1), torch.tensor([True])
    loss = clipped_surrogate(logp, old_logp, one, one, mask, clip_low=0.2, clip_high=0.2)
    assert_close(loss.total, torch.tensor(-math.exp(-8.49609375)))
    assert loss.total.dtype == torch.float32


def _second_derivatives(*, dual_clip=None):
    # rho, A: (1.1, 2) moves; (1.5, 2) and (.5, -1) are clipped; (1.1, 0) costs nothing; the last is off the mask.
    ratio, advantages = _fp64(1.1, 1.5, 0.5, 1.1, math.nan), _fp64(2.0, 2.0, -1.0, 0.0, math.nan)
    weights, mask = _fp64(0.25, 0.25, 0.25, 0.25, math.inf), torch.tensor([True, True, True, True, False])

    def loss(logp):
        return clipped_surrogate(
            logp, torch.zeros_like(logp), advantages, weights, mask, clip_low=0.2, clip_high=0.2, dual_clip=dual_clip
        ).total

    return loss, ratio.log(), _fp64(-0.25 * 1.1 * 2.0, 0.0, 0.0, 0.0, 0.0)  # -w rho A, and so is its derivative


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, on the way to jvp
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_derivatives_of_either_direction_and_of_second_order(dual_clip):
    loss, logp, gradient = _second_derivatives(dual_clip=dual_clip)
    assert_close(torch.func.grad(loss)(logp), gradient)
    assert_close(torch.func.jvp(loss, (logp,), (torch.ones_like(logp),))[1], gradient.sum())
    assert_close(torch.func.hessian(loss)(logp), torch.diag(gradient))
    live = logp.nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(loss, (live,)) and torch.autograd.gradgradcheck(loss, (live,))


def test_a_cut_for_the_cache_changes_nothing(monkeypatch):
    batch = scored_batch([[True, False] * 20, [True] * 30], Reduction(), seed=0)
    answers = []
    for tokens in (1000, 7):
        monkeypatch.setattr(policy_losses, "CUT_TOKENS", tokens)
        logp = batch.rollout_logp.clone().requires_grad_()
        loss = clipped_surrogate(logp, batch.old_logp, batch.advantages, batch.weights, batch.action_mask, clip_low=0.2, clip_high=0.2)
        loss.total.backward()
        answers.append((loss.total.detach(), loss.metrics, logp.grad))
    assert_close(*answers)


def test_no_tokens_cost_nothing_and_stay_attached():
    empty = torch.zeros(0, requires_grad=True)
    loss = clipped_surrogate(empty, empty, empty, empty, torch.zeros(0, dtype=torch.bool), clip_low=0.2, clip_high=0.2)
    loss.total.backward()
    assert loss.total == 0 and empty.grad.shape == (0,)


def test_constants_get_no_gradient():
    logp, old_logp, advantages, weights = (torch.full((2,), 0.5, requires_grad=True) for _ in range(4))
    loss = clipped_surrogate(logp, old_logp, advantages, weights, torch.tensor([True, True]), clip_low=0.2, clip_high=0.2)
    loss.total.backward()
    assert_close(logp.grad, torch.full((2,), -0.25))
    assert old_logp.grad is None and advantages.grad is None and weights.grad is None


def test_entropy_bonus_golden():
    # Logits [2, 1, 0]: H = logsumexp - sum p z = .832396, dH/dz = -p (log p + H).
    logits = _fp64(2.0, 1.0, 0.0).requires_grad_()
    log_p = logits.log_softmax(-1)
    entropy = torch.stack([torch.tensor(math.nan, dtype=torch.float64), -(log_p.exp() * log_p).sum()])
    mask = torch.tensor([False, True])
    loss = entropy_bonus(entropy, _fp64(math.nan, 1.0), mask, coef=0.5)
    loss.total.backward()
    assert_close(loss.metrics["entropy"], _fp64(0.832396).squeeze(), rtol=0, atol=1e-6)
    assert_close(loss.total.detach(), _fp64(-0.416198).squeeze(), rtol=0, atol=1e-6)
    assert_close(logits.grad, -0.5 * _fp64(-0.282587, 0.140770, 0.141817), rtol=0, atol=1e-6)
