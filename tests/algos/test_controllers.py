"""Coefficients that follow what was measured: golden values, bounds, saving."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.algos.controllers import AdaptiveEntropy, AdaptiveKL, FixedKL
from hone.algos.ranges import violations
from tests.algos.strategies import law


def test_fixed_kl_stays():
    assert FixedKL(coef=0.3).after(kl=100.0, sequences=512) == FixedKL(coef=0.3)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        # Target 6, 512 of 10000 sequences. 8 / 6 - 1 = .33, clipped to .2: .1 (1 + .2 .0512). 6.6 / 6 - 1 = .1.
        (8.0, 0.101024),
        (6.6, 0.100512),
        (6.0, 0.1),
        (0.0, 0.098976),
        (-1e30, 0.098976),
    ],
)
def test_adaptive_kl_golden(kl, expected):
    before = AdaptiveKL(coef=0.1, target=6.0, horizon=10000)
    after = before.after(kl=kl, sequences=512)
    assert after.coef == pytest.approx(expected, abs=1e-12)
    assert dataclasses.replace(after, coef=0.1) == before and before.coef == 0.1


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_adaptive_kl_refuses_what_would_spoil_its_state(kl):
    with pytest.raises(ValueError, match=f"kl is {kl}"):
        AdaptiveKL().after(kl=kl, sequences=1)


def test_adaptive_kl_cannot_turn_negative():
    with pytest.raises(ValueError, match="50000 sequences at once with a horizon of 10000"):
        AdaptiveKL().after(kl=0.0, sequences=50000)
    assert AdaptiveKL().after(kl=0.0, sequences=49999).coef > 0


@pytest.mark.parametrize(
    ("entropy", "level", "coef"),
    # Target .5, step .005 from .01: below and at the target it rises and acts, above it falls and rests.
    [(0.45, 0.015, 0.015), (0.5, 0.015, 0.015), (0.6, 0.005, 0.0)],
)
def test_adaptive_entropy_golden(entropy, level, coef):
    before = AdaptiveEntropy(level=0.01, target=0.5, step=0.005)
    after = before.after(entropy=entropy)
    assert after.level == pytest.approx(level, abs=1e-15) and after.coef == pytest.approx(coef, abs=1e-15)
    assert before.coef == 0.0  # nothing was measured yet


def test_adaptive_entropy_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="entropy is nan"):
        AdaptiveEntropy().after(entropy=math.nan)


@law
@given(st.lists(st.floats(0, 20), max_size=40), st.floats(0.01, 0.5))
def test_states_keep_their_ranges_and_survive_saving(measured, step):
    kl, entropy = AdaptiveKL(horizon=100), AdaptiveEntropy(target=1.0, step=step)
    for figure in measured:
        before = kl.coef
        kl = AdaptiveKL(**json.loads(json.dumps(dataclasses.asdict(kl.after(kl=figure, sequences=64)))))
        assert (kl.coef > before) == (figure > kl.target) and (kl.coef < before) == (figure < kl.target)
        entropy = AdaptiveEntropy(**json.loads(json.dumps(dataclasses.asdict(entropy.after(entropy=figure)))))
        assert list(violations(kl)) == [] and list(violations(entropy)) == []
        assert entropy.coef == (entropy.level if figure <= 1.0 else 0.0)
