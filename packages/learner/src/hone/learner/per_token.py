"""Losses that are sums of one term per token: their derivatives are known as soon as a token's log-probability is.

The head then takes gradients while it still has the logits (`token_logprobs`, `slopes`). Whether a loss is of this kind is
found out, not declared: its derivatives over half the tokens must be those it has over all of them. A sequence ratio, a
pair, or a quantile over the batch gives itself away there; and backward checks again.

The loss is called more often than it is for its value, and on rows cut down: that leaves random numbers as they were, and
what it raises there is no fault of the batch, since the call for its value comes afterwards and raises whatever is.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hone.algos.batch import AnyPacked, Batch, Packed, Scored
from hone.algos.offline import LogpLoss
from hone.algos.protocol import Loss, Outputs
from hone.learner.logprobs import Slopes, scored_positions


@runtime_checkable
class PolicyLoss(Protocol):
    """The part of an algorithm that trains a policy."""

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """Loss over any part of an optimiser step."""
        ...


class PerToken:
    """One loss during one optimiser step; asked about its first micro-batch, it answers for all."""

    def __init__(self, algo: PolicyLoss | LogpLoss[Any], *, with_entropy: bool = True) -> None:
        self.algo, self.loss, self.with_entropy = algo, cast("Callable[[Outputs, Any], Loss]", algo.loss), with_entropy
        self.holds: bool | None = None

    def slopes(self, part: Packed) -> Slopes | None:
        """What `token_logprobs` takes for this micro-batch; None where the loss is not a sum over tokens."""
        if not torch.is_grad_enabled():
            return None
        if self.holds is None:
            positions = scored_positions(part.cu_seqlens, part.action_mask)
            if len(positions) == 0:
                return None  # a filler says nothing about the loss
            self.holds = self._halves_are_the_whole(part, positions)
        if not self.holds:
            return None
        return lambda logp, entropy, positions: self._told(part, logp, entropy, positions)

    def _told(
        self, part: Packed, logp: Float[Tensor, " M"], entropy: Float[Tensor, " M"] | None, positions: Int[Tensor, " M"]
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"] | None]:
        try:
            return self._slopes(part, logp, entropy, positions)
        except Exception:  # the call for its value judges; zeros do not come true, so backward takes the logits again
            self.holds = False
            return torch.zeros_like(logp), None

    def _slopes(
        self, part: Packed, logp: Float[Tensor, " M"], entropy: Float[Tensor, " M"] | None, positions: Int[Tensor, " M"]
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"] | None]:
        leaves = [logp.detach().requires_grad_(), *([] if entropy is None else [entropy.detach().requires_grad_()])]
        with torch.enable_grad(), _random_numbers_kept(self.algo, logp.device):
            outputs = Outputs(logp=leaves[0], entropy=None if entropy is None else leaves[1])
            total = self.loss(outputs, tokens_of(part, positions)).total
            found = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else (None,) * len(leaves)
        return torch.zeros_like(logp) if found[0] is None else found[0], found[1] if entropy is not None else None

    def _halves_are_the_whole(self, part: Packed, positions: Int[Tensor, " M"]) -> bool:
        # Near the old log-probabilities, where ratios are neither 1 nor clipped; no two tokens alike.
        near = _near(part)
        number = torch.arange(len(positions), device=positions.device) + 1.0
        logp = near[positions] + 0.05 * torch.sin(number)
        entropy = 1 + 0.5 * torch.cos(number) if self.with_entropy else None
        try:
            whole = self._slopes(part, logp, entropy, positions)
            halves = [
                self._slopes(part, logp[half], None if entropy is None else entropy[half], positions[half])
                for half in HALVES
                if len(positions[half])
            ]
        except Exception:  # the call for its value judges
            return False
        # NaN among them compares as false: a loss that is broken is left to backward.
        return all(
            _same(half_of_it, None if all_of_it is None else all_of_it[half])
            for found, half in zip(halves, HALVES, strict=False)
            for half_of_it, all_of_it in zip(found, whole, strict=True)
        )


HALVES = (slice(0, None, 2), slice(1, None, 2))


def _near(part: Packed) -> Float[Tensor, " T"]:
    """Log-probabilities such as the policy may have: the old ones where there are any, else the reference's, else zeros."""
    if isinstance(part, Batch):
        return part.rollout_logp if part.old_logp is None else part.old_logp
    return torch.zeros(part.tokens.shape, device=part.tokens.device) if part.ref_logp is None else part.ref_logp


def _same(half: Float[Tensor, " M"] | None, whole: Float[Tensor, " M"] | None) -> bool:
    if half is None or whole is None:
        return half is whole
    return bool(((half - whole).abs() <= 1e-5 * whole.abs().amax()).all())


@contextlib.contextmanager
def _random_numbers_kept(algo: object, device: torch.device) -> Iterator[None]:
    """Torch's own random numbers, and those of generators the algorithm holds, go on afterwards as if nothing had happened."""
    held = [value for value in getattr(algo, "__dict__", {}).values() if isinstance(value, torch.Generator)]
    states = [generator.get_state() for generator in held]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for generator, state in zip(held, states, strict=True):
            generator.set_state(state)


def tokens_of(batch: AnyPacked, positions: Int[Tensor, " M"]) -> AnyPacked:
    """The tokens at these ascending positions, each row cut down to its own of them; rows may be left empty."""
    ends = torch.searchsorted(positions.contiguous(), batch.cu_seqlens.to(positions.dtype))
    changes: dict[str, Tensor] = {"cu_seqlens": ends.to(batch.cu_seqlens.dtype)}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor) and value.dim() > 0 and field.name not in batch.PER_ROW and field.name != "cu_seqlens":
            changes[field.name] = value[positions]
    return dataclasses.replace(batch, **changes)
