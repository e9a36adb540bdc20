"""The example an RL loss is tested on: packed rows with gaps, in fp64, and the ways laws rearrange it.

T packed tokens, N rows; everything is aligned with its own token: `logp[t]` belongs to `tokens[t]`, and so does `action_mask[t]`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.batch import rows_of_tokens
from hone.algos.padding import unpack_padded, valid_slots
from hone.algos.reduce import Reduction, token_weights

PER_TOKEN = ("logp", "old_logp", "ref_logp", "advantages", "rewards", "weights")
POISON = (float("nan"), float("inf"), float("-inf"), 1e300)


class LawBroken(AssertionError):
    """A function under test disobeys a law; the message says what was seen."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One micro-batch of an optimiser step. `weights`, `step_tokens` and `step_rows` are the whole step's, whatever part this is.

    A loss may use `weights` (which follow the step's reduction) or divide by the counts itself; `old_logp` is the policy's at the
    start of the step, `ref_logp` the reference's. Entries off `action_mask` carry no meaning.
    """

    logp: Float[Tensor, " T"]
    old_logp: Float[Tensor, " T"]
    ref_logp: Float[Tensor, " T"]
    advantages: Float[Tensor, " T"]
    rewards: Float[Tensor, " T"]
    weights: Float[Tensor, " T"]
    action_mask: Bool[Tensor, " T"]
    cu_seqlens: Int[Tensor, " N_plus_1"]
    step_tokens: int
    step_rows: int

    @property
    def rows(self) -> int:
        """Number of sequences N."""
        return self.cu_seqlens.numel() - 1

    def select(self, rows: Sequence[int]) -> "Case":
        """The given rows in the given order; gradients flow back to this case's numbers."""
        spans = [range(int(self.cu_seqlens[row]), int(self.cu_seqlens[row + 1])) for row in rows]
        index = torch.tensor([token for span in spans for token in span], dtype=torch.long)
        lengths = torch.tensor([0, *(len(span) for span in spans)])
        return self._take(index, lengths.cumsum(0).to(self.cu_seqlens.dtype))

    def widened(self, *, left: int, right: int) -> "Case":
        """Every row with that many tokens more before and after it, all off the mask and poisoned: padding, packed along."""
        lengths = self.cu_seqlens.diff() + left + right
        cu_seqlens = torch.cat([self.cu_seqlens[:1], lengths.cumsum(0).to(self.cu_seqlens.dtype)])
        position = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[rows_of_tokens(cu_seqlens)]
        row = rows_of_tokens(cu_seqlens)
        real = (position >= left) & (position < lengths[row] - right)
        index = (self.cu_seqlens[row] + position - left).clamp(0, self.logp.numel() - 1)
        widened = self._take(index.long(), cu_seqlens)
        return dataclasses.replace(widened, action_mask=widened.action_mask & real).poisoned()

    def poisoned(self) -> "Case":
        """NaN, infinities and huge numbers in every entry off the mask."""
        filler = torch.tensor(POISON, dtype=torch.float64).repeat(self.logp.numel())[: self.logp.numel()]
        return self.replace(**{name: torch.where(self.action_mask, getattr(self, name), filler) for name in PER_TOKEN})

    def replace(self, **changes: Tensor) -> "Case":
        """A copy with other tensors in the named fields."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type] - tensors go to tensor fields

    def _take(self, index: Int[Tensor, " K"], cu_seqlens: Int[Tensor, " M_plus_1"]) -> "Case":
        tensors = {name: getattr(self, name)[index] for name in PER_TOKEN}
        return self.replace(**tensors, action_mask=self.action_mask[index], cu_seqlens=cu_seqlens)


def example(*, reduction: Reduction | None = None, spread: float = 0.1, seed: int = 0) -> Case:
    """Five rows of uneven length with prompts, a gap, and one row without action tokens; log-ratios of about `spread` nats.

    No two numbers are alike, so that mixing up slots shows. The reduction is by token if not given.
    """
    rows = ["..##.#", ".####", ".#", "....", ".##########"]
    mask = torch.tensor([slot == "#" for row in rows for slot in row])
    cu_seqlens = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(mask.numel(), generator=generator, dtype=torch.float64)

    old_logp = -normal().abs() - 0.1
    return Case(
        logp=old_logp + spread * normal(),
        old_logp=old_logp,
        ref_logp=old_logp + normal(),
        advantages=normal(),
        rewards=normal(),
        weights=token_weights(mask, cu_seqlens, reduction or Reduction()).double(),
        action_mask=mask,
        cu_seqlens=cu_seqlens,
        step_tokens=int(mask.sum()),
        step_rows=4,
    )


def from_padded(padded_loss: Callable[..., Tensor], *, left: bool = False) -> Callable[[Case], Tensor]:
    """A loss on [B, L] tensors as a loss on cases: called with every per-token field of `Case` by name, and the two counts.

    Padding is poisoned; it stands on the right, or on the left.
    """

    def loss(case: Case) -> Tensor:
        valid = valid_slots(case.cu_seqlens, side="left" if left else "right")
        fields = {name: unpack_padded(getattr(case, name), valid, fill=float("nan")) for name in PER_TOKEN}
        mask = unpack_padded(case.action_mask, valid)
        return padded_loss(**fields, action_mask=mask, step_tokens=case.step_tokens, step_rows=case.step_rows)

    return loss
