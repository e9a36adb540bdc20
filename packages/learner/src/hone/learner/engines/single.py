"""The engine of one process: plain torch. In half precision it keeps fp32 masters and sums gradients in fp32."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from hone.learner.adapters import mark_trained
from hone.learner.checkpoint.pieces import Fragment, Piece, Source
from hone.learner.engines import state
from hone.learner.engines.protocol import StepInfo
from hone.learner.errors import NumericsError
from hone.learner.model import CriticModel, PolicyModel
from hone.learner.optim import Training, adamw
from hone.learner.published import Layer


class SingleEngine:
    """See `Engine`. Without `training` the model is frozen."""

    def __init__(self, module: PolicyModel | CriticModel, *, role: str, training: Training | None) -> None:
        self.module, self.role, self.training = module, role, training
        self.steps, self.finite = 0, True
        mark_trained(module, training is not None)
        if training is not None:
            named = [(name, one) for name, one in module.named_weights() if one.requires_grad]
            self.masters = [(parameter, _master(parameter)) for _, parameter in named]
            self.optimiser = adamw(
                ((name, master) for (name, _), (_, master) in zip(named, self.masters, strict=True)), training.config.adam
            )

    def __call__(self, *inputs: object) -> Any:
        """The module's forward."""
        return self.module(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the loss's gradient; every call is alike here."""
        self.finite = self.finite and bool(loss.isfinite())
        loss.backward()
        for parameter, master in self.masters:
            if master is not parameter and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def step(self) -> StepInfo:
        """Clips and updates; see `Engine`."""
        assert self.training is not None, f"{self.role} is frozen"
        masters = [master for _, master in self.masters]
        gradients = [master.grad for master in masters if master.grad is not None]
        norm = get_total_norm(gradients)
        if not self.finite or not norm.isfinite():
            what = f"the gradient norm is {float(norm)}" if self.finite else "a loss is not finite"
            raise NumericsError(role=self.role, step=self.steps, what=what)
        clip_grads_with_norm_(masters, self.training.config.max_norm, norm)
        lr = self.training.lr(self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            for parameter, master in self.masters:
                if master is not parameter:
                    parameter.copy_(master)
        self.steps += 1
        return StepInfo(grad_norm=float(norm), lr=lr)

    def weights(self, layers: Sequence[Layer] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its checkpoint name; see `Engine`."""
        for layer in self.module.published() if layers is None else layers:
            yield from layer.values()

    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, number format and shape of every weight."""
        return [entry for layer in self.module.published() for entry in layer.layout()]

    def pieces(self) -> list[Piece]:
        """All of it; see `Engine`."""
        return state.pieces(held := self._held(), held.fragments) if self.training is not None else []

    @torch.no_grad()
    def restore(self, source: Source) -> None:
        """Takes up a saved state; see `Engine`."""
        if self.training is not None:
            state.restore(self._held(), source)
            for parameter, master in self.masters:
                if master is not parameter:
                    parameter.copy_(master)
        self.steps = source.counters["steps"]

    def _held(self) -> state.Held:
        named = [(name, one) for name, one in self.module.named_weights() if one.requires_grad]
        fragments = [
            Fragment(name=name, shape=tuple(one.shape), start=0, flat=index, offset=0, numel=one.numel())
            for index, (name, one) in enumerate(named)
        ]
        return state.Held(masters=[master for _, master in self.masters], fragments=fragments, optimiser=self.optimiser)

    def close(self) -> None:
        """Nothing to give up."""


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter the optimiser works on: itself in fp32, else a copy in fp32, so that small updates are not rounded away."""
    return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
