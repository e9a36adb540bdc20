"""REINFORCE++: no critic and no group; rewards to go, whitened over the whole rollout. Reference: arXiv 2501.03262."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.advantages import discounted_returns, whiten
from hone.algos.algorithms.terms import KLPenalty, penalised_surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction


@dataclass(frozen=True, kw_only=True)
class ReturnAdvantage:
    """How REINFORCE++'s advantages are estimated."""

    gamma: Annotated[float, Range(low=0, high=1)] = 1.0
    """Discount per action token, in [0, 1]."""
    normalize: bool = True
    """Whiten the returns over all action tokens of the rollout; otherwise they are taken as they are, without any baseline."""


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """REINFORCE with the clipped surrogate, and the rollout's own mean and deviation for a baseline."""

    name: ClassVar[str] = "reinforce"

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=1e-3))
    """Penalty for leaving the reference model."""
    advantage: ReturnAdvantage = field(default_factory=ReturnAdvantage)
    """Estimation of advantages."""
    eps_clip_low: Annotated[float, Range(low=0, high=1)] = 0.2
    """How far the ratio may fall below one before a bad token stops counting, in [0, 1]."""
    eps_clip_high: Annotated[float, Range(low=0)] = 0.2
    """How far the ratio may rise above one before a good token stops counting, at least 0."""
    dual_clip: Annotated[float, Range(low=1, open_low=True)] | None = None
    """Largest ratio a bad token counts with, above 1; none leaves it open."""
    entropy_coef: Annotated[float, Range(low=0)] = 0.0
    """Weight of the entropy bonus [per nat], at least 0."""
    reduction: Reduction = field(default_factory=Reduction)
    """How the action tokens of an optimiser step are weighted."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Batch` to fill before judging."""
        return frozenset({"old_logp"}) | self.kl.needs

    def advantages(self, batch: Batch) -> Advantages:
        """Rewards to go, less the KL penalty's (where it is in the reward); whitened, if asked for."""
        rewards = batch.rewards + self.kl.reward(batch)
        returns = discounted_returns(rewards, batch.action_mask, batch.cu_seqlens, gamma=self.advantage.gamma)
        return Advantages(advantages=whiten(returns, batch.action_mask) if self.advantage.normalize else returns)

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The policy's loss over any part of an optimiser step."""
        return penalised_surrogate(
            outputs,
            scored,
            kl=self.kl,
            clip_low=self.eps_clip_low,
            clip_high=self.eps_clip_high,
            dual_clip=self.dual_clip,
            entropy_coef=self.entropy_coef,
        )
