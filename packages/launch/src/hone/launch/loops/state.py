"""loop.json: the stages a run has finished, each with its files' fingerprints and its figures; what a stopped run goes on with.

It is replaced whole after every stage, so a stage is either in it, with all its files, or has to be done again.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hone.launch.errors import Problem, UsageError
from hone.launch.loop_config import LoopConfig
from hone.launch.observe.files import replace_text
from hone.launch.observe.redact import redact
from hone.launch.schema import settings, value_of
from hone.learner.errors import CheckpointError

STATE = "loop.json"
FREE = (
    *("run.", "vllm.", "ckpt.", "reward.timeout_s", "reward.num_workers", "reward.retry_s", "reward.rows_per_request"),
    *("reward.max_in_flight", "reward.allowed_hosts", "reward.batch_size", "rollout.timeout_s"),
    *("train.iterations", "train.measure_last", "train.max_tokens_per_gpu", "train.micro_batch_size"),
)
"""Settings, or beginnings of them, that may be others when a run goes on: they change how, where and how long, and no result."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A stage that is done: file or directory (relative to the run) -> fingerprint, what it measured, and the seconds it took."""

    iteration: int
    stage: str
    files: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class State:
    """The finished stages of the run in `directory`."""

    def __init__(self, directory: Path, *, deciding: Mapping[str, object], finished: Sequence[Finished] = ()) -> None:
        self._directory, self._deciding, self._finished = directory, dict(deciding), list(finished)

    @property
    def finished(self) -> tuple[Finished, ...]:
        """In the order they were done."""
        return tuple(self._finished)

    def get(self, iteration: int, stage: str) -> Finished | None:
        """A stage, if it is finished."""
        return next((one for one in self._finished if (one.iteration, one.stage) == (iteration, stage)), None)

    def add(self, iteration: int, stage: str, paths: Sequence[Path], figures: Mapping[str, Any], *, seconds: float) -> None:
        """A stage has been finished and has left `paths`; on disk when this returns."""
        files = {str(path.relative_to(self._directory)): fingerprint(path) for path in paths}
        self._finished.append(Finished(iteration=iteration, stage=stage, files=files, figures=dict(figures), seconds=round(seconds, 2)))
        self.write()

    def write(self) -> None:
        """As it stands."""
        text = json.dumps({"settings": self._deciding, "stages": [asdict(one) for one in self._finished]}, indent=1, allow_nan=False)
        replace_text(self._directory / STATE, text + "\n")

    def check(self) -> None:
        """Whether what the next stages read is still what was written: the last model, and the files of the last iteration.

        Raises CheckpointError naming what is gone or has changed.
        """
        last = self._finished[-1].iteration if self._finished else 0
        model = max((one.iteration for one in self._finished if one.stage == "train"), default=0)
        for one in self._finished:
            if one.iteration != last and not (one.iteration == model and one.stage == "train"):
                continue
            for name, expected in one.files.items():
                path = self._directory / name
                if not path.exists() or fingerprint(path) != expected:
                    what = "is gone" if not path.exists() else "is not what was written there"
                    raise CheckpointError(f"{path} {what}, so the run cannot go on from it; bring it back, or begin a new run")


def deciding(config: LoopConfig) -> dict[str, object]:
    """The settings that decide what a run does, as JSON has them; secrets struck out."""
    names = [name for name in settings(config) if not name.startswith(FREE)]
    values = {name: value_of(config, name) for name in names}
    plain = {name: redact(value) if isinstance(value, str) else value for name, value in values.items()}
    return json.loads(json.dumps(plain))


def read(directory: Path, config: LoopConfig) -> State:
    """The state of a run that is to go on with `config`. Raises CheckpointError where it has none, or is one of other settings."""
    path, wanted = directory / STATE, deciding(config)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        before, finished = dict(known["settings"]), [Finished(**one) for one in known["stages"]]
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} is no run of a loop: it has no {STATE}; name one with --resume") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}); begin a new run") from error
    if other := sorted(name for name in before.keys() | wanted.keys() if before.get(name) != wanted.get(name)):
        shown = ", ".join(f"{name} {before.get(name)} (now {wanted.get(name)})" for name in other[:4]) + (", ..." if len(other) > 4 else "")
        raise CheckpointError(f"{directory} was begun with other settings: {shown}; give the same to go on, or begin a new run")
    return State(directory, deciding=wanted, finished=finished)


def place_of(config: LoopConfig) -> Path | None:
    """The run directory to go on in, as `--resume` or `--ckpt.load-enable` says; None where a new run begins. Raises CheckpointError."""
    asked, own = config.ckpt.resume, config.run.dir
    if asked == "latest":
        runs = sorted((run for run in Path("runs").glob(f"{config.verb}-*") if (run / STATE).is_file()), reverse=True)
        if not runs:
            raise CheckpointError(f"no run of {config.verb} in {Path('runs').absolute()} can go on; name one with --resume PATH")
        return runs[0]
    if asked is not None:
        if not (Path(asked) / STATE).is_file():
            raise CheckpointError(f"{asked} is no run of {config.verb}: it has no {STATE}; name a run directory with --resume")
        return Path(asked)
    return Path(own) if config.ckpt.load_enable and own is not None and (Path(own) / STATE).is_file() else None


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """The run directory, for this process alone. Raises UsageError where another has it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = f"another process is going on with {directory}"
            raise UsageError([Problem(what=what, mend="wait for it, or begin a new run", where="--resume")]) from error
        yield
    finally:
        os.close(descriptor)


def fingerprint(path: Path) -> str:
    """Of a file's content, or of all files of a directory with their names."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path) if path.is_dir() else ''}\n".encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()
