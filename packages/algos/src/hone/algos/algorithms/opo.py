"""OPO: the baseline of least variance, a mean of scores weighted by length. Reference: arXiv 2505.23585."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import Clip, KLPenalty, group_advantages, surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.group_baselines import action_counts, length_weighted_centred
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction


@dataclass(frozen=True, kw_only=True)
class OPO:
    """On-policy RL with the optimal reward baseline: no critic, no KL penalty, no standard deviation.

    Exactly on policy by the paper: let a rollout be one optimiser step, where the ratio is one and nothing is clipped.
    """

    name: ClassVar[str] = "opo"
    house: ClassVar[frozenset[str]] = frozenset({"clip.low", "clip.high"})

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=0.0))
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
        """Each row's summed reward less its group's mean weighted by length, on all its action tokens; see `group_advantages`."""
        lengths = action_counts(batch.action_mask, batch.episode_cu_seqlens)
        own_lengths = lengths[lengths > 0]
        return group_advantages(batch, lambda scores, group: length_weighted_centred(scores, group, own_lengths), kl=self.kl)

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The policy's loss over any part of an optimiser step."""
        return surrogate(outputs, scored, clip=self.clip, correction=self.correction, kl=self.kl, entropy_coef=self.entropy_coef)
