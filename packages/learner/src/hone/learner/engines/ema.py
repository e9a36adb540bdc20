"""An exponential moving average of a role's weights, kept where its fp32 masters are: each rank averages its own part, and nothing
is gathered for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

SECTION = "ema"
"""Its name in a checkpoint."""


class Average:
    """average <- beta average + (1 - beta) master, elementwise in fp32, once an optimiser step; it begins as the masters.

    In bf16 an average with a beta near one would stand still: 1 - beta is below its rounding. That is why it follows the masters.
    """

    def __init__(self, masters: Sequence[Tensor], *, beta: float) -> None:
        self.beta = beta
        self.flats = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, masters: Sequence[Tensor]) -> None:
        """Follows a step that was taken."""
        for flat, master in zip(self.flats, masters, strict=True):
            flat.lerp_(master.detach(), 1 - self.beta)

    @contextmanager
    def swapped(self, masters: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the masters hold the average and the average the masters; outside, all is as it was, bit for bit."""
        self._swap(masters)
        try:
            yield
        finally:
            self._swap(masters)

    @torch.no_grad()
    def _swap(self, masters: Sequence[Tensor]) -> None:
        for flat, master in zip(self.flats, masters, strict=True):
            kept = master.detach().clone()
            master.detach().copy_(flat)
            flat.copy_(kept)
