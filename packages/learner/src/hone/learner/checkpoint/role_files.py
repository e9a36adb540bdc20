"""A role to its file and back: what is kept beside the tensors, and the check that a checkpoint is of the model at hand."""

from pathlib import Path
from typing import Any

from hone.learner.checkpoint.shard_file import Layout, RoleReader, file_name, lay_out
from hone.learner.engines.protocol import Engine
from hone.learner.errors import CheckpointError


def path(directory: Path, role: str, *, rank: int, world_size: int) -> Path:
    """The file of a role that a rank writes."""
    return directory / file_name(role, rank=rank, world_size=world_size)


def layout(role: str, engine: Engine, *, rank: int, world_size: int, random_state: dict[str, Any]) -> Layout:
    """The file of a role as it stands: its pieces, the steps taken, the model's shape, and the process's random state."""
    about = {
        "role": role,
        "rank": rank,
        "world_size": world_size,
        "counters": engine.counters,
        "layout": _shapes(engine),
        "random_state": random_state,
    }
    return lay_out(engine.pieces(), about)


def matching(directory: Path, role: str, engine: Engine) -> RoleReader:
    """The saved state of a role. Raises CheckpointError where it is of another model than the engine's, naming the first difference."""
    reader = RoleReader(directory, role)
    saved, own = {name: tuple(shape) for name, shape in reader.layout}, {name: tuple(shape) for name, shape in _shapes(engine)}
    different = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    if different:
        name = different[0]
        raise CheckpointError(
            f"{directory} is of another model: of {len(own)} weights of the {role}, {len(different)} differ, the first {name}, "
            f"{saved.get(name, 'absent')} there and {own.get(name, 'absent')} here; name the model that run began with, or start a new run"
        )
    if saved and not reader.sections(next(iter(saved))) and engine.pieces():
        raise CheckpointError(f"{directory} was saved with a frozen {role}, which now trains; name a checkpoint of a run that trained it")
    if reader.counters.get("muon", 0) != engine.counters.get("muon", 0):
        raise CheckpointError(
            f"{directory} was saved with another optimiser of the {role}; set --*.optim as that run did, or start a new run"
        )
    kept = {piece.section for piece in engine.pieces() if not piece.section.startswith("optimiser.")}
    if absent := sorted(kept - reader.sections(next(iter(saved)))) if kept else []:
        raise CheckpointError(
            f"{directory} has no {', '.join(absent)} of the {role}; set what that run set (--train.enable-ema for ema), or start a new run"
        )
    return reader


def _shapes(engine: Engine) -> list[tuple[str, list[int]]]:
    return [(name, list(shape)) for name, _, shape in engine.layout()]
