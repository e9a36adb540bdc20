"""IPO: a squared loss that pulls the pair's log-ratio to 1 / (2 beta) instead of to infinity. Reference: arXiv 2310.12036 eq 17."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from hone.algos.kl import k1
from hone.algos.offline import Pairs
from hone.algos.pairs import row_mean_logp, split_pairs
from hone.algos.preference import ipo
from hone.algos.protocol import Loss, Outputs
from hone.algos.ranges import Range, require_valid


@dataclass(frozen=True, kw_only=True)
class IPO:
    """Identity preference optimisation, on log-ratios averaged per token as its authors' code does."""

    name: ClassVar[str] = "ipo"
    house: ClassVar[frozenset[str]] = frozenset()

    beta: Annotated[float, Range(low=0, open_low=True)] = 0.1
    """The paper's tau, above 0; the aim for the difference of log-ratios is 1 / (2 beta) [nats per token]."""

    @property
    def needs(self) -> frozenset[str]:
        """The reference's log-probabilities."""
        return frozenset({"ref_logp"})

    def loss(self, outputs: Outputs, rows: Pairs) -> Loss:
        """The loss over any part of an optimiser step, cut between pairs."""
        require_valid(self)
        log_ratios = k1(outputs.logp, rows.require("ref_logp"))
        chosen, rejected = split_pairs(row_mean_logp(log_ratios, rows.action_mask, rows.cu_seqlens))
        return ipo(chosen, rejected, rows.pair_weights, rows.pair_mask, beta=self.beta)
