"""Corrections as `judge` and the losses apply them: the presets of F1, the figures, and settings that contradict one another."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from hone.algos.algorithms import ALGORITHMS
from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.dapo import DAPO
from hone.algos.algorithms.grpo import GRPO
from hone.algos.algorithms.gspo import GSPO
from hone.algos.algorithms.reinforce_baseline import ReinforceBaseline
from hone.algos.algorithms.terms import KLPenalty
from hone.algos.batch import Batch, Scored, select
from hone.algos.corrections import (
    correction_weights,
    off_policy_sequence_mask,
    second_moment_mask,
    self_normalised,
    sequence_mask_tis,
)
from hone.algos.judging import judge, optimiser_steps
from hone.algos.protocol import Corrected, Outputs
from hone.algos.ranges import violations
from hone.algos.reduce import Reduction, token_weights
from tests.algos.strategies import law, poisoned, scored_batch, scored_batches
from tests.reference.fixtures import f1, scatter

NAN, INF = math.nan, math.inf
NONE = KLPenalty(init_coef=0.0)
U = (0.1, -0.2, 0.9, -0.6, 0.05)  # old_logp - rollout_logp of F1
MISMATCH = {"mismatch_k1", "mismatch_k3", "mismatch_chi2", "mismatch_perplexity_ratio", "mismatch_ess"}
CORRECTED = {"correction_ess", "correction_mean", "correction_rejected"}


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def _algo(**correction) -> ReinforceBaseline:
    """F1's advantages of +1 and -1 are the scores 2 and 0 of one group less their mean; PPO's clip of .2 on both sides."""
    return ReinforceBaseline(kl=NONE, normalize=False, correction=Correction(**correction))


def _f1(*, sign: float = 1.0, u: tuple[float, ...] = U) -> tuple[Batch, Tensor]:
    """(batch, current log-probabilities) of F1, NaN off the mask."""
    example = f1(sign=sign)
    mask = example.action_mask
    scored = scored_batch([[False, True, True, False, True], [False, True, True, False]], Reduction(), seed=0)
    fields = {field.name: getattr(scored, field.name) for field in dataclasses.fields(Batch)}
    first = 2.0 if sign > 0 else 0.0
    rewards = scatter(_fp64(0.5 * first, 0, 0.5 * first, 0, 2 - first), mask)
    own = {"old_logp": example.old_logp, "rollout_logp": scatter(example.old_logp[mask] - _fp64(*u), mask), "rewards": rewards}
    return Batch(**{**fields, **own, "group": torch.tensor([7, 7]), "ref_logp": None}), example.logp


def _factor(judged: Scored) -> Tensor:
    """What F1's advantages of +-1 were multiplied by."""
    return judged.advantages[judged.action_mask] * _fp64(1, 1, 1, -1, -1)


PRESETS = {
    "off": ({}, [1.0] * 5),
    "TIS": ({"level": "token"}, [1.105171, 0.818731, 2.0, 0.548812, 1.051271]),
    "TIS, clipped on both sides": ({"level": "token", "mode": "clip", "low": 0.6}, [1.105171, 0.818731, 2.0, 0.6, 1.051271]),
    "IcePop": ({"level": "token", "mode": "mask", "low": 0.5, "high": 5.0}, [1.105171, 0.818731, 2.459603, 0.548812, 1.051271]),
    "IcePop, narrow": ({"level": "token", "mode": "mask", "low": 0.6, "high": 2.0}, [1.105171, 0.818731, 0.0, 0.0, 1.051271]),
    "sequence TIS": ({"level": "sequence"}, [2.0] * 3 + [0.576950] * 2),
    "sequence TIS, open": ({"level": "sequence", "high": INF}, [2.225541] * 3 + [0.576950] * 2),  # e^.8 and e^-.55
    "MIS by token": ({"level": "token", "mode": "mask"}, [1.105171, 0.818731, 0.0, 0.548812, 1.051271]),
    "MIS": ({"level": "sequence", "mode": "mask"}, [0.0] * 3 + [0.576950] * 2),
    # Geometric means 1.305605 and .759572 pass the gate or not; the token's own weight is cut at its cap.
    "sequence-mask TIS": ({"level": "geometric", "low": 0.8, "high": 1.5}, [1.105171, 0.818731, 2.0, 0.0, 0.0]),
    "sequence-mask TIS, capped": (
        {"level": "geometric", "low": 0.5, "high": 1.5, "token_cap": 1.0, "mode": "clip"},
        [1.0, 0.818731, 1.0, 0.548812, 1.0],
    ),
    # u^2 = .01, .04, .81, .36, .0025: their mean .2445, .103125 without the widest, .0175 without the next.
    "M2PO": ({"second_moment": 0.04}, [1.0, 1.0, 0.0, 0.0, 1.0]),
    "M2PO and TIS": ({"level": "token", "second_moment": 0.04}, [1.105171, 0.818731, 0.0, 0.0, 1.051271]),
    # Over the mean 5.523985 / 5 of the truncated weights.
    "TIS, normalised": ({"level": "token", "normalize": True}, [1.000339, 0.741069, 1.810288, 0.496753, 0.951551]),
    # Over the mean of two rows, (2 + .576950) / 2.
    "sequence TIS, normalised": ({"level": "sequence", "normalize": True}, [1.552223] * 3 + [0.447777] * 2),
    "M2PO, normalised": ({"second_moment": 0.04, "normalize": True}, [5 / 3, 5 / 3, 0.0, 0.0, 5 / 3]),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_golden_of_f1(name):
    settings, expected = PRESETS[name]
    batch, _ = _f1()
    judged = judge(_algo(**settings), batch)
    assert_close(_factor(judged), _fp64(*expected), rtol=0, atol=1e-6)
    assert (judged.advantages[~batch.action_mask] == 0).all()
    assert list(violations(_algo(**settings))) == []


@pytest.mark.parametrize(
    ("settings", "expected", "gradient"),
    [
        # PPO's losses [-1, -1.2, -.670320], [1.648721, .904837] times the weight, over 5.
        ({"level": "token"}, -0.314444, [-0.221034, 0.0, -0.268128, 0.180967, 0.190246]),
        ({"level": "token", "mode": "mask", "low": 0.6, "high": 2.0}, -0.227284, [-0.221034, 0.0, 0.0, 0.0, 0.190246]),
        ({"level": "token", "high": INF}, -0.376060, [-0.221034, 0.0, -0.329744, 0.180967, 0.190246]),  # decoupled PPO
    ],
)
def test_corrected_ppo_golden_of_f1(settings, expected, gradient):
    batch, logp = _f1()
    algo = _algo(**settings)
    loss = algo.loss(Outputs(logp=logp), judge(algo, batch))
    loss.total.backward()
    assert_close(loss.total.detach(), _fp64(expected).squeeze(), rtol=0, atol=1e-6)
    assert_close(logp.grad[batch.action_mask], _fp64(*gradient), rtol=0, atol=1e-6)


FUNCTIONS = {
    "TIS": (Correction(level="token"), lambda *b: correction_weights(*b, level="token", mode="truncate", high=2.0)),
    "IcePop": (
        Correction(level="token", mode="mask", low=0.5, high=5.0),
        lambda *b: correction_weights(*b, level="token", mode="mask", low=0.5, high=5.0),
    ),
    "OpenRLHF's TIS": (
        Correction(level="token", mode="clip", low=0.5, high=1.5),
        lambda *b: correction_weights(*b, level="token", mode="clip", low=0.5, high=1.5),
    ),
    "sequence TIS": (Correction(level="sequence"), lambda *b: correction_weights(*b, level="sequence", mode="truncate", high=2.0)),
    "MIS": (Correction(level="sequence", mode="mask"), lambda *b: correction_weights(*b, level="sequence", mode="mask", high=2.0)),
    "sequence-mask TIS": (
        Correction(level="geometric", low=0.9, high=1.1, token_cap=1.5),
        lambda *b: sequence_mask_tis(*b, low=0.9, high=1.1, cap=1.5),
    ),
    "M2PO": (Correction(second_moment=0.04), lambda old, rollout, mask, edges: second_moment_mask(old, rollout, mask, threshold=0.04)),
    "normalised by token": (
        Correction(level="token", normalize=True),
        lambda old, rollout, mask, edges: self_normalised(
            correction_weights(old, rollout, mask, edges, level="token", mode="truncate", high=2.0),
            token_weights(mask, edges, Reduction()),
            mask,
        ),
    ),
    "normalised by row": (
        Correction(level="sequence", normalize=True),
        lambda old, rollout, mask, edges: self_normalised(
            correction_weights(old, rollout, mask, edges, level="sequence", mode="truncate", high=2.0),
            token_weights(mask, edges, Reduction(over="sequence")),
            mask,
        ),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@law
@given(scored=scored_batches())
def test_a_preset_is_its_function_times_the_advantages(name, scored):
    correction, function = FUNCTIONS[name]
    batch = _unjudged(poisoned(scored))
    bare, judged = (judge(GRPO(kl=NONE, correction=one), batch) for one in (Correction(), correction))
    factor = function(batch.old_logp, batch.rollout_logp, batch.action_mask, batch.cu_seqlens)
    assert_close(judged.advantages, bare.advantages * factor, rtol=0, atol=0)
    assert_close(judged.weights, bare.weights, rtol=0, atol=0)  # what is rejected stays in the denominator


def _unjudged(scored: Scored) -> Batch:
    return Batch(**{field.name: getattr(scored, field.name) for field in dataclasses.fields(Batch)})


@law
@given(scored_batches(), st.sampled_from(["truncate", "clip", "mask"]), st.booleans())
def test_level_off_changes_no_bit(scored, mode, normalize):
    batch = _unjudged(scored)
    off = Correction(mode=mode, low=0.9, high=1.1, token_cap=0.1, normalize=normalize)
    assert off.factor(batch) is None
    for algo in (GRPO(), GSPO(), ReinforceBaseline()):
        plain, settled = judge(algo, batch), judge(dataclasses.replace(algo, correction=off), batch)
        assert_close(settled.advantages, plain.advantages, rtol=0, atol=0)
        assert_close(settled.advantages, algo.advantages(batch).advantages, rtol=0, atol=0)
        assert set(settled.figures) == set(plain.figures)
        outputs = Outputs(logp=scored.ref_logp)
        losses = [one.loss(outputs, plain).total for one in (algo, dataclasses.replace(algo, correction=off))]
        assert_close(losses[1], losses[0], rtol=0, atol=0)


@law
@given(scored_batches(), st.sampled_from(["token", "sequence", "geometric"]))
def test_equal_policies_need_no_correction(scored, level):
    batch = dataclasses.replace(_unjudged(scored), rollout_logp=scored.old_logp)
    for algo in (GRPO(correction=Correction(level=level, second_moment=0.1, normalize=True)), GRPO()):
        judged = judge(algo, batch)
        assert_close(judged.advantages, GRPO().advantages(batch).advantages)
        assert_close(judged.figures["mismatch_ess"], torch.ones(()).double() * bool(batch.action_mask.any()))
        assert all(judged.figures[name] == 0 for name in ("mismatch_k1", "mismatch_k3", "mismatch_chi2"))


@pytest.mark.parametrize(
    ("sign", "threshold", "kept", "total"),
    [
        # mean(rollout_logp - logp) = -.7 / 3 = -.233333 and .15 / 2 = .075; only a bad row can be left behind.
        (1.0, 0.0, [1, 1, 1, 0, 0], -0.574064),  # (-1 - 1.2 - .670320) / 5
        (1.0, 0.074, [1, 1, 1, 0, 0], -0.574064),
        (1.0, 0.076, [1, 1, 1, 1, 1], -0.063352),  # and (1.648721 + .904837) / 5
        (-1.0, 0.0, [1, 1, 1, 1, 1], 0.209004),
    ],
)
def test_opsm_golden_of_f1(sign, threshold, kept, total):
    batch, logp = _f1(sign=sign)
    plain, masking = _algo(), _algo(left_behind=threshold)
    judged = judge(masking, batch)
    assert_close(judged.advantages, judge(plain, batch).advantages, rtol=0, atol=0)  # it needs the current policy
    loss = masking.loss(Outputs(logp=logp), judged)
    (gradient,) = torch.autograd.grad(loss.total, logp)
    expected = dataclasses.replace(judged, advantages=judged.advantages * scatter(_fp64(*kept), batch.action_mask).nan_to_num())
    bare = plain.loss(Outputs(logp=logp), expected)
    assert_close(loss.total.detach(), _fp64(total).squeeze(), rtol=0, atol=1e-6)
    assert_close(loss.total, bare.total, rtol=0, atol=0)
    assert_close(loss.metrics, bare.metrics, rtol=0, atol=0)
    assert_close(gradient, torch.autograd.grad(bare.total, logp)[0], rtol=0, atol=0)
    assert (gradient[batch.action_mask][_fp64(*kept) == 0] == 0).all()


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"remax"}))
def test_opsm_reaches_every_algorithm_and_leaves_its_penalties(name):
    scored = scored_batch([[True, True], [True], [False, True, True]], Reduction(), seed=4)
    batch = dataclasses.replace(_unjudged(scored), group=torch.zeros(3, dtype=torch.long))
    plain = ALGORITHMS[name]()
    masking = dataclasses.replace(plain, correction=Correction(left_behind=0.0))
    judged, logp = judge(plain, batch), scored.values - 1
    keep = off_policy_sequence_mask(logp, batch.rollout_logp, judged.advantages, batch.action_mask, batch.cu_seqlens, threshold=0.0)
    assert {0.0, 1.0} <= set(keep[batch.action_mask].tolist())
    expected = plain.loss(Outputs(logp=logp), dataclasses.replace(judged, advantages=judged.advantages * keep))
    actual = masking.loss(Outputs(logp=logp), judged)
    assert_close(actual.total, expected.total, rtol=0, atol=0)
    assert_close(actual.metrics, expected.metrics, rtol=0, atol=0)


def test_figures_golden_of_f1():
    batch, _ = _f1()
    figures = judge(_algo(), batch).figures
    expected = {
        "mismatch_k1": -0.05,
        "mismatch_k3": 0.146718,
        "mismatch_chi2": 0.869547,
        "mismatch_perplexity_ratio": (3 * 0.765928 + 2 * 1.316531) / 5,
        "mismatch_ess": 0.766032,  # 5.983588^2 / (5 * 9.347735)
    }
    assert set(figures) == MISMATCH | {"groups", "groups_of_one", "groups_of_equals"}
    for name, value in expected.items():
        assert float(figures[name]) == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize(
    ("settings", "ess", "mean", "rejected"),
    [
        ({"level": "token", "high": INF}, 0.766032, 5.983588 / 5, 0.0),
        ({"level": "token"}, 0.836230, 5.523985 / 5, 0.0),
        ({"level": "token", "normalize": True}, 0.836230, 1.0, 0.0),
        # Of three tokens [1.105171, .818731, 1.051271]: 2.975173^2 / (5 * 2.996894).
        ({"level": "token", "mode": "mask", "low": 0.6}, 0.590722, 2.975173 / 5, 0.4),
        # By row: (2 + .576950)^2 / (2 * (4 + .332871)).
        ({"level": "sequence"}, 0.766313, 2.57695 / 2, 0.0),
        ({"level": "sequence", "mode": "mask"}, 0.5, 0.57695 / 2, 0.6),
        ({"second_moment": 0.04}, 0.6, 0.6, 0.4),
        ({"level": "sequence", "mode": "mask", "high": 0.1}, 0.0, 0.0, 1.0),
        ({"level": "sequence", "mode": "mask", "high": 0.1, "normalize": True}, 0.0, 0.0, 1.0),
    ],
)
def test_figures_of_a_correction_golden_of_f1(settings, ess, mean, rejected):
    batch, _ = _f1()
    figures = judge(_algo(**settings), batch).figures
    assert set(figures) >= MISMATCH | CORRECTED
    expected = {"correction_ess": ess, "correction_mean": mean, "correction_rejected": rejected}
    assert {name: float(figures[name]) for name in CORRECTED} == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_figures_are_always_there_and_never_nan(name):
    scored = scored_batch([[True, True], [False], [True]], Reduction(), seed=0)
    batch = dataclasses.replace(_unjudged(scored), greedy_scores=torch.zeros(3))
    corrected = dataclasses.replace(ALGORITHMS[name](), correction=Correction(level="token", normalize=True))
    nowhere = dataclasses.replace(batch, action_mask=torch.zeros_like(batch.action_mask))
    # An engine that is 500 nats off overflows a ratio, in single precision by far.
    apart = dataclasses.replace(batch, old_logp=batch.old_logp.float(), rollout_logp=(batch.old_logp - 500).float())
    for one in (batch, nowhere, apart):
        assert set(judge(ALGORITHMS[name](), one).figures) >= MISMATCH
        figures = judge(corrected, one).figures
        assert set(figures) >= MISMATCH | CORRECTED
        assert not any(figure.isnan() or figure.requires_grad for figure in figures.values())


def test_without_the_learners_numbers_there_is_nothing_to_compare():
    class Blind(GRPO):
        needs = property(lambda self: frozenset())

    batch = dataclasses.replace(_f1()[0], old_logp=None)
    assert set(judge(Blind(), batch).figures) == {"groups", "groups_of_one", "groups_of_equals"}
    with pytest.raises(ValueError, match="the batch has no old_logp; the learner fills it"):
        judge(Blind(correction=Correction(level="token")), batch)


@law
@given(scored_batches(), st.integers(1, 3), st.data())
def test_figures_tell_of_the_whole_rollout_whatever_part_is_looked_at(scored, batch_size, data):
    judged = judge(DAPO(correction=Correction(level="token")), _unjudged(scored))
    order = data.draw(st.lists(st.integers(0, scored.rows - 1), max_size=4))
    generator = torch.Generator().manual_seed(0)
    steps = list(optimiser_steps(judged, batch_size=batch_size, reduction=Reduction(), generator=generator))
    for part in (select(judged, order), *steps, *(select(step, [0]) for step in steps)):
        assert part.figures is judged.figures
    assert set(judged.figures) >= MISMATCH | CORRECTED


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": "token", "mode": "mask", "low": 2.0, "high": 0.5}, r"correction bounds \[2.0, 0.5\]: low must not be above high"),
        ({"level": "geometric", "low": 3.0}, r"correction bounds \[3.0, 2.0\]"),
        ({"level": "sequence", "mode": "clip", "low": 3.0}, r"correction bounds \[3.0, 2.0\]"),
        ({"level": "token", "low": 0.5}, r"correction low is 0.5, but 'truncate' has no lower bound; 'clip' raises .*, 'mask' rejects"),
        ({"level": "sequence", "low": 0.5}, r"correction low is 0.5, but 'truncate' has no lower bound"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Correction(**settings)


def test_values_out_of_range_are_found_and_the_defaults_are_in_it():
    assert list(violations(Correction())) == [] and isinstance(Correction(), Corrected)
    assert Correction() == Correction(
        level="off", mode="truncate", low=0.0, high=2.0, token_cap=2.0, normalize=False, second_moment=None, left_behind=None
    )
    broken = GRPO(correction=Correction(low=-1.0, high=-0.5, token_cap=-1.0, second_moment=0.0, left_behind=-0.1))
    assert {name: str(limit) for name, _, limit in violations(broken)} == {
        "correction.low": "[0, inf)",
        "correction.high": "[0, inf)",
        "correction.token_cap": "[0, inf)",
        "correction.second_moment": "(0, inf)",
        "correction.left_behind": "[0, inf)",
    }
    assert [name for name, _, _ in violations(Correction(high=NAN))] == ["high"]
