"""The learner's end of weight transfer through shared memory, for engines on the same machine without a GPU.

Flow: source -> one file in shared memory (tensors end to end, 64-byte aligned) -> every engine maps it and loads.
Imports no vllm: the learner's process need not pay for that.
"""

import errno
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from hone.rollout.errors import EngineError
from hone.rollout.weight_sync.protocol import Client
from hone.rollout.weight_sync.source import FingerprintedSource

_ALIGNMENT = 64


class SharedMemoryTrainer:
    """Writes all weights into one file and tells the engines to load it; rank 0 writes, the others only take part in gathering.

    The file has an unpredictable name and mode 0600, is opened by every engine at the handshake and unlinked at once
    after it: from then on it lives exactly as long as the processes that hold it open, however they end.
    """

    def __init__(self, *, client: Client, source: FingerprintedSource, rank: int) -> None:
        self._client = client
        self._source = source
        self._file: int | None = None
        if rank == 0:
            memory = "/dev/shm"
            self._file, path = tempfile.mkstemp(prefix="hone-weights-", dir=memory if os.access(memory, os.W_OK) else None)
            try:
                client.init_weight_transfer_engine({"path": path})
            finally:
                Path(path).unlink()

    def send_weights(self) -> dict[str, str]:
        """Send every tensor to every engine and wait until it is loaded; the fingerprints sent, by name."""
        if self._file is None:
            for _ in self._source:
                pass
            return self._source.fingerprints
        names: list[str] = []
        dtype_names: list[str] = []
        shapes: list[list[int]] = []
        offsets: list[int] = []
        end = 0
        for name, tensor in self._source:
            names.append(name)
            dtype_names.append(str(tensor.dtype).removeprefix("torch."))
            shapes.append(list(tensor.shape))
            offsets.append(end)
            end = _aligned(_write(self._file, tensor, end))
        sent = self._source.fingerprints
        layout = {"names": names, "dtype_names": dtype_names, "shapes": shapes, "offsets": offsets}
        self._client.start_weight_update()
        self._client.update_weights({**layout, "fingerprints": [sent[name] for name in names]})
        self._client.finish_weight_update()
        return sent

    def close(self) -> None:
        """Give the memory back (once the engines let go of it, too)."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _write(file: int, tensor: Tensor, offset: int) -> int:
    """The tensor's bytes at `offset` of the file; the offset behind them. Raises EngineError when shared memory is full."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    try:
        # A full tmpfs refuses a write with an error; through a mapping it would kill the process with SIGBUS.
        while data:
            written = os.pwrite(file, data, offset)
            data, offset = data[written:], offset + written
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise EngineError(
            f"shared memory is full: {offset / 2**20:.0f} MiB of weights fit, the next {len(data) / 2**20:.0f} MiB did not; "
            "enlarge /dev/shm (in a container: --shm-size) to at least the size of the model"
        ) from error
    return offset
