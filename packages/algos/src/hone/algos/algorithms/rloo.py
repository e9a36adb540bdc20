"""RLOO: every sample's baseline is the mean of its prompt's other samples. Reference: arXiv 2402.14740."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.advantages import row_sums, spread
from hone.algos.algorithms.terms import KLPenalty, penalised_surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.group_baselines import action_counts, leave_one_out
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction


@dataclass(frozen=True, kw_only=True)
class RLOO:
    """REINFORCE leave-one-out: a whole response is one action, and its KL penalty is part of its score.

    The paper clips nothing: while a rollout is one optimiser step the ratio is one and neither does this. It sums over a
    row's tokens where the default reduction averages over the step's, which scales a step's gradient and leaves its direction.
    """

    name: ClassVar[str] = "rloo"

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=0.03))
    """Penalty for leaving the reference model."""
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
        """Each row's score against the mean of its group's others, on all of the row's action tokens.

        The score is the sum of the row's rewards less its KL penalty (where that is in the reward): the baseline contains
        both. A row without action tokens stays out of its group.
        """
        mask, cu_seqlens = batch.action_mask, batch.cu_seqlens
        scores = row_sums(batch.rewards + self.kl.reward(batch), mask, cu_seqlens)
        per_row = leave_one_out(scores, batch.group, action_counts(mask, cu_seqlens) > 0)
        return Advantages(advantages=spread(per_row, mask, cu_seqlens))

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
