"""Figures of one step, computed on the controller from what the loop already holds; names are those of `observe/metrics.py`."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hone.algos.batch import Batch
from hone.rollout.executor import Group


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards, lengths [tokens] and truncation over every sample; the spread of rewards within a group, averaged."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    lengths = torch.tensor([sum(int(part.action_mask.sum()) for part in sample.segments) for sample in samples], dtype=torch.float64)
    within = [torch.tensor([sample.reward for sample in group.samples], dtype=torch.float64) for group in groups]
    spreads = [float(one.std()) if one.numel() > 1 else 0.0 for one in within]
    metrics = {
        "rollout/reward_mean": float(rewards.mean()),
        "rollout/reward_std": float(rewards.std(correction=0)),
        "rollout/score_mean": sum(sample.score for sample in samples) / len(samples),
        "rollout/response_length_mean": float(lengths.mean()),
        "rollout/truncated_rate": sum(sample.trajectory.truncated for sample in samples) / len(samples),
        "rollout/group_reward_std": sum(spreads) / len(spreads),
        "rollout/num_samples": float(len(samples)),
    }
    greedy = [group.greedy.reward for group in groups if group.greedy is not None]
    if greedy:
        metrics["rollout/greedy_reward_mean"] = sum(greedy) / len(greedy)
    for key in sorted({key for sample in samples for key in sample.extra_logs}):
        values = [sample.extra_logs[key] for sample in samples if key in sample.extra_logs]
        metrics[f"rollout/extra/{key}"] = sum(values) / len(values)
    return metrics


def mismatch_metrics(batch: Batch) -> dict[str, float]:
    """How far the learner's log-probabilities [nats] are from those the engine sampled with, on the same policy version."""
    gap = (batch.require("old_logp") - batch.rollout_logp)[batch.action_mask].double()
    return {
        "mismatch/logp_abs_diff_mean": float(gap.abs().mean()),
        "mismatch/logp_abs_diff_max": float(gap.abs().max()),
    }


FIGURES = {
    "mismatch_k1": "mismatch/kl",
    "mismatch_k3": "mismatch/k3",
    "mismatch_chi2": "mismatch/chi2",
    "mismatch_perplexity_ratio": "mismatch/perplexity_ratio",
    "mismatch_ess": "mismatch/ess",
    "correction_ess": "mismatch/correction_ess",
    "correction_mean": "mismatch/correction_mean",
    "correction_rejected": "mismatch/correction_rejected",
    "groups": "rollout/groups",
    "groups_of_one": "rollout/groups_of_one",
    "groups_of_equals": "rollout/groups_of_equals",
}
"""What `judge` calls a figure of a whole rollout -> its name among the metrics."""


def figure_metrics(figures: Mapping[str, Float[Tensor, ""]]) -> dict[str, float]:
    """The figures of a judged rollout under the names of metrics; one without an entry keeps its own, which the table then refuses."""
    return {FIGURES.get(name, name): float(value) for name, value in figures.items()}


def staleness_metrics(batch: Batch, *, version: int) -> dict[str, float]:
    """Policy versions that sampled tokens are behind the one that is learning: the most, and on average."""
    lag = version - batch.version[batch.action_mask]
    return {"staleness/version_lag_max": float(lag.max()), "staleness/version_lag_mean": float(lag.double().mean())}


def training_metrics(learned: Sequence[dict[str, float]]) -> dict[str, float]:
    """Averages over the optimiser steps of one rollout; a figure that some steps lack is averaged over those that have it."""
    names = sorted({name for metrics in learned for name in metrics})
    per_name = {name: [metrics[name] for metrics in learned if name in metrics] for name in names}
    averages = {f"train/{name}": sum(values) / len(values) for name, values in per_name.items()}
    return {**averages, "train/optimizer_steps": float(len(learned))}
