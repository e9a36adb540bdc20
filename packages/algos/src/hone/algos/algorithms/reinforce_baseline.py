"""REINFORCE++-baseline: scores less their group's mean, whitened over the whole rollout. Reference: arXiv 2501.03262 eq 6 to 8."""

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

from hone.algos.advantages import group_centred, whiten
from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import Clip, KLPenalty, group_advantages, surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction


@dataclass(frozen=True, kw_only=True)
class ReinforceBaseline:
    """The group's mean for a baseline, the rollout's deviation for a scale: groups that agree are not blown up."""

    name: ClassVar[str] = "reinforce_baseline"
    house: ClassVar[frozenset[str]] = frozenset()

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(init_coef=1e-3, estimator="k2", use_loss=True))
    """Penalty for leaving the reference model."""
    normalize: bool = True
    """Whiten the advantages over all action tokens of the rollout; otherwise only the groups' means are taken off."""
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
        """Each row's summed reward less its group's mean, on all of the row's action tokens; whitened, if asked for.

        See `group_advantages`; a KL penalty in the reward is whitened with the rest.
        """
        judged = group_advantages(batch, group_centred, kl=self.kl)
        return replace(judged, advantages=whiten(judged.advantages, batch.action_mask)) if self.normalize else judged

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The policy's loss over any part of an optimiser step."""
        return surrogate(outputs, scored, clip=self.clip, correction=self.correction, kl=self.kl, entropy_coef=self.entropy_coef)
