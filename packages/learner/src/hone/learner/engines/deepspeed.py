"""The engine of many ranks: DeepSpeed, ZeRO stage 0 to 3, gloo on the CPU and nccl on CUDA; the only file that imports it."""

import contextlib
import io
import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import get_total_norm

from hone.learner.adapters import mark_trained
from hone.learner.checkpoint.pieces import Piece, Source, share
from hone.learner.config import DeepSpeedConfig
from hone.learner.engines import state, zero_state
from hone.learner.engines.protocol import StepInfo
from hone.learner.errors import NumericsError
from hone.learner.mixture import expert_blocks
from hone.learner.model import CriticModel, PolicyModel
from hone.learner.optim import Training, adamw
from hone.learner.published import Layer

NOISE: tuple[tuple[str, type[Warning]], ...] = (
    # Torch's renaming of collectives; DeepSpeed still calls them by the old names.
    (r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning),
    # DeepSpeed imports torch's compiler, which warns about a part of torch that neither of us uses.
    (r"`torch\.jit\.script_method` is deprecated", DeprecationWarning),
)
"""Warnings about DeepSpeed's own calls, which no user of this project can mend."""

WHOLE_BELOW = 100_000
"""Parameters with fewer elements stay whole on every rank under stage 3: gathering them costs more than holding them."""


def join(*, rank: int, world_size: int, master_addr: str, master_port: int, device: torch.device) -> None:
    """Makes this process rank `rank` of the job; must come before the first engine."""
    for message, category in NOISE:
        warnings.filterwarnings("ignore", message=message, category=category)
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it looks for one, and reports at length that it found none
    deepspeed = _import()
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed takes the device from there and nowhere else
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = _store(master_addr, master_port, rank=rank, world_size=world_size)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)


def _store(address: str, port: int, *, rank: int, world_size: int) -> Any:
    """The ranks' meeting place. Rank 0 listens on `address` alone, where torch by itself would listen on every interface."""
    tcp_store: Any = distributed.TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented, but missing from its module's __all__
    if rank != 0:
        return tcp_store(address, port, world_size, is_master=False)
    listening = socket.create_server((address, port))
    # The store owns the descriptor from here on, so the socket object must let go of it.
    return tcp_store(address, port, world_size, is_master=True, master_listen_fd=listening.detach(), use_libuv=False)


def leave() -> None:
    """Takes this process out of the job; DeepSpeed's own call also forgets the groups it made, so the process may join again."""
    _import().comm.destroy_process_group()


class DeepSpeedEngine:
    """See `Engine`. A frozen model (no `training`) is sharded by stage 3 alone, since nothing else of it could be."""

    def __init__(self, module: PolicyModel | CriticModel, *, role: str, training: Training | None, ds: DeepSpeedConfig) -> None:
        self.module, self.role, self.training, self.stage = module, role, training, _stage(ds)
        self.steps = 0
        self.engine: Any = module
        self.bad_losses = torch.zeros((), device=next(module.parameters()).device)
        mark_trained(module, training is not None)
        if training is None and self.stage < 3:
            return
        if self.stage == 3 and (blocks := expert_blocks(module)):
            # Whole at a time: gathered expert by expert, ranks that route differently would wait for one another for ever.
            _import().utils.set_z3_leaf_modules(module, blocks)
        optimiser = None if training is None else adamw(module.named_weights(), training.config.adam)
        with contextlib.redirect_stdout(io.StringIO()):  # one of its optimisers prints the memory in use, whatever the log level
            self.engine, *_ = _import().initialize(model=module, optimizer=optimiser, config=_settings(ds, training))
        self.optimiser = optimiser

    def __call__(self, *inputs: object) -> Any:
        """The module's forward."""
        return self.engine(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the loss's gradient; see `Engine`."""
        self.bad_losses += (~loss.detach().isfinite()).float()
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; our losses are parts of one sum.
        self.engine.backward(loss * distributed.get_world_size())

    def step(self) -> StepInfo:
        """Clips and updates; see `Engine`."""
        assert self.training is not None and self.optimiser is not None, f"{self.role} is frozen"
        distributed.all_reduce(self.bad_losses)
        if int(self.bad_losses):
            raise NumericsError(role=self.role, step=self.steps, what=f"{int(self.bad_losses)} micro-batch losses are not finite")
        lr = self.training.lr(self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        # Stage 0 leaves the whole gradient on every rank and updates whatever it is; the others, so all of bf16, look at the norm.
        norm = self._whole_norm() if self.stage == 0 else None
        if norm is None or math.isfinite(norm):
            self.engine.step()
            reported = self.engine.get_global_grad_norm() if norm is None else norm
            norm = float(reported) if self.engine.was_step_applied() else math.inf
        # DeepSpeed reports -1.0 for a norm that is not finite.
        if not math.isfinite(norm) or norm < 0:
            raise NumericsError(role=self.role, step=self.steps, what="the gradient norm is not finite")
        self.steps += 1
        return StepInfo(grad_norm=norm, lr=lr)

    def weights(self, layers: Sequence[Layer] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every weight in full under its checkpoint name; see `Engine`."""
        for layer in self.module.published() if layers is None else layers:
            with self._gathered(layer.parameters):
                yield from layer.values()

    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, number format and full shape of every weight; gathers nothing."""
        return [entry for layer in self.module.published() for entry in layer.layout()]

    def pieces(self) -> list[Piece]:
        """A rank's own share; see `Engine`."""
        if self.training is None:
            return []
        held = self._held()
        if self.stage > 0:
            return state.pieces(held, held.fragments)
        return state.pieces(held, share(held.fragments, rank=distributed.get_rank(), world_size=distributed.get_world_size()))

    def restore(self, source: Source) -> None:
        """Takes up a saved state; see `Engine`."""
        if self.training is not None:
            state.restore(self._held(), source)
            zero_state.renew_parameters(self.engine.optimizer, self.stage)
        self.steps = source.counters["steps"]

    def _held(self) -> state.Held:
        trained = [(name, parameter) for name, parameter in self.module.named_weights() if parameter.requires_grad]
        return zero_state.held(self.engine.optimizer, trained, self.stage)

    def close(self) -> None:
        """Gives up DeepSpeed's buffers and hooks."""
        if self.engine is not self.module:
            self.engine.destroy()

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[object]:
        return _import().zero.GatheredParameters(list(parameters)) if self.stage == 3 else contextlib.nullcontext()

    def _whole_norm(self) -> float:
        return float(get_total_norm([parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]))


def _stage(ds: DeepSpeedConfig) -> int:
    """The stage that DeepSpeed runs: `zero_stage`, but 1 for 0 in bf16."""
    # In bf16 DeepSpeed's stage 0 is an optimiser of its own: it sums gradients and rounds their norm in bf16, and its first update
    # is scaled as Adam's second. Stage 1 is the same mathematics as the others and shards nothing but optimiser states.
    return max(ds.zero_stage, 1) if ds.param_dtype == "bf16" else ds.zero_stage


def _settings(ds: DeepSpeedConfig, training: Training | None) -> dict[str, object]:
    settings: dict[str, object] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": _stage(ds), "stage3_param_persistence_threshold": WHOLE_BELOW},
        "bf16": {"enabled": ds.param_dtype == "bf16"},
        # AdamW as torch has it; "untested" means that DeepSpeed's own list does not name it.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if training is not None:
        settings["gradient_clipping"] = training.config.max_norm
    if ds.param_dtype == "bf16":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _import() -> ModuleType:
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # An empty table of native operators: the only one looked up here serves tensor-parallel inference, and building it would ask
    # for a C++ compiler on every machine.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed
