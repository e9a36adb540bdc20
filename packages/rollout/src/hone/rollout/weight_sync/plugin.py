"""The engine's end of weight transfer, loaded by vLLM itself in each of its processes (entry point `vllm.general_plugins`).

Receivers: shared memory and files (ours, `receivers.py`), nccl and ipc (vLLM's). Each records a fingerprint of every tensor it
hands to the model, so what arrived is measured where it arrived.
"""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.platforms import current_platform

from hone.rollout.weight_sync.adapter import TENSORS
from hone.rollout.weight_sync.protocol import Client
from hone.rollout.weight_sync.receivers import FileReceiver, SharedMemoryReceiver, abandon, tied_heads
from hone.rollout.weight_sync.source import FingerprintedSource, fingerprint

# Our names of the receivers; on CUDA ours are vLLM's own with recording added.
RECEIVERS = {"shared_memory": "shared_memory", "file": "file", "nccl": "hone_nccl", "ipc": "hone_ipc"}


@functools.cache
def register() -> None:
    """Make the receivers known to vLLM, and end its processes with their parent; called by it, perhaps more than once in a process."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    WeightTransferEngineFactory.register_engine(RECEIVERS["shared_memory"], SharedMemoryReceiver)
    WeightTransferEngineFactory.register_engine(RECEIVERS["file"], FileReceiver)
    if current_platform.is_cuda():
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        WeightTransferEngineFactory.register_engine(RECEIVERS["ipc"], ipc_receiver())
        WeightTransferEngineFactory.register_engine(RECEIVERS["nccl"], type("NCCLReceiver", (Recording, NCCLWeightTransferEngine), {}))


def ipc_receiver() -> type[Any]:
    """The receiver of CUDA IPC: that of vLLM, with recording added."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    return type("IPCReceiver", (Recording, IPCWeightTransferEngine), {})


def _end_with(parent: BaseProcess) -> None:
    """Wait for the parent's death and follow it: vLLM's engine core would live on, holding its memory, with nobody to serve."""
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


class Recording:
    """Mixed in before one of vLLM's receivers: remembers, per update, what passes into the model's `load_weights`.

    `received` holds fingerprints by checkpoint name, `loaded` the model's own names of the parameters it filled.
    """

    model: Any
    model_config: Any
    received: dict[str, str]
    loaded: set[str]

    def start_weight_update(self) -> None:
        """Begin an update with nothing received, and nothing left of one that failed."""
        self.received, self.loaded = {}, set()
        abandon(self.model, self.model_config)
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


class WorkerExtension:
    """Methods that vLLM adds to its workers (`worker_extension_cls`); reached by `collective_rpc`."""

    weight_transfer_engine: Any
    model_runner: Any
    hone_adapted: bool = False

    def hone_alive(self) -> None:
        """Nothing: that it was called is the answer."""

    def hone_fingerprints(self) -> dict[str, str]:
        """What the last update received, by checkpoint name."""
        return self.weight_transfer_engine.received

    def hone_abandon_update(self) -> None:
        """Give up an update that was begun: the next one starts afresh."""
        self._weight_update_active = False
        self.weight_transfer_engine.reset_weight_update_target()

    def hone_check_adapter(self, path: str, fingerprints: dict[str, str]) -> None:
        """Read the adapter that is to be loaded next; ValueError names the tensors that are not what was sent."""
        with safe_open(Path(path) / TENSORS, framework="pt") as file:
            found = {name: fingerprint(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no dictionary
        altered = [name for name in fingerprints.keys() | found.keys() if found.get(name) != fingerprints.get(name)]
        if altered:
            raise ValueError(f"{len(altered)} of the adapter's {len(fingerprints)} tensors are not what was sent: {', '.join(altered[:8])}")
        self.weight_transfer_engine.received = found
        self.hone_adapted = True

    def hone_suspects(self) -> list[str]:
        """Parameters that the last update may have missed, most suspect first, each with the reason."""
        if self.hone_adapted:
            return ["the weights below the adapter (never sent: the engine read its own)"]
        model, loaded = self.model_runner.get_model(), self.weight_transfer_engine.loaded
        tied = [f"{name}.weight (tied to the embedding, packed apart from it)" for name in tied_heads(model)]
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
