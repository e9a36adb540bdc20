"""Laws that every loss obeys: additive over cuts, blind to order and to what stands off the mask, right in its gradient."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.algorithms.grpo import GRPO
from hone.algos.algorithms.ppo import PPO
from hone.algos.algorithms.terms import Clip, KLPenalty
from hone.algos.batch import select
from hone.algos.protocol import Outputs
from hone.algos.reduce import Reduction
from hone.algos.supervised import nll
from tests.algos.strategies import law, poisoned, reductions, scored_batch, scored_batches


def _policy(algo):
    # -logp stands in for the entropy: any quantity of the policy with a gradient will do.
    return lambda current, batch: algo.loss(Outputs(logp=current, entropy=-current), batch)


LOSSES = {
    "ppo": _policy(PPO(clip=Clip(dual=3.0))),
    "ppo with entropy": _policy(PPO(entropy_coef=0.1, kl=KLPenalty(init_coef=0.0))),
    "grpo": _policy(GRPO()),
    "grpo with k3 as written": _policy(GRPO(kl=KLPenalty(init_coef=0.1, estimator="k3", use_loss=True, gradient="as_written"))),
    "value, clipped": lambda current, batch: PPO().value_loss(current, batch),
    "value": lambda current, batch: PPO(value_clip=None).value_loss(current, batch),
    "nll": lambda current, batch: nll(current, batch.weights, batch.action_mask),
}
losses = st.sampled_from(sorted(LOSSES)).map(LOSSES.__getitem__)


def _evaluate(loss, batch):
    """(loss, gradient); `rollout_logp` holds the current numbers."""
    current = batch.rollout_logp.clone().requires_grad_()
    result = loss(current, batch)
    result.total.backward()
    return result, current.grad


@law
@given(losses, scored_batches(), st.data())
def test_any_cut_into_micro_batches_in_any_order_adds_up_to_the_whole(loss, batch, data):
    order = data.draw(st.permutations(range(batch.rows)))
    cuts = sorted(data.draw(st.lists(st.integers(0, batch.rows), max_size=3)))
    edges = [0, *cuts, batch.rows]
    parts = [list(order[start:stop]) for start, stop in itertools.pairwise(edges)]
    whole, gradient = _evaluate(loss, batch)
    evaluated = [_evaluate(loss, select(batch, rows)) for rows in parts]
    total = evaluated[0][0]
    for part, _ in evaluated[1:]:
        total = total + part
    assert_close(total.total, whole.total)
    assert_close(total.metrics, whole.metrics)
    tokens = torch.cat([torch.arange(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1])) for row in order])
    assert_close(torch.cat([part_gradient for _, part_gradient in evaluated]), gradient[tokens])


@law
@given(losses, scored_batches())
def test_poison_off_the_mask_changes_no_bit_and_gets_no_gradient(loss, batch):
    clean, clean_gradient = _evaluate(loss, batch)
    dirty, dirty_gradient = _evaluate(loss, poisoned(batch))
    assert_close(dirty.total, clean.total, rtol=0, atol=0)
    assert_close(dirty.metrics, clean.metrics, rtol=0, atol=0)
    assert_close(dirty_gradient, clean_gradient, rtol=0, atol=0)
    assert (dirty_gradient[~batch.action_mask] == 0).all()


@law
@given(losses, reductions)
def test_without_any_action_token_the_loss_is_zero_and_attached_to_the_graph(loss, reduction):
    result, gradient = _evaluate(loss, poisoned(scored_batch([[False], [False, False]], reduction, seed=0)))
    assert result.total == 0
    assert (gradient == 0).all()


@law
@given(losses, scored_batches(spread=30.0))
def test_large_ratios_leave_everything_finite(loss, batch):
    # exp of some 100 nats fits fp64, so here nothing may overflow, whichever way a ratio runs.
    result, gradient = _evaluate(loss, batch)
    assert gradient.isfinite().all() and result.total.isfinite()


def test_gradients_are_the_derivatives_of_the_values():
    # Numbers from the seed, away from the kinks of the clips by more than gradcheck's step.
    batch = scored_batch([[True, False, True], [False, True, True, True]], Reduction(), seed=3)
    for name in ("ppo with entropy", "grpo with k3 as written", "value, clipped", "value", "nll"):
        current = batch.rollout_logp.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda current, loss=LOSSES[name]: loss(current, batch).total, (current,)), name


def test_figures_are_constants():
    batch = scored_batch([[True, True], [True]], Reduction(), seed=0)
    for loss in LOSSES.values():
        result, _ = _evaluate(loss, batch)
        assert not any(figure.requires_grad for figure in result.metrics.values())
