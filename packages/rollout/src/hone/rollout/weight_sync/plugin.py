"""The engine's end of weight transfer, loaded by vLLM itself in each of its processes (entry point `vllm.general_plugins`).

Receivers: shared memory (ours), nccl and ipc (vLLM's). Each records a fingerprint of every tensor it hands to the model,
so what arrived is measured where it arrived. The only file that knows vLLM's transfer classes.
"""

import functools
import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.platforms import current_platform

from hone.rollout.weight_sync.protocol import Client
from hone.rollout.weight_sync.source import FingerprintedSource, fingerprint

# Our names of the receivers; on CUDA ours are vLLM's own with recording added.
RECEIVERS = {"shared_memory": "shared_memory", "nccl": "hone_nccl", "ipc": "hone_ipc"}


@functools.cache
def register() -> None:
    """Make the receivers known to vLLM, and end its processes with their parent; called by it, perhaps more than once in a process."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    WeightTransferEngineFactory.register_engine(RECEIVERS["shared_memory"], SharedMemoryReceiver)
    if current_platform.is_cuda():
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        WeightTransferEngineFactory.register_engine(RECEIVERS["ipc"], type("IPCReceiver", (Recording, IPCWeightTransferEngine), {}))
        WeightTransferEngineFactory.register_engine(RECEIVERS["nccl"], type("NCCLReceiver", (Recording, NCCLWeightTransferEngine), {}))


def _end_with(parent: BaseProcess) -> None:
    """Wait for the parent's death and follow it: vLLM's engine core would live on, holding its memory, with nobody to serve."""
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


class Recording:
    """Mixed in before one of vLLM's receivers: remembers, per update, what passes into the model's `load_weights`.

    `received` holds fingerprints by checkpoint name, `loaded` the model's own names of the parameters it filled.
    """

    model: Any
    received: dict[str, str]
    loaded: set[str]

    def start_weight_update(self) -> None:
        """Begin an update with nothing received."""
        self.received, self.loaded = {}, set()
        super().start_weight_update()  # pyright: ignore[reportAttributeAccessIssue] - the receiver this is mixed into

    def receive_weights(self, update_info: Any) -> None:
        """Receive as vLLM does, with the model's loader watched."""
        load = self.model.load_weights

        def watched(weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            filled = load(self._recorded(weights))
            self.loaded |= filled
            return filled

        # An instance attribute shadows the method for the length of the call; vLLM's receivers look it up on the model.
        self.model.load_weights = watched
        try:
            super().receive_weights(update_info)  # pyright: ignore[reportAttributeAccessIssue] - likewise
        finally:
            del self.model.load_weights

    def _recorded(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.received[name] = fingerprint(tensor)
            yield name, tensor


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Where the file lies while the handshake lasts."""

    path: str


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """What the file holds: names, dtypes (torch's names), shapes, byte offsets and fingerprints, in one order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    fingerprints: list[str]


class SharedMemoryReceiver(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Maps the trainer's file, checks every fingerprint against what it reads, and only then begins to load."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    model: Any
    _file: int | None = None
    received: dict[str, str]
    loaded: set[str]

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Open the file; it is unlinked right after."""
        self.shutdown()
        self._file = os.open(init_info.path, os.O_RDONLY | os.O_NOFOLLOW)

    def start_weight_update(self) -> None:
        """Begin an update with nothing received; the model is not touched before the bytes are checked."""
        self.received, self.loaded = {}, set()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load; the base class would synchronise an accelerator that need not be there."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Load all tensors, or raise ValueError naming those whose bytes are not what was sent, with the old weights intact."""
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        weights = self._mapped(update_info)
        self.received = {name: fingerprint(tensor) for name, tensor in weights}
        expected = dict(zip(update_info.names, update_info.fingerprints, strict=True))
        altered = [name for name in expected if self.received[name] != expected[name]]
        if altered:
            raise ValueError(f"{len(altered)} of {len(expected)} tensors in shared memory are not what was sent: {', '.join(altered[:8])}")
        initialize_layerwise_reload(self.model)
        with disable_mtp_completeness_check():
            self.loaded |= self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        """Process what was loaded, and the tied heads that the layerwise reload leaves behind."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self.mend_tied_heads()

    def mend_tied_heads(self) -> None:
        """Pack every tied head anew from the embedding's new bytes.

        On the CPU a head multiplies by a packed copy of its weight, made when it is loaded. A tied head is never loaded
        (the checkpoint does not name it), so after a reload its copy is still the old one and every log-probability is wrong.
        """
        for head in _tied_heads(self.model).values():
            head.quant_method.process_weights_after_loading(head)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue] - vLLM's layer

    def _mapped(self, update_info: SharedMemoryUpdateInfo) -> list[tuple[str, Tensor]]:
        """The tensors, as views of the mapped file; they are copied when they are loaded."""
        if self._file is None:
            raise RuntimeError("weights were sent before the handshake; call init_weight_transfer_engine first")
        # A private mapping costs nothing until it is written, which nobody does; torch insists on a writable buffer.
        memory = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)
        layout = zip(update_info.names, update_info.dtype_names, update_info.shapes, update_info.offsets, strict=True)
        return [(name, _view(memory, getattr(torch, dtype), shape, offset)) for name, dtype, shape, offset in layout]

    def shutdown(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _view(memory: mmap.mmap, dtype: torch.dtype, shape: list[int], offset: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape) if count else torch.empty(shape, dtype=dtype)


def _tied_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Output heads whose weight is also the weight of another module, by name."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    modules = dict(model.named_modules())
    owners: dict[int, int] = {}
    for module in modules.values():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    return {name: head for name, head in modules.items() if isinstance(head, ParallelLMHead) and owners.get(id(head.weight), 0) > 1}


class WorkerExtension:
    """Methods that vLLM adds to its workers (`worker_extension_cls`); reached by `collective_rpc`."""

    weight_transfer_engine: Any
    model_runner: Any

    def hone_alive(self) -> None:
        """Nothing: that it was called is the answer."""

    def hone_fingerprints(self) -> dict[str, str]:
        """What the last update received, by checkpoint name."""
        return self.weight_transfer_engine.received

    def hone_suspects(self) -> list[str]:
        """Parameters that the last update may have missed, most suspect first, each with the reason."""
        model, loaded = self.model_runner.get_model(), self.weight_transfer_engine.loaded
        tied = [f"{name}.weight (tied to the embedding, packed apart from it)" for name in _tied_heads(model)]
        parameters = dict(model.named_parameters())
        missed = [f"{name} (not loaded)" for name in parameters if name not in loaded]
        packed = [f"{name} (packed, cannot be read back)" for name, parameter in parameters.items() if parameter.numel() == 0]
        return [*missed, *tied, *packed]


class VLLMTrainer:
    """The learner's end on CUDA: vLLM's own nccl or ipc trainer, with the fingerprints of what it sent."""

    def __init__(self, backend: str, *, client: Client, source: FingerprintedSource, rank: int, workers: int) -> None:
        self._source = source
        if backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            init_info = IPCTrainerInitInfo(rank=rank, packed=True)
        else:
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
            from vllm.utils.network_utils import get_ip, get_open_port

            # Only rank 0 listens; the other ranks never look at the address.
            init_info = NCCLTrainerInitInfo(rank=rank, master_address=get_ip(), master_port=get_open_port(), world_size=1 + workers)
        self._trainer = WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)  # pyright: ignore[reportArgumentType] - the part of WeightSource they use

    def send_weights(self) -> dict[str, str]:
        """Send every tensor to every engine and wait until it is loaded; the fingerprints sent, by name."""
        self._trainer.send_weights()
        return self._source.fingerprints

    def close(self) -> None:
        """Release the communicator."""
        self._trainer.shutdown()
