"""Rewards before any baseline: clipped, normalised by what was seen so far, less for running long, and which groups to keep.

T packed tokens, N rows; a score is the sum of a row's rewards. Work on scores, then `rescored` puts them back as rewards.
A NaN that is only moved or scaled stays one, for `judge` to name; where it would be decided or remembered by, it is named here.
Filters look at the scores as they were given, before any of this: a penalty for length is no sign of a mixed group.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.advantages import group_index
from hone.algos.batch import rows_of_tokens
from hone.algos.checks import checked
from hone.algos.masking import on_mask, upcast


@checked
@torch.no_grad()
def clip_scores(scores: Float[Tensor, " N"], *, low: float, high: float) -> Float[Tensor, " N"]:
    """min(max(r, low), high). Raises ValueError unless low < high."""
    if not low < high:
        raise ValueError(f"scores cannot be clipped to [{low}, {high}]; the lower bound must be below the upper")
    return upcast(scores).clamp(low, high)


@checked
@torch.no_grad()
def overlong_penalty(lengths: Int[Tensor, " N"], *, max_length: int, buffer: int, factor: float = 1.0) -> Float[Tensor, " N"]:
    """What a long row loses: 0 up to L - c action tokens, factor (L - c - l) / c up to L, -factor beyond; add it to the score.

    l is the length of what the policy wrote (`action_counts`), L max_length, c buffer, all [tokens].
    Reference: arXiv 2503.14476 eq 13. Raises ValueError unless 1 <= buffer <= max_length.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"the overlong buffer is {buffer} tokens of {max_length}; it must be at least 1 and at most the longest response")
    return -factor * ((lengths.double() - (max_length - buffer)) / buffer).clamp(0, 1)


@checked
@torch.no_grad()
def stop_properly(scores: Float[Tensor, " N"], truncated: Bool[Tensor, " N"], *, coef: float) -> Float[Tensor, " N"]:
    """Scores of rows that were cut off: min(r, coef r) for coef in [0, 1], min(r, coef) for coef below 0; others stay.

    Being cut off never raises a score: OpenRLHF's r coef would make a score of -1 better. Raises ValueError for coef above 1.
    """
    if not coef <= 1:
        raise ValueError(f"stop-properly coefficient is {coef}; use [0, 1] to scale the scores of rows cut off, below 0 to replace them")
    scores = upcast(scores)
    lowered = coef * scores if coef >= 0 else torch.full_like(scores, coef)
    return torch.where(truncated, torch.minimum(scores, lowered), scores)


@checked
@torch.no_grad()
def rescored(
    rewards: Float[Tensor, " T"], scores: Float[Tensor, " N"], action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"]
) -> Float[Tensor, " T"]:
    """The rewards, with the one on each row's last action token changed so that the row sums to its score; zero off the mask.

    Rewards of earlier turns stay. A row without action tokens has nowhere to put a score, and keeps none.
    """
    row = rows_of_tokens(cu_seqlens)
    last = torch.zeros_like(action_mask)
    places, own = action_mask.nonzero().flatten(), row[action_mask]
    last[places[torch.cat([own[1:] != own[:-1], own.new_ones(min(1, own.numel()), dtype=torch.bool)])]] = True
    earlier = on_mask(rewards, action_mask & ~last).double()
    sums = torch.zeros(scores.shape, dtype=torch.float64, device=rewards.device).index_add_(0, row, earlier)
    return torch.where(last, (scores.double() - sums)[row], earlier).to(upcast(rewards).dtype)


@dataclass(frozen=True, kw_only=True)
class RunningMoments:
    """Count, mean and summed squared distance from it of all scores seen: three numbers to save, and to start from again."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the scores seen (dividing by their count); zero before the second."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


@checked
@torch.no_grad()
def update_moments(moments: RunningMoments, scores: Float[Tensor, " N"]) -> RunningMoments:
    """The moments with these scores seen too, the same for any cut into batches (up to rounding).

    Equal scores leave a deviation of exactly zero. Reference: Chan, Golub and LeVeque 1979, pairwise updating.
    Raises ValueError for a score that is not finite: it would stay in the state for ever.
    """
    broken = scores[~torch.isfinite(scores)]
    if broken.numel():
        raise ValueError(f"scores: {broken.numel()} of {scores.numel()} are not finite, the first {float(broken[0])}; leave those rows out")
    if scores.numel() == 0:
        return moments
    new = scores.double()
    mean = float(new[0]) if bool(new.max() == new.min()) else float(new.mean())
    squares = float((new - mean).square().sum())
    count, apart = moments.count + new.numel(), mean - moments.mean
    if moments.count == 0:
        return RunningMoments(count=count, mean=mean, squares=squares)
    return RunningMoments(
        count=count,
        mean=moments.mean + apart * new.numel() / count,
        squares=moments.squares + squares + apart * apart * moments.count * new.numel() / count,
    )


@checked
@torch.no_grad()
def normalise_scores(scores: Float[Tensor, " N"], moments: RunningMoments, *, eps: float) -> Float[Tensor, " N"]:
    """(r - mean) / (std + eps) by what was seen; only centred while everything seen was equal, unchanged before anything was."""
    scale = moments.std + eps if moments.std > 0 else 1.0
    return ((scores.double() - moments.mean) / scale).to(upcast(scores).dtype)


@checked
@torch.no_grad()
def varied_groups(
    scores: Float[Tensor, " N"], group: Int[Tensor, " N"], live: Bool[Tensor, " N"], *, min_std: float = 0.0
) -> Bool[Tensor, " N"]:
    """True on the rows of groups whose scores have a standard deviation (population's) above `min_std`.

    At 0 exactly the groups of equal scores, and of one live row, are dropped: they teach a group baseline nothing. Rows that
    are not live have no say, and share their group's lot. Raises ValueError for a live score that is not finite.
    """
    index, sizes, mean = _group_means(scores, group, live)
    own = scores[live].double()
    squares = torch.zeros_like(mean).index_add_(0, index[live], (own - mean[index[live]]).square())
    return ((squares / sizes.clamp(min=1)).sqrt() > min_std)[index]


@checked
@torch.no_grad()
def groups_in_range(
    scores: Float[Tensor, " N"], group: Int[Tensor, " N"], live: Bool[Tensor, " N"], *, low: float, high: float
) -> Bool[Tensor, " N"]:
    """True on the rows of groups with low < mean score < high; with scores of 0 and 1, (0, 1) keeps 0 < correct < n.

    Groups without a live row are dropped. Reference: arXiv 2503.14476 eq 11. Raises ValueError unless low < high, and for a
    live score that is not finite.
    """
    if not low < high:
        raise ValueError(f"no mean score lies between {low} and {high}; the lower bound must be below the upper")
    index, sizes, mean = _group_means(scores, group, live)
    return ((sizes > 0) & (mean > low) & (mean < high))[index]


def _group_means(
    scores: Float[Tensor, " N"], group: Int[Tensor, " N"], live: Bool[Tensor, " N"]
) -> tuple[Int[Tensor, " N"], Int[Tensor, " G"], Float[Tensor, " G"]]:
    """(index of each row's group, live rows of each group, their mean score: exactly the score where all are equal)."""
    broken = (~torch.isfinite(scores) & live).nonzero().flatten()
    if broken.numel():
        row = int(broken[0])
        # A comparison with NaN is false, and would drop the group without a word.
        raise ValueError(f"scores: that of row {row} is {float(scores[row])}; give every row with action tokens a finite score")
    index = group_index(group)
    sizes = torch.bincount(index[live], minlength=torch.bincount(index).numel())
    own = scores[live].double()
    total = torch.zeros(sizes.numel(), dtype=torch.float64, device=scores.device).index_add_(0, index[live], own)
    lowest = torch.zeros_like(total).scatter_reduce_(0, index[live], own, "amin", include_self=False)
    highest = torch.zeros_like(total).scatter_reduce_(0, index[live], own, "amax", include_self=False)
    # Three copies of 0.1 have a mean above 0.1, which would pass for a deviation, and for a mean inside an open range.
    return index, sizes, (total / sizes.clamp(min=1)).clamp(lowest, highest)
