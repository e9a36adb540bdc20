"""What the reference model says of every row, asked once before training and remembered on disk for the next run.

The memory is a file named by a hash of all that decides the numbers: rows, model, number format. So DPO and KTO hold no second
model while they train, and a second run with the same data holds none at all.
"""

import hashlib
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hone.algos.batch import Packed
from hone.datasets.labelled import TokenRow
from hone.datasets.lazy import Lazy
from hone.launch.labels import packed
from hone.learner.config import DeepSpeedConfig
from hone.learner.model_files import resolve

ROWS_PER_CALL = 256


@runtime_checkable
class Asked(Protocol):
    """A reference model that answers."""

    def logp(self, role: str, batch: Packed) -> Tensor:
        """Log-probabilities [nats] of every action token, [T]."""
        ...


def remembered(
    rows: Sequence[TokenRow],
    *,
    model: str,
    ds: DeepSpeedConfig,
    directory: Path,
    reference: Callable[[], AbstractContextManager[Asked]],
    on_progress: Callable[[int, int], None],
) -> "Answers":
    """The reference's log-probabilities [nats] of each row's tokens, zero where they are not trained on.

    From `directory` if it has them; else `reference` is brought up, asked, and its answers are kept there.
    """
    file = directory / f"{key(rows, model=model, ds=ds)}.safetensors"
    lengths = array("q", (len(row.tokens) for row in rows))
    if not file.exists():
        with reference() as asked:
            parts = list(_answers(rows, asked, on_progress))
        directory.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=directory)
        os.close(handle)
        save_file({"logp": torch.cat(parts)}, partial)
        Path(partial).replace(file)
    return Answers(load_file(file)["logp"], lengths)


class Answers(Lazy[Tensor]):
    """What was said of each row, in one tensor that is mapped from its file."""

    def __init__(self, logp: Tensor, lengths: "array[int]") -> None:
        self._logp, self._ends = logp, array("q", accumulate(lengths))

    def __len__(self) -> int:
        return len(self._ends)

    def _at(self, index: int) -> Tensor:
        return self._logp[self._ends[index - 1] if index else 0 : self._ends[index]]


def _answers(rows: Sequence[TokenRow], asked: Asked, on_progress: Callable[[int, int], None]) -> Iterator[Tensor]:
    for start in range(0, len(rows), ROWS_PER_CALL):
        yield asked.logp("reference", packed(rows[start : start + ROWS_PER_CALL])).float()
        done = min(start + ROWS_PER_CALL, len(rows))
        if 4 * done // len(rows) > 4 * start // len(rows):  # a word a quarter is enough
            on_progress(done, len(rows))


def key(rows: Sequence[TokenRow], *, model: str, ds: DeepSpeedConfig) -> str:
    """A name for the answers: of the rows and their marks, of the model's files as they are now, of its number format."""
    digest = hashlib.blake2b(digest_size=16)
    directory = Path(resolve(model))
    digest.update(repr((1, str(directory.absolute()), ds.param_dtype, ds.load_in_4bit)).encode())
    for file in sorted(directory.iterdir()):
        if file.suffix in (".safetensors", ".json"):
            state = file.stat()
            digest.update(repr((file.name, state.st_size, state.st_mtime_ns)).encode())
    for row in rows:
        digest.update(len(row.tokens).to_bytes(4, "little"))
        digest.update(row.tokens.tobytes())
        digest.update(row.trained)
    return digest.hexdigest()
