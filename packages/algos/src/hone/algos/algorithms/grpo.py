"""GRPO: the other samples of a prompt stand in for the critic. Reference: arXiv 2402.03300 eq 3 and 4, section 4.1.2."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.advantages import discounted_returns, group_centred, group_normalised, row_sums, spread
from hone.algos.algorithms.terms import KLPenalty, penalised_surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction


@dataclass(frozen=True, kw_only=True)
class GroupAdvantage:
    """How GRPO's advantages are estimated."""

    normalize_std: bool = True
    """Divide by the standard deviation of the group's scores; otherwise only their mean is taken off."""
    eps: Annotated[float, Range(low=0)] = 1e-6
    """Added to that standard deviation [reward], at least 0."""


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Group-relative policy optimisation: no critic."""

    name: ClassVar[str] = "grpo"

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=0.04, estimator="k3", use_loss=True))
    """Penalty for leaving the reference model."""
    advantage: GroupAdvantage = field(default_factory=GroupAdvantage)
    """Estimation of advantages."""
    eps_clip_low: Annotated[float, Range(low=0, high=1)] = 0.2
    """How far the ratio may fall below one before a bad token stops counting, in [0, 1]."""
    eps_clip_high: Annotated[float, Range(low=0)] = 0.2
    """How far the ratio may rise above one before a good token stops counting, at least 0."""
    dual_clip: Annotated[float, Range(low=1, open_low=True)] | None = None
    """Largest ratio a bad token counts with, above 1; none leaves it open."""
    entropy_coef: Annotated[float, Range(low=0)] = 0.0
    """Weight of the entropy bonus [per nat], at least 0."""
    reduction: Reduction = field(default_factory=lambda: Reduction(over="sequence"))
    """How the action tokens of an optimiser step are weighted."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Batch` to fill before judging."""
        return frozenset({"old_logp"}) | self.kl.needs

    def advantages(self, batch: Batch) -> Advantages:
        """Each row's summed reward against its group's, on all of the row's action tokens.

        A row without action tokens has no score and stays out of its group. A KL penalty in the reward is added as its
        reward to go after the group's normalisation, which would otherwise rescale it by how the rewards happen to spread.
        """
        mask, cu_seqlens = batch.action_mask, batch.cu_seqlens
        scores = row_sums(batch.rewards, mask, cu_seqlens)
        live = row_sums(mask.to(scores.dtype), mask, cu_seqlens) > 0
        if self.advantage.normalize_std:
            relative = group_normalised(scores[live], batch.group[live], eps=self.advantage.eps)
        else:
            relative = group_centred(scores[live], batch.group[live])
        per_row = scores.new_zeros(batch.rows).masked_scatter_(live, relative)
        penalty = discounted_returns(self.kl.reward(batch), mask, cu_seqlens, gamma=1.0)
        return Advantages(advantages=spread(per_row, mask, cu_seqlens) + penalty)

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
