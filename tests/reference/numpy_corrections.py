"""Slow references of what is decided over a whole rollout: M2PO's mask, self-normalised weights, and counts of groups."""


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
