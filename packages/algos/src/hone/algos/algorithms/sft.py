"""SFT: imitate the demonstrated answers."""

from dataclasses import dataclass, field
from typing import ClassVar

from hone.algos.offline import Demonstrations
from hone.algos.protocol import Loss, Outputs
from hone.algos.ranges import require_valid
from hone.algos.reduce import Reduction
from hone.algos.supervised import nll


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Supervised fine-tuning: the negative log-likelihood of the answers' tokens."""

    name: ClassVar[str] = "sft"
    house: ClassVar[frozenset[str]] = frozenset()

    reduction: Reduction = field(default_factory=Reduction)
    """How the answers' tokens are weighted within an optimiser step."""

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the policy."""
        return frozenset()

    def loss(self, outputs: Outputs, rows: Demonstrations) -> Loss:
        """The loss over any part of an optimiser step."""
        require_valid(self)
        return nll(outputs.logp, rows.weights, rows.action_mask)
