"""The vocabulary cut over ranks: each has the logits of its own words, and statistics are put together from every rank's.

c tokens of a chunk, V words in all, b of them here. Two sums over the ranks for a chunk: its maxima first, then, shifted to them,
sum e^z, sum e^z z and the target's logit, in fp32.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hone.learner.tensor_parallel.cut import Cut, entered


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The calling rank's rows of an output embedding of `cut.shape` [V, H]."""

    cut: Cut

    def entered(self, hidden: Float[Tensor, "M H"]) -> Float[Tensor, "M H"]:
        """Hidden states on their way to the own words; backward adds up their gradient over the ranks."""
        return entered(hidden, self.cut.wire)

    def merged(
        self, highest: Float[Tensor, " c"], total: Float[Tensor, " c"], weighted: Float[Tensor, " c"], at_target: Float[Tensor, " c"]
    ) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Of all words, from those of each rank's own: max z, sum e^(z - max), sum e^(z - max) (z - max), and the target's z.

        The target's is 0 on ranks that do not have it.
        """
        top = highest.clone()
        self.cut.wire.take_highest(top)
        shift = highest - top
        scale = shift.exp()
        sums = torch.stack([scale * total, scale * (weighted + total * shift), at_target])
        self.cut.wire.add_up(sums)
        total, weighted, at_target = sums
        return top, total, weighted, at_target

    def whole(self, logits: Float[Tensor, "c b"]) -> Float[Tensor, "c V"]:
        """Every rank's logits side by side; no gradient."""
        result = logits.new_zeros(len(logits), self.cut.shape[0])
        result[:, self.cut.low : self.cut.high] = logits
        self.cut.wire.add_up(result)
        return result

    def own(self, logits: Float[Tensor, "c V"]) -> Float[Tensor, "c b"]:
        """The calling rank's columns."""
        return logits[:, self.cut.low : self.cut.high]
