"""REINFORCE++: no critic and no group; rewards to go, whitened over the whole rollout. Reference: arXiv 2501.03262 eq 4, 5."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.advantages import discounted_returns, whiten
from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import Clip, KLPenalty, surrogate
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
    house: ClassVar[frozenset[str]] = frozenset()

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=1e-3))
    """Penalty for leaving the reference model."""
    advantage: ReturnAdvantage = field(default_factory=ReturnAdvantage)
    """Estimation of advantages."""
    clip: Clip = field(default_factory=Clip)
    """How far the policy may move from the one that sampled before a token stops counting."""
    correction: Correction = field(default_factory=Correction)
    """How samples count for which engine and learner disagree."""
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
        return surrogate(outputs, scored, clip=self.clip, correction=self.correction, kl=self.kl, entropy_coef=self.entropy_coef)
