"""SAPO: a sigmoid gate in place of the clip. Reference: arXiv 2511.20347."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import GroupAdvantage, KLPenalty, kept, with_penalties
from hone.algos.batch import Batch, Scored
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction
from hone.algos.soft_losses import sapo_loss


@dataclass(frozen=True, kw_only=True)
class SAPO:
    """Soft adaptive policy optimisation: a token fades as its ratio leaves one, faster if it is a bad one."""

    name: ClassVar[str] = "sapo"
    house: ClassVar[frozenset[str]] = frozenset({"advantage.eps"})

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=0.0, estimator="k3", use_loss=True))
    """Penalty for leaving the reference model; the paper has none."""
    advantage: GroupAdvantage = field(default_factory=GroupAdvantage)
    """Estimation of advantages."""
    temperature_positive: Annotated[float, Range(low=0, open_low=True)] = 1.0
    """How fast a good token fades as its ratio leaves one, above 0."""
    temperature_negative: Annotated[float, Range(low=0, open_low=True)] = 1.05
    """How fast a bad token fades as its ratio leaves one, above 0."""
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
        """The policy's loss over any part of an optimiser step."""
        scored = kept(outputs, scored, correction=self.correction)
        policy = sapo_loss(
            outputs.logp,
            scored.require("old_logp"),
            scored.advantages,
            scored.weights,
            scored.action_mask,
            temperature_positive=self.temperature_positive,
            temperature_negative=self.temperature_negative,
        )
        return with_penalties(policy, outputs, scored, kl=self.kl, entropy_coef=self.entropy_coef)
