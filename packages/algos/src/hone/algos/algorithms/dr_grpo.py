"""Dr. GRPO: GRPO without its two biases, the division by a row's length and by the group's deviation. Reference: arXiv 2503.20783."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.advantages import group_centred
from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import Clip, KLPenalty, group_advantages, surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction


@dataclass(frozen=True, kw_only=True)
class DrGRPO:
    """GRPO done right: scores less their group's mean, and a loss divided by a constant length."""

    name: ClassVar[str] = "dr_grpo"
    house: ClassVar[frozenset[str]] = frozenset()

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=0.0))
    """Penalty for leaving the reference model."""
    clip: Clip = field(default_factory=Clip)
    """How far the policy may move from the one that sampled before a token stops counting."""
    correction: Correction = field(default_factory=Correction)
    """How samples count for which engine and learner disagree."""
    entropy_coef: Annotated[float, Range(low=0)] = 0.0
    """Weight of the entropy bonus [per nat], at least 0."""
    reduction: Reduction = field(default_factory=lambda: Reduction(over="constant", length=3000))
    """How the action tokens of an optimiser step are weighted; the length is the longest response that may be sampled."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Batch` to fill before judging."""
        return frozenset({"old_logp"}) | self.kl.needs

    def advantages(self, batch: Batch) -> Advantages:
        """Each row's summed reward less its group's mean, on all of the row's action tokens; see `group_advantages`."""
        return group_advantages(batch, group_centred, kl=self.kl)

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The policy's loss over any part of an optimiser step."""
        return surrogate(outputs, scored, clip=self.clip, correction=self.correction, kl=self.kl, entropy_coef=self.entropy_coef)
