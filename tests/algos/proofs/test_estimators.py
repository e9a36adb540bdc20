"""Every public estimator in one table: constants, blind to what is off the mask, exact in half precision and at any scale."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hone.algos.advantages import discounted_returns, gae, group_centred, group_normalised, row_sums, spread, whiten
from hone.algos.corrections import correction_weights, log_weights, off_policy_sequence_mask, sequence_mask_tis
from hone.algos.covariance_losses import token_covariance
from hone.algos.decoupled import proximal_approximation
from hone.algos.distillation import lumped_teacher_logp, on_policy_distillation_advantages
from hone.algos.group_baselines import (
    greedy_baselines,
    greedy_centred,
    leave_one_out,
    length_weighted_centred,
    max_rl,
    pass_at_k_advantages,
)
from hone.algos.kto import anchor_sums
from hone.algos.lambda_schedules import decoupled_gae, length_adaptive_gae
from hone.algos.shaping import RunningMoments, clip_scores, normalise_scores, rescored, stop_properly, update_moments
from hone.algos.soft_losses import scaled_advantages
from hone.algos.trust_region import binary_kl, binary_tv, divergence_mask
from hone.algos.turn_credit import anchor_centred, anchor_normalised, gigpo, process_normalised, turn_gae
from tests.algos.proofs.losses import Columns, columns

GROUP = torch.tensor([3, 3, 3, 8, 8])
"""Prompts of the five rows; the third row has no action token."""
VERSIONS = torch.arange(18) % 4
STATES = torch.arange(18) % 2
GREEDY = torch.tensor([8, 3])


@dataclass(frozen=True)
class Given:
    """The columns of a micro-batch, its rows' scores, and which rows have an action token."""

    tokens: Columns
    scores: Tensor
    live: Tensor

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Where the action tokens and the rows are."""
        return self.tokens.mask, self.tokens.cu_seqlens

    @property
    def greedy(self) -> Tensor:
        """Scores of two greedy samples."""
        return self.scores[[4, 0]]

    def map(self, change: Callable[[str, Tensor], Tensor]) -> "Given":
        """With every column and the scores changed."""
        return Given(self.tokens.map(change), change("scores", self.scores), self.live)


def given() -> Given:
    """Five rows, of which one is not live."""
    tokens = columns()
    return Given(tokens, torch.tensor([0.5, -1.25, 3.0, 2.0, 0.75], dtype=torch.float64), torch.tensor([True, True, False, True, True]))


def _ends(g: Given) -> Tensor:
    return g.tokens.mask & (torch.arange(18) % 3 != 0)


GAE = {"gamma": 0.9, "lambd": 0.8}
RATIOS = {"level": "sequence", "mode": "clip", "low": 0.5, "high": 1.5}

# Label -> (function of Given, how the result scales with rewards, values and scores: 1, 0, or None where that is no question).
PER_TOKEN = {
    "advantages.gae": (lambda g: gae(g.tokens.returns, g.tokens.values, *g.rows, **GAE), 1),
    "advantages.gae, bootstrapped": (lambda g: gae(g.tokens.returns, g.tokens.values, *g.rows, **GAE, bootstrap=g.scores), 1),
    "advantages.discounted_returns": (lambda g: discounted_returns(g.tokens.returns, *g.rows, gamma=0.9), 1),
    "advantages.whiten": (lambda g: whiten(g.tokens.returns, g.tokens.mask), 0),
    "lambda_schedules.decoupled_gae": (
        lambda g: decoupled_gae(g.tokens.returns, g.tokens.values, *g.rows, gamma=0.9, policy_lambd=0.8, value_lambd=1.0),
        1,
    ),
    "lambda_schedules.length_adaptive_gae": (
        lambda g: length_adaptive_gae(g.tokens.returns, g.tokens.values, *g.rows, gamma=0.9, alpha=0.5, value_lambd=1.0),
        1,
    ),
    "turn_credit.turn_gae": (lambda g: turn_gae(g.tokens.returns, g.tokens.values, *g.rows, **GAE), 1),
    "turn_credit.anchor_centred": (lambda g: anchor_centred(g.tokens.returns, STATES, *g.rows, GROUP, gamma=0.9), 1),
    "turn_credit.anchor_normalised": (lambda g: anchor_normalised(g.tokens.returns, STATES, *g.rows, GROUP, gamma=0.9, eps=0.0), 0),
    "turn_credit.gigpo": (lambda g: gigpo(g.tokens.returns, STATES, *g.rows, GROUP, gamma=0.9, step_weight=0.7, eps=0.0), 0),
    "turn_credit.process_normalised": (lambda g: process_normalised(g.tokens.returns, _ends(g), *g.rows, GROUP, eps=0.0), 0),
    "shaping.rescored": (lambda g: rescored(g.tokens.returns, g.scores, *g.rows), 1),
    "soft_losses.scaled_advantages": (lambda g: scaled_advantages(g.tokens.advantages, g.tokens.margins, g.tokens.mask), None),
    "covariance_losses.token_covariance": (lambda g: token_covariance(g.tokens.logp, g.tokens.advantages, g.tokens.mask), None),
    "trust_region.binary_tv": (lambda g: binary_tv(g.tokens.logp, g.tokens.rollout_logp, g.tokens.mask), None),
    "trust_region.binary_kl": (lambda g: binary_kl(g.tokens.logp, g.tokens.rollout_logp, g.tokens.mask), None),
    "trust_region.divergence_mask": (
        lambda g: divergence_mask(
            *(g.tokens.logp, g.tokens.rollout_logp, g.tokens.advantages, g.tokens.mask), divergence="tv", threshold=0.05
        ),
        None,
    ),
    "distillation.on_policy_distillation_advantages": (
        lambda g: on_policy_distillation_advantages(g.tokens.logp, g.tokens.ref_logp, g.tokens.mask),
        None,
    ),
    "corrections.log_weights": (lambda g: log_weights(g.tokens.old_logp, g.tokens.rollout_logp, *g.rows, level="geometric"), None),
    "corrections.correction_weights": (lambda g: correction_weights(g.tokens.old_logp, g.tokens.rollout_logp, *g.rows, **RATIOS), None),
    "corrections.sequence_mask_tis": (
        lambda g: sequence_mask_tis(g.tokens.old_logp, g.tokens.rollout_logp, *g.rows, low=0.9, high=1.1, cap=1.2),
        None,
    ),
    "corrections.off_policy_sequence_mask": (
        lambda g: off_policy_sequence_mask(g.tokens.logp, g.tokens.rollout_logp, g.tokens.advantages, *g.rows, threshold=0.0),
        None,
    ),
    "decoupled.proximal_approximation": (
        lambda g: proximal_approximation(g.tokens.logp, g.tokens.rollout_logp, VERSIONS, g.tokens.mask, policy_version=3),
        None,
    ),
}
PER_ROW = {
    "group_baselines.leave_one_out": (lambda g: leave_one_out(g.scores, GROUP, g.live), 1),
    "group_baselines.length_weighted_centred": (
        lambda g: length_weighted_centred(g.scores, GROUP, g.live * torch.tensor([4, 2, 9, 3, 1])),
        1,
    ),
    "group_baselines.greedy_centred": (lambda g: greedy_centred(g.scores, GROUP, g.live, g.greedy, GREEDY), 1),
    "group_baselines.max_rl": (lambda g: max_rl(g.scores.square(), GROUP, g.live, eps=0.0), 0),
    "group_baselines.pass_at_k_advantages": (
        lambda g: pass_at_k_advantages((g.scores > 0.6).to(g.scores.dtype), GROUP, g.live, k=1, eps=0.0),
        None,
    ),
}
DENSE = {
    # All entries are meant.
    "advantages.group_centred": (lambda g: group_centred(g.scores, GROUP), 1),
    "advantages.group_normalised": (lambda g: group_normalised(g.scores, GROUP, eps=0.0), 0),
    "advantages.row_sums": (lambda g: row_sums(g.tokens.returns, *g.rows), 1),
    "advantages.spread": (lambda g: spread(g.scores, *g.rows), 1),
    "group_baselines.greedy_baselines": (lambda g: greedy_baselines(GROUP, g.greedy, GREEDY), 1),
    "shaping.clip_scores": (lambda g: clip_scores(g.scores, low=-1.0, high=1.0), None),
    "shaping.stop_properly": (lambda g: stop_properly(g.scores, ~g.live, coef=0.5), 1),
    "shaping.normalise_scores": (lambda g: normalise_scores(g.scores, update_moments(RunningMoments(), g.scores), eps=0.0), 0),
    "distillation.lumped_teacher_logp": (lambda g: lumped_teacher_logp(g.tokens.teacher[:, :2], torch.ones(18, dtype=torch.bool)), None),
    "kto.anchor_sums": (lambda g: anchor_sums(g.scores, g.live), None),
}
TABLE = {**PER_TOKEN, **PER_ROW, **DENSE}
every_estimator = pytest.mark.parametrize("label", sorted(TABLE))


def _results(label: str, g: Given) -> tuple[Tensor, ...]:
    result = TABLE[label][0](g)
    return result if isinstance(result, tuple) else (result,)


def _floats(change: Callable[[Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
    return lambda _, column: change(column) if column.is_floating_point() else column


@every_estimator
def test_results_are_constants(label):
    for result in _results(label, given().map(_floats(lambda column: column.clone().requires_grad_()))):
        assert not result.requires_grad


@pytest.mark.parametrize("label", sorted({**PER_TOKEN, **PER_ROW, "kto.anchor_sums": None, "advantages.row_sums": None}))
def test_what_is_off_the_mask_changes_no_bit(label):
    clean = given()
    kept = clean.tokens.mask if label in PER_TOKEN else clean.live
    for filler in (math.nan, math.inf, -math.inf, 1e300):

        def poisoned(column, filler=filler):
            own = clean.live if column.shape == clean.live.shape else clean.tokens.mask
            return torch.where(own if column.ndim == 1 else own[:, None], column, torch.full_like(column, filler))

        for one, other in zip(_results(label, clean), _results(label, clean.map(_floats(poisoned))), strict=True):
            assert_close(other, one, rtol=0, atol=0)
            assert label not in PER_TOKEN | PER_ROW or (other[~kept] == 0).all()


@every_estimator
def test_half_precision_is_promoted_before_any_arithmetic(label):
    half = given().map(_floats(torch.Tensor.bfloat16))
    full = half.map(_floats(torch.Tensor.float))
    for low, high in zip(_results(label, half), _results(label, full), strict=True):
        looked_up = label == "group_baselines.greedy_baselines"  # no arithmetic: the numbers as they were given
        assert low.dtype in (torch.float32, torch.float64, torch.bool) or looked_up
        assert_close(low, high, rtol=0, atol=0, check_dtype=not looked_up)


SIZES = [(300, torch.float64), (60, torch.float32), (-60, torch.float32)]
# Whitening has a floor under the variance, which is a size: its golden test has that.
SCALED = [
    (label, *size)
    for label, (_, degree) in sorted(TABLE.items())
    for size in SIZES
    if degree is not None and not (label == "advantages.whiten" and size[0] < 0)
]


@pytest.mark.parametrize(("label", "exponent", "dtype"), SCALED)
def test_rewards_of_any_size_only_change_the_scale(label, exponent, dtype):
    # A power of two changes no digit. Squares of 2^300 still fit fp64, in which every statistic is taken.
    once = given().map(_floats(lambda column: column.to(dtype)))
    far = once.map(_floats(lambda column: 2.0**exponent * column))
    degree = TABLE[label][1]
    for one, other in zip(_results(label, once), _results(label, far), strict=True):
        assert other.isfinite().all()
        assert_close(other, 2.0 ** (degree * exponent) * one, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)


@pytest.mark.parametrize("label", sorted(PER_TOKEN))
def test_nothing_on_the_mask_gives_zeros(label):
    g = given()
    empty = Given(g.tokens.off().map(_floats(lambda column: torch.full_like(column, math.nan))), g.scores, torch.zeros_like(g.live))
    for result in _results(label, empty):
        assert result.shape == (18,) and (result == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [100.0, 1000.0, -100.0, -1000.0])
def test_corrections_far_out_stand_at_their_bounds(u, dtype):
    # One row of two tokens, u and 0: token weights e^u and 1, the product e^u, its root e^(u / 2).
    rollout, old = torch.tensor([-max(u, 0.0), 0.0], dtype=dtype), torch.tensor([min(u, 0.0), 0.0], dtype=dtype)
    rows = (torch.tensor([True, True]), torch.tensor([0, 2], dtype=torch.int32))
    up = u > 0
    for level in ("token", "sequence", "geometric"):
        second = 1.0 if level == "token" else None
        expected = {"truncate": 2.0 if up else 0.0, "clip": 2.0 if up else 0.5, "mask": 0.0}
        for mode, first in expected.items():
            low = 0.0 if mode == "truncate" else 0.5
            actual = correction_weights(old, rollout, *rows, level=level, mode=mode, low=low, high=2.0)
            assert_close(actual, torch.tensor([first, first if second is None else second], dtype=dtype), rtol=0, atol=1e-20)
    kept = off_policy_sequence_mask(old, rollout, torch.tensor([-1.0, 1.0], dtype=dtype), *rows, threshold=0.5)
    assert kept.tolist() == [1.0 if up else 0.0, 1.0]
    proximal = proximal_approximation(old, rollout, torch.tensor([0, 0]), rows[0], policy_version=2)
    assert_close(proximal, (old + rollout) / 2)
