"""The best model of a run by one metric of its evaluations."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MARK = "best.json"
"""In the directory: metric, value and step of its model."""
HIGHER_IS_BETTER = ("accuracy", "reward_margin", "chosen_reward")


class Best:
    """Keeps one model directory, that of the best value so far of the metric `key`; "none" keeps nothing."""

    def __init__(self, key: str, directory: Path) -> None:
        self._key, self._directory = key, directory
        self._sign = 1.0 if key.rpartition("/")[2] in HIGHER_IS_BETTER else -1.0
        self.value, self.step = -self._sign * math.inf, 0

    def improved(self, metrics: Mapping[str, float], *, step: int) -> bool:
        """Whether this evaluation is the best so far, which it then is; a value that is not a number never is."""
        if self._key == "none":
            return False
        value = metrics[self._key]
        if not self._sign * value > self._sign * self.value:
            return False
        self.value, self.step = value, step
        return True

    def keep(self, export: Callable[[Path], None]) -> None:
        """Have the model exported in place of the one that was the best before; whole, or not at all."""
        partial = self._directory.with_name(f"{self._directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        export(partial)
        (partial / MARK).write_text(json.dumps(self.state()), encoding="utf-8")
        # The one before stands beside it until the new one has its name, so that at no moment there is none.
        before = self._directory.with_name(f"{self._directory.name}.before")
        shutil.rmtree(before, ignore_errors=True)
        if self._directory.exists():
            self._directory.rename(before)
        partial.rename(self._directory)
        shutil.rmtree(before, ignore_errors=True)

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint."""
        return {"key": self._key, "value": self.value, "step": self.step} if self.step else None

    def go_on_from(self, state: Mapping[str, Any] | None, directory: Path) -> None:
        """Take over the best model of the run that was saved; without it the next evaluation is the best so far."""
        kept = directory / MARK
        # The run may have gone on after its checkpoint, and have found a better one.
        if state is None or state["key"] != self._key or not kept.is_file() or json.loads(kept.read_text(encoding="utf-8")) != state:
            return
        shutil.copytree(directory, self._directory)
        self.value, self.step = float(state["value"]), int(state["step"])
