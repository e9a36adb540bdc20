"""SimPO: preference by mean log-probability, with a margin and without a reference. Reference: arXiv 2405.14734."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from hone.algos.offline import Pairs
from hone.algos.pairs import row_mean_logp, split_pairs
from hone.algos.preference import simpo
from hone.algos.protocol import Loss, Outputs
from hone.algos.ranges import Range, require_valid


@dataclass(frozen=True, kw_only=True)
class SimPO:
    """Simple preference optimisation: what is compared is what generation goes by, the mean over tokens."""

    name: ClassVar[str] = "simpo"
    house: ClassVar[frozenset[str]] = frozenset()

    beta: Annotated[float, Range(low=0, open_low=True)] = 2.0
    """Reward per nat of mean log-probability, above 0; 2 to 2.5 in the authors' recipes, 10 for some models."""
    gamma_beta_ratio: Annotated[float, Range(low=0)] = 0.5
    """Margin over beta [nats per token], at least 0; the paper's gamma is beta times this."""

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the policy."""
        return frozenset()

    def loss(self, outputs: Outputs, rows: Pairs) -> Loss:
        """The loss over any part of an optimiser step, cut between pairs."""
        require_valid(self)
        chosen, rejected = split_pairs(row_mean_logp(outputs.logp, rows.action_mask, rows.cu_seqlens))
        return simpo(chosen, rejected, rows.pair_weights, rows.pair_mask, beta=self.beta, gamma_beta_ratio=self.gamma_beta_ratio)
