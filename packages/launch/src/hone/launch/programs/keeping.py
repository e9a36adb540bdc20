"""What a program keeps of its models, and what it writes down when that fails: exports, the rescue after a failure, saved checkpoints."""

from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from hone.launch.observe.display import Display
from hone.launch.observe.run_directory import RunDirectory
from hone.learner.errors import ModelError


@runtime_checkable
class Exporting(Protocol):
    """Parts that hold models."""

    def export(self, role: str, directory: str, *, average: bool = False) -> None:
        """Write a role's model in the Hugging Face layout, or the moving average of its weights."""
        ...

    def close(self) -> None:
        """End everything that was started."""
        ...


class Keeper:
    """Keeps the models of a run, whose trained role is `role`, in its directory."""

    def __init__(self, directory: RunDirectory, display: Display, *, role: str) -> None:
        self._directory, self._display, self._role = directory, display, role

    def export(self, parts: Exporting, directory: Path, *, average: bool = False) -> None:
        """Have the model (or its moving average) written, and see for ourselves that it is there: a rank may live elsewhere."""
        parts.export(self._role, str(directory.resolve()), average=average)
        if not (directory / "config.json").is_file():
            raise ModelError(
                f"the model was exported but is not in {directory}; ranks on other machines need the run directory on a shared disk"
            )

    def close(self, parts: Exporting, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the parts. What fails here is raised, unless the run is failing already: then it is written down beside that."""
        try:
            parts.close()
        except Exception as closing:
            if error is None:
                raise
            self._directory.append_event("closing_failed", error=f"{type(closing).__name__}: {closing}")

    def rescue(self, parts: Exporting, *, step: int) -> None:
        """Keep what was learnt before step `step` failed; the failure itself is what the run ends with."""
        kept = self._directory.checkpoints / f"failed_in_step_{step}"
        try:
            self.export(parts, kept)
        except Exception as error:  # the learner is gone, too: recorded beside the failure that is being raised
            self._directory.append_event("rescue_failed", error=f"{type(error).__name__}: {error}")
            return
        self._directory.append_event("rescued", model=str(kept))
        self._display.note(f"the {self._role} as it stood is kept in {kept}")

    def saved(self, kind: str, **fields: Any) -> None:
        """A checkpoint that is complete, or one that failed: written down, and a failure shown, for it must not be found out later."""
        self._directory.append_event(kind, **fields)
        if kind == "checkpoint_failed":
            self._display.note(f"the checkpoint of step {fields['step']} was not written ({fields['error']}); training goes on")
