"""The run's checkpoints: every group of learner ranks writes beside the others, the controller makes one directory of it.

begin (a memory copy on every rank) -> training goes on -> poll, once a step: all written? -> manifest, rename, older ones removed.
A disk that is full or fails stops no run: the attempt is dropped and told as an event, and the next interval tries again.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hone.datasets.stream import StreamState
from hone.launch.config import CkptConfig
from hone.learner.checkpoint import directory as checkpoints
from hone.learner.checkpoint import role_files
from hone.learner.checkpoint.files import Files
from hone.learner.checkpoint.snapshot import Outcome
from hone.learner.errors import CheckpointError

STATE, METRICS, EVENTS, OPEN = "run.json", "metrics.jsonl", "events.jsonl", "open.npz"


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """Where the loop stands after `step`: the prompts drawn, the generator that cuts rollouts into optimiser steps, controllers."""

    step: int
    algorithm: str
    stream: StreamState
    shuffle: bytes
    controllers: dict[str, Any] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """As JSON."""
        return json.dumps({**dataclasses.asdict(self), "shuffle": self.shuffle.hex()})


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A verified checkpoint, what the loop needs of it, and the newer ones that were passed over, with the reason."""

    path: Path
    state: LoopState
    passed_over: tuple[str, ...]

    def text(self, name: str) -> bytes:
        """A file that the run had written about itself when the checkpoint was made."""
        return (self.path / name).read_bytes()


@runtime_checkable
class Savable(Protocol):
    """The processes that host roles, as far as saving goes."""

    def save(self, directory: str) -> None:
        """Every rank copies its share and goes on."""
        ...

    def saved(self, wait: bool) -> list[Outcome] | None:
        """What became of the last save on every rank, once; None while one of them is writing."""
        ...


class Checkpoints:
    """One save at a time under `root`, the newest `keep` are kept; `event(kind, **fields)` hears of each that is complete or failed."""

    def __init__(self, groups: Sequence[Savable], root: Path, *, keep: int, event: Callable[..., None], files: Files | None = None) -> None:
        self._groups, self._root, self._keep, self._event = list(groups), root, keep, event
        self._files = files or Files()
        self._open: tuple[int, Path, Mapping[str, str | bytes]] | None = None
        self._outcomes: dict[int, list[Outcome]] = {}

    def begin(self, step: int, texts: Mapping[str, str | bytes]) -> None:
        """Begins a save; `texts` (file name -> content) go in beside the roles. Waits for the one before, if it is not done."""
        self.poll(wait=True)
        try:
            partial = checkpoints.begin(self._files, self._root, step)
        except OSError as error:
            self._event("checkpoint_failed", step=step, error=str(error))
            return
        self._open, self._outcomes = (step, partial, texts), {}
        for group in self._groups:
            group.save(str(partial.resolve()))

    def poll(self, *, wait: bool) -> None:
        """Completes the open save if everything is written, or waits until it is."""
        if self._open is None:
            return
        for index, group in enumerate(self._groups):
            if index not in self._outcomes and (outcomes := group.saved(wait)) is not None:
                self._outcomes[index] = outcomes
        if len(self._outcomes) < len(self._groups):
            return
        (step, partial, texts), self._open = self._open, None
        outcomes = [outcome for of_group in self._outcomes.values() for outcome in of_group]
        errors = [outcome.error for outcome in outcomes if outcome.error]
        try:
            if errors:
                raise OSError("; ".join(errors))
            path = checkpoints.complete(self._files, partial, [file for outcome in outcomes for file in outcome.files], texts)
        except OSError as error:
            self._event("checkpoint_failed", step=step, error=str(error))
            self._drop(partial)
            return
        self._event("checkpoint_saved", step=step, path=str(path))
        try:
            checkpoints.prune(self._files, self._root, keep=self._keep, newest=step)
        except OSError as error:  # the new one is complete all the same; what could not go is tried again after the next
            self._event("checkpoint_left", path=str(self._root), error=str(error))

    def _drop(self, partial: Path) -> None:
        """Makes room again. What cannot be removed now is removed by the next save."""
        try:
            if partial.exists():
                self._files.remove(partial)
        except OSError as error:
            self._event("checkpoint_left", path=str(partial), error=str(error))


def place_of(asked: str, *, verb: str, runs: Path = Path("runs")) -> tuple[Path, int | None]:
    """What `--resume` means: a directory of checkpoints, and the step of one of them where one was named.

    Raises CheckpointError for a path that is neither, and for `latest` where no run of `verb` in `runs` has a complete checkpoint.
    """
    if asked == "latest":
        for run in sorted(runs.glob(f"{verb}-*"), reverse=True):  # their names end in the time they began
            root = _root_of(run)
            if root.is_dir() and any(checkpoints.step_of(entry) is not None for entry in root.iterdir()):
                return root, None
        raise CheckpointError(
            f"no run of {verb} in {runs.absolute()} has a complete checkpoint; name a run or a checkpoint with --resume PATH"
        )
    path = Path(asked)
    if not path.is_dir():
        raise CheckpointError(
            f"no checkpoint or run {asked} (working directory {Path.cwd()}); name a run directory, or a step_N, with --resume"
        )
    if (step := checkpoints.step_of(path)) is not None:
        return path.parent, step
    return (_root_of(path), None) if (path / EVENTS).is_file() else (path, None)


def place_asked(ckpt: CkptConfig, *, verb: str) -> tuple[Path, int | None]:
    """Where a run that is to go on finds its checkpoint: as `--resume` or `--ckpt.path` says; see `place_of`. Raises CheckpointError."""
    if ckpt.resume is not None:
        return place_of(ckpt.resume, verb=verb)
    if ckpt.path is None:
        raise CheckpointError(
            "--ckpt.load-enable needs to know where the checkpoints are; name their directory with --ckpt.path, or --resume"
        )
    return Path(ckpt.path), None


def _root_of(run: Path) -> Path:
    """Where a run keeps its checkpoints: as it has written down, for it may be elsewhere, or within it."""
    saved = []
    if (run / EVENTS).is_file():
        lines = (run / EVENTS).read_text(encoding="utf-8").splitlines()
        # A killed run's last line may be cut off; a save is told after it is complete, so an earlier line says the same.
        saved = [json.loads(line)["path"] for line in lines if '"checkpoint_saved"' in line and line.endswith("}")]
    root = Path(saved[-1]).parent if saved else run / "checkpoints"
    return root if root.is_dir() else run / "checkpoints"  # it was moved, or is named as seen from elsewhere


def check_start(resumed: Resumed | None, *, steps: int, path: str | None) -> None:
    """Whether a run of `steps` steps can begin here. Raises CheckpointError before anything is started.

    Not after its own end; and not in a directory (`path`, `--ckpt.path`) with checkpoints of later steps than it begins after, which
    would be taken for its own. Newer ones that were passed over because they are damaged are in nobody's way.
    """
    begun = 0 if resumed is None else resumed.state.step
    if resumed is not None and begun > steps:
        raise CheckpointError(
            f"{resumed.path} is of step {begun}, and the run ends after step {steps}; --train.max-steps {begun} or more, or more "
            "--train.num-episodes"
        )
    others = [] if path is None or (resumed is not None and resumed.passed_over) else checkpoints.later(Path(path), than=begun)
    if others:
        names = ", ".join(one.name for one in others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        what = "begins anew" if resumed is None else f"goes on after step {begun}"
        raise CheckpointError(
            f"{path} has checkpoints of another line ({names}), which would be taken for those of this run, which {what}; go on from the "
            "newest with --ckpt.load-enable, move them away, or name another directory with --ckpt.path"
        )


def take_up(
    root: Path,
    *,
    algorithm: str,
    batch_size: int,
    seed: int,
    num_episodes: int,
    models: Mapping[str, str],
    step: int | None = None,
    batch_flag: str = "--rollout.batch-size",
) -> Resumed:
    """The newest complete checkpoint under `root`, or that of `step`, checked against the run that is to go on from it.

    `models` maps role -> model, `batch_flag` is what sets the size of a step. Raises CheckpointError where there is none, or where it is
    of a run whose data, algorithm, roles or models were others; reads no weights.
    """
    found = checkpoints.find(root, step=step)
    try:
        fields = json.loads((found.path / STATE).read_text(encoding="utf-8"))
        stream = StreamState(**fields.pop("stream"))
        state = LoopState(**{**fields, "stream": stream, "shuffle": bytes.fromhex(fields["shuffle"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{found.path / STATE} is no state of this loop ({type(error).__name__}: {error}); name another") from error
    before = {"algorithm": state.algorithm, batch_flag: stream.batch_size, "--train.seed": stream.seed}
    now = {"algorithm": algorithm, batch_flag: batch_size, "--train.seed": seed}
    if changed := [f"{name} {before[name]} then, {now[name]} now" for name in now if before[name] != now[name]]:
        raise CheckpointError(f"{found.path} is of another run: {'; '.join(changed)}; give the same again, or start a new run")
    for role, model in models.items():
        role_files.check_architecture(found.path, role, model)
    # More episodes than before only make the run longer.
    state = dataclasses.replace(state, stream=dataclasses.replace(stream, num_episodes=num_episodes))
    return Resumed(path=found.path, state=state, passed_over=found.passed_over)
