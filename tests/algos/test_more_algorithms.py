"""The other estimators as whole algorithms: needs, golden advantages of F1 and F2, penalties, and the laws of their losses."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.advantages import discounted_returns, group_centred, row_sums, spread, whiten
from hone.algos.algorithms.dr_grpo import DrGRPO
from hone.algos.algorithms.opo import OPO
from hone.algos.algorithms.reinforce import Reinforce, ReturnAdvantage
from hone.algos.algorithms.reinforce_baseline import ReinforceBaseline
from hone.algos.algorithms.remax import ReMax, with_greedy
from hone.algos.algorithms.rloo import RLOO
from hone.algos.algorithms.terms import Clip, KLPenalty
from hone.algos.algorithms.vapo import VAPO, LengthAdaptiveAdvantage
from hone.algos.batch import Batch, select
from hone.algos.judging import judge
from hone.algos.lambda_schedules import length_adaptive_gae
from hone.algos.protocol import ActorCritic, Algorithm, Outputs
from hone.algos.ranges import violations
from hone.algos.reduce import Reduction, token_weights
from tests.algos.strategies import law, poisoned, scored_batch, scored_batches
from tests.reference.fixtures import f1, scatter

IN_REWARD, IN_LOSS, NONE = KLPenalty(init_coef=0.1), KLPenalty(init_coef=0.1, use_loss=True), KLPenalty(init_coef=0.0)
EVERY = (Reinforce, ReinforceBaseline, RLOO, ReMax, OPO, DrGRPO, VAPO)
every = pytest.mark.parametrize("algorithm", EVERY, ids=lambda algorithm: algorithm.name)


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def _judged(algo, batch):
    """Advantages of a batch whose prompts all have a greedy score of .25, should the algorithm ask."""
    greedy = batch.group.unique()
    return algo.advantages(with_greedy(batch, torch.full(greedy.shape, 0.25, dtype=torch.float64), greedy))


@every
def test_every_algorithm_keeps_the_protocol(algorithm):
    algo = algorithm()
    assert isinstance(algo, Algorithm) and list(violations(algo)) == []
    assert isinstance(algo, ActorCritic) == ("values" in algo.needs) == (algorithm is VAPO)
    own = {VAPO: {"values"}, ReMax: {"greedy_scores"}}
    assert algorithm(kl=NONE).needs == {"old_logp"} | own.get(algorithm, set())
    for kl in (IN_REWARD, IN_LOSS):
        assert algorithm(kl=kl).needs == algorithm(kl=NONE).needs | {"ref_logp"}


def test_names_and_defaults_are_the_papers():
    assert [algorithm.name for algorithm in EVERY] == ["reinforce", "reinforce_baseline", "rloo", "remax", "opo", "dr_grpo", "vapo"]
    assert Reinforce().kl == KLPenalty(init_coef=1e-3)
    assert ReinforceBaseline().kl == KLPenalty(init_coef=1e-3, estimator="k2", use_loss=True)
    assert RLOO().kl == KLPenalty(init_coef=0.03)
    assert OPO().kl.init_coef == DrGRPO().kl.init_coef == VAPO().kl.init_coef == 0
    assert DrGRPO().reduction == Reduction(over="constant", length=3000)
    assert (VAPO().clip, VAPO().imitation_coef) == (Clip(low=0.2, high=0.28), 0.1)
    assert (VAPO().advantage.alpha, VAPO().advantage.value_lambd) == (0.05, 1.0)


def test_reinforce_golden_of_f1():
    # Scores 1 and 0, beta .1, old KL per token .2, -.8, 1.4 and -.5, -1.4: to go .8, .6, 1.4 and -1.9, -1.4;
    # A = 1 - .08, 1 - .06, 1 - .14, .19, .14.
    example = f1()
    mask, kl = example.action_mask, _fp64(0.2, -0.8, 1.4, -0.5, -1.4)
    batch = scored_batch([[False, True, True, False, True], [False, True, True, False]], Reduction(), seed=0)
    batch = dataclasses.replace(
        batch,
        rewards=scatter(_fp64(0, 0, 1, 0, 0), mask),
        old_logp=example.old_logp,
        ref_logp=scatter(example.old_logp[mask] - kl, mask),
    )
    raw = Reinforce(kl=IN_REWARD, advantage=ReturnAdvantage(normalize=False)).advantages(batch).advantages
    assert_close(raw[mask], _fp64(0.92, 0.94, 0.86, 0.19, 0.14))
    whitened = Reinforce(kl=IN_REWARD).advantages(batch).advantages
    assert_close(whitened[mask], _fp64(0.850161, 0.905010, 0.685614, -1.151831, -1.288954), rtol=0, atol=1e-6)
    # Both rows in one group: +-.5 instead of 1 and 0.
    batch = dataclasses.replace(batch, group=torch.tensor([4, 4]))
    relative = ReinforceBaseline(kl=IN_REWARD, normalize=False).advantages(batch).advantages
    assert_close(relative[mask], _fp64(0.42, 0.44, 0.36, -0.31, -0.36))
    # RLOO: the sequence's whole KL is in the score, 1 - .08 against 0 + .19.
    assert_close(RLOO(kl=IN_REWARD).advantages(batch).advantages[mask], _fp64(0.73, 0.73, 0.73, -0.73, -0.73))


def _f2():
    """F2's scores 1, 0, .5, 0 on rows of 4, 2, 3 and 1 action tokens of one prompt, with a row without any among them."""
    rows = [[True] * 4, [True, False, True], [False, False], [True, True, True], [False, True]]
    batch = scored_batch(rows, Reduction(), seed=0)
    rewards = torch.full((14,), math.nan, dtype=torch.float64)
    rewards[batch.action_mask] = _fp64(0, 0, 0, 1, 0, 0, 0.2, 0.0, 0.3, 0)
    return dataclasses.replace(batch, rewards=rewards, group=torch.full((5,), 7))


@pytest.mark.parametrize(
    ("algo", "expected"),
    [
        (RLOO(kl=NONE), [5 / 6, -0.5, 0.0, 1 / 6, -0.5]),
        (OPO(), [0.45, -0.55, 0.0, -0.05, -0.55]),
        (DrGRPO(), [0.625, -0.375, 0.0, 0.125, -0.375]),
        (ReinforceBaseline(normalize=False), [0.625, -0.375, 0.0, 0.125, -0.375]),
        (ReMax(kl=NONE), [0.75, -0.25, 0.0, 0.25, -0.25]),
    ],
    ids=lambda case: getattr(case, "name", ""),
)
def test_golden_of_f2_with_a_row_without_actions_that_stays_out(algo, expected):
    batch = _f2()
    assert_close(_judged(algo, batch).advantages, spread(_fp64(*expected), batch.action_mask, batch.cu_seqlens))


@law
@given(scored_batches())
def test_a_penalty_in_the_reward_is_added_as_its_reward_to_go(batch):
    mask, cu_seqlens = batch.action_mask, batch.cu_seqlens
    to_go = discounted_returns(0.1 * (batch.old_logp - batch.ref_logp), mask, cu_seqlens, gamma=1.0)
    for algorithm in (OPO, DrGRPO, ReMax):
        expected = _judged(algorithm(kl=NONE), batch).advantages - to_go
        assert_close(_judged(algorithm(kl=IN_REWARD), batch).advantages, expected)
    plain = ReinforceBaseline(kl=NONE, normalize=False).advantages(batch).advantages
    assert_close(ReinforceBaseline(kl=IN_REWARD).advantages(batch).advantages, whiten(plain - to_go, mask))


@law
@given(scored_batches(), st.booleans())
def test_vapo_takes_its_two_lambdas_and_whitens_only_the_advantages(batch, normalize):
    advantage = LengthAdaptiveAdvantage(gamma=0.9, alpha=0.6, value_lambd=0.8, normalize=normalize)
    judged = VAPO(kl=IN_REWARD, advantage=advantage).advantages(poisoned(batch))
    rewards = batch.rewards - 0.1 * (batch.old_logp - batch.ref_logp)
    rows = (batch.values, batch.action_mask, batch.cu_seqlens)
    advantages, returns = length_adaptive_gae(rewards, *rows, gamma=0.9, alpha=0.6, value_lambd=0.8)
    assert_close(judged.returns, returns)
    assert_close(judged.advantages, whiten(advantages, batch.action_mask) if normalize else advantages)


def test_vapo_imitates_correct_rows_golden():
    # One correct row of log-probabilities -1, -.2, -2.4: .1 (3.6 / 3) = .12. A wrong row beside it, of one token: the
    # step's weights are 1/4 each, and the correct row's share 3/4 of that.
    batch = scored_batch([[True, False, True, True], [True]], Reduction(), seed=0)
    batch = dataclasses.replace(batch, rewards=_fp64(0, math.nan, 0, 1, -1))
    logp = _fp64(-1, math.nan, -0.2, -2.4, -5).requires_grad_()
    for rows, share, nan in (([0], 1.0, 4), ([0, 1], 0.75, 5)):
        step = select(batch, rows)
        step = dataclasses.replace(step, weights=token_weights(step.action_mask, step.cu_seqlens, Reduction()).double())
        with_term, without = (VAPO(imitation_coef=coef).loss(Outputs(logp=logp[:nan]), step) for coef in (0.1, 0.0))
        assert_close(with_term.total - without.total, _fp64(0.12 * share).squeeze())
        assert_close(with_term.metrics["imitation_nll"], _fp64(1.2 * share).squeeze())
        assert "imitation_nll" not in without.metrics
    gradient = torch.autograd.grad(with_term.total - without.total, logp)[0]
    assert_close(gradient, _fp64(-0.025, 0.0, -0.025, -0.025, 0.0))


def test_remax_asks_for_greedy_scores_and_compares_with_them():
    batch = _f2()
    with pytest.raises(ValueError, match="the batch has no greedy_scores; `with_greedy` fills it"):
        ReMax().advantages(batch)
    with pytest.raises(ValueError, match="group 7 has no greedy sample"):
        with_greedy(batch, _fp64(1.0), torch.tensor([8]))
    greedy = with_greedy(batch, _fp64(9.0, 0.25), torch.tensor([8, 7]))
    # Rows may be selected before they are judged.
    moved = select(greedy, [3, 0])
    expected = spread(_fp64(0.25, 0.75), moved.action_mask, moved.cu_seqlens)
    assert_close(ReMax(kl=NONE).advantages(moved).advantages, expected)
    judged = judge(ReMax(kl=NONE), greedy)
    assert type(judged).__name__ == "Scored" and judged.weights.sum() == pytest.approx(1)


@every
@law
@given(batch=scored_batches())
def test_garbage_off_the_mask_changes_no_advantage(algorithm, batch):
    clean, dirty = (_judged(algorithm(kl=IN_REWARD), one) for one in (batch, poisoned(batch)))
    assert_close(dirty.advantages, clean.advantages, rtol=0, atol=0)
    assert (clean.advantages[~batch.action_mask] == 0).all()
    assert (clean.returns is None) == (algorithm is not VAPO)


@every
@law
@given(batch=scored_batches(), data=st.data())
def test_the_order_of_rows_does_not_matter(algorithm, batch, data):
    order = data.draw(st.permutations(range(batch.rows)))
    tokens = torch.cat([torch.arange(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1])) for row in order])
    moved = _judged(algorithm(), select(batch, order))
    assert_close(moved.advantages, _judged(algorithm(), batch).advantages[tokens])


@law
@given(scored_batches(), st.floats(-50, 50))
def test_group_baselines_ignore_a_constant_added_to_every_score(batch, shift):
    mask, cu_seqlens = batch.action_mask, batch.cu_seqlens
    last = mask & (discounted_returns(torch.ones_like(batch.rewards), mask, cu_seqlens, gamma=1.0) == 1)
    moved = dataclasses.replace(batch, rewards=batch.rewards + shift * last)
    for algo in (RLOO(), OPO(), DrGRPO(), ReinforceBaseline(normalize=False)):
        assert_close(algo.advantages(moved).advantages, algo.advantages(batch).advantages, rtol=0, atol=1e-9)


@law
@given(scored_batches())
def test_dr_grpo_is_rloo_by_n_minus_one_over_n(batch):
    mask, cu_seqlens = batch.action_mask, batch.cu_seqlens
    live = row_sums(torch.ones_like(batch.rewards), mask, cu_seqlens) > 0
    scores = row_sums(batch.rewards, mask, cu_seqlens)
    expected = torch.zeros_like(scores).masked_scatter(live, group_centred(scores[live], batch.group[live]))
    assert_close(DrGRPO().advantages(batch).advantages, spread(expected, mask, cu_seqlens))
    size = _fp64(*(float((live & (batch.group == own)).sum()) for own in batch.group)).clamp(min=1)
    rloo = spread((size - 1) / size, mask, cu_seqlens) * RLOO(kl=NONE).advantages(batch).advantages
    assert_close(DrGRPO().advantages(batch).advantages, rloo)


def _evaluate(algo, batch):
    current = batch.rollout_logp.clone().requires_grad_()
    result = algo.loss(Outputs(logp=current, entropy=-current), batch)
    result.total.backward()
    return result, current.grad


@every
@law
@given(batch=scored_batches(), data=st.data())
def test_any_cut_of_a_step_adds_up_and_garbage_off_the_mask_changes_no_bit(algorithm, batch, data):
    algo = algorithm(kl=IN_LOSS, clip=Clip(dual=3.0), entropy_coef=0.1)
    order = data.draw(st.permutations(range(batch.rows)))
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, batch.rows), max_size=3))), batch.rows]
    whole, gradient = _evaluate(algo, batch)
    parts = [_evaluate(algo, select(batch, order[start:stop])) for start, stop in itertools.pairwise(edges)]
    total = parts[0][0]
    for part, _ in parts[1:]:
        total = total + part
    assert_close(total.total, whole.total)
    assert_close(total.metrics, whole.metrics)
    tokens = torch.cat([torch.arange(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1])) for row in order])
    assert_close(torch.cat([own for _, own in parts]), gradient[tokens])
    dirty, dirty_gradient = _evaluate(algo, poisoned(batch))
    assert_close(dirty.total, whole.total, rtol=0, atol=0)
    assert_close(dirty_gradient, gradient, rtol=0, atol=0)
    assert not any(figure.requires_grad for figure in whole.metrics.values())


def test_on_policy_the_gradient_is_plain_reinforce():
    batch = scored_batch([[True, False, True], [True, True]], Reduction(), seed=1)
    batch = dataclasses.replace(batch, rollout_logp=batch.old_logp)
    for algorithm in (Reinforce, ReinforceBaseline, RLOO, ReMax, OPO, DrGRPO):
        _, gradient = _evaluate(algorithm(kl=NONE), batch)
        assert_close(gradient, -batch.weights * batch.advantages)


def test_vapo_trains_its_critic_clipped_or_not():
    batch = scored_batch([[True, True]], Reduction(), seed=0)
    batch = dataclasses.replace(batch, values=_fp64(0.5, 0.5), returns=_fp64(1.5, 0.2), weights=_fp64(1, 1))
    values = _fp64(0.9, 0.9)
    # Spec 4.7 with c = .2: .32 + .245; without a clip .18 + .245.
    assert_close(VAPO(value_clip=0.2).value_loss(values, batch).total, _fp64(0.565).squeeze())
    assert_close(VAPO(value_clip=None).value_loss(values, batch).total, _fp64(0.425).squeeze())


@every
def test_judge_takes_every_algorithm(algorithm):
    scored = scored_batch([[True, False, True], [True, True], [False]], Reduction(), seed=0)
    batch = Batch(**{field.name: getattr(scored, field.name) for field in dataclasses.fields(Batch)})
    batch = with_greedy(batch, _fp64(0, 0, 0), torch.arange(3))
    judged = judge(algorithm(), batch)
    assert_close(judged.weights, token_weights(batch.action_mask, batch.cu_seqlens, algorithm().reduction))
    assert algorithm().loss(Outputs(logp=batch.rollout_logp), judged).total.isfinite()
