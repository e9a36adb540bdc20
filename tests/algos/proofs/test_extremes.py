"""Every public loss far out: one item, log-ratios of 100 and 1000 nats (and the like), the value and gradient known beforehand.

Where a bound holds the loss is finite and the gradient zero. Where the formula itself has no bound, infinity is the right answer
and NaN never is. `x` is the distance; `e` is exp(x) in the dtype: in fp32 infinity at both distances, in fp64 only at 1000.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch.testing import assert_close

from hone.algos.kl import LARGEST_VALUE
from tests.algos.proofs.losses import ENTRIES, Columns, columns, evaluate

LOG2 = math.log(2)


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


def _policy(x: float, e: float) -> Iterator[tuple[str, dict, float, dict]]:
    """(label, numbers, value, gradient) with the policy above the old one by x, then below, for either sign of the advantage."""
    bounded = {
        # label: (value, slope) for (above, A = 1), (above, A = -1), (below, A = 1), (below, A = -1)
        "policy_losses.clipped_surrogate: dual clip": [(-1.28, 0), (1.4, 0), (0, 0), (0.8, 0)],
        "policy_losses.clipped_surrogate": [(-1.28, 0), (e, e), (0, 0), (0.8, 0)],
        "covariance_losses.clip_cov_loss": [(-1.28, 0), (e, e), (0, 0), (0.8, 0)],  # one token has no covariance
        "decoupled.decoupled_surrogate": [(-1.28, 0), (e, e), (0, 0), (0.8, 0)],
        "sequence_losses.gspo_loss": [(-1.1, 0), (e, e), (0, 0), (0.9, 0)],
        "sequence_losses.gspo_token_loss": [(-1.1, 0), (e, e), (0, 0), (0.9, 0)],
        "sequence_losses.gmpo_loss": [(-math.exp(0.4), 0), (e, e), (0, 0), (math.exp(-0.3), 0)],
        "soft_losses.sapo_loss": [(-4, 0), (4 / 1.05, 0), (-4 * _sigmoid(-1), 0), (4 / 1.05 * _sigmoid(-1.05), 0)],
        "soft_losses.reinforce_loss": [(0, -1), (0, 1), (x, -1), (-x, 1)],
        "soft_losses.cispo_loss": [(0, -1.2), (0, 1.2), (0.7 * x, -0.7), (-0.7 * x, 0.7)],
        # Above, the token is certain now and was impossible: held if good; below the other way round.
        "trust_region.dppo_loss: tv": [(0, 0), (0, 1.5), (0, 0), (0, 0)],
        "trust_region.dppo_loss: kl": [(0, 0), (0, 1.5), (0, 0), (0, 0)],
        # One token is always among the highest: + .7 x.
        "covariance_losses.kl_cov_loss": [(0.7 * x - e, 0.7 - e), (0.7 * x + e, 0.7 + e), (0.7 * x, -0.7), (0.7 * x, -0.7)],
    }
    for label, expected in bounded.items():
        cases = [(above, advantage) for above in (True, False) for advantage in (1.0, -1.0)]
        for (above, advantage), (value, slope) in zip(cases, expected, strict=True):
            old = -x if above else 0.0
            numbers = {"logp": 0.0 if above else -x, "old_logp": old, "rollout_logp": old, "advantages": advantage}
            yield label, numbers, value, {"logp": slope}
        for distance in (x, -x):
            still = label == "covariance_losses.kl_cov_loss"  # which asks for no advantage
            numbers = {"logp": min(distance, 0.0), "old_logp": min(-distance, 0.0), "rollout_logp": min(-distance, 0.0), "advantages": 0.0}
            yield label, numbers, 0.7 * x if still else 0.0, {"logp": math.copysign(0.7, distance) if still else 0.0}
    for behaviour, weight in ((-x, 1.3), (0.0, 0.0)):  # the sampler far below the proximal policy, and far above
        proximal = 0.0 if weight else -x
        numbers = {"logp": proximal, "old_logp": proximal, "rollout_logp": behaviour, "advantages": 1.0}
        yield "decoupled.decoupled_surrogate", numbers, -weight, {"logp": -weight}


def _kl(x: float, e: float) -> Iterator[tuple[str, dict, float, dict]]:
    for d in (x, -x):
        values = {"k1": d, "k2": d * d / 2, "k3": x - 1 if d > 0 else e - 1 - x}
        slopes = {"k1": 1.0, "k2": d, "k3": 1.0 if d > 0 else 1 - e}
        numbers = {"logp": min(d, 0.0), "ref_logp": min(-d, 0.0)}
        for estimator, value in values.items():
            yield f"kl.kl_loss: {estimator}, as_written", numbers, 0.3 * value, {"logp": 0.3 * slopes[estimator]}
            saturated = 0.3 * min(value, LARGEST_VALUE)
            yield f"kl.kl_loss: {estimator}, reverse", numbers, saturated, {"logp": 0.3 * d}
            # The policy above the sampler by more than the cap, and far below it.
            yield f"kl.weighted_kl_loss: {estimator}", {**numbers, "old_logp": numbers["logp"] - x}, 5 * saturated, {"logp": 1.5 * d}
            yield f"kl.weighted_kl_loss: {estimator}", {**numbers, "old_logp": numbers["logp"] + x}, 0.0, {"logp": 0.0}


def _values(x: float, e: float) -> Iterator[tuple[str, dict, float, dict]]:
    yield "policy_losses.entropy_bonus", {"entropy": x}, -0.3 * x, {"entropy": -0.3}
    yield "supervised.nll", {"logp": -x}, x, {"logp": -1.0}
    far = 1e16 * x
    yield "value_losses.squared_value_loss", {"values": far}, far * far / 2, {"values": far}
    yield "value_losses.clipped_value_loss", {"values": far}, far * far / 2, {"values": far}
    # The return is reached, but not from where the old value may go.
    yield "value_losses.clipped_value_loss", {"values": far, "returns": far}, far * far / 2, {"values": 0.0}
    yield "pairs.paired_loss", {"chosen": far, "values": far, "returns": -far}, far, {"chosen": 1.0}


def _preferences(x: float, e: float) -> Iterator[tuple[str, dict, float, dict]]:
    above, below = {"chosen": x, "rejected": 0.0}, {"chosen": -x, "rejected": 0.0}
    for label, numbers, value, slope in (
        ("preference.dpo", above, 0.0, 0.0),
        ("preference.dpo", below, 0.4 * x, -0.4),
        ("preference.conservative_dpo", above, 0.1 * 0.4 * x, 0.04),
        ("preference.conservative_dpo", below, 0.9 * 0.4 * x, -0.36),
        ("preference.conservative_dpo: half", above, 0.2 * x, 0.2),
        ("preference.conservative_dpo: half", below, 0.2 * x, -0.2),
        ("preference.robust_dpo", above, -0.1 / 0.8 * 0.4 * x, -0.05),  # without a floor, as its unbiasedness needs it
        ("preference.robust_dpo", below, 0.9 / 0.8 * 0.4 * x, -0.45),
        ("preference.ipo", above, (x - 1.25) ** 2, 2 * (x - 1.25)),
        ("preference.ipo", below, (x + 1.25) ** 2, -2 * (x + 1.25)),
        ("preference.ipo_summed", above, (x - 1.25) ** 2, 2 * (x - 1.25)),
        ("preference.ipo_summed", below, (x + 1.25) ** 2, -2 * (x + 1.25)),
        ("preference.simpo", above, 0.0, 0.0),
        ("preference.simpo", below, 0.4 * x + 0.3, -0.4),
        ("reward_models.bradley_terry", above, 0.0, 0.0),
        ("reward_models.bradley_terry", below, x, -1.0),
        ("reward_models.log_exp", above, 0.0, 0.0),
        ("reward_models.log_exp", below, x, -1.0),
    ):
        yield label, numbers, value, {"chosen": slope, "rejected": -slope}
    yield "reward_models.bradley_terry", {"margins": x}, x, {"chosen": -1.0, "rejected": 1.0}
    yield "reward_models.reward_centre", above, 0.4 * x * x, {"chosen": 0.8 * x, "rejected": 0.8 * x}
    yield "preference.rpo", {**below, "chosen_logp": -x}, 0.4 * x + 0.7 * x, {"chosen": -0.4, "rejected": 0.4, "chosen_logp": -0.7}
    # ORPO: o(-x) = -x, o(-1) = log(e^-1 / (1 - e^-1)); d o / d a = 1 / (1 - e^a).
    odds, steep = math.log(math.exp(-1) / (1 - math.exp(-1))), 1 / (1 - math.exp(-1))
    for label, own in (("preference.odds_ratio", 0.0), ("preference.orpo", 1.0)):
        unlikely, likely = {"chosen": -x, "rejected": -1.0}, {"chosen": -1.0, "rejected": -x}
        yield label, unlikely, own * x + 0.4 * (x + odds), {"chosen": -own - 0.4, "rejected": 0.4 * steep}
        yield label, likely, own, {"chosen": -own, "rejected": 0.0}
        yield label, {"chosen": 0.0, "rejected": 0.0}, 0.4 * LOG2, {"chosen": -own - 0.2, "rejected": 0.2}  # two certain answers
        yield label, {"chosen": 0.0, "rejected": -x}, 0.0, {"chosen": -own, "rejected": 0.0}
    for desirable, far, value in ((True, x, 0.0), (True, -x, 1.3), (False, x, 0.7), (False, -x, 0.0)):
        yield "kto.kto_loss", {"chosen": far, "desirable": desirable}, value, {"chosen": 0.0}


def _distributions(x: float, e: float) -> Iterator[tuple[str, dict, float, dict]]:
    certain = [x, 0.0, 0.0, 0.0]
    yield "process.hard_process_loss", {"logits": certain, "labels": 0}, 0.0, {"logits": [0.0] * 4}
    yield "process.hard_process_loss", {"logits": certain, "labels": 1}, x, {"logits": [1.0, -1.0, 0.0, 0.0]}
    shares = {"logits": certain, "shares": [0.25, 0.75, 0.0, 0.0]}
    yield "process.soft_process_loss", shares, 0.75 * x, {"logits": [0.75, -0.75, 0.0, 0.0]}
    # Student and teacher are each certain, of different tokens.
    apart = {"student": [0.0, -x, -x, -x], "teacher": [-x, 0.0, -x, -x]}
    yield "distillation.forward_kl", apart, x, {"student": [0.0, -1.0, 0.0, 0.0]}
    yield "distillation.reverse_kl", apart, x, {"student": [x + 1, 0.0, 0.0, 0.0]}
    yield "distillation.generalised_jsd: 0", apart, x, {"student": [0.0, -1.0, 0.0, 0.0]}
    yield "distillation.generalised_jsd: 1", apart, x, {"student": [x + 1, 0.0, 0.0, 0.0]}
    for label, beta in ((".1", 0.1), (".5", 0.5)):
        value = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        yield f"distillation.generalised_jsd: {label}", apart, value, {"student": [-(1 - beta) * math.log(1 - beta), 0.0, 0.0, 0.0]}
    logits = {"logits": [0.7 * x, 0.0, 0.0, 0.0], "teacher": [-x, 0.0, -x, -x], "top": [0, 1]}
    yield "distillation.forward_kl: of logits", logits, x, {"logits": [1 / 0.7, -1 / 0.7, 0.0, 0.0]}
    # The teacher's top two hold all of its mass, and leave the rest none.
    yield "distillation.forward_kl: lumped", logits, x, {"logits": [1 / 0.7, -1 / 0.7, 0.0, 0.0]}
    value = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    yield "distillation.generalised_jsd: lumped", logits, value, {"logits": [0.0] * 4}
    # A teacher that gives half to its rest, a student that gives everything to the token the teacher rules out.
    half = {**logits, "teacher": [-x, math.log(0.5), 0.0, 0.0]}
    yield "distillation.reverse_kl: lumped", half, x, {"logits": [0.0] * 4}


def _one(dtype: torch.dtype, numbers: dict[str, object]) -> Columns:
    """One item, its weight one, zero wherever nothing is given."""
    shape = {name: column[:1] for name, column in columns().numbers.items()}
    zeros = {name: torch.zeros_like(column, dtype=dtype if column.is_floating_point() else column.dtype) for name, column in shape.items()}
    given = {name: torch.tensor([value], dtype=zeros[name].dtype) for name, value in numbers.items()}
    one = {"weights": torch.ones(1, dtype=dtype), "top": torch.tensor([[0, 1]])}
    return Columns({**zeros, **one, **given}, torch.tensor([True]), (1,))


FAMILIES = (_policy, _kl, _values, _preferences, _distributions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [100.0, 1000.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_far_out_every_loss_has_the_value_and_the_gradient_of_its_formula(family, x, dtype):
    e = float(torch.tensor(x, dtype=dtype).exp())
    for label, numbers, value, slopes in family(x, e):
        result, gradients = evaluate(ENTRIES[label], _one(dtype, numbers))
        note = f"{label} at {numbers}: {float(result.total.detach())} for {value}, {gradients} for {slopes}"
        close = {"rtol": 2e-6, "atol": 1e-6, "msg": note}
        assert_close(result.total.detach(), torch.tensor(value, dtype=dtype), **close)
        for name, slope in slopes.items():
            assert_close(gradients[name][0], torch.tensor(slope, dtype=dtype), **close)
        assert set(slopes) == set(gradients), label
        assert not any(figure.isnan() for figure in result.metrics.values()), note


def test_every_loss_is_among_them():
    assert {label for family in FAMILIES for label, *_ in family(100.0, math.inf)} == set(ENTRIES)


# KL-Cov's penalty asks for no advantage; `_policy` has its value.
JUDGED = sorted({label for label, entry in ENTRIES.items() if "advantages" in entry.constants} - {"covariance_losses.kl_cov_loss"})


@pytest.mark.parametrize("label", JUDGED)
@pytest.mark.parametrize("spread", [0.4, 400.0])
def test_without_advantages_nothing_is_learnt(label, spread):
    given = columns(spread=spread)
    result, gradients = evaluate(ENTRIES[label], given.replace(advantages=torch.zeros_like(given.advantages)))
    assert result.total == 0
    assert (gradients["logp"] == 0).all()


@pytest.mark.parametrize("label", sorted(ENTRIES))
@pytest.mark.parametrize("spread", [10.0, 50.0])
def test_a_whole_batch_of_large_ratios_stays_finite(label, spread):
    # Up to 100 nats at once, in fp64, where exp can hold it: nothing cancels to NaN between items.
    result, gradients = evaluate(ENTRIES[label], columns(spread=spread))
    assert result.total.isfinite() and all(figure.isfinite() for figure in result.metrics.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())
