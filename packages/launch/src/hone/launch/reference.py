"""What the reference model says of every row, asked once and remembered on disk for later epochs and the next run.

The memory is two files named by a hash of all that decides the numbers: rows, model, number format. A run asks for all rows before
training, and holds no second model while it trains, or for those of each step as they are drawn.
"""

import fcntl
import hashlib
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hone.algos.batch import Packed
from hone.datasets.labelled import TokenRow
from hone.datasets.token_table import libraries
from hone.launch.labels import packed
from hone.learner.config import DeepSpeedConfig
from hone.learner.model_files import resolve

ROWS_PER_CALL = 256
NUMBER_BYTES, PLACE_BYTES = 4, 8


@runtime_checkable
class Asked(Protocol):
    """A reference model that answers."""

    def logp(self, role: str, batch: Packed) -> Tensor:
        """Log-probabilities [nats] of every action token, [T]."""
        ...


class Memory:
    """The reference's log-probabilities [nats] of each of `rows` numbered rows of tokens, zero where they are not trained on.

    `NAME.logp` has them as fp32 in the order in which they were asked for, `NAME.places` where in it those of each row end [bytes], 0
    for a row that was not asked for. Runs may share a memory, and one that is killed leaves what it knew.
    """

    def __init__(self, directory: Path, name: str, *, rows: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._logp, self._places = (self._opened(directory / f"{name}.{kind}") for kind in ("logp", "places"))
        os.ftruncate(self._places, PLACE_BYTES * rows)
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    @property
    def whole(self) -> bool:
        """Whether every row was asked for."""
        return bool(np.frombuffer(os.pread(self._places, PLACE_BYTES * self._rows, 0), dtype="<i8").all())

    def of(self, rows: Sequence[TokenRow], numbers: Sequence[int], asked: Asked) -> list[Tensor]:
        """What was said of these rows, which have these numbers; those not asked for yet are asked for, and kept."""
        own = dict(zip(numbers, rows, strict=True))
        missing = [number for number in own if not self._end(number)]
        for start in range(0, len(missing), ROWS_PER_CALL):
            part = missing[start : start + ROWS_PER_CALL]
            said = asked.logp("reference", packed([own[number] for number in part])).float()
            self._keep(part, said, [len(own[number].tokens) for number in part])
        return [self._read(number, len(row.tokens)) for number, row in zip(numbers, rows, strict=True)]

    def _opened(self, file: Path) -> int:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, handle)
        return handle

    def _end(self, number: int) -> int:
        return int.from_bytes(os.pread(self._places, PLACE_BYTES, PLACE_BYTES * number), "little")

    def _read(self, number: int, length: int) -> Tensor:
        wanted = NUMBER_BYTES * length
        found = os.pread(self._logp, wanted, self._end(number) - wanted)
        return torch.frombuffer(bytearray(found), dtype=torch.float32)

    def _keep(self, numbers: Sequence[int], logp: Tensor, lengths: Sequence[int]) -> None:
        content = logp.contiguous().numpy().tobytes()
        # One run at a time, and the numbers before their places: a place never leads to what is not there.
        fcntl.flock(self._logp, fcntl.LOCK_EX)
        try:
            end = os.lseek(self._logp, 0, os.SEEK_END)
            written = 0
            while written < len(content):
                written += os.pwrite(self._logp, content[written:], end + written)
            os.fdatasync(self._logp)
            for number, length in zip(numbers, lengths, strict=True):
                end += NUMBER_BYTES * length
                os.pwrite(self._places, end.to_bytes(PLACE_BYTES, "little"), PLACE_BYTES * number)
        finally:
            fcntl.flock(self._logp, fcntl.LOCK_UN)


def key(rows: str, *, model: str, ds: DeepSpeedConfig) -> str:
    """A name for the answers: of what `rows` says of the rows, of what made ids of them, of the model's files as they are now."""
    digest = hashlib.blake2b(digest_size=16)
    directory = Path(resolve(model))
    digest.update(repr((2, rows, libraries(), str(directory.absolute()), ds.param_dtype, ds.load_in_4bit)).encode())
    for file in sorted(directory.iterdir()):
        if file.suffix in (".safetensors", ".json"):
            state = file.stat()
            digest.update(repr((file.name, state.st_size, state.st_mtime_ns)).encode())
    return digest.hexdigest()
