"""Advantages per row from the other samples of its prompt, beyond the plain mean: leave-one-out, greedy, by length, pass@k, MaxRL.

N rows, P prompts; scores in units of reward. Groups are told by id, never by position, and may differ in size. Rows that
are not `live` (they have no action token) enter no baseline, whatever their score, and get zero. A group of one live row,
or of equal scores, gets exactly zero: there is nothing to compare (`greedy_centred` alone compares with another sample).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.advantages import group_centred, group_index
from hone.algos.batch import rows_of_tokens
from hone.algos.checks import MEND_REWARDS, checked, require_finite
from hone.algos.masking import upcast


@checked
@torch.no_grad()
def action_counts(action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"]) -> Int[Tensor, " N"]:
    """Action tokens of each row: the length of what the policy wrote, without the prompt's and the environment's tokens."""
    return torch.bincount(rows_of_tokens(cu_seqlens)[action_mask], minlength=cu_seqlens.numel() - 1)


@checked
@torch.no_grad()
def group_figures(scores: Float[Tensor, " N"], group: Int[Tensor, " N"], live: Bool[Tensor, " N"]) -> dict[str, Float[Tensor, ""]]:
    """Counts of groups with a live row: "groups", "groups_of_one" and "groups_of_equals" (of two rows or more, all scores equal).

    The latter two teach a group baseline nothing: their advantages are zero.
    """
    index, sizes = _live_groups(group, live)
    centred = group_centred(scores[live].double(), index)
    varied = torch.zeros_like(sizes).index_add_(0, index, (centred != 0).long()) > 0
    alone = sizes == 1
    counts = {"groups": sizes > 0, "groups_of_one": alone, "groups_of_equals": ~varied & ~alone}
    return {name: count.sum().float() for name, count in counts.items()}


@checked
@torch.no_grad()
def leave_one_out(scores: Float[Tensor, " N"], group: Int[Tensor, " N"], live: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """RLOO: A_i = r_i - mean of the group's other rows = n / (n - 1) (r_i - mean), n live rows in the group.

    Reference: arXiv 2402.14740. A group of one gets zero, not its raw score.
    """
    index, sizes = _live_groups(group, live)
    size = sizes[index].double()
    return _onto_rows(size / (size - 1).clamp(min=1) * group_centred(scores[live].double(), index), live, like=scores)


@checked
@torch.no_grad()
def length_weighted_centred(scores: Float[Tensor, " N"], group: Int[Tensor, " N"], lengths: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """OPO: A_i = r_i - b with b = sum_j l_j r_j / sum_j l_j over the group, l the action tokens [tokens] of a row.

    A row of length zero is not live. The baseline of least variance if a row's squared gradient grows with its length.
    Reference: arXiv 2505.23585.
    """
    live = lengths > 0
    index, sizes = _live_groups(group, live)
    length = lengths[live].double()
    # From the centred scores, so that equal ones give exact zeros.
    centred = group_centred(scores[live].double(), index)
    weighted = torch.zeros(sizes.numel(), dtype=torch.float64, device=scores.device).index_add_(0, index, length * centred)
    total = torch.zeros_like(weighted).index_add_(0, index, length)
    return _onto_rows(centred - (weighted / total)[index], live, like=scores)


@checked
@torch.no_grad()
def max_rl(scores: Float[Tensor, " N"], group: Int[Tensor, " N"], live: Bool[Tensor, " N"], *, eps: float) -> Float[Tensor, " N"]:
    """MaxRL: A_i = (r_i - mean) / (mean + eps) within the group: rare successes count as they do in the likelihood of success.

    Its expectation climbs the series of log p = -sum_k (1 - p)^k / k truncated at n - 1 terms, n the rows of the group.

    Reference: arXiv 2602.02710. Raises ValueError for a negative score: a negative mean would turn every sign.
    """
    own = scores[live].double()
    if bool((own < 0).any()):
        raise ValueError(f"scores go down to {float(own.min())}; MaxRL needs them at least 0, so shift them or choose another estimator")
    index, sizes = _live_groups(group, live)
    mean = torch.zeros(sizes.numel(), dtype=torch.float64, device=scores.device).index_add_(0, index, own) / sizes
    centred = group_centred(own, index)
    # A group that never succeeds is zero for eps = 0 too.
    return _onto_rows(torch.where(centred == 0, 0.0, centred / (mean[index] + eps)), live, like=scores)


@checked
@torch.no_grad()
def pass_at_k(correct: Int[Tensor, " P"], samples: Int[Tensor, " P"], *, k: int) -> Float[Tensor, " P"]:
    """Rho = 1 - C(n - c, k) / C(n, k): the chance that k of n samples, drawn without replacement, hold one of the c correct.

    Zero for c = 0, whatever n. Reference: arXiv 2107.03374. Raises ValueError for k below 1, and for a prompt with more
    correct samples than samples, or fewer than none.
    """
    if k < 1:
        raise ValueError(f"k is {k}; pass@k needs at least 1 sample")
    impossible = (correct < 0) | (correct > samples)
    if bool(impossible.any()):
        first = int(impossible.nonzero()[0, 0])
        raise ValueError(
            f"correct holds {int(correct[first])} of {int(samples[first])} samples at index {first}; "
            "give, for each prompt, how many of its samples are correct"
        )
    failing = _ratio_of_binomials(samples - correct, samples, k=k)
    return torch.where(correct > 0, 1 - failing, 0.0)


@checked
@torch.no_grad()
def pass_at_k_advantages(
    scores: Float[Tensor, " N"], group: Int[Tensor, " N"], live: Bool[Tensor, " N"], *, k: int, eps: float
) -> Float[Tensor, " N"]:
    """Pass@k training, analytic: the expected advantage of a row over every set of k rows of its group that holds it.

    With n rows, c of them correct, rho = 1 - C(n - c, k) / C(n, k) and sigma = sqrt(rho (1 - rho)): a correct row gets
    (1 - rho) / (sigma + eps), a wrong one (1 - rho - C(n - c - 1, k - 1) / C(n - 1, k - 1)) / (sigma + eps). Exactly zero
    where c = 0 or rho = 1, and so in a group smaller than k.
    Times sigma, its expected gradient is (1 / k - 1 / n) that of pass@k. At k = 1 this is (r - mean) / std with the population's std.
    Reference: arXiv 2508.10751 eq 11, 12, 14, 15. Raises ValueError for k below 1 and for a live score that is neither 0 nor 1.
    """
    own = scores[live].double()
    odd = own[(own != 0) & (own != 1)]
    if odd.numel():
        raise ValueError(f"scores hold {float(odd[0])}; pass@k needs every one to be 0 (wrong) or 1 (correct), so apply a threshold")
    index, sizes = _live_groups(group, live)
    correct = torch.zeros_like(sizes).index_add_(0, index, own.long())
    rho = pass_at_k(correct, sizes, k=k)
    deviation = (rho * (1 - rho)).sqrt() + eps
    if_correct = (1 - rho) / deviation
    if_wrong = (1 - rho - _ratio_of_binomials(sizes - correct - 1, sizes - 1, k=k - 1)) / deviation
    advantages = torch.where(own == 1, if_correct[index], if_wrong[index])
    # Nothing to learn from gives exact zeros for eps = 0 too, where sigma is 0 / 0.
    mixed = (correct > 0) & (rho < 1)
    return _onto_rows(torch.where(mixed[index], advantages, 0.0), live, like=scores)


@checked
@torch.no_grad()
def greedy_baselines(group: Int[Tensor, " N"], greedy_scores: Float[Tensor, " P"], greedy_group: Int[Tensor, " P"]) -> Float[Tensor, " N"]:
    """For every row the score of its prompt's greedy sample, found by group id.

    Raises ValueError if a prompt has no greedy sample, or two.
    """
    ids, order = greedy_group.sort()
    twice = ids[1:][ids[1:] == ids[:-1]]
    if twice.numel():
        raise ValueError(f"greedy_group holds {int(twice[0])} twice; ReMax compares with one greedy sample per prompt")
    missing = group[~torch.isin(group, ids)]
    if missing.numel():
        raise ValueError(f"group {int(missing[0])} has no greedy sample; score one response per prompt at temperature 0 for ReMax")
    return greedy_scores[order][torch.searchsorted(ids, group)]


@checked
@torch.no_grad()
def greedy_centred(
    scores: Float[Tensor, " N"],
    group: Int[Tensor, " N"],
    live: Bool[Tensor, " N"],
    greedy_scores: Float[Tensor, " P"],
    greedy_group: Int[Tensor, " P"],
) -> Float[Tensor, " N"]:
    """ReMax: A_i = r_i - r of the prompt's greedy sample; needs no second sample, and is zero for a row that is the greedy one.

    Reference: arXiv 2310.10505. Raises ValueError as `greedy_baselines` does, and for a live score that is not finite.
    """
    require_finite("greedy_centred", "scores", scores, live, remedy=MEND_REWARDS)
    baselines = greedy_baselines(group[live], greedy_scores, greedy_group)
    return _onto_rows(scores[live].double() - baselines.double(), live, like=scores)


def _live_groups(group: Int[Tensor, " N"], live: Bool[Tensor, " N"]) -> tuple[Int[Tensor, " L"], Int[Tensor, " G"]]:
    """(index of each live row's group, renumbered from zero; live rows of each group)."""
    index = group_index(group[live])
    return index, torch.bincount(index)


def _onto_rows(per_live: Float[Tensor, " L"], live: Bool[Tensor, " N"], *, like: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Live rows back in their places, zero elsewhere, in the precision of `like` (at least fp32)."""
    dtype = upcast(like).dtype
    return torch.zeros(live.shape, dtype=dtype, device=like.device).masked_scatter_(live, per_live.to(dtype))


def _ratio_of_binomials(few: Int[Tensor, " P"], many: Int[Tensor, " P"], *, k: int) -> Float[Tensor, " P"]:
    """C(few, k) / C(many, k) for few <= many, as prod_j (few - j) / (many - j); zero where few < k."""
    drawn = torch.arange(k, device=few.device)
    factors = (few[:, None] - drawn).double() / (many[:, None] - drawn).clamp(min=1)
    return torch.where(few >= k, factors.prod(dim=1), 0.0)
