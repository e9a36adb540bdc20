"""PPO: a critic, generalised advantage estimation and the clipped surrogate. Reference: arXiv 1707.06347, 2203.02155."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from jaxtyping import Float
from torch import Tensor

from hone.algos.advantages import gae, whiten
from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import Clip, KLPenalty, surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction
from hone.algos.value_losses import clipped_value_loss, squared_value_loss


@dataclass(frozen=True, kw_only=True)
class GAEAdvantage:
    """How PPO's advantages are estimated."""

    gamma: Annotated[float, Range(low=0, high=1)] = 1.0
    """Discount per action token, in [0, 1]."""
    # At 1 the returns are the rewards that came, whatever the critic says: a critic that starts untrained does no harm, and
    # a reward at the end reaches the first token undamped (at 0.95 a hundredth of it is left after 90 tokens).
    lambd: Annotated[float, Range(low=0, high=1)] = 1.0
    """Trust in rewards (1) against trust in the critic (0), in [0, 1]; below 1 variance falls and the critic's error enters."""
    normalize: bool = True
    """Whiten the advantages over all action tokens of the rollout; the critic's targets stay as they are."""


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Proximal policy optimisation with a critic."""

    name: ClassVar[str] = "ppo"
    house: ClassVar[frozenset[str]] = frozenset({"kl.init_coef", "advantage.lambd", "value_clip"})

    kl: KLPenalty = field(default_factory=KLPenalty)
    """Penalty for leaving the reference model."""
    advantage: GAEAdvantage = field(default_factory=GAEAdvantage)
    """Estimation of advantages."""
    clip: Clip = field(default_factory=Clip)
    """How far the policy may move from the one that sampled before a token stops counting."""
    correction: Correction = field(default_factory=Correction)
    """How samples count for which engine and learner disagree."""
    entropy_coef: Annotated[float, Range(low=0)] = 0.0
    """Weight of the entropy bonus [per nat], at least 0."""
    value_clip: Annotated[float, Range(low=0, open_low=True)] | None = 0.5
    """How far a value may move from the rollout's [reward] before its loss stops falling, above 0; none leaves it free."""
    reduction: Reduction = field(default_factory=Reduction)
    """How the action tokens of an optimiser step are weighted."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Batch` to fill before judging."""
        return frozenset({"old_logp", "values"}) | self.kl.needs

    def advantages(self, batch: Batch) -> Advantages:
        """GAE over rewards less the KL penalty (where it is in the reward); whitened, if asked for, after the returns."""
        rewards = batch.rewards + self.kl.reward(batch)
        advantages, returns = gae(
            rewards, batch.require("values"), batch.action_mask, batch.cu_seqlens, gamma=self.advantage.gamma, lambd=self.advantage.lambd
        )
        if self.advantage.normalize:
            advantages = whiten(advantages, batch.action_mask)
        return Advantages(advantages=advantages, returns=returns)

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The policy's loss over any part of an optimiser step."""
        return surrogate(outputs, scored, clip=self.clip, correction=self.correction, kl=self.kl, entropy_coef=self.entropy_coef)

    def value_loss(self, values: Float[Tensor, " T"], scored: Scored) -> Loss:
        """The critic's loss over any part of an optimiser step."""
        assert scored.returns is not None, "scored by an algorithm without a critic"
        if self.value_clip is None:
            return squared_value_loss(values, scored.returns, scored.weights, scored.action_mask)
        old_values = scored.require("values")
        return clipped_value_loss(values, old_values, scored.returns, scored.weights, scored.action_mask, clip=self.value_clip)
