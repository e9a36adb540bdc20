"""Slow references of what stands between engine, learner and a stale policy: fp64, one Python loop per index, no masks.

A row is the list of its action tokens' log-probabilities; a batch is a list of rows; answers come in the same shape.
"""

import math

Rows = list[list[float]]


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def sequence_mask_tis(old_logp: Rows, rollout_logp: Rows, *, low: float, high: float, cap: float) -> Rows:
    """Token ratios up to a cap, in rows whose geometric mean of ratios lies within the bounds."""
    weights = []
    for old, rollout in zip(old_logp, rollout_logp, strict=True):
        ratios = [math.exp(a - b) for a, b in zip(old, rollout, strict=True)]
        passes = low <= math.prod(ratios) ** (1 / max(len(ratios), 1)) <= high
        weights.append([min(ratio, cap) if passes else 0.0 for ratio in ratios])
    return weights


def off_policy_sequence_mask(logp: Rows, rollout_logp: Rows, advantages: Rows, *, threshold: float) -> Rows:
    """arXiv 2512.02556 eq 9: bad tokens of rows that the policy has left behind by more than the threshold are dropped."""
    masks = []
    for new, rollout, row in zip(logp, rollout_logp, advantages, strict=True):
        left = _mean([b - a for a, b in zip(new, rollout, strict=True)])
        masks.append([0.0 if a < 0 and left > threshold else 1.0 for a in row])
    return masks


def proximal(logp: float, behaviour: float, *, version: int, policy_version: int) -> float:
    """arXiv 2512.06547: as far towards the policy as the version before it lies between behaviour and policy."""
    lag = policy_version - version
    if version < 0 or lag <= 0:
        return behaviour
    return behaviour + (policy_version - 1 - version) / lag * (logp - behaviour)


def decoupled(
    logp: float, proximal_logp: float, behaviour_logp: float, advantage: float, *, clip_low: float, clip_high: float, cap: float
) -> float:
    """arXiv 2110.00641: PPO around the proximal policy times its ratio to behaviour, one token."""
    ratio = math.exp(logp - proximal_logp)
    objective = min(ratio * advantage, min(max(ratio, 1 - clip_low), 1 + clip_high) * advantage)
    return -min(math.exp(proximal_logp - behaviour_logp), cap) * objective


def effective_sample_size(corrections: list[float], shares: list[float]) -> float:
    """Kish: (sum of w c)^2 over sum of w times sum of w c^2."""
    first = sum(w * c for w, c in zip(shares, corrections, strict=True))
    second = sum(w * c * c for w, c in zip(shares, corrections, strict=True))
    return first * first / (sum(shares) * second) if second else 0.0


def mismatch(old_logp: Rows, rollout_logp: Rows, shares: Rows) -> dict[str, float]:
    """Weighted means over tokens, with w = old / rollout: of -log w, w - 1 - log w, w^2 - 1, and the row's perplexity ratio."""
    sums = dict.fromkeys(("mismatch_k1", "mismatch_k3", "mismatch_chi2", "mismatch_perplexity_ratio"), 0.0)
    for old, rollout, row in zip(old_logp, rollout_logp, shares, strict=True):
        perplexity = math.exp(-_mean(old)) / math.exp(-_mean(rollout))
        for a, b, share in zip(old, rollout, row, strict=True):
            w = math.exp(a) / math.exp(b)
            sums["mismatch_k1"] += share * -math.log(w)
            sums["mismatch_k3"] += share * (w - 1 - math.log(w))
            sums["mismatch_chi2"] += share * (w * w - 1)
            sums["mismatch_perplexity_ratio"] += share * perplexity
    return sums


def weights_of_kept(corrections: Rows, *, over: str, length: int | None) -> Rows:
    """One over the kept tokens, over kept rows times their kept tokens, or over kept rows times a length."""
    kept = [[c != 0 for c in row] for row in corrections]
    tokens, rows = sum(map(sum, kept)), sum(any(row) for row in kept)
    divisor = {"token": lambda own: tokens, "sequence": lambda own: rows * own, "constant": lambda own: rows * length}[over]
    return [[1.0 / divisor(sum(row)) if its else 0.0 for its in row] for row in kept]


def total_variation(logp: float, rollout_logp: float) -> float:
    """arXiv 2602.04879 eq 13, half the sum of both differences."""
    pi, mu = math.exp(logp), math.exp(rollout_logp)
    return 0.5 * (abs(pi - mu) + abs((1 - pi) - (1 - mu)))


def binary_kl(logp: float, rollout_logp: float) -> float:
    """arXiv 2602.04879 eq 14, for probabilities that are neither zero nor one."""
    pi, mu = math.exp(logp), math.exp(rollout_logp)
    return mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))


def may_move(logp: float, rollout_logp: float, advantage: float, *, distance: float, threshold: float) -> bool:
    """arXiv 2602.04879 eq 12."""
    further = (advantage > 0 and logp > rollout_logp) or (advantage < 0 and logp < rollout_logp)
    return not (further and distance > threshold)


def second_moment_mask(differences: list[float], *, threshold: float) -> list[float]:
    """AReaL's form: while the mean square of those kept is not below the threshold, drop the largest; one always stays."""
    kept = list(range(len(differences)))
    while len(kept) > 1 and sum(differences[t] ** 2 for t in kept) / len(kept) >= threshold:
        kept.remove(max(kept, key=lambda t: abs(differences[t])))
    return [float(t in kept) for t in range(len(differences))]


def self_normalised(corrections: list[float], weights: list[float]) -> list[float]:
    """Each over the weighted mean of all."""
    mean = sum(w * c for w, c in zip(weights, corrections, strict=True)) / sum(weights) if sum(weights) else 0.0
    return [c / mean if mean else 0.0 for c in corrections]


def group_figures(scores: list[float], group: list[int], live: list[bool]) -> dict[str, int]:
    """Groups with a live row, those of one such row, and those of several with one score."""
    members = {own: [s for s, g, its in zip(scores, group, live, strict=True) if its and g == own] for own in set(group)}
    sizes = {own: len(its) for own, its in members.items() if its}
    equal = [own for own, size in sizes.items() if size > 1 and len(set(members[own])) == 1]
    return {"groups": len(sizes), "groups_of_one": sum(size == 1 for size in sizes.values()), "groups_of_equals": len(equal)}
