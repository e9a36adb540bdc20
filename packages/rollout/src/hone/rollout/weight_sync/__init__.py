"""Weights from the learner to the engines, over vLLM's weight-transfer API, and the proof that they arrived.

Learner ranks call `trainer(...)` and its `send_weights`; the controller calls `sync` (protocol.py), which verifies.
"""

from collections.abc import Iterable

from torch import Tensor

from hone.rollout.weight_sync.protocol import Client, Trainer
from hone.rollout.weight_sync.shared_memory import SharedMemoryTrainer
from hone.rollout.weight_sync.source import FingerprintedSource


def trainer(backend: str, *, client: Client, source: Iterable[tuple[str, Tensor]], rank: int, workers: int) -> Trainer:
    """The learner's end for `backend` ("shared_memory", "ipc" or "nccl"), ready to send; constructed on every learner rank.

    `source` yields full (name, tensor) pairs afresh on every `iter`; `workers` counts the engines' devices over all engines.
    """
    fingerprinted = FingerprintedSource(source)
    if backend == "shared_memory":
        return SharedMemoryTrainer(client=client, source=fingerprinted, rank=rank)
    if backend in ("ipc", "nccl"):
        from hone.rollout.weight_sync.plugin import VLLMTrainer

        return VLLMTrainer(backend, client=client, source=fingerprinted, rank=rank, workers=workers)
    raise ValueError(f"unknown sync backend {backend!r}; choose shared_memory, ipc or nccl")
