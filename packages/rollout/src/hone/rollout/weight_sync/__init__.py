"""Weights from the learner to the engines, over vLLM's weight-transfer API, and the proof that they arrived.

Learner ranks call `trainer(...)` and its `send_weights`; the controller calls `sync` (protocol.py), which verifies.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hone.rollout.weight_sync.adapter import AdapterTrainer
from hone.rollout.weight_sync.file import FileTrainer
from hone.rollout.weight_sync.protocol import Client, Trainer
from hone.rollout.weight_sync.shared_memory import MEMORY, SharedMemoryTrainer
from hone.rollout.weight_sync.source import FingerprintedSource


def trainer(
    backend: str,
    *,
    client: Client,
    source: Iterable[tuple[str, Tensor]],
    rank: int,
    workers: int,
    directory: Path | None = None,
    dtype: torch.dtype | None = None,
    delta: bool = False,
    adapter: Mapping[str, Any] | None = None,
) -> Trainer:
    """The learner's end for `backend` ("shared_memory", "file", "ipc" or "nccl"), ready to send; constructed on every learner rank.

    `source` yields full (name, tensor) pairs afresh on every `iter`; `workers` counts the engines' devices over all engines.
    `directory` is one that every engine sees, for files; `dtype` the engines' number format, None the source's own; `delta` leaves
    out what did not change (shared memory only). With `adapter`, PEFT's configuration of one, `source` is that adapter alone.
    """
    fingerprinted = FingerprintedSource(source, dtype=dtype)
    if backend not in ("shared_memory", "file", "ipc", "nccl"):
        raise ValueError(f"unknown sync backend {backend!r}; choose shared_memory, file, ipc or nccl")
    if adapter is not None:
        place = Path(MEMORY) if backend in ("shared_memory", "ipc") else directory
        return AdapterTrainer(client=client, source=fingerprinted, rank=rank, directory=_given(place), config=adapter)
    if backend == "shared_memory":
        return SharedMemoryTrainer(client=client, source=fingerprinted, rank=rank, delta=delta)
    if backend == "file":
        return FileTrainer(client=client, source=fingerprinted, rank=rank, directory=_given(directory))
    from hone.rollout.weight_sync.plugin import VLLMTrainer

    return VLLMTrainer(backend, client=client, source=fingerprinted, rank=rank, workers=workers)


def _given(directory: Path | None) -> Path:
    if directory is None:
        raise ValueError("weights that travel in files need a directory that every engine sees")
    return directory
