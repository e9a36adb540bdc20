"""ReMax: every sample's baseline is the score of its prompt's greedy response. Reference: arXiv 2310.10505."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from hone.algos.advantages import discounted_returns, row_sums, spread
from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import Clip, KLPenalty, surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.checks import checked
from hone.algos.group_baselines import greedy_baselines
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction


@checked
def with_greedy(batch: Batch, greedy_scores: Float[Tensor, " P"], greedy_group: Int[Tensor, " P"]) -> Batch:
    """The batch with its prompts' greedy scores, found by group id.

    Raises ValueError if a prompt of the batch has no greedy sample, or two.
    """
    return dataclasses.replace(batch, greedy_scores=greedy_baselines(batch.group, greedy_scores, greedy_group))


@dataclass(frozen=True, kw_only=True)
class ReMax:
    """REINFORCE with a greedy baseline: no critic, one sample of a prompt is enough, and one greedy rollout of it.

    The paper clips nothing: while a rollout is one optimiser step the ratio is one and neither does this. Its own code
    takes only a token's immediate KL penalty, where the reward to go is what the objective's gradient holds.
    """

    name: ClassVar[str] = "remax"
    house: ClassVar[frozenset[str]] = frozenset({"kl.init_coef", "clip.low", "clip.high"})

    kl: KLPenalty = field(default_factory=KLPenalty)
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
        return frozenset({"old_logp", "greedy_scores"}) | self.kl.needs

    def advantages(self, batch: Batch) -> Advantages:
        """Each row's summed reward less that of its prompt's greedy response, on all of the row's action tokens.

        A KL penalty in the reward is added as its reward to go. Raises ValueError for a batch without greedy scores.
        """
        mask, cu_seqlens = batch.action_mask, batch.cu_seqlens
        gained = row_sums(batch.rewards, mask, cu_seqlens) - batch.require("greedy_scores")
        penalty = discounted_returns(self.kl.reward(batch), mask, cu_seqlens, gamma=1.0)
        return Advantages(advantages=spread(gained, mask, cu_seqlens) + penalty)

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The policy's loss over any part of an optimiser step."""
        return surrogate(outputs, scored, clip=self.clip, correction=self.correction, kl=self.kl, entropy_coef=self.entropy_coef)
