"""Weights through a file, where the engines have nothing in common with the learner but a file system; the slow reference.

Flow: source -> a safetensors file in the run's directory, complete before it has its name -> every engine reads it; then it goes.
"""

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hone.rollout.errors import EngineError
from hone.rollout.weight_sync.protocol import Client
from hone.rollout.weight_sync.source import FingerprintedSource


class FileTrainer:
    """Writes all weights into `directory` and tells the engines to load them; rank 0 writes, the others take part in gathering."""

    def __init__(self, *, client: Client, source: FingerprintedSource, rank: int, directory: Path) -> None:
        self._client, self._source, self._writes, self._directory = client, source, rank == 0, directory
        if self._writes:
            directory.mkdir(parents=True, exist_ok=True)
            client.init_weight_transfer_engine({})

    def send_weights(self) -> dict[str, str]:
        """Send every tensor to every engine and wait until it is loaded; the fingerprints sent, by name (none from other ranks)."""
        if not self._writes:
            for _ in self._source.plain():
                pass
            return {}
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self._source}
        path = self._directory / f"weights-{os.getpid()}.safetensors"
        try:
            self._write(path, tensors)
            del tensors
            self._client.start_weight_update()
            self._client.update_weights({"path": str(path), "fingerprints": self._source.fingerprints})
            self._client.finish_weight_update()
        finally:
            path.unlink(missing_ok=True)
        return self._source.fingerprints

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        part = path.with_suffix(".part")
        try:
            save_file(tensors, part)
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.rename(path)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"weights could not be written to {self._directory} ({error}); free space there") from error
        finally:
            part.unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is held open."""
