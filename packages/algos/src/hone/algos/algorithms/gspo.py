"""GSPO: one ratio per row, the geometric mean of its tokens'. Reference: arXiv 2507.18071 eq 5 to 7, 13, 14."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import Clip, GroupAdvantage, KLPenalty, kept, with_penalties
from hone.algos.batch import Batch, Scored
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction
from hone.algos.sequence_losses import gspo_loss, gspo_token_loss


@dataclass(frozen=True, kw_only=True)
class GSPO:
    """Group sequence policy optimisation: whole rows are clipped or kept, as whole rows are rewarded."""

    name: ClassVar[str] = "gspo"
    house: ClassVar[frozenset[str]] = frozenset({"advantage.eps"})

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=0.0, estimator="k3", use_loss=True))
    """Penalty for leaving the reference model; the paper has none."""
    advantage: GroupAdvantage = field(default_factory=GroupAdvantage)
    """Estimation of advantages."""
    gradient: Literal["sequence", "token"] = "sequence"
    """Whose gradient the row's ratio carries: its own, or (GSPO-token) each token's; they differ where advantages do within a row."""
    clip: Clip = field(default_factory=lambda: Clip(low=3e-4, high=4e-4))
    """How far a row's ratio may move from one before the row stops counting; far narrower than a token's."""
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
        surrogate = gspo_loss if self.gradient == "sequence" else gspo_token_loss
        policy = surrogate(
            outputs.logp,
            scored.require("old_logp"),
            scored.advantages,
            scored.weights,
            scored.action_mask,
            scored.cu_seqlens,
            clip_low=self.clip.low,
            clip_high=self.clip.high,
            dual_clip=self.clip.dual,
        )
        return with_penalties(policy, outputs, scored, kl=self.kl, entropy_coef=self.entropy_coef)
