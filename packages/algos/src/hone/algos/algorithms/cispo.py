"""CISPO: a policy gradient whose detached ratio is capped, so every token keeps its gradient. Reference: arXiv 2506.13585 eq 4, 5."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import GroupAdvantage, KLPenalty, kept, with_penalties
from hone.algos.batch import Batch, Scored
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction
from hone.algos.soft_losses import cispo_loss


@dataclass(frozen=True, kw_only=True)
class CISPO:
    """Clipped importance-sampling policy optimisation: group advantages, weights by token."""

    name: ClassVar[str] = "cispo"
    house: ClassVar[frozenset[str]] = frozenset({"ratio_cap", "advantage.eps"})

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=0.0, estimator="k3", use_loss=True))
    """Penalty for leaving the reference model; the paper has none."""
    advantage: GroupAdvantage = field(default_factory=GroupAdvantage)
    """Estimation of advantages."""
    # The paper gives no number; 5 is what TRL and Liger take, and 1 + 4 in AReaL.
    ratio_cap: Annotated[float, Range(low=1)] = 5.0
    """Largest ratio a token counts with, an absolute ratio (not a distance from one), at least 1."""
    ratio_floor: Annotated[float, Range(low=0, high=1)] = 0.0
    """Smallest ratio a token counts with, an absolute ratio, in [0, 1]; 0 leaves it open, as the paper does."""
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
        """Each row's summed reward against its group's, as GRPO's."""
        return self.advantage.judge(batch, kl=self.kl)

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The policy's loss over any part of an optimiser step."""
        scored = kept(outputs, scored, correction=self.correction)
        policy = cispo_loss(
            outputs.logp,
            scored.require("old_logp"),
            scored.advantages,
            scored.weights,
            scored.action_mask,
            cap=self.ratio_cap,
            floor=self.ratio_floor,
        )
        return with_penalties(policy, outputs, scored, kl=self.kl, entropy_coef=self.entropy_coef)
