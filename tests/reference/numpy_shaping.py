"""Slow references of rewards before a baseline and of statistics over a batch: NumPy in fp64, loops, by definition."""

import math

import numpy as np


def whiten(numbers: list[float]) -> list[float]:
    """Less their mean, over the square root of their mean squared distance from it, which is at least 1e-8."""
    mean = math.fsum(numbers) / len(numbers)
    variance = math.fsum((x - mean) ** 2 for x in numbers) / len(numbers)
    return [0.0 if len(set(numbers)) == 1 else (x - mean) / math.sqrt(max(variance, 1e-8)) for x in numbers]


def group_centred(scores: list[float], group: list[int]) -> list[float]:
    """arXiv 2503.20783."""
    members = {own: [s for s, g in zip(scores, group, strict=True) if g == own] for own in set(group)}
    return [0.0 if len(set(members[own])) == 1 else score - float(np.mean(members[own])) for score, own in zip(scores, group, strict=True)]


def greedy_centred(scores: list[float], group: list[int], live: list[bool], greedy: dict[int, float]) -> list[float]:
    """arXiv 2310.10505."""
    return [score - greedy[own] if its else 0.0 for score, own, its in zip(scores, group, live, strict=True)]


def length_adaptive_lambda(length: int, *, alpha: float) -> float:
    """arXiv 2504.05118: the lambda whose sum over all distances is alpha times the length, if there is one."""
    return max(0.0, 1 - 1 / (alpha * length)) if length else 0.0


def overlong(length: int, *, max_length: int, buffer: int, factor: float) -> float:
    """arXiv 2503.14476 eq 13, its three cases."""
    if length <= max_length - buffer:
        return 0.0
    return factor * ((max_length - buffer) - length) / buffer if length <= max_length else -factor


def stop_properly(score: float, truncated: bool, *, coef: float) -> float:
    """A row that was cut off earns its share of the score, or a price, but never more than it had."""
    return min(score, coef * score if coef >= 0 else coef) if truncated else score


def rescored(rewards: list[float], score: float) -> list[float]:
    """One row's rewards with the last changed so that they sum to the score."""
    return [*rewards[:-1], score - math.fsum(rewards[:-1])] if rewards else []


def pass_at_k(correct: int, samples: int, *, k: int) -> float:
    """arXiv 2107.03374 eq 1 with its combinations, exactly."""
    if correct == 0:
        return 0.0
    return 1.0 if samples - correct < k else 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def gigpo(episode: list[float], rows: list[int], step: list[float], *, step_weight: float) -> list[float]:
    """arXiv 2505.10978 eq 8: each turn's own advantage on top of its row's; `rows` says whose turn it is."""
    return [episode[row] + step_weight * own for row, own in zip(rows, step, strict=True)]
