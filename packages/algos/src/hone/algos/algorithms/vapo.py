"""VAPO: PPO with an unbiased critic, a lambda that grows with the length, and correct rows imitated. Reference: arXiv 2504.05118."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from hone.algos.advantages import row_sums, whiten
from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import Clip, KLPenalty, surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.lambda_schedules import length_adaptive_gae
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction
from hone.algos.supervised import nll
from hone.algos.value_losses import clipped_value_loss, squared_value_loss


@dataclass(frozen=True, kw_only=True)
class LengthAdaptiveAdvantage:
    """How VAPO's advantages and the critic's targets are estimated."""

    gamma: Annotated[float, Range(low=0, high=1)] = 1.0
    """Discount per action token, in [0, 1]."""
    alpha: Annotated[float, Range(low=0, open_low=True)] = 0.05
    """The policy's lambda is 1 - 1 / (alpha l) for a row of l action tokens (at least 0); above 0."""
    value_lambd: Annotated[float, Range(low=0, high=1)] = 1.0
    """The critic's lambda, in [0, 1]; at 1 its targets are the rewards that came."""
    normalize: bool = True
    """Whiten the advantages over all action tokens of the rollout; the critic's targets stay as they are."""


@dataclass(frozen=True, kw_only=True)
class VAPO:
    """Value-augmented proximal policy optimisation. Its critic is to be trained some steps before the policy (50 in the paper)."""

    name: ClassVar[str] = "vapo"
    house: ClassVar[frozenset[str]] = frozenset({"correct_above", "value_clip"})

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=0.0))
    """Penalty for leaving the reference model."""
    advantage: LengthAdaptiveAdvantage = field(default_factory=LengthAdaptiveAdvantage)
    """Estimation of advantages."""
    clip: Clip = field(default_factory=lambda: Clip(high=0.28))
    """How far the policy may move from the one that sampled before a token stops counting."""
    correction: Correction = field(default_factory=Correction)
    """How samples count for which engine and learner disagree."""
    entropy_coef: Annotated[float, Range(low=0)] = 0.0
    """Weight of the entropy bonus [per nat], at least 0."""
    imitation_coef: Annotated[float, Range(low=0)] = 0.1
    """Weight of the negative log-likelihood of correct rows [per nat], at least 0."""
    correct_above: float = 0.0
    """A row is correct if its rewards sum to more than this [reward]; 0 suits rewards of 0 and 1, and of -1 and 1."""
    value_clip: Annotated[float, Range(low=0, open_low=True)] | None = 0.5
    """How far a value may move from the rollout's [reward] before its loss stops falling, above 0; none leaves it free."""
    reduction: Reduction = field(default_factory=Reduction)
    """How the action tokens of an optimiser step are weighted."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Batch` to fill before judging."""
        return frozenset({"old_logp", "values"}) | self.kl.needs

    def advantages(self, batch: Batch) -> Advantages:
        """GAE under the length's lambda for the policy, under `value_lambd` for the critic; only the former are whitened."""
        advantages, returns = length_adaptive_gae(
            batch.rewards + self.kl.reward(batch),
            batch.require("values"),
            batch.action_mask,
            batch.cu_seqlens,
            gamma=self.advantage.gamma,
            alpha=self.advantage.alpha,
            value_lambd=self.advantage.value_lambd,
        )
        if self.advantage.normalize:
            advantages = whiten(advantages, batch.action_mask)
        return Advantages(advantages=advantages, returns=returns)

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The policy's loss over any part of an optimiser step, with the figure "imitation_nll" where correct rows are imitated.

        The likelihood of correct rows has the weights of the step, so that it adds up over micro-batches: the paper's mean
        over correct tokens alone (eq 9), times the share of the step's weight that they have.
        """
        loss = surrogate(outputs, scored, clip=self.clip, correction=self.correction, kl=self.kl, entropy_coef=self.entropy_coef)
        if self.imitation_coef == 0:
            return loss
        imitation = nll(outputs.logp, scored.weights, self._correct(scored)).total
        return loss + Loss(total=self.imitation_coef * imitation, metrics={"imitation_nll": imitation.detach()})

    def value_loss(self, values: Float[Tensor, " T"], scored: Scored) -> Loss:
        """The critic's loss over any part of an optimiser step."""
        assert scored.returns is not None, "scored by an algorithm without a critic"
        if self.value_clip is None:
            return squared_value_loss(values, scored.returns, scored.weights, scored.action_mask)
        old_values = scored.require("values")
        return clipped_value_loss(values, old_values, scored.returns, scored.weights, scored.action_mask, clip=self.value_clip)

    def _correct(self, scored: Scored) -> Bool[Tensor, " T"]:
        """The action tokens of correct rows."""
        scores = row_sums(scored.rewards, scored.action_mask, scored.cu_seqlens)
        return scored.action_mask & (scores > self.correct_above)[scored.row_of_token]
