"""ReMax: every sample's baseline is the score of its prompt's greedy response. Reference: arXiv 2310.10505."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from hone.algos.advantages import discounted_returns, row_sums, spread
from hone.algos.algorithms.terms import KLPenalty, penalised_surrogate
from hone.algos.batch import Batch, Scored
from hone.algos.group_baselines import greedy_baselines
from hone.algos.masking import on_mask
from hone.algos.protocol import Advantages, Loss, Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction


@dataclass(frozen=True, kw_only=True)
class GreedyBatch(Batch):
    """A batch whose prompts were answered greedily too: on every token of a row, the score of its prompt's greedy response."""

    baselines: Float[Tensor, " T"]


def with_greedy(batch: Batch, greedy_scores: Float[Tensor, " P"], greedy_group: Int[Tensor, " P"]) -> GreedyBatch:
    """The batch with its prompts' greedy scores, found by group id.

    Raises ValueError if a prompt of the batch has no greedy sample, or two.
    """
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    per_row = greedy_baselines(batch.group, greedy_scores, greedy_group)
    return GreedyBatch(**fields, baselines=per_row[batch.row_of_token])


@dataclass(frozen=True, kw_only=True)
class ReMax:
    """REINFORCE with a greedy baseline: no critic, one sample of a prompt is enough, and one greedy rollout of it.

    The paper clips nothing: while a rollout is one optimiser step the ratio is one and neither does this. Its own code
    takes only a token's immediate KL penalty, where the reward to go is what the objective's gradient holds.
    """

    name: ClassVar[str] = "remax"

    kl: KLPenalty = field(default_factory=KLPenalty)
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
        """Each row's summed reward less that of its prompt's greedy response, on all of the row's action tokens.

        A KL penalty in the reward is added as its reward to go. Raises ValueError for a batch without greedy scores.
        """
        if not isinstance(batch, GreedyBatch):
            raise ValueError("remax needs the score of one greedy response per prompt; add them to the batch with `with_greedy`")
        mask, cu_seqlens = batch.action_mask, batch.cu_seqlens
        scores = spread(row_sums(batch.rewards, mask, cu_seqlens), mask, cu_seqlens)
        penalty = discounted_returns(self.kl.reward(batch), mask, cu_seqlens, gamma=1.0)
        return Advantages(advantages=scores - on_mask(batch.baselines, mask) + penalty)

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
