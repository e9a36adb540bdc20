"""DPO: the policy is its own reward model; cDPO and RPO are two of its settings. Reference: arXiv 2305.18290 eq 7; 2404.19733 (NLL)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from hone.algos.kl import k1
from hone.algos.offline import Pairs
from hone.algos.pairs import row_logp, row_mean_logp, split_pairs
from hone.algos.preference import conservative_dpo
from hone.algos.protocol import Loss, Outputs
from hone.algos.ranges import Range, require_valid
from hone.algos.reduce import weighted_sum


@dataclass(frozen=True, kw_only=True)
class DPO:
    """Direct preference optimisation: the chosen answer's log-ratio to the reference above the rejected one's."""

    name: ClassVar[str] = "dpo"
    house: ClassVar[frozenset[str]] = frozenset()

    beta: Annotated[float, Range(low=0, open_low=True)] = 0.1
    """Reward per nat of log-ratio, above 0; the larger, the closer to the reference."""
    label_smoothing: Annotated[float, Range(low=0, high=0.5)] = 0.0
    """cDPO: share of pairs whose labels are taken to be swapped, in [0, 0.5]."""
    nll_loss_coef: Annotated[float, Range(low=0)] = 0.0
    """RPO: weight of the chosen answers' negative log-likelihood per token, at least 0."""

    @property
    def needs(self) -> frozenset[str]:
        """The reference's log-probabilities."""
        return frozenset({"ref_logp"})

    def loss(self, outputs: Outputs, rows: Pairs) -> Loss:
        """The loss over any part of an optimiser step, cut between pairs."""
        require_valid(self)
        mask, cu_seqlens = rows.action_mask, rows.cu_seqlens
        log_ratios = k1(outputs.logp, rows.require("ref_logp"))
        chosen, rejected = split_pairs(row_logp(log_ratios, mask, cu_seqlens))
        weights, pair_mask = rows.pair_weights, rows.pair_mask
        loss = conservative_dpo(chosen, rejected, weights, pair_mask, beta=self.beta, flip=self.label_smoothing)
        if self.nll_loss_coef == 0:
            return loss
        likelihood, _ = split_pairs(row_mean_logp(outputs.logp, mask, cu_seqlens))
        nll = -weighted_sum(likelihood, weights, pair_mask)
        return loss + Loss(total=self.nll_loss_coef * nll, metrics={"nll": nll.detach()})
