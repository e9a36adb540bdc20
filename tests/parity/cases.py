"""Numbers both sides are given: padded [B, L] as the peers want them (zeros off the mask), and packed [T] as ours does.

B rows, L slots; a slot off `valid` is padding, one on `valid` but off `mask` the environment's. Log-probabilities in nats, fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hone.algos.padding import pack_padded
from hone.algos.reduce import Reduction, token_weights
from hone.learner.logprobs import token_logprobs

TOLERANCE = 1e-6
"""Largest difference between two fp32 results that count as the same."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Four rows of unlike lengths, one with a gap where `gap` is set."""

    valid: Tensor
    mask: Tensor
    logp: Tensor
    old_logp: Tensor
    rollout_logp: Tensor
    ref_logp: Tensor
    advantages: Tensor
    values: Tensor
    old_values: Tensor
    returns: Tensor
    rewards: Tensor
    cu_seqlens: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cu_seqlens", pack_padded(self.logp, self.valid)[1])

    def packed(self, padded: Tensor) -> Tensor:
        """The tokens of a padded tensor end to end, with gradient."""
        return pack_padded(padded, self.valid)[0]

    @property
    def action_mask(self) -> Tensor:
        """The mask, packed."""
        return self.packed(self.mask)

    def weights(self, over: str = "token", length: int | None = None) -> Tensor:
        """Weights as if the case were one optimiser step."""
        return token_weights(self.action_mask, self.cu_seqlens, Reduction(over=over, length=length))

    def per_row(self, values: list[float]) -> Tensor:
        """One number per row, on all of its action tokens, padded."""
        return torch.tensor(values)[:, None] * self.mask


def case(*, gap: bool = True) -> Case:
    """Rows of 5, 3, 7 and 1 slots; for good tokens and bad, ratios lie below every clip the tests use, above every one, and near one."""
    generator = torch.Generator().manual_seed(35)
    lengths = torch.tensor([5, 3, 7, 1])
    valid = torch.arange(7) < lengths[:, None]
    mask = valid.clone()
    if gap:
        mask[2, 2:4] = False

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(valid.shape, generator=generator) * mask

    logp = -(0.1 + 2.5 * torch.rand(valid.shape, generator=generator)) * mask
    old_logp = logp - noise(0.4)
    rollout_logp, ref_logp, advantages = old_logp - noise(0.6), logp - noise(0.5), noise(1.0)
    ratio = torch.exp(logp - old_logp)
    for place in (ratio < 0.66, (ratio > 0.9) & (ratio < 1.1), ratio > 1.5):
        assert {-1.0, 1.0} <= set(advantages.sign()[place & mask].tolist())
    values = noise(0.5)
    return Case(
        valid=valid,
        mask=mask,
        logp=logp,
        old_logp=old_logp,
        rollout_logp=rollout_logp,
        ref_logp=ref_logp,
        advantages=advantages,
        values=values,
        old_values=values - noise(0.5),
        returns=noise(0.7),
        rewards=noise(0.3),
    )


def agree(theirs: Tensor, ours: Tensor) -> None:
    """The same shape and, in fp32, at most 1e-6 apart; `pytest -rP` shows how far."""
    assert theirs.shape == ours.shape
    assert ours.dtype == torch.float32
    difference = float((theirs.detach() - ours.detach()).abs().max())
    print(f"largest difference {difference:.1e}")
    assert difference <= TOLERANCE


def value_and_gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """A scalar loss and its gradient, at a leaf of its own."""
    leaf = at.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def losses_agree(theirs: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Two losses of one tensor have the same value and the same gradient."""
    their_value, their_gradient = value_and_gradient(theirs, at)
    our_value, our_gradient = value_and_gradient(ours, at)
    assert float(their_gradient.abs().max()) > 0
    agree(their_value, our_value)
    agree(their_gradient, our_gradient)


def single(*numbers: float) -> tuple[Tensor, ...]:
    """Each number as a padded tensor of one row with one token."""
    return tuple(torch.tensor([[number]]) for number in numbers)


def our_head(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Our learner's log-probabilities and entropies of given logits [T, V]: hidden states under an identity for a head."""
    hidden = torch.cat([logits, torch.zeros(1, logits.shape[1])])
    tokens, cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), tokens]), torch.tensor([0, tokens.numel() + 1])
    mask = torch.arange(tokens.numel()) > 0
    logp, entropy = token_logprobs(
        hidden, torch.eye(logits.shape[1]), tokens, cu_seqlens, mask, temperature=temperature, chunk_tokens=3, with_entropy=True
    )
    return logp[1:], entropy[1:]
