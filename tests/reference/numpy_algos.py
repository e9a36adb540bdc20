"""Slow references from the papers: NumPy in fp64, one Python loop per index, no masking tricks. Rows are lists of steps."""

import math

import numpy as np


def gae(rewards: list[float], values: list[float], *, gamma: float, lambd: float, value_after: float = 0.0) -> list[float]:
    """arXiv 1506.02438 eq 16 as the double sum: A_t = sum_l (gamma lambda)^l delta_{t + l}, over one row's own steps."""
    steps = len(rewards)
    following = [*values[1:], value_after]
    delta = [rewards[t] + gamma * following[t] - values[t] for t in range(steps)]
    return [sum((gamma * lambd) ** (k - t) * delta[k] for k in range(t, steps)) for t in range(steps)]


def returns(rewards: list[float], *, gamma: float) -> list[float]:
    """G_t = sum_l gamma^l r_{t + l}."""
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


def group_normalised(scores: list[float], group: list[int], *, eps: float) -> list[float]:
    """arXiv 2402.03300 section 4.1.2, Bessel's standard deviation."""
    advantages = []
    for score, own in zip(scores, group, strict=True):
        members = np.array([other for other, its in zip(scores, group, strict=True) if its == own], dtype=np.float64)
        constant = bool((members == members[0]).all())
        advantages.append(0.0 if constant else (score - members.mean()) / (members.std(ddof=1) + eps))
    return advantages


def token_weights(masks: list[list[bool]], *, over: str, length: int | None) -> list[float]:
    """Weight of every token, rows end to end."""
    tokens = sum(map(sum, masks))
    rows = sum(any(mask) for mask in masks)
    divisor = {"token": lambda own: tokens, "sequence": lambda own: rows * own, "constant": lambda own: rows * length}[over]
    return [1.0 / divisor(sum(mask)) if live else 0.0 for mask in masks for live in mask]


def clipped_surrogate(
    logp: float, old_logp: float, advantage: float, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> float:
    """arXiv 1707.06347 eq 7 with 1912.09729 eq 5, for one token, as the loss (negated)."""
    ratio = math.exp(logp - old_logp)
    objective = min(ratio * advantage, min(max(ratio, 1 - clip_low), 1 + clip_high) * advantage)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return -objective


def clipped_value_loss(value: float, old_value: float, target: float, *, clip: float) -> float:
    """The larger of the two halved squares, for one token."""
    near = old_value + min(max(value - old_value, -clip), clip)
    return 0.5 * max((value - target) ** 2, (near - target) ** 2)


def kl(logp: float, ref_logp: float, *, estimator: str) -> float:
    """The three estimators, for one token."""
    d = logp - ref_logp
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
