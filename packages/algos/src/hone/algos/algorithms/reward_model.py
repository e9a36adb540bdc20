"""Reward model: the chosen answer's score above the rejected one's. Reference: arXiv 2203.02155 (Bradley-Terry), 2307.09288 (margin)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from jaxtyping import Float
from torch import Tensor

from hone.algos.offline import Pairs
from hone.algos.pairs import split_pairs
from hone.algos.protocol import Loss
from hone.algos.ranges import Range, require_valid
from hone.algos.reward_models import bradley_terry, reward_centre


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """Bradley-Terry on pairs, with the pairs' margins where they have any."""

    name: ClassVar[str] = "rm"
    house: ClassVar[frozenset[str]] = frozenset()

    centre_coef: Annotated[float, Range(low=0)] = 0.0
    """Weight of the squared sum of a pair's scores, which pairs alone leave free, at least 0; 0.01 is usual."""

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the model itself."""
        return frozenset()

    def score_loss(self, scores: Float[Tensor, " N"], rows: Pairs) -> Loss:
        """The loss over any part of an optimiser step, cut between pairs."""
        require_valid(self)
        chosen, rejected = split_pairs(scores)
        loss = bradley_terry(chosen, rejected, rows.margins[0::2], rows.pair_weights, rows.pair_mask)
        if self.centre_coef == 0:
            return loss
        return loss + reward_centre(chosen, rejected, rows.pair_weights, rows.pair_mask, coef=self.centre_coef)
