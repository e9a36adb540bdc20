"""RLOO: every sample's baseline is the mean of its prompt's other samples. Reference: arXiv 2402.14740."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.advantages import row_sums, spread
from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import Clip, KLPenalty, surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.group_baselines import action_counts, group_figures, leave_one_out
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
    house: ClassVar[frozenset[str]] = frozenset({"clip.low", "clip.high"})

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=0.03))
    """Penalty for leaving the reference model."""
    clip: Clip = field(default_factory=Clip)
    """How far the policy may move from the one that sampled before a token stops counting."""
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
        """Each row's score against the mean of its group's others, on all of the row's action tokens.

        The score is the sum of the row's rewards less its KL penalty (where that is in the reward): the baseline contains
        both. The rows of an episode count as one; one without action tokens stays out of its group.
        """
        mask, cu_seqlens, group = batch.action_mask, batch.episode_cu_seqlens, batch.episode_group
        scores = row_sums(batch.rewards_once + self.kl.reward(batch), mask, cu_seqlens)
        live = action_counts(mask, cu_seqlens) > 0
        per_sample = leave_one_out(scores, group, live)
        return Advantages(advantages=spread(per_sample, mask, cu_seqlens), figures=group_figures(scores, group, live))

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The policy's loss over any part of an optimiser step."""
        return surrogate(outputs, scored, clip=self.clip, correction=self.correction, kl=self.kl, entropy_coef=self.entropy_coef)
