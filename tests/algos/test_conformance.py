"""The conformance kit: it passes what is right and catches faults of the field's history, each by the law meant for it.

Each fault stands for a class of reports (the pains and section 0.2 of the field survey), in a few lines of the usual padded style.
"""

from functools import partial

import pytest
import torch

from hone.algos.advantages import discounted_returns, group_normalised, whiten
from hone.algos.conformance import LAWS, LawBroken, example, from_padded
from hone.algos.conformance.plugin import NEEDS_A_CASE
from hone.algos.kl import k1, k2, k3
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.reduce import Reduction

EVERYTHING = [(kind, name) for kind, laws in LAWS.items() for name in laws]


def obeys(kind, name, function):
    """Whether the function passes the law; a crash in it is no verdict."""
    arguments = [function, example()] if kind in NEEDS_A_CASE else [function]
    try:
        LAWS[kind][name](*arguments)
    except LawBroken:
        return False
    return True


def ours(case):
    return clipped_surrogate(case.logp, case.old_logp, case.advantages, case.weights, case.action_mask, clip_low=0.2, clip_high=0.2).total


def padded_ppo(logp, old_logp, advantages, action_mask, step_tokens, **_):
    """PPO as it is usually written, right in every respect."""
    keep = action_mask & (advantages != 0)
    ratio = torch.exp(torch.where(keep, logp - old_logp, 0.0).clamp(-80, 80))
    advantages = torch.where(action_mask, advantages, 0.0)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -torch.where(keep, surrogate, 0.0).sum() / step_tokens


def right_logp(logits, tokens, temperature):
    logp = (logits / temperature).log_softmax(-1)
    return torch.cat([torch.zeros(1, dtype=logits.dtype), logp[:-1].gather(-1, tokens[1:, None])[:, 0]])


def reverse_kl_term(logp, ref_logp):
    carrier = k2(logp, ref_logp)
    return k3(logp, ref_logp).detach() + carrier - carrier.detach()


def summed(loss):
    """An engine that sums the shares, as ours does."""
    return lambda ranks: torch.stack([loss(part) for rank in ranks for part in rank]).sum()


RIGHT = {
    "loss": {"packed": ours, "padded": from_padded(padded_ppo), "padded on the left": from_padded(padded_ppo, left=True)},
    "clip": {"packed": ours, "padded": from_padded(padded_ppo)},
    "step": {"summed": summed(ours)},
    "kl": {"k2": k2, "straight through": reverse_kl_term},
    "logp": {"gathered": right_logp},
    "whitening": {"whiten": whiten},
    "group": {"normalised": partial(group_normalised, eps=1e-6)},
    "return": {"discounted": partial(discounted_returns, gamma=0.9)},
}


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_what_is_right_passes_every_law(kind, name):
    for title, function in RIGHT[kind].items():
        assert obeys(kind, name, function), title


# ---- faults: losses on padded tensors -------------------------------------------------------------------------------


def _surrogate(logp, old_logp, advantages):
    ratio = torch.exp(logp - old_logp)
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def _zeroed(mask, *tensors):
    return [torch.where(mask, tensor, 0.0) for tensor in tensors]


def mean_of_the_micro_batch(logp, old_logp, advantages, action_mask, **_):  # pain 1 (TRL#3021)
    per_token = _surrogate(*_zeroed(action_mask, logp, old_logp, advantages))
    return (per_token * action_mask).sum() / action_mask.sum().clamp(min=1)


def padding_in_the_denominator(logp, old_logp, advantages, action_mask, step_rows, **_):  # mean(-1) over padded width
    per_token = _surrogate(*_zeroed(action_mask, logp, old_logp, advantages))
    return torch.where(action_mask, per_token, 0.0).mean(-1).sum() / step_rows


def mask_shifted_by_one(logp, old_logp, advantages, action_mask, step_tokens, **_):  # OpenRLHF's KD, v0.9
    per_token = _surrogate(*(tensor.nan_to_num(0.0, 0.0, 0.0) for tensor in (logp, old_logp, advantages)))
    return (per_token[:, 1:] * action_mask[:, :-1]).sum() / step_tokens


def times_the_mask(logp, old_logp, advantages, action_mask, step_tokens, **_):  # pain 3, algorithms.md 0.2: NaN * 0
    return (_surrogate(logp, old_logp, advantages) * action_mask).sum() / step_tokens


def where_on_the_output_alone(logp, old_logp, advantages, action_mask, step_tokens, **_):  # AReaL functional.py:452
    return torch.where(action_mask, _surrogate(logp, old_logp, advantages), 0.0).sum() / step_tokens


def nan_to_num_hides_it(logp, old_logp, advantages, action_mask, step_tokens, **_):  # Molt; garbage that is finite gets in
    per_token = _surrogate(*(tensor.nan_to_num(0.0, 1.0, -1.0).clamp(-10, 10) for tensor in (logp, old_logp, advantages)))
    return per_token.sum() / step_tokens


def advantages_recentred_here(logp, old_logp, advantages, action_mask, step_tokens, **_):  # statistics of the micro-batch
    logp, old_logp, advantages = _zeroed(action_mask, logp, old_logp, advantages)
    centred = advantages - advantages.sum() / action_mask.sum().clamp(min=1)
    return torch.where(action_mask, _surrogate(logp, old_logp, centred), 0.0).sum() / step_tokens


def overflow_behind_the_clip(logp, old_logp, advantages, action_mask, step_tokens, **_):  # 0.2: gradient NaN at +100 nats
    return (_surrogate(*_zeroed(action_mask, logp, old_logp, advantages)) * action_mask).sum() / step_tokens


def clamped_ratio_by_row_position(logp, old_logp, advantages, action_mask, step_tokens, **_):  # the first row as a baseline
    logp, old_logp, advantages = _zeroed(action_mask, logp, old_logp, advantages)
    scale = torch.ones_like(logp)
    scale[0] = 0.5
    return (scale * torch.where(action_mask, _surrogate(logp, old_logp, advantages), 0.0)).sum() / step_tokens


def ratio_against_the_reference(logp, ref_logp, advantages, action_mask, step_tokens, **_):  # never one on policy
    logp, ref_logp, advantages = _zeroed(action_mask, logp, ref_logp, advantages)
    return (_surrogate(logp, ref_logp, advantages) * action_mask).sum() / step_tokens


def half_precision_difference(logp, old_logp, advantages, action_mask, step_tokens, **_):  # pain 5, 0.2: 1/16 nat near -8
    logp, old_logp, advantages = _zeroed(action_mask, logp, old_logp, advantages)
    ratio = torch.exp(logp - old_logp.bfloat16())
    return -(ratio * advantages * action_mask).sum() / step_tokens


def sequence_ratio_over_padding(logp, old_logp, advantages, action_mask, step_tokens, **_):  # GSPO's mean over the width
    logp, old_logp, advantages = _zeroed(action_mask, logp, old_logp, advantages)
    ratio = torch.exp((logp - old_logp).mean(-1, keepdim=True))
    return -(ratio * advantages * action_mask).sum() / step_tokens


# ---- faults: engines, KL terms, log-probabilities, whitening, groups, returns ---------------------------------------


def _mean_loss(case):
    return from_padded(mean_of_the_micro_batch)(case)


def mean_of_micro_batch_means(ranks):  # pain 1: loss / gradient_accumulation_steps
    return torch.stack([torch.stack([_mean_loss(part) for part in rank]).mean() for rank in ranks]).mean()


def mean_over_ranks_of_a_global_share(ranks):  # pain 1: gradients averaged where they had to be summed
    return torch.stack([torch.stack([ours(part) for part in rank]).sum() for rank in ranks]).mean()


def shares_divided_by_accumulation(ranks):  # pain 1: already normalised, divided once more
    return torch.stack([ours(part) / len(rank) for rank in ranks for part in rank]).sum()


def rank_tokens_for_step_tokens(ranks):  # pain 1: the count of this rank, not of the step
    def local(rank):
        count = sum(int(part.action_mask.sum()) for part in rank)
        return torch.stack([ours(part) * part.step_tokens for part in rank]).sum() / max(count, 1)

    return torch.stack([local(rank) for rank in ranks]).mean()


def clamped_k3(logp, ref_logp):  # verl: no gradient where the penalty is largest
    return torch.clamp(k3(logp, ref_logp), -10, 10)


def detached_weight(logp, ref_logp):  # algorithms.md 4.1: a detached ratio on k3 is not exact
    return torch.exp(logp - logp.detach()).detach() * k3(logp, ref_logp)


def k3_overflows(logp, ref_logp):
    return torch.exp((ref_logp - logp) * 20) - 1 + (logp - ref_logp) * 20


def no_temperature(logits, tokens, temperature):  # pain 7
    return right_logp(logits, tokens, 1.0)


def temperature_the_wrong_way(logits, tokens, temperature):
    return right_logp(logits * temperature, tokens, 1.0)


def temperature_after_the_softmax(logits, tokens, temperature):
    return right_logp(logits, tokens, 1.0) / temperature


def unshifted(logits, tokens, temperature):  # OpenRLHF's KD: position t scored by its own logits
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def whitening_over_the_padding(values, mask):  # pain 3: zeros of the padding counted in
    values = torch.where(mask, values, 0.0)
    return (values - values.mean()) / (values.std() + 1e-8)


def whitening_by_products(values, mask):  # NaN * 0 in the sums
    count = mask.sum()
    mean = (values * mask).sum() / count
    return (values - mean) * torch.rsqrt(((values - mean).square() * mask).sum() / count + 1e-8)


def whitening_by_difference_of_squares(values, mask):  # NeMo utils.py:104: E[x^2] - mean^2 in fp32
    live = torch.where(mask, values, 0.0)
    mean, squares = live.sum() / mask.sum(), live.square().sum() / mask.sum()
    return (values - mean) / (squares - mean.square()).clamp(min=0).sqrt().nan_to_num(0.0).clamp(min=1e-4)


def epsilon_for_a_guard(values, mask):  # 0.2: seven copies of .1 become -.82
    live = values[mask]
    return torch.zeros_like(values).masked_scatter(mask, (live - live.mean()) / (live.std() + 1e-9))


def _grouped(scores, group, normalise):
    advantages = torch.zeros_like(scores)
    for own in group.unique():
        advantages[group == own] = normalise(scores[group == own])
    return advantages


def group_epsilon_for_a_guard(scores, group):  # Molt 1e-9, ROLL 1e-6
    return _grouped(scores, group, lambda live: (live - live.mean()) / (live.std() + 1e-9))


def group_by_position(scores, group):  # reshape(-1, n) after a shuffle or a dropped sample
    size = 4 if scores.numel() % 4 == 0 else scores.numel()
    rows = scores.reshape(-1, size)
    centred = rows - rows.mean(1, keepdim=True)
    return torch.where(centred == 0, 0.0, centred / (rows.std(1, keepdim=True) + 1e-6)).reshape(-1)


def biased_std(scores, group):  # population for Bessel's
    return _grouped(scores, group, lambda live: group_normalised(live, torch.zeros_like(live, dtype=torch.long), eps=1e-6) * _bias(live))


def _bias(live):
    return (live.numel() / (live.numel() - 1)) ** 0.5


def std_by_difference_of_squares(scores, group):
    def normalise(live):
        variance = live.square().mean() - live.mean().square()
        return (live - live.mean()) / (variance.clamp(min=0).sqrt() * _bias(live) + 1e-6)

    return _grouped(scores, group, normalise)


def returns_across_rows(rewards, mask, cu_seqlens):  # pain 13: one recursion through the packed tensor
    everything = torch.tensor([0, mask.numel()], dtype=torch.int32)
    return discounted_returns(rewards, mask, everything, gamma=0.9)


def returns_of_every_token(rewards, mask, cu_seqlens):  # pain 3: rewards off the mask flow back
    return discounted_returns(rewards.nan_to_num(), torch.ones_like(mask), cu_seqlens, gamma=0.9)


def raw_score_of_a_group_of_one(scores, group):  # decision D1 of the survey; verl's loop
    alone = torch.bincount(group)[group] == 1
    return torch.where(alone, scores, group_normalised(scores, group, eps=1e-6))


def discounted_by_every_token(rewards, mask, cu_seqlens):  # pain 3: the environment's tokens are steps too
    live = torch.where(mask, rewards, 0.0)
    return discounted_returns(live, torch.ones_like(mask), cu_seqlens, gamma=0.9)


def optimistic(logp, old_logp, advantages, action_mask, step_tokens, **_):  # max in the place of min
    keep = action_mask & (advantages != 0)
    ratio = torch.exp(torch.where(keep, logp - old_logp, 0.0).clamp(-80, 80))
    advantages = torch.where(action_mask, advantages, 0.0)
    return -torch.where(keep, torch.maximum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages), 0.0).sum() / step_tokens


def clipped_on_both_sides(logp, old_logp, advantages, action_mask, step_tokens, **_):  # the clip alone, without the minimum
    keep = action_mask & (advantages != 0)
    ratio = torch.exp(torch.where(keep, logp - old_logp, 0.0).clamp(-80, 80)).clamp(0.8, 1.2)
    return -torch.where(keep, ratio * torch.where(action_mask, advantages, 0.0), 0.0).sum() / step_tokens


FAULTS = {
    raw_score_of_a_group_of_one: ("group", "group of one"),
    discounted_by_every_token: ("return", "returns cross gaps"),
    optimistic: ("clip", "pessimism"),
    clipped_on_both_sides: ("clip", "pessimism"),
    mean_of_the_micro_batch: ("loss", "micro-batch additivity"),
    advantages_recentred_here: ("loss", "micro-batch additivity"),
    padding_in_the_denominator: ("loss", "packing is padding"),
    sequence_ratio_over_padding: ("loss", "packing is padding"),
    mask_shifted_by_one: ("loss", "mask alignment"),
    times_the_mask: ("loss", "poison off the mask"),
    nan_to_num_hides_it: ("loss", "poison off the mask"),
    where_on_the_output_alone: ("loss", "zero gradient off the mask"),
    overflow_behind_the_clip: ("loss", "finite on extreme ratios"),
    clamped_ratio_by_row_position: ("loss", "row order"),
    ratio_against_the_reference: ("loss", "on-policy gradient"),
    half_precision_difference: ("loss", "on-policy gradient"),
    mean_of_micro_batch_means: ("step", "accumulation and ranks"),
    mean_over_ranks_of_a_global_share: ("step", "accumulation and ranks"),
    shares_divided_by_accumulation: ("step", "accumulation and ranks"),
    rank_tokens_for_step_tokens: ("step", "accumulation and ranks"),
    k3: ("kl", "KL gradient"),  # pain 2: k3 as a loss, differentiated as written
    k1: ("kl", "KL gradient"),  # pain 2: no gradient at all
    detached_weight: ("kl", "KL gradient"),
    clamped_k3: ("kl", "KL pull"),
    k3_overflows: ("kl", "KL pull"),
    no_temperature: ("logp", "temperature"),
    temperature_the_wrong_way: ("logp", "temperature"),
    temperature_after_the_softmax: ("logp", "temperature"),
    unshifted: ("logp", "logp alignment"),
    whitening_over_the_padding: ("whitening", "whitening moments"),
    whitening_by_products: ("whitening", "whitening leak"),
    whitening_by_difference_of_squares: ("whitening", "whitening moments"),
    epsilon_for_a_guard: ("whitening", "whitening of equals"),
    group_epsilon_for_a_guard: ("group", "group of equals"),
    group_by_position: ("group", "group by id"),
    biased_std: ("group", "Bessel"),
    std_by_difference_of_squares: ("group", "group shift"),
    returns_across_rows: ("return", "returns stay in their row"),
    returns_of_every_token: ("return", "returns ignore other tokens"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_kit_catches(fault):
    kind, name = FAULTS[fault]
    assert not obeys(kind, name, from_padded(fault) if kind in ("loss", "clip") else fault)


def test_every_law_catches_something():
    assert set(FAULTS.values()) == set(EVERYTHING)


def test_the_law_says_what_it_saw():
    with pytest.raises(LawBroken, match="the loss of one micro-batch became another when its rows were dealt out as"):
        LAWS["loss"]["micro-batch additivity"](from_padded(mean_of_the_micro_batch), example())
    with pytest.raises(LawBroken, match=r"the loss has shape \(28,\); it must be a scalar"):
        LAWS["loss"]["row order"](lambda case: case.logp, example())


@pytest.mark.parametrize("reduction", [Reduction(), Reduction(over="sequence"), Reduction(over="constant", length=7)])
def test_the_example_follows_the_reduction(reduction):
    case = example(reduction=reduction)
    for law in LAWS["loss"].values():
        law(ours, case)
    assert case.step_tokens == case.action_mask.sum() and case.step_rows == 4
    assert case.widened(left=2, right=1).select([4, 0]).logp.numel() == 11 + 6 + 2 * 3
