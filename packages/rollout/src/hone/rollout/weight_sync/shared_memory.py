"""Weights through shared memory, for engines on the same machine without a GPU: the learner's end, and how the other end reads.

Flow: source -> regions of one file in shared memory (tensors end to end, 64-byte aligned) -> every engine maps it and loads.
While the learner fills a region, the engines check the one before; a larger tensor is checked as it grows.
Imports no vllm: the learner's process need not pay for that.
"""

import errno
import mmap
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from hone.rollout.errors import EngineError
from hone.rollout.weight_sync.protocol import Client
from hone.rollout.weight_sync.source import FingerprintedSource, RunningFingerprint, bytes_of, copied, fingerprint

MEMORY = "/dev/shm"
REGION_BYTES = 1 << 26
"""What is announced to the engines in one call: enough that calls cost nothing, little enough that the last check is short."""
_ALIGNMENT = 64


def _update() -> dict[str, list[Any]]:
    return {key: [] for key in ("names", "dtype_names", "shapes", "offsets", "fingerprints", "unchanged", "ahead")}


@dataclass
class _Region:
    """A part of the file, mapped; `used` of its bytes are taken."""

    start: int
    memory: UInt8[Tensor, " B"]
    used: int = 0
    update: dict[str, list[Any]] = field(default_factory=_update)

    @property
    def size(self) -> int:
        """Bytes it has."""
        return self.memory.numel()


class SharedMemoryTrainer:
    """Writes all weights into one file and tells the engines to load it; rank 0 writes, the others only take part in gathering.

    The file has an unpredictable name and mode 0600, is opened by every engine at the handshake and unlinked at once
    after it: from then on it lives exactly as long as the processes that hold it open, however they end. With `delta`, tensors
    that are what they were are neither copied nor loaded again; after an update that failed everything is.
    """

    def __init__(
        self, *, client: Client, source: FingerprintedSource, rank: int, delta: bool = False, region_bytes: int = REGION_BYTES
    ) -> None:
        self._client, self._source, self._delta, self._region_bytes = client, source, delta, region_bytes
        self._file: int | None = None
        self._mapped: list[tuple[int, UInt8[Tensor, " B"]]] = []
        self._reserved = 0
        self._served: dict[str, str] = {}
        if rank == 0:
            self._file, path = tempfile.mkstemp(prefix="hone-weights-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None)
            try:
                client.init_weight_transfer_engine({"path": path})
            finally:
                Path(path).unlink()

    def send_weights(self) -> dict[str, str]:
        """Send every tensor to every engine and wait until it is loaded; the fingerprints sent, by name (none from other ranks)."""
        if self._file is None:
            for _ in self._source.plain():
                pass
            return {}
        before, self._served = self._served if self._delta else {}, {}
        self._client.start_weight_update()
        # One thread, so that regions are announced in turn; leaving the block waits for those under way.
        with ThreadPoolExecutor(max_workers=1) as announcing:
            announced: list[Future[None]] = []
            sent = self._write(before, lambda update: announced.append(announcing.submit(self._client.update_weights, update)), announced)
        for one in announced:
            one.result()
        self._client.finish_weight_update()
        self._served = sent
        return sent

    def _write(self, before: dict[str, str], announce: Callable[[dict[str, Any]], None], announced: list[Future[None]]) -> dict[str, str]:
        """Fill region after region; the fingerprints of all tensors."""
        sent: dict[str, str] = {}
        region, count = None, 0
        for name, tensor in self._source.plain():
            if region is None or region.used + tensor.nbytes > region.size:
                if region is not None:
                    announce(region.update)
                for one in announced:
                    if one.done():
                        one.result()  # an engine that refused a region need not be sent the others
                region, count = self._region(count, tensor.nbytes), count + 1
            offset, end = region.used, region.used + tensor.nbytes
            if name in before and fingerprint(tensor) == before[name]:
                digest = before[name]
                region.update["unchanged"].append(name)
            else:
                self._reserve(region.start + end)
                begin = region.start + offset
                digest = copied(
                    tensor,
                    region.memory[offset:end],
                    self._region_bytes,
                    lambda ready, begin=begin: announce(_update() | {"ahead": [begin, ready]}),
                )
            sent[name] = digest
            entry = (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), region.start + offset, digest)
            for key, value in zip(("names", "dtype_names", "shapes", "offsets", "fingerprints"), entry, strict=True):
                region.update[key].append(value)
            region.used = _aligned(end)
        if region is not None:
            announce(region.update)
        return sent

    def _region(self, index: int, first: int) -> _Region:
        """The next part of the file, at least as large as its `first` tensor [bytes]; made once, for the layout stays."""
        if index == len(self._mapped):
            assert self._file is not None
            start = 0 if not self._mapped else self._mapped[-1][0] + self._mapped[-1][1].numel()
            size = _aligned(max(first, self._region_bytes), mmap.ALLOCATIONGRANULARITY)
            # A file with holes: memory is taken by what is written, not by what is mapped.
            os.ftruncate(self._file, start + size)
            self._mapped.append((start, torch.frombuffer(mmap.mmap(self._file, size, offset=start), dtype=torch.uint8)))
        start, memory = self._mapped[index]
        return _Region(start, memory)

    def _reserve(self, end: int) -> None:
        """Take the memory up to `end`: a full tmpfs refuses this with an error, a write through the mapping with the signal SIGBUS."""
        assert self._file is not None
        size = end - self._reserved
        if size <= 0:
            return
        try:
            os.posix_fallocate(self._file, self._reserved, size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise EngineError(
                f"shared memory is full: {self._reserved / 2**20:.0f} MiB of weights fit, the next {size / 2**20:.0f} MiB did not; "
                "enlarge /dev/shm (in a container: --shm-size) to at least the size of the model"
            ) from error
        self._reserved = end

    def close(self) -> None:
        """Give the memory back (once the engines let go of it, too)."""
        if self._file is not None:
            os.close(self._file)
            self._file, self._mapped = None, []


class Mapping:
    """The engine's end of the file: views of what was announced, as the trainer's process wrote it."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        self._memory: mmap.mmap | None = None
        self._ahead: tuple[int, int, RunningFingerprint] | None = None

    def begin(self) -> None:
        """A new update: nothing is taken of any tensor."""
        self._ahead = None

    def ahead(self, offset: int, ready: int) -> None:
        """Take the fingerprint of a large tensor as far as it is written: its first `ready` bytes, a multiple of `source.PIECE`."""
        memory = self._mapped()
        address = _view(memory, torch.uint8, [ready], offset).data_ptr()
        if self._ahead is None or self._ahead[0] != address:
            self._ahead = address, 0, RunningFingerprint()
        _, done, running = self._ahead
        running.add(_view(memory, torch.uint8, [ready - done], offset + done))
        self._ahead = address, ready, running

    def fingerprint(self, tensor: Tensor) -> str:
        """Of one of `tensors`: what is left of it is read, if a part was taken ahead."""
        if self._ahead is None or self._ahead[0] != tensor.data_ptr():
            return fingerprint(tensor)
        (_, done, running), self._ahead = self._ahead, None
        running.add(bytes_of(tensor)[done:])
        return running.of(tensor)

    def tensors(self, update: Any) -> list[tuple[str, Tensor]]:
        """The tensors of one region by name, as views; whoever loads them copies them."""
        memory = self._mapped()
        layout = zip(update.names, update.dtype_names, update.shapes, update.offsets, strict=True)
        return [(name, _view(memory, getattr(torch, dtype), shape, offset)) for name, dtype, shape, offset in layout]

    def _mapped(self) -> mmap.mmap:
        size = os.fstat(self._file).st_size
        if self._memory is None or len(self._memory) < size:
            # A private mapping costs nothing until it is written, which nobody does; torch insists on a writable buffer.
            self._memory, self._ahead = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY), None
        return self._memory

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


def _view(memory: mmap.mmap, dtype: torch.dtype, shape: list[int], offset: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape) if count else torch.empty(shape, dtype=dtype)


def _aligned(offset: int, to: int = _ALIGNMENT) -> int:
    return -(-offset // to) * to
