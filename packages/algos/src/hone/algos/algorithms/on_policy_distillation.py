"""On-policy distillation: the teacher judges every token the student sampled. Reference: arXiv 2601.02780 eq 8."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import Clip, KLPenalty, surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.distillation import on_policy_distillation_advantages
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction

NO_PENALTY = KLPenalty(init_coef=0.0)


@dataclass(frozen=True, kw_only=True)
class OnPolicyDistillation:
    """The reference model is the teacher; an advantage is how much likelier it finds a token. Rewards are not looked at."""

    name: ClassVar[str] = "on_policy_distill"
    house: ClassVar[frozenset[str]] = frozenset({"clip.low", "clip.high"})

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
        """The student's log-probabilities, and the teacher's as those of the reference."""
        return frozenset({"old_logp", "ref_logp"})

    def advantages(self, batch: Batch) -> Advantages:
        """Teacher's less student's log-probability of each action token [nats]: no discount, no baseline, no whitening."""
        return Advantages(
            advantages=on_policy_distillation_advantages(batch.require("old_logp"), batch.require("ref_logp"), batch.action_mask)
        )

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The policy's loss over any part of an optimiser step."""
        return surrogate(outputs, scored, clip=self.clip, correction=self.correction, kl=NO_PENALTY, entropy_coef=self.entropy_coef)
