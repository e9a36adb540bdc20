"""REINFORCE++-baseline: scores less their group's mean, whitened over the whole rollout. Reference: arXiv 2501.03262."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.advantages import discounted_returns, group_centred, row_sums, spread, whiten
from hone.algos.algorithms.terms import KLPenalty, penalised_surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.group_baselines import action_counts
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction


@dataclass(frozen=True, kw_only=True)
class ReinforceBaseline:
    """The group's mean for a baseline, the rollout's deviation for a scale: groups that agree are not blown up."""

    name: ClassVar[str] = "reinforce_baseline"

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=1e-3, estimator="k2", use_loss=True))
    """Penalty for leaving the reference model."""
    normalize: bool = True
    """Whiten the advantages over all action tokens of the rollout; otherwise only the groups' means are taken off."""
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
        """Each row's summed reward less its group's mean, on all of the row's action tokens; whitened, if asked for.

        A row without action tokens stays out of its group. A KL penalty in the reward is added as its reward to go after
        the mean is taken off, and is whitened with the rest.
        """
        mask, cu_seqlens = batch.action_mask, batch.cu_seqlens
        live = action_counts(mask, cu_seqlens) > 0
        scores = row_sums(batch.rewards, mask, cu_seqlens)
        per_row = scores.new_zeros(batch.rows).masked_scatter_(live, group_centred(scores[live], batch.group[live]))
        penalty = discounted_returns(self.kl.reward(batch), mask, cu_seqlens, gamma=1.0)
        advantages = spread(per_row, mask, cu_seqlens) + penalty
        return Advantages(advantages=whiten(advantages, mask) if self.normalize else advantages)

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
