"""ORPO: imitation of the chosen answer and a penalty on the odds of the rejected one, in one stage. Reference: arXiv 2403.07691."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from hone.algos.offline import Pairs
from hone.algos.pairs import row_mean_logp, split_pairs
from hone.algos.preference import orpo
from hone.algos.protocol import Loss, Outputs
from hone.algos.ranges import Range, require_valid


@dataclass(frozen=True, kw_only=True)
class ORPO:
    """Odds-ratio preference optimisation: no reference model."""

    name: ClassVar[str] = "orpo"
    house: ClassVar[frozenset[str]] = frozenset()

    coef: Annotated[float, Range(low=0)] = 0.1
    """Weight of the odds ratio's term (the paper's lambda), at least 0."""

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the policy."""
        return frozenset()

    def loss(self, outputs: Outputs, rows: Pairs) -> Loss:
        """The loss over any part of an optimiser step, cut between pairs."""
        require_valid(self)
        chosen, rejected = split_pairs(row_mean_logp(outputs.logp, rows.action_mask, rows.cu_seqlens))
        return orpo(chosen, rejected, rows.pair_weights, rows.pair_mask, coef=self.coef)
