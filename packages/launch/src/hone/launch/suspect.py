"""What most likely sets engine and learner apart, told from one batch by rules that can be read here.

With p the learner's distribution at a token, an engine at temperature T / a (the learner's T) has log q = a log p + (a - 1) H_a(p), H_a
the Renyi entropy: within one context a straight line of slope a. One that draws from a part of p, of mass m, has log q = log p - log m:
no token is less likely than the learner says. Stale weights and another prompt have no such law and are told by where the gap stands.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.batch import Batch

LEADING = 8
"""Action tokens of a row that are looked up among the rows of its group: samples of one prompt soon part."""
EARLY = 4
"""First tokens of a response (of a turn), where another prompt shows most."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A cause by its name, and a sentence of what points to it and what to look at."""

    name: Literal["temperature", "truncation", "stale_weights", "prompt", "weights"]
    why: str


def suspect(batch: Batch, *, version: int, limit: float) -> Suspect:
    """The likeliest cause of the gap between `rollout_logp` and `old_logp` [nats]; the first rule that holds.

    1. temperature: samples with a context in common (else all tokens) lie on a line whose slope is not 1.
    2. truncation: at most 1 token in 100 is clearly less likely to the engine than to the learner.
    3. stale_weights: tokens older than `version`, the learner's, and none of `version` or those within `limit`.
    4. prompt: the first 4 tokens of responses are at least 3 times as far apart as those behind them.
    5. weights: none of these. Where no two samples share a context, a temperature is found only if contexts have similar entropies.
    """
    mask = batch.action_mask
    rollout, old = batch.rollout_logp[mask].double(), batch.require("old_logp")[mask].double()
    excess = rollout - old
    if wrong := int((~excess.isfinite()).sum()):
        return Suspect(name="weights", why=f"{wrong} tokens have log-probabilities that are no finite numbers: weights or number format")

    slope = _slope_within_contexts(batch, rollout, old)
    shared = slope is not None
    truncated = float((excess < -0.1 * excess.abs().mean()).double().mean()) <= 0.01
    if slope is None and not truncated:
        slope = _slope(old - old.mean(), rollout - rollout.mean(), left=0.5)
    if slope is not None:
        where = "of samples with a context in common" if shared else "of all tokens"
        return Suspect(
            name="temperature",
            why=f"the engine's log-probabilities {where} are {slope:.2f} times the learner's: it samples as at temperature "
            f"{batch.temperature / slope:.2f}, the learner recomputes at {batch.temperature:g}; look at the engine's own sampling "
            "settings, and at a scale of the logits that one of them leaves out",
        )
    if truncated:
        zeros = float((rollout == 0).double().mean())
        return Suspect(
            name="truncation",
            why=f"no token is clearly less likely to the engine than to the learner, and {zeros:.0%} are certain to it: it draws from a "
            "part of the distribution; look for top_p, top_k, min_p or a grammar among the engine's own settings (generation_config.json)",
        )
    lag = version - batch.version[mask]
    fresh = excess[lag == 0].abs()
    if bool((lag > 0).any()) and (fresh.numel() == 0 or float(fresh.mean()) <= limit):
        now = f"those that are not differ by {float(fresh.mean()):.3g} nats" if fresh.numel() else "there are no others"
        return Suspect(
            name="stale_weights",
            why=f"{float((lag > 0).double().mean()):.0%} of the tokens were sampled up to {int(lag.max())} policy versions ago, and {now}; "
            "lower train.async_queue_size, rollout.max_staleness or the learning rate",
        )
    early = _early(mask, batch.cu_seqlens)[mask]
    first, later = excess[early].abs(), excess[~early].abs()
    if later.numel() and float(first.mean()) >= 3 * float(later.mean()):
        return Suspect(
            name="prompt",
            why=f"the first {EARLY} tokens of responses differ by {float(first.mean()):.3g} nats, later ones by {float(later.mean()):.3g}: "
            "the engine reads another prompt than the learner; look at the chat template, a beginning-of-sequence token that stands "
            "there twice, and the prefix cache (vllm.enable_prefix_caching)",
        )
    return Suspect(
        name="weights",
        why="nothing points to truncation, age, prompt or temperature (which shows surely only where a prompt has several samples), so the "
        "weights or their number format; look at vllm.dtype, vllm.quantization and ds.param_dtype, and lower vllm.sync_tolerance, by which "
        "the canary judges every update",
    )


def _slope(old: Float[Tensor, " A"], rollout: Float[Tensor, " A"], *, left: float) -> float | None:
    """The slope of `rollout` on `old`, both centred, where it differs from 1 by more than 0.05, accounts for the gap but for the share
    `left` of its root mean square, and for most of `rollout` itself: what has nothing in common has a slope, too, near 0.
    """
    slope = (old * rollout).sum() / old.square().sum()
    rest = (rollout - slope * old).norm()
    fits = rest <= left * (rollout - old).norm() and rest <= 0.4 * rollout.norm() and (slope - 1).abs() > 0.05 and slope > 0
    return float(slope) if fits else None


def _slope_within_contexts(batch: Batch, rollout: Float[Tensor, " A"], old: Float[Tensor, " A"]) -> float | None:
    """The slope over tokens that follow one and the same context, each context centred; None with fewer than 4 to compare, or no line."""
    place = batch.action_mask.cumsum(0) - 1  # of a token among the action tokens
    contexts: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    bounds = batch.cu_seqlens.tolist()
    for row, (start, end) in enumerate(pairwise(bounds)):
        for offset in batch.action_mask[start:end].nonzero().flatten()[:LEADING].tolist():
            context = batch.tokens[start : start + offset].numpy().tobytes()
            contexts[int(batch.group[row]), context].append(start + offset)
    compared, centred_old, centred_rollout = 0, [], []
    for tokens in contexts.values():
        at = place[tokens]
        compared += len(set(batch.tokens[tokens].tolist())) - 1
        centred_old.append(old[at] - old[at].mean())
        centred_rollout.append(rollout[at] - rollout[at].mean())
    return _slope(torch.cat(centred_old), torch.cat(centred_rollout), left=0.2) if compared >= 4 else None


def _early(mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"]) -> Bool[Tensor, " T"]:
    """Which tokens are among the first of a run of action tokens."""
    begins = mask.clone()
    begins[1:] &= ~mask[:-1]
    begins[cu_seqlens[:-1].long()] = mask[cu_seqlens[:-1].long()]
    index = torch.arange(mask.numel())
    since = index - torch.where(begins, index, 0).cummax(0).values
    return mask & (since < EARLY)
