"""Slow references for preferences, process rewards and distillation: NumPy in fp64, one Python loop per index, no tricks."""

import math

import numpy as np


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + exp(-x)))."""
    return -math.log1p(math.exp(-x))


def odds(mean: float) -> float:
    """log(p / (1 - p)) of p = exp(mean)."""
    probability = math.exp(mean)
    return math.log(probability / (1 - probability))


def paired(name: str, chosen: float, rejected: float, *, beta: float, flip: float = 0.0, margin: float = 0.0) -> float:
    """One pair's loss, from the papers: log-ratios (dpo, cdpo, robust), means (ipo, simpo, orpo) or scores (bt)."""
    h = chosen - rejected
    kept, swapped = -log_sigmoid(beta * h), -log_sigmoid(-beta * h)
    return {
        "bt": lambda: -log_sigmoid(h - margin),
        "dpo": lambda: kept,
        "cdpo": lambda: (1 - flip) * kept + flip * swapped,
        "robust": lambda: ((1 - flip) * kept - flip * swapped) / (1 - 2 * flip),
        "ipo": lambda: (h - 1 / (2 * beta)) ** 2,
        "simpo": lambda: -log_sigmoid(beta * h - margin),
        "orpo": lambda: -chosen - beta * log_sigmoid(odds(chosen) - odds(rejected)),
    }[name]()


def kto(ratio: float, anchor: float, *, good: bool, beta: float, scale: float) -> float:
    """arXiv 2402.01306 eq 8 for one row, less its constant."""
    x = beta * (ratio - anchor) if good else beta * (anchor - ratio)
    return scale * (1 - 1 / (1 + math.exp(-x)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of one vector."""
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def cross_entropy(logits: list[float], shares: list[float]) -> float:
    """-sum_c q_c log p_c."""
    return -sum(share * math.log(p) for share, p in zip(shares, softmax(np.array(logits)), strict=True))


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """sum_c p_c log(p_c / q_c), in probabilities."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def jsd(teacher: np.ndarray, student: np.ndarray, *, beta: float) -> float:
    """arXiv 2306.13649 eq 1, in probabilities, with the ends as the paper's code has them."""
    if beta in (0, 1):
        return kl(student, teacher) if beta else kl(teacher, student)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def lumped(probabilities: np.ndarray, tokens: list[int]) -> np.ndarray:
    """The named columns, and the sum of the others."""
    others = [column for column in range(len(probabilities)) if column not in tokens]
    return np.array([*probabilities[tokens], probabilities[others].sum()])
