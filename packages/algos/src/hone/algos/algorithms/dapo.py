"""DAPO: GRPO with a higher upper bound, every token weighing the same, and no KL penalty. Reference: arXiv 2503.14476 eq 8, 9."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.algorithms.grpo import GRPO, GroupAdvantage
from hone.algos.algorithms.terms import KLPenalty, penalised_surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction


@dataclass(frozen=True, kw_only=True)
class DAPO:
    """Decoupled clip; the paper's dynamic sampling and overlong penalty act on rewards, before this."""

    name: ClassVar[str] = "dapo"

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=0.0, estimator="k3", use_loss=True))
    """Penalty for leaving the reference model; the paper has none."""
    advantage: GroupAdvantage = field(default_factory=GroupAdvantage)
    """Estimation of advantages."""
    eps_clip_low: Annotated[float, Range(low=0, high=1)] = 0.2
    """How far the ratio may fall below one before a bad token stops counting, in [0, 1]."""
    eps_clip_high: Annotated[float, Range(low=0)] = 0.28
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
        """GRPO's."""
        return GRPO(kl=self.kl, advantage=self.advantage).advantages(batch)

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
