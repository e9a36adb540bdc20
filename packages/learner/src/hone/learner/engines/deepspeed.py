"""The engine of many ranks: DeepSpeed, ZeRO stage 0 to 3, gloo on the CPU and nccl on CUDA; the only file that imports it."""

import contextlib
import dataclasses
import functools
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
from hone.learner.engines import compiled, state, zero_settings, zero_state
from hone.learner.engines.ema import SECTION, Average
from hone.learner.engines.loss_scale import Skips
from hone.learner.engines.model_parallel import ModelParallel, placed
from hone.learner.engines.protocol import StepInfo
from hone.learner.engines.sleep import Sleeper, own_memory, tensors_in
from hone.learner.errors import ModelError
from hone.learner.mixture import expert_blocks
from hone.learner.model import CriticModel, PolicyModel
from hone.learner.muon import Muon
from hone.learner.optim import MakeAdamW, Training, optimiser
from hone.learner.published import Layer
from hone.learner.tensor_parallel.cut import cut_of

NOISE: tuple[tuple[str, type[Warning]], ...] = (
    # Torch's renaming of collectives; DeepSpeed still calls them by the old names.
    (r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning),
    # DeepSpeed imports torch's compiler, which warns about a part of torch that neither of us uses.
    (r"`torch\.jit\.script_method` is deprecated", DeprecationWarning),
)
"""Warnings about DeepSpeed's own calls, which no user of this project can mend."""

WHOLE_BELOW = zero_settings.WHOLE_BELOW


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

    def __init__(
        self,
        module: PolicyModel | CriticModel,
        *,
        role: str,
        training: Training | None,
        ds: DeepSpeedConfig,
        parallel: ModelParallel | None = None,
    ) -> None:
        self.parallel = parallel
        self.module, self.role, self.training, self.stage = module, role, training, zero_settings.stage_of(ds)
        self.steps = 0
        self.engine: Any = module
        mark_trained(module, training is not None)
        self.optimiser: torch.optim.Optimizer | None = None
        own_memory(module)
        self.device = next(module.parameters()).device
        self.bad_losses = torch.zeros((), device=self.device)
        self.sleeper, self.average = Sleeper(self.device), None
        if training is None and self.stage < 3:
            return
        if self.stage == 3 and (blocks := expert_blocks(module)):
            # Whole at a time: gathered expert by expert, ranks that route differently would wait for one another for ever.
            _import().utils.set_z3_leaf_modules(module, blocks)
        chosen = None if training is None else optimiser(module.named_weights(), training.config, _make_adamw(ds))
        with contextlib.redirect_stdout(io.StringIO()):  # one of its optimisers prints the memory in use, whatever the log level
            settings = zero_settings.settings(ds, training, whole_below=WHOLE_BELOW, device=self.device)
            self.engine, *_ = _import().initialize(model=module, optimizer=chosen, config=settings, mpu=parallel)
        self.optimiser = chosen
        if isinstance(chosen, Muon) and self.stage > 0:
            chosen.lay_out(zero_state.matrices(self.engine.optimizer, self._held(), self.stage))
        if ds.deepcompile and training is not None:
            compiled.compile_transformer(self.engine, module)
        if training is not None:
            self.skips = Skips(role=role, bound=training.config.max_skipped_steps)
            self.scaler = self.engine.optimizer.loss_scaler if ds.param_dtype == "fp16" else None
            if self.scaler is not None:
                self.scaler.raise_error_at_min_scale = False  # our own bound ends the run, with our own error
            if training.ema_beta is not None:
                self.average = Average(self._held().masters, beta=training.ema_beta)

    def __call__(self, *inputs: object) -> Any:
        """The module's forward."""
        return self.engine(*inputs)

    @property
    def counters(self) -> dict[str, int]:
        """See `Engine`."""
        if self.training is None:
            return {"steps": self.steps}
        scale = {}
        if self.scaler is not None:
            clean = self.scaler.cur_iter - self.scaler.last_overflow_iter - 1
            scale = {"loss_scale": int(self.scaler.cur_scale), "loss_scale_clean": clean}
        muon = int(self.training.config.optim == "muon")
        return {"steps": self.steps, "muon": muon, "skipped_in_a_row": self.skips.in_a_row, **scale}

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the loss's gradient; see `Engine`."""
        self.bad_losses += (~loss.detach().isfinite()).float()
        # DeepSpeed averages over data-parallel ranks; our losses are parts of one sum.
        factor = float(self._copies)
        if last:
            distributed.all_reduce(self.bad_losses)
            # An infinite loss may have finite gradients: made NaN on every rank, so that every stage leaves the step out by itself.
            factor = math.nan if int(self.bad_losses) else factor
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * factor)

    def step(self) -> StepInfo:
        """Clips and updates; see `Engine`."""
        assert self.training is not None and self.optimiser is not None, f"{self.role} is frozen"
        # Every rank of a tensor-parallel group has counted the same losses.
        lr, bad_losses = self.training.lr(self.steps), math.ceil(int(self.bad_losses) * self._copies / distributed.get_world_size())
        self.bad_losses.zero_()
        self.training.set_lr(self.optimiser, self.steps)
        # Stage 0 leaves the whole gradient on every rank and updates whatever it is; the others look at the norm.
        norm = self._whole_norm() if self.stage == 0 else None
        mendable = self.scaler is not None and self.scaler.cur_scale > self.scaler.min_scale and not bad_losses
        if norm is None or math.isfinite(norm):
            self.engine.step()
            reported = self.engine.get_global_grad_norm() if norm is None else norm
            norm = float(reported) if self.engine.was_step_applied() else math.inf
        else:
            self.engine.zero_grad()
        # DeepSpeed reports -1.0 for a norm that is not finite.
        if not math.isfinite(norm) or norm < 0:
            if mendable:
                return StepInfo(grad_norm=math.inf, lr=lr, applied=False)
            what = f"{bad_losses} micro-batch losses are not finite" if bad_losses else "the gradient norm is not finite"
            return self.skips.leave_out(what, step=self.steps, norm=math.inf, lr=lr)
        if self.average is not None:
            self.average.update(self._held().masters)
        self.steps += 1
        self.skips.in_a_row = 0
        return StepInfo(grad_norm=norm, lr=lr)

    def weights(self, layers: Sequence[Layer] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every weight in full under its checkpoint name; see `Engine`."""
        for layer in self.module.published() if layers is None else layers:
            with self._gathered(layer.parameters):
                yield from layer.values()

    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, number format and full shape of every weight; gathers nothing."""
        return [entry for layer in self.module.published() for entry in layer.layout()]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in place of the weights; see `Engine`. Collective."""
        if self.average is None:
            raise ValueError(f"the {self.role} keeps no moving average; set --train.enable-ema")
        try:
            with self.average.swapped(self._held().masters):
                zero_state.renew_parameters(self.engine.optimizer, self.stage)
                yield
        finally:
            zero_state.renew_parameters(self.engine.optimizer, self.stage)

    def pieces(self) -> list[Piece]:
        """A rank's own share; see `Engine`."""
        if self.training is None:
            return []
        held = self._held()
        written = held.fragments
        if self.stage == 0:
            rank = distributed.get_rank() if self.parallel is None else self.parallel.get_data_parallel_rank()
            written = share(written, rank=rank, world_size=self._copies)
        if self.parallel is not None and self.parallel.tensor.rank:  # what is whole on all of them, the first one writes
            cut = {name for name, parameter in self.module.named_weights() if cut_of(parameter) is not None}
            written = [fragment for fragment in written if fragment.name in cut]
        return state.pieces(held, written, copy_of=self.sleeper.copy_of)

    def restore(self, source: Source) -> None:
        """Takes up a saved state; see `Engine`."""
        self.steps = source.counters["steps"]
        if self.training is None:
            return
        state.restore(self._held(), source)
        zero_state.renew_parameters(self.engine.optimizer, self.stage)
        self.skips.in_a_row = source.counters.get("skipped_in_a_row", 0)
        if self.scaler is not None and "loss_scale" in source.counters:
            self.scaler.cur_scale, self.scaler.last_overflow_iter = float(source.counters["loss_scale"]), -1
            self.scaler.cur_iter = source.counters["loss_scale_clean"]

    def sleep(self) -> int:
        """See `Engine`. DeepSpeed's own `offload_states` knows neither frozen models nor stage 0; see docs/decisions/0016."""
        parameters, gradients = zero_state.parameter_memory(self.module)
        kept: list[object] = [gradients, self.average and self.average.flats]
        buckets: dict[Any, Any] = {}
        if self.optimiser is not None:
            buckets = vars(self.engine.optimizer).get("ipg_buckets", {})
            kept += [vars(self.engine.optimizer), dict(self.optimiser.state)]
        return self.sleeper.sleep(parameters, tensors_in(kept), tensors_in([vars(bucket) for bucket in buckets.values()]))

    def wake(self, *, training: bool) -> int:
        """See `Engine`."""
        return self.sleeper.wake(training=training)

    def _held(self) -> state.Held:
        trained = [(name, parameter) for name, parameter in self.module.named_weights() if parameter.requires_grad]
        held = placed(zero_state.held(self.engine.optimizer, trained, self.stage), trained)
        return held if self.average is None else dataclasses.replace(held, extra={SECTION: self.average.flats})

    def close(self) -> None:
        """Gives up DeepSpeed's buffers and hooks."""
        if self.engine is not self.module:
            self.engine.destroy()

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[object]:
        return _import().zero.GatheredParameters(list(parameters)) if self.stage == 3 else contextlib.nullcontext()

    def _whole_norm(self) -> float:
        graded = [(one.grad, cut_of(one) is not None) for one in self.module.parameters() if one.grad is not None]
        if self.parallel is None:
            return float(get_total_norm([gradient for gradient, _ in graded]))
        square = get_total_norm([gradient for gradient, cut in graded if cut]).square()
        self.parallel.tensor.add_up(square)
        return float((square + get_total_norm([gradient for gradient, cut in graded if not cut]).square()).sqrt())

    @property
    def _copies(self) -> int:
        """Ranks that share an optimiser step's micro-batches among them, each with the whole model or the same part of it."""
        return distributed.get_world_size() if self.parallel is None else self.parallel.copies


def _make_adamw(ds: DeepSpeedConfig) -> MakeAdamW:
    """Torch's AdamW as it is; on the host fused, three times as fast; or DeepSpeed's."""
    if not ds.adam_offload:
        return torch.optim.AdamW
    return functools.partial(torch.optim.AdamW, fused=True) if ds.cpu_adam == "torch" else _cpu_adam


def _cpu_adam(*arguments: Any, **settings: Any) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for the host. Raises ModelError where its C++ extension cannot be built."""
    _import()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(*arguments, **settings)
    except RuntimeError as error:
        raise ModelError(
            f"--ds.cpu-adam deepspeed needs a C++ extension that could not be built here ({error.__cause__ or error}); install a C++ "
            "compiler and ninja, or --ds.cpu-adam torch"
        ) from error


def _import() -> ModuleType:
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # An empty table of native operators: the only one looked up here serves tensor-parallel inference, and building it would ask
    # for a C++ compiler on every machine.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed
