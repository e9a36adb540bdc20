"""Slow references of the policy losses and corrections, from the papers: plain fp64, one Python loop per index, no masks.

A row is the list of its action tokens; a batch is a list of rows. Every function answers with loss, weight or mask per token.
"""

import math

import numpy as np

Rows = list[list[float]]


def gspo(logp: Rows, old_logp: Rows, advantages: Rows, *, clip_low: float, clip_high: float) -> Rows:
    """arXiv 2507.18071 eq 5 and 7: the n-th root of the product of a row's ratios, clipped against each advantage."""
    losses = []
    for new, old, row in zip(logp, old_logp, advantages, strict=True):
        ratio = math.prod(math.exp(a - b) for a, b in zip(new, old, strict=True)) ** (1 / max(len(new), 1))
        losses.append([-min(ratio * a, min(max(ratio, 1 - clip_low), 1 + clip_high) * a) for a in row])
    return losses


def gmpo(logp: Rows, old_logp: Rows, advantages: Rows, *, log_clip_low: float, log_clip_high: float) -> Rows:
    """arXiv 2507.20673: sign * min(sign x, sign clip(x)), averaged over the row, exponentiated."""
    losses = []
    for new, old, row in zip(logp, old_logp, advantages, strict=True):
        signs = np.sign(row)
        clipped = [
            sign * min(sign * (a - b), sign * min(max(a - b, -log_clip_low), log_clip_high))
            for a, b, sign in zip(new, old, signs, strict=True)
        ]
        losses.append([-math.exp(sum(clipped) / len(clipped)) * a for a in row])
    return losses


def cispo(logp: float, old_logp: float, advantage: float, *, cap: float, floor: float) -> float:
    """arXiv 2506.13585 eq 4, one token."""
    return -min(max(math.exp(logp - old_logp), floor), cap) * advantage * logp


def sapo(logp: float, old_logp: float, advantage: float, *, positive: float, negative: float) -> float:
    """arXiv 2511.20347, one token."""
    tau = positive if advantage > 0 else negative
    return -4 / tau / (1 + math.exp(-tau * (math.exp(logp - old_logp) - 1))) * advantage


def covariance(logp: list[float], advantages: list[float]) -> list[float]:
    """arXiv 2505.22617 eq 10 over all action tokens."""
    return list((np.array(logp) - np.mean(logp)) * (np.array(advantages) - np.mean(advantages)))


def kl_cov(logp: list[float], old_logp: list[float], advantages: list[float], *, fraction: float, coef: float) -> list[float]:
    """arXiv 2505.22617 eq 13 and 14 with the code's absolute log-ratio."""
    order = sorted(range(len(logp)), key=lambda t: covariance(logp, advantages)[t], reverse=True)
    chosen = set(order[: max(math.floor(fraction * len(logp)), 1)])
    return [
        -math.exp(new - old) * a + (coef * abs(new - old) if t in chosen else 0.0)
        for t, (new, old, a) in enumerate(zip(logp, old_logp, advantages, strict=True))
    ]


def dppo(logp: float, rollout_logp: float, advantage: float, *, divergence: str, threshold: float, cap: float) -> float:
    """arXiv 2602.04879 eq 12 to 14, one token."""
    pi, mu = math.exp(logp), math.exp(rollout_logp)
    distance = abs(mu - pi) if divergence == "tv" else mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))
    away = (advantage > 0 and pi > mu) or (advantage < 0 and pi < mu)
    return 0.0 if away and distance > threshold else -min(pi / mu, cap) * advantage * logp


def correction(old_logp: Rows, rollout_logp: Rows, *, level: str, mode: str, low: float, high: float) -> Rows:
    """Weight of every token: its ratio, its row's product of ratios or that product's root, then the bound."""
    weights = []
    for old, rollout in zip(old_logp, rollout_logp, strict=True):
        ratios = [math.exp(a - b) for a, b in zip(old, rollout, strict=True)]
        product = math.prod(ratios)
        raw = {"token": ratios, "sequence": [product] * len(ratios), "geometric": [product ** (1 / max(len(ratios), 1))] * len(ratios)}[
            level
        ]
        bound = {
            "truncate": lambda w: min(w, high),
            "clip": lambda w: min(max(w, low), high),
            "mask": lambda w: w if low <= w <= high else 0.0,
        }[mode]
        weights.append([bound(w) for w in raw])
    return weights


def rows_of(per_token: list[float], masks: list[list[bool]]) -> Rows:
    """The action tokens' numbers, row by row."""
    numbers = iter(per_token)
    return [[number for number, live in [(next(numbers), live) for live in mask] if live] for mask in masks]
