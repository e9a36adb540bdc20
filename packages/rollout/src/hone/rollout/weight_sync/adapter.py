"""A LoRA adapter alone on its way to engines that serve it over the base model, which never travels.

Flow: source (A and B of every layer) -> a directory in PEFT's own format -> every engine loads it in place of the last; then it goes.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hone.rollout.weight_sync.protocol import Client
from hone.rollout.weight_sync.source import FingerprintedSource

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class AdapterTrainer:
    """Writes the adapter into a private directory below `directory` and tells the engines to load it; rank 0 writes.

    `source` has PEFT's names ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"), `config` is PEFT's configuration.
    """

    def __init__(self, *, client: Client, source: FingerprintedSource, rank: int, directory: Path, config: Mapping[str, Any]) -> None:
        self._client, self._source, self._writes, self._directory, self._config = client, source, rank == 0, directory, dict(config)
        if self._writes:
            directory.mkdir(parents=True, exist_ok=True)

    def send_weights(self) -> dict[str, str]:
        """Send the adapter to every engine and wait until it is loaded; the fingerprints sent, by name (none from other ranks)."""
        if not self._writes:
            for _ in self._source.plain():
                pass
            return {}
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self._source}
        place = Path(tempfile.mkdtemp(prefix="hone-adapter-", dir=self._directory))
        try:
            (place / CONFIG).write_text(json.dumps(self._config), encoding="utf-8")
            save_file(tensors, place / TENSORS, metadata={"format": "pt"})
            self._client.start_weight_update()
            self._client.update_weights({"adapter": str(place), "fingerprints": self._source.fingerprints})
            self._client.finish_weight_update()
        finally:
            shutil.rmtree(place)
        return self._source.fingerprints

    def close(self) -> None:
        """Nothing is held open."""
