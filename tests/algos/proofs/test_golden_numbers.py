"""Golden numbers of the field's worked examples that no other test has; each with its derivation. F1, F2, F5 are in `fixtures`."""

import math
from dataclasses import dataclass
from typing import Annotated

import pytest
import torch
from torch.testing import assert_close

from hone.algos.advantages import discounted_returns, whiten
from hone.algos.batch import rows_of_tokens
from hone.algos.distillation import forward_kl, lumped_student_logp, lumped_teacher_logp, reverse_kl
from hone.algos.group_baselines import pass_at_k
from hone.algos.kl import k3, kl_loss, kl_per_token
from hone.algos.masking import on_mask, upcast
from hone.algos.mismatch import mismatch_figures
from hone.algos.pairs import paired_loss
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.preference import dpo, log1mexp, odds_ratio, rpo
from hone.algos.ranges import Range, violations
from hone.algos.ratios import importance_ratio
from hone.algos.reduce import Reduction, token_weights, weighted_sum
from hone.algos.sequence_losses import gmpo_loss
from hone.algos.soft_losses import reinforce_loss, sapo_loss, scaled_advantages
from hone.algos.supervised import nll
from tests.reference.fixtures import f1, scatter

TOKEN, SEQUENCE, SUM = Reduction(), Reduction(over="sequence"), Reduction(over="constant", length=1)
PPO = {"clip_low": 0.2, "clip_high": 0.2}
# w = old - rollout of F1 in logs, so rollout_logp = [-1.1, -.3, -2.9], [-.1, -1.25].
MISMATCH = torch.tensor([0.1, -0.2, 0.9, -0.6, 0.05], dtype=torch.float64)


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def _near(actual, *expected):
    assert_close(actual.detach(), _fp64(*expected) if actual.ndim else _fp64(*expected).squeeze(), rtol=0, atol=1e-6)


def _weights(example, reduction):
    return token_weights(example.action_mask, example.cu_seqlens, reduction).double()


def _gradient(example, loss):
    (gradient,) = torch.autograd.grad(loss.total, example.logp)
    return gradient[example.action_mask]


def test_sum_over_tokens_mean_over_rows():
    # Losses [1, 2, 3] and [4, 5]: (6 + 9) / 2; by token 15 / 5, by sequence (2 + 4.5) / 2, over 4 slots 15 / 8.
    mask, cu_seqlens = torch.ones(5, dtype=torch.bool), torch.tensor([0, 3, 5], dtype=torch.int32)
    losses = _fp64(1, 2, 3, 4, 5)
    for reduction, expected in ((SUM, 7.5), (TOKEN, 3.0), (SEQUENCE, 3.25), (Reduction(over="constant", length=4), 1.875)):
        _near(weighted_sum(losses, token_weights(mask, cu_seqlens, reduction).double(), mask), expected)


@pytest.mark.parametrize(
    ("sign", "reduction", "expected", "gradient"),
    [
        # -rho A w: rho = 1, 1.349859, .670320, 1.648721, .904837; held at 1.2 with A > 0 and at .8 with A < 0.
        (1.0, SUM, -0.158381, [-0.5, 0.0, -0.335160, 0.824361, 0.452419]),
        (-1.0, SEQUENCE, -0.001233, [0.166667, 0.224977, 0.0, 0.0, -0.226209]),
    ],
)
def test_gradients_of_ppo_under_the_other_reductions(sign, reduction, expected, gradient):
    example = f1(sign=sign)
    weights = _weights(example, reduction)
    loss = clipped_surrogate(example.logp, example.old_logp, example.advantages, weights, example.action_mask, **PPO)
    _near(loss.total, expected)
    _near(_gradient(example, loss), *gradient)


def test_ppo_around_the_rollout_itself():
    # Bypassing the learner's own old policy: rho = e^.1, e^.1, e^.5, e^-.1, e^-.05 = 1.105171 twice, 1.648721 (held at 1.2),
    # .904837, .951229; (-1.105171 - 1.105171 - 1.2 + .904837 + .951229) / 5.
    example = f1()
    rollout_logp = scatter(example.old_logp[example.action_mask] - MISMATCH, example.action_mask)
    weights = _weights(example, TOKEN)
    loss = clipped_surrogate(example.logp, rollout_logp, example.advantages, weights, example.action_mask, **PPO)
    _near(loss.total, -0.310855)
    _near(_gradient(example, loss), -0.221034, -0.221034, 0.0, 0.180967, 0.190246)


def test_reinforce_by_sequence():
    # -(-1 - .2 - 2.4) / 3 = 1.2 and (-.2 - 1.3) / 2 = -.75; their mean. GPG scales it by total over valid groups, here 2.
    example = f1()
    weights = _weights(example, SEQUENCE)
    for scale, expected in ((1.0, 0.225), (2.0, 0.45)):
        _near(reinforce_loss(example.logp, scale * example.advantages, weights, example.action_mask).total, expected)


def test_sapo_on_policy_has_the_value_two_over_tau():
    mask, one = torch.tensor([True]), _fp64(1.0)
    _near(sapo_loss(0 * one, 0 * one, one, one, mask).total, -2.0)
    _near(sapo_loss(0 * one, 0 * one, -one, one, mask).total, 1.904762)  # 2 / 1.05


def test_sapo_without_an_advantage_takes_the_negative_temperature():
    # tau 2 where A <= 0, ratio 1.5: p = sigmoid(1) = .731059, gate 4 p (1 - p); with tau 1 it would be .940015.
    mask, one = torch.tensor([True]), _fp64(1.0)
    for advantage, expected in ((0.0, 0.786448), (-1.0, 0.786448), (1.0, 0.940015)):
        loss = sapo_loss(math.log(1.5) * one, 0 * one, advantage * one, one, mask, temperature_negative=2.0)
        _near(loss.metrics["sapo_gate"], expected)


def test_gmpo_with_the_papers_bound():
    # Bound .4 in logs. F1-: A < 0 on [0, .3, -.4], bounded below, at the bound itself: mean -.1 / 3; A > 0 on [.5, -.1], bounded
    # above to .4: mean .15. (e^-.033333 - e^.15) / 2; e^-.033333 / 6 each; nothing and -e^.15 / 4.
    example = f1(sign=-1.0)
    weights = _weights(example, SEQUENCE)
    bounds = {"log_clip_low": 0.4, "log_clip_high": 0.4}
    loss = gmpo_loss(example.logp, example.old_logp, example.advantages, weights, example.action_mask, example.cu_seqlens, **bounds)
    _near(loss.total, -0.097309)
    _near(_gradient(example, loss), *[0.161203] * 3, 0.0, -0.290459)


def test_the_likelihood_of_a_right_answer_at_a_tenth():
    # VAPO adds .1 NLL of the correct rows, here one with logp = -1, -.2, -2.4: .1 * 3.6 / 3.
    third, mask = torch.full((3,), 1 / 3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    _near(0.1 * nll(_fp64(-1, -0.2, -2.4), third, mask).total, 0.12)


def test_reinforce_plus_plus_before_and_after_its_whitening():
    # KL of the old policy: k1 = [.2, -.8, 1.4], [-.5, -1.4]; rewards 1 and 0 at the ends, less .1 k1, summed from the end:
    # 1 - .1 (.2 - .8 + 1.4) = .92, .94, .86; .1 (.5 + 1.4) = .19, .14. Mean .61, variance .13296 (dividing by 5).
    example = f1()
    mask = example.action_mask
    k1 = kl_per_token(example.old_logp, example.ref_logp, mask, estimator="k1")
    _near(k1[mask], 0.2, -0.8, 1.4, -0.5, -1.4)
    rewards = scatter(_fp64(0, 0, 1, 0, 0), mask)
    to_go = discounted_returns(rewards - 0.1 * k1, mask, example.cu_seqlens, gamma=1.0)
    _near(to_go[mask], 0.92, 0.94, 0.86, 0.19, 0.14)
    _near(whiten(to_go, mask)[mask], 0.850161, 0.905010, 0.685614, -1.151831, -1.288954)


def test_whitening_has_a_floor_under_its_variance():
    # Variance 1e-12, below 1e-8: the numbers over 1e-4.
    assert_close(whiten(_fp64(1e-6, -1e-6), torch.tensor([True, True])), _fp64(0.01, -0.01))


def test_the_ratio_times_k3():
    # k3 = e^-d - 1 + d of d = .2, -.5, 1, 0, -1.5: .018731, .148721, .367879, 0, 1.981689; times rho, mean; gradient rho d / 5.
    example = f1()
    mask = example.action_mask
    weights = _weights(example, TOKEN) * importance_ratio(example.logp, example.old_logp, mask).detach()
    loss = kl_loss(example.logp, example.ref_logp, weights, mask, coef=1.0, estimator="k3", gradient="reverse")
    _near(loss.total, 0.451837)
    _near(_gradient(example, loss), 0.04, -0.134986, 0.134064, 0.0, -0.271451)


def test_k2_misses_the_divergence_that_k1_and_k3_meet():
    logp, ref_logp = _fp64(0.5, -0.2, 0.1).log_softmax(-1), _fp64(0.0, 0.3, -0.4).log_softmax(-1)
    mask = torch.ones(3, dtype=torch.bool)
    for estimator, expected in (("k1", 0.102848), ("k2", 0.093614), ("k3", 0.102848)):
        _near(weighted_sum(kl_per_token(logp, ref_logp, mask, estimator=estimator), logp.exp(), mask), expected)


def test_cancellation_in_single_precision():
    # k3 at 1e-4 as fp32 has it: 5e-9 less d^3 / 6; exp(-d) - 1 + d would answer -1.659646e-08.
    assert_close(k3(torch.tensor([1e-4]), torch.zeros(1)), torch.tensor([4.998583e-09]), rtol=1e-6, atol=0)
    # log(1 - e^-1e-7) = log(1e-7 - 5e-15); log1p(-e^x) would answer -15.942385.
    assert_close(log1mexp(torch.tensor([-1e-7])), torch.tensor([-16.11810]), rtol=1e-6, atol=0)
    # e^100 has no place in fp32, and nothing is clamped.
    assert k3(torch.tensor([-100.0]), torch.zeros(1)) == math.inf


def test_the_other_odds():
    # a = -.2 and -.9: o = -.2 - log(1 - .818731) = 1.507790, -.9 - log(1 - .406570) = -.378146; log(1 + e^-1.885936).
    mask = torch.tensor([True])
    _near(odds_ratio(_fp64(-0.2), _fp64(-0.9), _fp64(1.0), mask, coef=1.0).total, 0.141228)


def test_preferences_built_from_dpo():
    # F4: sums -10 and -12 of lengths 4 and 5; reference -11 and -11.5; beta .1.
    one, mask = _fp64(1.0), torch.tensor([True])
    # CPO is DPO without a reference plus the chosen answer's NLL per token: log(1 + e^-.2) + 10 / 4.
    _near(rpo(_fp64(-10.0), _fp64(-12.0), _fp64(-2.5), one, mask, beta=0.1, nll_coef=1.0).total, 3.098139)
    # DPO on means per token: 1 / 4 and -.5 / 5, log(1 + e^-.035).
    _near(dpo(_fp64(0.25), _fp64(-0.1), one, mask, beta=0.1).total, 0.675800)


def test_mismatch_of_either_row_alone():
    # u = .1, -.2, .9 and -.6, .05: -.8 / 3 and .55 / 2; mean e^u - 1 - u; e^-mean u.
    example = f1()
    rollout_logp = scatter(example.old_logp[example.action_mask] - MISMATCH, example.action_mask)
    live = example.action_mask
    for row, length, expected in ((0, 3, (-0.266667, 0.194502, 0.765928)), (1, 2, (0.275, 0.075041, 1.316531))):
        weights = (live & (rows_of_tokens(example.cu_seqlens) == row)).double() / length
        figures = mismatch_figures(example.old_logp, rollout_logp, weights, live, example.cu_seqlens)
        for name, number in zip(("mismatch_k1", "mismatch_k3", "mismatch_perplexity_ratio"), expected, strict=True):
            _near(figures[name], number)


def test_f5_lumped_to_the_teachers_top_two():
    # Teacher .610296, .224515 of tokens 1 and 3, rest .165189; student .174371, .287490, rest .538139.
    mask, one, logits = torch.tensor([True]), _fp64(1.0), _fp64(1.0, 0.0, -1.0, 0.5)[None].requires_grad_()
    teacher = lumped_teacher_logp(_fp64(0.0, 2.0, 0.0, 1.0).log_softmax(-1)[None, [1, 3]], mask)
    student = lumped_student_logp(logits, torch.tensor([[1, 3]]), mask, temperature=1.0)
    _near(teacher.exp()[0], 0.610296, 0.224515, 0.165189)
    _near(student.exp()[0], 0.174371, 0.287490, 0.538139)
    # .610296 log(3.5) + .224515 log(.780949) + .165189 log(.306964), and the other way round.
    _near(forward_kl(student, teacher, one, mask).total, 0.513949)
    _near(reverse_kl(student, teacher, one, mask).total, 0.488191)


def test_scaled_advantages():
    # The product, and nothing where either is zero, however large the other is.
    mask = torch.tensor([True, True, True, True, False])
    advantages, factor = _fp64(2.0, 0.0, -3.0, -1.0, math.nan), _fp64(1.5, math.inf, 0.0, math.inf, math.nan)
    _near(scaled_advantages(advantages, factor, mask), 3.0, 0.0, 0.0, -math.inf, 0.0)


def test_five_draws_of_ten_with_three_right():
    # 1 - C(7, 5) / C(10, 5) = 1 - 21 / 252.
    _near(pass_at_k(torch.tensor([3]), torch.tensor([10]), k=5), 0.916667)


def test_masking_and_rows():
    mask = torch.tensor([False, True, False])
    assert on_mask(torch.tensor([math.nan, 2.0, math.inf]), mask).tolist() == [0.0, 2.0, 0.0]
    for given, promoted in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert upcast(torch.ones(1, dtype=given)).dtype == promoted
        assert on_mask(torch.ones(3, dtype=given), mask).dtype == promoted
    assert rows_of_tokens(torch.tensor([0, 2, 2, 5])).tolist() == [0, 0, 2, 2, 2]


def test_figures_of_pairs():
    # .25 and .75 of losses 2 and 4; rewards 1 over 3, then 2 over -1: the second pair is won.
    weights, mask = _fp64(0.25, 0.75, math.nan), torch.tensor([True, True, False])
    loss = paired_loss(_fp64(2, 4, math.nan), _fp64(1, 2, math.nan), _fp64(3, -1, math.nan), weights, mask, name="loss")
    _near(loss.total, 3.5)
    figures = {name: float(figure) for name, figure in loss.metrics.items()}
    assert figures == {"loss": 3.5, "chosen_reward": 1.75, "rejected_reward": 0.0, "accuracy": 0.75}


@dataclass(frozen=True)
class Inner:
    rates: Annotated[tuple[float, ...], Range(high=1)] = (0.5, 2.0, 3.0)


@dataclass(frozen=True)
class Outer:
    size: Annotated[int, Range(low=1)] | None = 0
    depth: Annotated[int, Range(low=1)] | None = None
    inner: Inner = Inner()
    name: str = "any"


def test_settings_out_of_range_are_listed_by_their_dotted_names():
    # None is no number; of several, every one that is out is named.
    high = Range(high=1)
    assert list(violations(Outer())) == [("size", 0, Range(low=1)), ("inner.rates", 2.0, high), ("inner.rates", 3.0, high)]
    assert list(violations(Outer(size=1, inner=Inner(rates=())))) == []
