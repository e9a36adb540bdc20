"""Slow references for group baselines, credit per turn, lambdas and running moments: one Python loop per index, by definition.

Rows are lists: `scores`, `group` and `live` have an entry per row; a row of tokens is a list of (reward, live) or of turns.
"""

import itertools

import numpy as np


def per_group(scores, group, live, advantage):
    """advantage(own score, scores of its group's live rows, own position among them), zero for rows that are not live."""
    result = []
    for row, (score, own) in enumerate(zip(scores, group, strict=True)):
        members = [other for other in range(len(scores)) if live[other] and group[other] == own]
        result.append(advantage(score, [scores[other] for other in members], members.index(row)) if live[row] else 0.0)
    return result


def leave_one_out(score, members, position):
    """arXiv 2402.14740: the mean of the others."""
    others = members[:position] + members[position + 1 :]
    return score - sum(others) / len(others) if others else 0.0


def length_weighted(scores, group, lengths):
    """arXiv 2505.23585."""
    result = []
    for score, own, length in zip(scores, group, lengths, strict=True):
        members = [(s, k) for s, g, k in zip(scores, group, lengths, strict=True) if g == own and k > 0]
        total = sum(k for _, k in members)
        result.append(score - sum(s * k for s, k in members) / total if length else 0.0)
    return result


def max_rl(score, members, position, *, eps):
    """arXiv 2602.02710."""
    return 0.0 if len(set(members)) == 1 else (score - np.mean(members)) / (np.mean(members) + eps)


def pass_at_k(score, members, position, *, k, eps):
    """arXiv 2508.10751, without its algebra: the mean over every set of k rows that holds this one of (best - mean) / deviation."""
    best = [max(members[row] for row in rows) for rows in itertools.combinations(range(len(members)), k)]
    if not best or np.std(best) == 0:
        return 0.0
    others = [row for row in range(len(members)) if row != position]
    own = [max([score, *(members[row] for row in rows)]) for rows in itertools.combinations(others, k - 1)]
    return (np.mean(own) - np.mean(best)) / (np.std(best) + eps)


def turns_of(mask):
    """Lists of the positions of each unbroken run of live tokens."""
    runs, previous = [], None
    for position, live in enumerate(mask):
        if live:
            if previous != position - 1:
                runs.append([])
            runs[-1].append(position)
            previous = position
    return runs


def anchored(returns, cells, *, eps):
    """arXiv 2505.10978 eq 3 to 8 over a flat list of turns; eps None leaves the deviation out."""
    result = []
    for own, cell in zip(returns, cells, strict=True):
        members = np.array([other for other, its in zip(returns, cells, strict=True) if its == cell])
        if len(members) < 2 or (members == members[0]).all():
            result.append(0.0)
        else:
            result.append((own - members.mean()) / (1.0 if eps is None else members.std(ddof=1) + eps))
    return result


def moments(scores):
    """(mean, standard deviation) of everything at once."""
    return float(np.mean(scores)), float(np.std(scores))
