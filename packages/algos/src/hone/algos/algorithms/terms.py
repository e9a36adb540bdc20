"""What several algorithms are composed of: the KL penalty's settings, and the surrogate with its penalties."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hone.algos.batch import Batch, Scored
from hone.algos.kl import kl_loss, kl_per_token
from hone.algos.policy_losses import clipped_surrogate, entropy_bonus
from hone.algos.protocol import Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import weighted_sum


@dataclass(frozen=True, kw_only=True)
class KLPenalty:
    """How, and how strongly, the policy is held near the reference model."""

    init_coef: Annotated[float, Range(low=0)] = 0.01
    """Weight of the penalty [reward per nat], at least 0; at 0 no reference model is loaded."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of KL per token from d = logp - ref_logp [nats]: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d."""
    use_loss: bool = False
    """Add the penalty to the loss; otherwise it is taken from the rewards, token by token."""
    gradient: Literal["reverse", "as_written"] = "reverse"
    """Gradient of the penalty in the loss: that of KL(policy || reference), or the estimator differentiated as it is written."""

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
        return kl_loss(outputs.logp, ref_logp, scored.weights, mask, coef=self.init_coef, estimator=self.estimator, gradient=self.gradient)


def penalised_surrogate(
    outputs: Outputs,
    scored: Scored,
    *,
    kl: KLPenalty,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
) -> Loss:
    """The clipped surrogate, plus the KL penalty, minus the entropy bonus; the figure "entropy" wherever entropy is given."""
    loss = clipped_surrogate(
        outputs.logp,
        scored.require("old_logp"),
        scored.advantages,
        scored.weights,
        scored.action_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    return with_penalties(loss, outputs, scored, kl=kl, entropy_coef=entropy_coef)


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
