"""The engine of one process: plain torch. In half precision it keeps fp32 masters, and in fp16 it scales the loss."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from hone.learner.adapters import mark_trained
from hone.learner.checkpoint.pieces import Fragment, Piece, Source
from hone.learner.engines import state
from hone.learner.engines.ema import SECTION, Average
from hone.learner.engines.loss_scale import LossScale, Skips
from hone.learner.engines.protocol import StepInfo
from hone.learner.engines.sleep import Sleeper, own_memory, tensors_in
from hone.learner.model import CriticModel, PolicyModel
from hone.learner.optim import Training, optimiser
from hone.learner.published import Layer


class SingleEngine:
    """See `Engine`. Without `training` the model is frozen. Gradients of micro-batches are summed in `grad_accum_dtype`."""

    def __init__(
        self,
        module: PolicyModel | CriticModel,
        *,
        role: str,
        training: Training | None,
        grad_accum_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module, self.role, self.training = module, role, training
        self.steps, self.finite = 0, True
        mark_trained(module, training is not None)
        own_memory(module)
        device = next(module.parameters()).device
        self.sleeper, self.average = Sleeper(device), None
        self.grad_accum_dtype = grad_accum_dtype
        if training is not None:
            named = [(name, one) for name, one in module.named_weights() if one.requires_grad]
            self.masters = [(parameter, _master(parameter)) for _, parameter in named]
            self.sums: list[Tensor | None] = [None] * len(named)
            self.loss_scale = LossScale() if any(parameter.dtype == torch.float16 for _, parameter in named) else None
            self.skips = Skips(role=role, bound=training.config.max_skipped_steps)
            masters = ((name, master) for (name, _), (_, master) in zip(named, self.masters, strict=True))
            self.optimiser = optimiser(masters, training.config)
            if training.ema_beta is not None:
                self.average = Average([master for _, master in self.masters], beta=training.ema_beta)

    def __call__(self, *inputs: object) -> Any:
        """The module's forward."""
        return self.module(*inputs)

    @property
    def counters(self) -> dict[str, int]:
        """See `Engine`."""
        if self.training is None:
            return {"steps": self.steps}
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale.scale, "loss_scale_clean": self.loss_scale.clean}
        muon = int(self.training.config.optim == "muon")
        return {"steps": self.steps, "muon": muon, "skipped_in_a_row": self.skips.in_a_row, **scale}

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the loss's gradient; every call is alike here."""
        self.finite = self.finite and bool(loss.isfinite())
        (loss if self.loss_scale is None else loss * self.loss_scale.scale).backward()
        for index, (parameter, master) in enumerate(self.masters):
            if master is not parameter and parameter.grad is not None:
                gradient, before = parameter.grad.to(self.grad_accum_dtype), self.sums[index]
                self.sums[index] = gradient if before is None else before.add_(gradient)
                parameter.grad = None

    def step(self) -> StepInfo:
        """Clips and updates; see `Engine`."""
        assert self.training is not None, f"{self.role} is frozen"
        masters = [master for _, master in self.masters]
        scale = 1 if self.loss_scale is None else self.loss_scale.scale
        for index, (parameter, master) in enumerate(self.masters):
            if master is not parameter:
                gradient, self.sums[index] = self.sums[index], None
                master.grad = None if gradient is None else gradient.float().div_(scale)
        norm = get_total_norm([master.grad for master in masters if master.grad is not None])
        lr, finite = self.training.lr(self.steps), self.finite
        self.finite = True
        if not finite or not norm.isfinite():
            self.optimiser.zero_grad()
            what = f"the gradient norm is {float(norm)}" if finite else "a loss is not finite"
            if finite and self.loss_scale is not None and self.loss_scale.update(overflow=True):
                return StepInfo(grad_norm=float(norm), lr=lr, applied=False)
            return self.skips.leave_out(what, step=self.steps, norm=float(norm), lr=lr)
        if self.loss_scale is not None:
            self.loss_scale.update(overflow=False)
        clip_grads_with_norm_(masters, self.training.config.max_norm, norm)
        self.training.set_lr(self.optimiser, self.steps)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self._renew_parameters()
        if self.average is not None:
            self.average.update(masters)
        self.steps += 1
        self.skips.in_a_row = 0
        return StepInfo(grad_norm=float(norm), lr=lr)

    def weights(self, layers: Sequence[Layer] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its checkpoint name; see `Engine`."""
        for layer in self.module.published() if layers is None else layers:
            yield from layer.values()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in place of the weights; see `Engine`."""
        if self.average is None:
            raise ValueError(f"the {self.role} keeps no moving average; set --train.enable-ema")
        try:
            with self.average.swapped([master for _, master in self.masters]):
                self._renew_parameters()
                yield
        finally:
            self._renew_parameters()

    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, number format and shape of every weight."""
        return [entry for layer in self.module.published() for entry in layer.layout()]

    def pieces(self) -> list[Piece]:
        """All of it; see `Engine`."""
        if self.training is None:
            return []
        held = self._held()
        return state.pieces(held, held.fragments, copy_of=self.sleeper.copy_of)

    @torch.no_grad()
    def restore(self, source: Source) -> None:
        """Takes up a saved state; see `Engine`."""
        self.steps = source.counters["steps"]
        if self.training is None:
            return
        state.restore(self._held(), source)
        self._renew_parameters()
        self.skips.in_a_row = source.counters.get("skipped_in_a_row", 0)
        if self.loss_scale is not None and "loss_scale" in source.counters:
            self.loss_scale.scale, self.loss_scale.clean = source.counters["loss_scale"], source.counters["loss_scale_clean"]

    def sleep(self) -> int:
        """See `Engine`."""
        parameters = [one.detach() for one in self.module.parameters()]
        kept = [] if self.training is None else [self.masters, self.sums, dict(self.optimiser.state), self.average and self.average.flats]
        gradients = [one.grad for one in self.module.parameters()]
        return self.sleeper.sleep(parameters, tensors_in([kept, gradients]))

    def wake(self, *, training: bool) -> int:
        """See `Engine`."""
        return self.sleeper.wake(training=training)

    @torch.no_grad()
    def _renew_parameters(self) -> None:
        for parameter, master in self.masters:
            if master is not parameter:
                parameter.copy_(master)

    def _held(self) -> state.Held:
        named = [(name, one) for name, one in self.module.named_weights() if one.requires_grad]
        fragments = [
            Fragment(name=name, shape=tuple(one.shape), start=0, flat=index, offset=0, numel=one.numel())
            for index, (name, one) in enumerate(named)
        ]
        extra = {} if self.average is None else {SECTION: self.average.flats}
        masters = [master for _, master in self.masters]
        return state.Held(masters=masters, fragments=fragments, optimiser=self.optimiser, extra=extra)

    def close(self) -> None:
        """Nothing to give up."""


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter the optimiser works on: itself in fp32, else a copy in fp32, so that small updates are not rounded away."""
    return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
