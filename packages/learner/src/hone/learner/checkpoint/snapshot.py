"""The copy a save stops training for, and the thread that brings it to the disk while training goes on.

One buffer, kept from save to save (pinned beside a GPU), holds the bodies of all files this rank writes; the stall is one memory copy.
"""

import hashlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hone.learner.checkpoint.files import Files
from hone.learner.checkpoint.shard_file import Layout
from hone.learner.errors import CheckpointError

CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file as it must be found again."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a save on one rank: its files, or `error`, the operating system's own words and the file."""

    files: tuple[Written, ...] = ()
    error: str = ""


class Writer:
    """Writes one save at a time. What fails in the thread is kept until it is asked for by `outcome`, or raised by the next call."""

    def __init__(self, files: Files, *, pinned: bool) -> None:
        self._files, self._pinned = files, pinned
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._defect: Exception | None = None

    def reserve(self, size: int) -> None:
        """Memory for a snapshot of `size` bytes, touched so that no save waits for the system to find it."""
        if self._buffer.numel() < size:
            self._buffer = torch.zeros(size, dtype=torch.uint8, pin_memory=self._pinned)

    def save(self, layouts: Mapping[Path, Layout]) -> None:
        """Copies the pieces and returns; the files appear later. Waits for the save before, and raises what that one failed with."""
        self.raise_unseen()
        self.reserve(sum(_aligned(layout.size) for layout in layouts.values()))
        bodies, copies, at = {}, [], 0
        for path, layout in layouts.items():
            bodies[path] = self._buffer[at : at + layout.size]
            at += _aligned(layout.size)
            for piece, place in zip(layout.pieces, layout.places, strict=True):
                copies.append((bodies[path][place : place + piece.values.nbytes], piece.values.detach().view(torch.uint8)))
        # Whole pieces to each thread: torch's threads meet after every piece, and wait there for one that the system has put aside.
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
            list(pool.map(_copy, copies))
        if self._pinned:
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._run, args=(layouts, bodies), name="hone-checkpoint")
        self._thread.start()

    def outcome(self, *, wait: bool) -> Outcome | None:
        """What became of the last save, once; None if none is open, or if it is still being written and `wait` is False."""
        if self._thread is None or (self._thread.is_alive() and not wait):
            return None
        self._thread.join()
        self._thread = None
        if self._defect is not None:
            defect, self._defect = self._defect, None
            raise defect
        outcome, self._outcome = self._outcome, None
        return outcome

    def raise_unseen(self) -> None:
        """Waits for the last save and raises CheckpointError if it failed and nobody has asked."""
        outcome = self.outcome(wait=True)
        if outcome is not None and outcome.error:
            raise CheckpointError(f"the last checkpoint was not written: {outcome.error}; make room or mend the disk")

    def _run(self, layouts: Mapping[Path, Layout], bodies: Mapping[Path, Tensor]) -> None:
        try:
            self._outcome = Outcome(files=tuple(self._write(path, layout, bodies[path]) for path, layout in layouts.items()))
        except OSError as error:
            self._outcome = Outcome(error=str(error))
        except Exception as error:  # a defect of ours: raised by whoever asks next, in a thread that is watched
            self._defect = error

    def _write(self, path: Path, layout: Layout, body: Tensor) -> Written:
        written = write_file(self._files, path, [memoryview(layout.header), body.numpy().data])
        check_file(path, written)
        return written


def write_file(files: Files, path: Path, parts: list[memoryview]) -> Written:
    """A new file, flushed to the disk, and what it must hash to. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    descriptor = files.create(path)
    try:
        for part in parts:
            for begin in range(0, len(part), CHUNK_BYTES):
                chunk = part[begin : begin + CHUNK_BYTES]
                files.write(descriptor, chunk)
                digest.update(chunk)
                size += len(chunk)
        files.flush(descriptor)
    finally:
        files.close(descriptor)
    return Written(name=path.name, size=size, sha256=digest.hexdigest())


def check_file(path: Path, expected: Written) -> None:
    """Reads a file back, from the disk where the system lets go of its own copy. Raises OSError for one that is not as it was written."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        if size != expected.size:
            raise OSError(f"{path} has {size} bytes, {expected.size} were written")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:  # pyright: ignore[reportArgumentType] - a raw file has readinto
            raise OSError(f"{path} does not hold what was written: its SHA-256 is another")


def _copy(pair: tuple[Tensor, Tensor]) -> None:
    target, source = pair
    if source.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source, non_blocking=True)


def _aligned(size: int) -> int:
    return size + -size % 8
