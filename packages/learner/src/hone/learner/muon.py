"""Muon for hidden matrices and AdamW for everything else, as one torch optimiser that steps whole matrices or ZeRO's flat shards.

Per matrix W [m, n] with gradient g:  b <- mu b + (1 - mu) g;  u = (1 - mu) g + mu b (Nesterov) or b;  o = orthogonalised(u);
W <- (1 - lr decay) W - lr sqrt(max(1, m / n)) o.  Momentum and decay are elementwise, so they live in the shards; only u is brought
together, on one rank a matrix (or a stack of experts' matrices, each by itself), which orthogonalises it for all.

Reference: https://kellerjordan.github.io/posts/muon/ and torch.optim.Muon, which is tested to give the same. DeepSpeed's own Muon
takes neither the number of iterations nor the choice of Nesterov, and clips what is orthogonalised already.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn

from hone.learner.checkpoint.pieces import Fragment

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix, or one for each expert, of a flat shard: its shape, and which range of it the calling rank holds (None: nothing)."""

    shape: tuple[int, ...]
    part: Fragment | None


def orthogonalised(update: Float[Tensor, "*E m n"], *, steps: int) -> Float[Tensor, "*E m n"]:
    """Newton-Schulz: the nearest matrix with singular values near one (0.7 to 1.2 after 5 steps); bf16 on a GPU, fp32 on the CPU.

    Of a stack of E experts' matrices, each by itself.
    """
    a, b, c = COEFFICIENTS
    tall = update.shape[-2] > update.shape[-1]
    x = (update.mT if tall else update).to(torch.bfloat16 if update.is_cuda else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """`groups` have `use_muon`: True with lr, momentum, nesterov, ns_steps, weight_decay; False with AdamW's settings.

    Tensors of one dimension in a Muon group are shards: `lay_out` says of what, before the first step with a gradient.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(list(groups), {})
        self._matrices: dict[int, Sequence[Matrix]] = {}
        others = [group for group in self.param_groups if not group["use_muon"]]
        self._adamw = torch.optim.AdamW(others or [torch.zeros(0)])
        for group in others:
            for name, value in self._adamw.defaults.items():
                group.setdefault(name, value)

    def lay_out(self, matrices: Mapping[Tensor, Sequence[Matrix]]) -> None:
        """Which matrices, in an order that is the same on all ranks, lie in each shard."""
        self._matrices = {id(shard): tuple(inside) for shard, inside in matrices.items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's may return a loss
        """One update; collective where there are shards."""
        assert closure is None, "no closures"
        for group in self.param_groups:
            for parameter in group["params"] if group["use_muon"] else ():
                if parameter.grad is not None:
                    self._step(parameter, group)
        self._adamw.param_groups = [group for group in self.param_groups if not group["use_muon"]]
        self._adamw.state = self.state
        self._adamw.step()

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, mu = parameter.grad, group["momentum"]
        assert gradient is not None
        buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        buffer.lerp_(gradient, 1 - mu)
        update = gradient.lerp(buffer, mu) if group["nesterov"] else buffer
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if parameter.dim() > 1:
            change = orthogonalised(update, steps=group["ns_steps"])
            parameter.sub_(change, alpha=group["lr"] * _ratio(tuple(parameter.shape)))
            return
        inside = self._matrices.get(id(parameter))
        if inside is None:  # DeepSpeed tries a step on nothing before it hands the optimiser out
            assert not gradient.any(), "lay_out was not called"
            return
        ranks, rank = distributed.get_world_size(), distributed.get_rank()
        for first in range(0, len(inside), ranks):
            together = inside[first : first + ranks]  # a matrix for each rank
            whole = [_whole(matrix, update) for matrix in together]
            _wait([distributed.reduce(one, dst=owner, async_op=True) for owner, one in enumerate(whole)])
            if rank < len(together):
                # Of a tall matrix the result is a transposed view, whose memory in its own order is another matrix to the receivers.
                whole[rank] = orthogonalised(whole[rank], steps=group["ns_steps"]).contiguous()
            _wait([distributed.broadcast(one, src=owner, async_op=True) for owner, one in enumerate(whole)])
            for matrix, change in zip(together, whole, strict=True):
                if (part := matrix.part) is not None:
                    own = change.reshape(-1)[part.start : part.start + part.numel]
                    parameter[part.offset : part.offset + part.numel].sub_(own, alpha=group["lr"] * _ratio(matrix.shape))


def hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon is for it: a matrix, or one for each expert, within a numbered layer, so no embedding, output or value head."""
    shape, parts = getattr(parameter, "ds_shape", parameter.shape), name.split(".")
    # Other weights of three dimensions are convolutions.
    return (len(shape) == 2 or (len(shape) == 3 and "experts" in parts)) and any(part.isdigit() for part in parts)


def _whole(matrix: Matrix, update: Tensor) -> Tensor:
    """A matrix of zeros but for what this rank holds of it: summed over the ranks, the update."""
    whole = torch.zeros(matrix.shape, dtype=update.dtype, device=update.device)
    if (part := matrix.part) is not None:
        whole.view(-1)[part.start : part.start + part.numel] = update[part.offset : part.offset + part.numel]
    return whole


def _wait(works: Iterable[Any]) -> None:
    for work in works:
        work.wait()


def _ratio(shape: tuple[int, ...]) -> float:
    return max(1.0, shape[-2] / shape[-1]) ** 0.5
