"""GMPO: the geometric mean of a row's clipped token ratios. Reference: arXiv 2507.20673."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import GroupAdvantage, KLPenalty, kept, with_penalties
from hone.algos.batch import Batch, Scored
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction
from hone.algos.sequence_losses import gmpo_loss


@dataclass(frozen=True, kw_only=True)
class GMPO:
    """Geometric-mean policy optimisation: one wild token moves a row's ratio little."""

    name: ClassVar[str] = "gmpo"
    house: ClassVar[frozenset[str]] = frozenset({"advantage.eps"})

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=0.0, estimator="k3", use_loss=True))
    """Penalty for leaving the reference model; the paper has none."""
    advantage: GroupAdvantage = field(default_factory=GroupAdvantage)
    """Estimation of advantages."""
    log_clip_low: Annotated[float, Range(low=0)] = 0.4
    """How far a token's log-ratio may fall below zero before a bad token stops counting [nats], at least 0."""
    log_clip_high: Annotated[float, Range(low=0)] = 0.4
    """How far a token's log-ratio may rise above zero before a good token stops counting [nats], at least 0."""
    correction: Correction = field(default_factory=Correction)
    """How samples count for which engine and learner disagree."""
    entropy_coef: Annotated[float, Range(low=0)] = 0.0
    """Weight of the entropy bonus [per nat], at least 0."""
    reduction: Reduction = field(default_factory=lambda: Reduction(over="sequence"))
    """How the action tokens of an optimiser step are weighted; by sequence in the paper."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Batch` to fill before judging."""
        return frozenset({"old_logp"}) | self.kl.needs

    def advantages(self, batch: Batch) -> Advantages:
        """Each row's summed reward against its group's, as GRPO's."""
        return self.advantage.judge(batch, kl=self.kl)

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The policy's loss over any part of an optimiser step, cut between rows."""
        scored = kept(outputs, scored, correction=self.correction)
        policy = gmpo_loss(
            outputs.logp,
            scored.require("old_logp"),
            scored.advantages,
            scored.weights,
            scored.action_mask,
            scored.cu_seqlens,
            log_clip_low=self.log_clip_low,
            log_clip_high=self.log_clip_high,
        )
        return with_penalties(policy, outputs, scored, kl=self.kl, entropy_coef=self.entropy_coef)
