"""What the policy-gradient algorithms are composed of: settings of the KL penalty and the clip, the surrogate, group advantages."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hone.algos.advantages import discounted_returns, group_centred, group_normalised, row_sums, spread
from hone.algos.algorithms.correction import Correction
from hone.algos.batch import Batch, Scored
from hone.algos.group_baselines import action_counts, group_figures
from hone.algos.kl import kl_loss, kl_per_token, weighted_kl_loss
from hone.algos.policy_losses import clipped_surrogate, entropy_bonus
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import weighted_sum
from hone.algos.soft_losses import scaled_advantages


@dataclass(frozen=True, kw_only=True)
class KLPenalty:
    """How, and how strongly, the policy is held near the reference model."""

    init_coef: Annotated[float, Range(low=0)] = 0.01
    """Weight of the penalty [reward per nat], at least 0; at 0 no reference model is loaded."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of KL per token from d = logp - ref_logp [nats]: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d."""
    use_loss: bool = False
    """Add the penalty to the loss; otherwise it is taken from the rewards, token by token."""
    gradient: Literal["reverse", "unbiased", "as_written"] = "reverse"
    """Gradient in the loss: that of KL(policy || reference) on policy; the same weighted by policy over sampler, which keeps it right
    while a rollout is trained on; or the estimator differentiated as it is written."""
    ratio_cap: Annotated[float, Range(low=0, open_low=True)] = 10.0
    """Largest such weight of gradient 'unbiased', above 0."""

    def __post_init__(self) -> None:
        if self.init_coef > 0 and self.use_loss and self.estimator == "k1" and self.gradient == "as_written":
            raise ValueError(
                "KL estimator 'k1' in the loss with gradient 'as_written' has no gradient in expectation and would hold nothing; "
                "choose gradient 'reverse', or estimator 'k2' or 'k3'"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The reference's log-probabilities, if there is a penalty."""
        return frozenset({"ref_logp"}) if self.init_coef > 0 else frozenset()

    def reward(self, batch: Batch) -> Float[Tensor, " T"]:
        """-init_coef k_t per token, of the policy that starts the step; zero where the penalty is in the loss."""
        if self.use_loss or self.init_coef == 0:
            return torch.zeros_like(batch.rewards)
        penalty = kl_per_token(batch.require("old_logp"), batch.require("ref_logp"), batch.action_mask, estimator=self.estimator)
        return -self.init_coef * penalty

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The penalty's part of the loss, and its figure "kl" wherever there is a penalty."""
        nothing = outputs.logp.new_zeros((), dtype=torch.float32)
        if self.init_coef == 0:
            return Loss(total=nothing, metrics={})
        ref_logp, mask = scored.require("ref_logp"), scored.action_mask
        if not self.use_loss:
            figure = weighted_sum(kl_per_token(outputs.logp.detach(), ref_logp, mask, estimator=self.estimator), scored.weights, mask)
            return Loss(total=nothing, metrics={"kl": figure})
        if self.gradient == "unbiased":
            old_logp, cap = scored.require("old_logp"), self.ratio_cap
            return weighted_kl_loss(
                outputs.logp, old_logp, ref_logp, scored.weights, mask, coef=self.init_coef, estimator=self.estimator, ratio_cap=cap
            )
        return kl_loss(outputs.logp, ref_logp, scored.weights, mask, coef=self.init_coef, estimator=self.estimator, gradient=self.gradient)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """How far the policy may move from the one that sampled before a token stops counting."""

    low: Annotated[float, Range(low=0, high=1)] = 0.2
    """How far the ratio may fall below one before a bad token stops counting, in [0, 1]."""
    high: Annotated[float, Range(low=0)] = 0.2
    """How far the ratio may rise above one before a good token stops counting, at least 0."""
    dual: Annotated[float, Range(low=1, open_low=True)] | None = None
    """Largest ratio a bad token counts with, above 1; none leaves it open."""


def surrogate(outputs: Outputs, scored: Scored, *, clip: Clip, correction: Correction, kl: KLPenalty, entropy_coef: float) -> Loss:
    """The clipped surrogate, plus the KL penalty, minus the entropy bonus: the loss of every algorithm that clips by token."""
    scored = kept(outputs, scored, correction=correction)
    policy = clipped_surrogate(
        outputs.logp,
        scored.require("old_logp"),
        scored.advantages,
        scored.weights,
        scored.action_mask,
        clip_low=clip.low,
        clip_high=clip.high,
        dual_clip=clip.dual,
    )
    return with_penalties(policy, outputs, scored, kl=kl, entropy_coef=entropy_coef)


def kept(outputs: Outputs, scored: Scored, *, correction: Correction) -> Scored:
    """The scored rows without the advantages of those that the current policy has left behind (OPSM), if that is asked for."""
    keep = correction.keep(outputs, scored)
    if keep is None:
        return scored
    return replace(scored, advantages=scaled_advantages(scored.advantages, keep, scored.action_mask))


def with_penalties(policy: Loss, outputs: Outputs, scored: Scored, *, kl: KLPenalty, entropy_coef: float) -> Loss:
    """A policy loss, plus the KL penalty, minus the entropy bonus; the figure "entropy" wherever entropy is given."""
    loss = policy + kl.loss(outputs, scored)
    if outputs.entropy is not None:
        # Without a bonus the entropy is a figure only; detached, nothing is sent back through it.
        entropy = outputs.entropy if entropy_coef > 0 else outputs.entropy.detach()
        return loss + entropy_bonus(entropy, scored.weights, scored.action_mask, coef=entropy_coef)
    if entropy_coef > 0:
        raise ValueError(f"entropy_coef is {entropy_coef}, but the outputs have no entropy; compute it with the log-probabilities")
    return loss


RowEstimator = Callable[[Float[Tensor, " N"], Int[Tensor, " N"]], Float[Tensor, " N"]]
"""(scores, group) of live rows -> their advantages."""


def group_advantages(batch: Batch, estimate: RowEstimator, *, kl: KLPenalty) -> Advantages:
    """Each row's summed reward against its group's, on all of the row's action tokens, with the counts of `group_figures`.

    The rows of an episode count as one. One without action tokens has no score and stays out of its group. A KL penalty in the
    reward is added as its reward to go after the baseline, which would otherwise rescale it by how the rewards happen to spread.
    """
    mask, cu_seqlens, group = batch.action_mask, batch.episode_cu_seqlens, batch.episode_group
    scores = row_sums(batch.rewards_once, mask, cu_seqlens)
    live = action_counts(mask, cu_seqlens) > 0
    per_sample = torch.zeros_like(scores).masked_scatter_(live, estimate(scores[live], group[live]))
    advantages = spread(per_sample, mask, cu_seqlens) + discounted_returns(kl.reward(batch), mask, batch.cu_seqlens, gamma=1.0)
    return Advantages(advantages=advantages, figures=group_figures(scores, group, live))


@dataclass(frozen=True, kw_only=True)
class GroupAdvantage:
    """How a row's score is compared with its group's. Reference: arXiv 2402.03300 section 4.1.2."""

    normalize_std: bool = True
    """Divide by the standard deviation of the group's scores; otherwise only their mean is taken off."""
    eps: Annotated[float, Range(low=0)] = 1e-6
    """Added to that standard deviation [reward], at least 0."""

    def judge(self, batch: Batch, *, kl: KLPenalty) -> Advantages:
        """`group_advantages` of scores less their group's mean, over the group's deviation if asked for."""
        if self.normalize_std:
            return group_advantages(batch, lambda scores, group: group_normalised(scores, group, eps=self.eps), kl=kl)
        return group_advantages(batch, group_centred, kl=kl)
