"""KTO: answers judged good or bad one by one, against the policy's distance from the reference. Reference: arXiv 2402.01306."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from hone.algos.kl import k1
from hone.algos.kto import kto_loss
from hone.algos.offline import Judgements
from hone.algos.pairs import row_logp
from hone.algos.protocol import Loss, Outputs
from hone.algos.ranges import Range, require_valid


@dataclass(frozen=True, kw_only=True)
class KTO:
    """Kahneman-Tversky optimisation. Choose the weights so that good ones times their number over bad ones' lies in [1, 3/2]."""

    name: ClassVar[str] = "kto"
    house: ClassVar[frozenset[str]] = frozenset()

    beta: Annotated[float, Range(low=0, open_low=True)] = 0.1
    """Reward per nat of log-ratio, above 0."""
    desirable_loss_weight: Annotated[float, Range(low=0)] = 1.0
    """Weight of good answers, at least 0."""
    undesirable_loss_weight: Annotated[float, Range(low=0)] = 1.0
    """Weight of bad answers, at least 0."""

    @property
    def needs(self) -> frozenset[str]:
        """The reference's log-probabilities, and the step's anchor from mismatched rows."""
        return frozenset({"ref_logp", "anchor"})

    def loss(self, outputs: Outputs, rows: Judgements) -> Loss:
        """The loss over any part of an optimiser step."""
        require_valid(self)
        log_ratios = row_logp(k1(outputs.logp, rows.require("ref_logp")), rows.action_mask, rows.cu_seqlens)
        return kto_loss(
            log_ratios,
            rows.desirable,
            rows.row_weights,
            rows.row_weights != 0,
            rows.require("anchor"),
            beta=self.beta,
            desirable_weight=self.desirable_loss_weight,
            undesirable_weight=self.undesirable_loss_weight,
        )
