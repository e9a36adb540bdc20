"""Process reward model: a label at the end of every step of a solution. Reference: arXiv 2312.08935 (Math-Shepherd), 2305.20050."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hone.algos.offline import Steps
from hone.algos.process import reward_token_logits, soft_process_loss
from hone.algos.protocol import Loss
from hone.algos.ranges import require_valid
from hone.algos.reduce import Reduction


@dataclass(frozen=True, kw_only=True)
class ProcessRewardModel:
    """Cross-entropy between the labels' shares and what the model says where a step ends; hard labels are shares of one."""

    name: ClassVar[str] = "prm"
    house: ClassVar[frozenset[str]] = frozenset()

    reward_tokens: tuple[int, ...] = ()
    """Ids of the tokens that stand for the labels, in the order of the targets; none if the logits are a classifier's."""
    reduction: Reduction = field(default_factory=Reduction)
    """How the steps are weighted within an optimiser step."""

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the model itself."""
        return frozenset()

    def logits_loss(self, logits: Float[Tensor, "T V"], rows: Steps) -> Loss:
        """The loss over any part of an optimiser step; logits[t] are read AT token t, where a step ends."""
        require_valid(self)
        if self.reward_tokens:
            logits = reward_token_logits(logits, torch.tensor(self.reward_tokens, device=logits.device))
        return soft_process_loss(logits, rows.targets, rows.weights, rows.action_mask)
