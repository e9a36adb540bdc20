"""GRPO: the other samples of a prompt stand in for the critic. Reference: arXiv 2402.03300 eq 3 and 4, section 4.1.2."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import Clip, GroupAdvantage, KLPenalty, surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Group-relative policy optimisation: no critic."""

    name: ClassVar[str] = "grpo"
    house: ClassVar[frozenset[str]] = frozenset({"kl.gradient", "clip.low", "clip.high", "advantage.eps"})

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=0.04, estimator="k3", use_loss=True))
    """Penalty for leaving the reference model."""
    advantage: GroupAdvantage = field(default_factory=GroupAdvantage)
    """Estimation of advantages."""
    clip: Clip = field(default_factory=Clip)
    """How far the policy may move from the one that sampled before a token stops counting."""
    correction: Correction = field(default_factory=Correction)
    """How samples count for which engine and learner disagree."""
    entropy_coef: Annotated[float, Range(low=0)] = 0.0
    """Weight of the entropy bonus [per nat], at least 0."""
    reduction: Reduction = field(default_factory=lambda: Reduction(over="sequence"))
    """How the action tokens of an optimiser step are weighted."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Batch` to fill before judging."""
        return frozenset({"old_logp"}) | self.kl.needs

    def advantages(self, batch: Batch) -> Advantages:
        """Each row's summed reward against its group's, on all of the row's action tokens; see `group_advantages`."""
        return self.advantage.judge(batch, kl=self.kl)

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The policy's loss over any part of an optimiser step."""
        return surrogate(outputs, scored, clip=self.clip, correction=self.correction, kl=self.kl, entropy_coef=self.entropy_coef)
