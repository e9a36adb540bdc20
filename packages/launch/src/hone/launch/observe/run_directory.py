"""The run directory: everything a run leaves, written as it happens, offline and private to its owner.

config.toml     the resolved configuration       rollouts/step_000001.parquet   every sample
manifest.json   what ran where                   checkpoints/  logs/  model/
metrics.jsonl   one line a step                  report.md
events.jsonl    the ledger, faults, the outcome
"""

import json
import math
import os
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hone.launch.errors import Problem, UsageError
from hone.launch.observe import rollout_table
from hone.launch.observe.files import append_line, read_lines, replace_text, replaced, unused
from hone.launch.observe.metrics import check_names
from hone.launch.observe.redact import redact

CONFIG, MANIFEST, METRICS_FILE, EVENTS, REPORT = "config.toml", "manifest.json", "metrics.jsonl", "events.jsonl", "report.md"
SUBFOLDERS = ("rollouts", "checkpoints", "logs")


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """An existing run directory and the ways to write into it."""

    path: Path

    @staticmethod
    def create(path: Path | str | None, verb: str) -> "RunDirectory":
        """Make `path`, or runs/<verb>-<YYYYmmdd-HHMMSS> where none is given, with its subfolders, all 0700.

        Raises UsageError for a path that holds something already, belongs to someone else, has odd characters or cannot be made.
        """
        try:
            home = _unused(Path("runs"), verb) if path is None else _given(str(path))
        except OSError as error:
            place = "runs/" if path is None else repr(str(path))
            raise _refused(f"the run directory {place} cannot be made: {error.strerror}", "name a directory that you may write") from error
        for name in SUBFOLDERS:
            (home / name).mkdir(mode=0o700)
        return RunDirectory(path=home)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go, one folder a step."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Where the output of the worker processes goes."""
        return self.path / "logs"

    @property
    def model(self) -> Path:
        """Where the trained model is exported to; not made before it is."""
        return self.path / "model"

    def write_config(self, text: str) -> None:
        """The resolved configuration, as TOML text."""
        replace_text(self.path / CONFIG, text)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """What ran where (see manifest.py)."""
        replace_text(self.path / MANIFEST, json.dumps(dict(manifest), indent=2, allow_nan=False) + "\n")

    def append_metrics(self, metrics: Mapping[str, int | float]) -> None:
        """One step, one line; `step` is among its keys.

        A value that is not finite is written as "nan", "inf" or "-inf" and named by an event.

        Raises ValueError for a name outside the table of metrics.py or a step without its number.
        """
        check_names(metrics)
        if "step" not in metrics:
            raise ValueError(f"a line of {METRICS_FILE} needs its step; got {sorted(metrics)}")
        line: dict[str, int | float | str] = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        odd = {name: str(value) for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
        append_line(self.path / METRICS_FILE, line | odd)
        if odd:
            self.append_event("not_finite", step=metrics["step"], metrics=odd)

    def append_event(self, kind: str, **fields: Any) -> None:
        """One event, stamped with the time [s since 1970]; secrets in its texts are struck out."""
        shown = {name: redact(value) if isinstance(value, str) else value for name, value in fields.items()}
        append_line(self.path / EVENTS, {"time_s": round(time.time(), 3), "kind": kind, **shown})

    def go_on_from(self, metrics: bytes, events: bytes) -> None:
        """The lines of an earlier run, up to its checkpoint, for this one to go on with; before anything is appended."""
        for name, data in ((METRICS_FILE, metrics), (EVENTS, events)):
            with replaced(self.path / name) as file:
                file.write(data)

    def write_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
        """The samples of a step (see rollout_table.py); returns the file."""
        path = self.path / "rollouts" / f"step_{step:06d}.parquet"
        rollout_table.write_rollouts(path, rows)
        return path


def read_metrics(path: Path) -> tuple[list[dict[str, int | float]], int]:
    """Every step of a run directory's metrics.jsonl as numbers, and how many lines were torn."""
    if not (path / METRICS_FILE).exists():
        return [], 0
    rows, torn = read_lines(path / METRICS_FILE)
    return [{name: float(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows], torn


def read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Every event of a run directory, and how many lines were torn."""
    return read_lines(path / EVENTS) if (path / EVENTS).exists() else ([], 0)


def _unused(parent: Path, verb: str) -> Path:
    """A new runs/<verb>-<time>; a second run within the second gets -2."""
    parent.mkdir(exist_ok=True)
    return unused(parent / f"{verb}-{datetime.now():%Y%m%d-%H%M%S}", lambda candidate: candidate.mkdir(mode=0o700))


def _given(path: str) -> Path:
    """The directory the user named, made or found empty."""
    # Control, format and surrogate characters in a path are a mistake, or meant to mislead whoever reads it.
    if odd := sorted({character for character in path if unicodedata.category(character) in ("Cc", "Cf", "Cs")}):
        raise _refused(f"the run directory {path!a} holds {', '.join(ascii(character) for character in odd)}", "use plain characters")
    home = Path(path)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (owner := home.stat().st_uid) != os.getuid():
        raise _refused(f"the run directory {path!r} belongs to user id {owner}, not to you ({os.getuid()})", "name a directory of your own")
    if found := sorted(entry.name for entry in home.iterdir()):
        listed = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise _refused(f"the run directory {path!r} is not empty ({listed})", "name a new directory; a run never overwrites another")
    home.chmod(0o700)
    return home


def _refused(what: str, mend: str) -> UsageError:
    return UsageError([Problem(what=what, mend=mend, where="--run.dir")])
