"""Slow references of the terms that sum, row or item by item: plain fp64 Python, from the formulas, no masks and no tricks."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np


def squared_value(value: float, target: float) -> float:
    """Half the squared distance."""
    return (value - target) ** 2 / 2


def kl_term(logp: float, ref_logp: float, *, estimator: str, gradient: str) -> tuple[float, float]:
    """(value, slope): http://joschu.net/blog/kl-approx.html; "reverse" has k2's slope whatever the value."""
    d = logp - ref_logp
    value = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
    slope = {"k1": 1.0, "k2": d, "k3": 1 - math.exp(-d)}[estimator]
    return value, d if gradient == "reverse" else slope


def clip_cov(losses: list[float], *, chosen: set[int]) -> list[float]:
    """arXiv 2505.22617 eq 11 and 12, given the draw: the chosen tokens' losses are zero."""
    return [0.0 if token in chosen else loss for token, loss in enumerate(losses)]


def covariance_candidates(
    logp: list[float], old_logp: list[float], advantages: list[float], *, clip_low: float, clip_high: float, low: float, high: float
) -> set[int]:
    """Tokens whose covariance lies between the bounds and that PPO's clip does not hold already."""
    covariance = (np.array(logp) - np.mean(logp)) * (np.array(advantages) - np.mean(advantages))
    free = [
        not ((a > 0 and math.exp(new - old) > 1 + clip_high) or (a < 0 and math.exp(new - old) < 1 - clip_low))
        for new, old, a in zip(logp, old_logp, advantages, strict=True)
    ]
    return {token for token in range(len(logp)) if free[token] and low < covariance[token] < high}


def anchor(log_ratios: list[float]) -> float:
    """arXiv 2402.01306 eq 7: their mean, or zero below it."""
    return max(0.0, sum(log_ratios) / len(log_ratios))


def row_sums(numbers: list[float], masks: list[list[bool]]) -> list[float]:
    """Each row's numbers on the mask, added exactly."""
    flat = iter(numbers)
    rows = [[(next(flat), live) for live in mask] for mask in masks]
    return [float(sum((Fraction(x) for x, live in row if live), Fraction(0))) for row in rows]


def tempered(logits: list[float], *, temperature: float) -> list[float]:
    """Logarithms of the softmax at a temperature, as probabilities first."""
    powers = [math.exp(x / temperature) for x in logits]
    return [math.log(power / sum(powers)) for power in powers]


def log1mexp(x: float) -> float:
    """log(1 - e^x), in four hundred decimal digits."""
    with localcontext() as context:
        context.prec = 400
        return float((1 - Decimal(x).exp()).ln())
