"""A role to its file and back: what is kept beside the tensors, and the check that a checkpoint is of the model at hand."""

import json
from pathlib import Path
from typing import Any

from hone.learner.checkpoint.pieces import Source
from hone.learner.checkpoint.shard_file import Layout, RoleReader, file_name, lay_out, read_about
from hone.learner.engines.protocol import Engine
from hone.learner.errors import CheckpointError
from hone.learner.head_files import keep_statistics, kept_statistics
from hone.learner.published import full_shape

SHAPING = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "tie_word_embeddings", "num_experts", "num_local_experts", "moe_intermediate_size"),
)
"""Entries of a config.json that decide a model's weights."""


def path(directory: Path, role: str, *, rank: int, world_size: int) -> Path:
    """The file of a role that a rank writes."""
    return directory / file_name(role, rank=rank, world_size=world_size)


def layout(role: str, engine: Engine, *, rank: int, world_size: int, random_state: dict[str, Any], made_of: dict[str, Any]) -> Layout:
    """The file of a role as it stands: its pieces, steps taken, the model's shape, its scores' statistics, the process's random state.

    `made_of` says how the role was made: see `learner.made_of`.
    """
    about = {
        "role": role,
        "rank": rank,
        "world_size": world_size,
        "counters": engine.counters,
        "layout": _shapes(engine),
        "identity": dict(engine.module.adapted.identity),
        "statistics": kept_statistics(engine.module.adaptable()[0].config),
        "random_state": random_state,
        "made_of": made_of,
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
    trains = [name for name, parameter in engine.module.named_weights() if parameter.requires_grad]
    trained = [name for name in saved if reader.sections(name)]
    if trains and not trained:
        raise CheckpointError(f"{directory} was saved with a frozen {role}, which now trains; name a checkpoint of a run that trained it")
    if trains and (odd := [name for name in saved if (name in set(trains)) != (name in set(trained))]):
        raise CheckpointError(
            f"{directory} is of a {role} of which other parameters trained: {len(odd)} differ, the first {odd[0]}; "
            "repeat that run's settings of adapters and frozen parts, or start a new run"
        )
    was, now = reader.identity, dict(engine.module.adapted.identity)
    if trains and was != now:
        what = next(name for name in {**was, **now} if was.get(name) != now.get(name))
        raise CheckpointError(
            f"{directory} is of a {role} with another {what} ({was.get(what, 'none')} there, {now.get(what, 'none')} here); "
            "repeat that run's settings and its model, or start a new run"
        )
    if reader.counters.get("muon", 0) != engine.counters.get("muon", 0):
        raise CheckpointError(
            f"{directory} was saved with another optimiser of the {role}; set --*.optim as that run did, or start a new run"
        )
    kept = {piece.section for piece in engine.pieces() if not piece.section.startswith("optimiser.")}
    if absent := sorted(kept - reader.sections(next(iter(trained)))) if kept else []:
        raise CheckpointError(
            f"{directory} has no {', '.join(absent)} of the {role}; set what that run set (--train.enable-ema for ema), or start a new run"
        )
    return reader


def take_up(engine: Engine, source: Source, reader: RoleReader) -> None:
    """The role as `reader` has it, its tensors by way of `source`."""
    engine.restore(source)
    keep_statistics(engine.module.adaptable()[0].config, reader.statistics)


def _shapes(engine: Engine) -> list[tuple[str, list[int]]]:
    return [(name, list(full_shape(parameter))) for name, parameter in engine.module.named_weights()]


def architecture(directory: Path) -> dict[str, Any]:
    """What of a model's configuration decides its weights' names and shapes."""
    described = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    text = described.get("text_config", described)
    return {name: text.get(name) for name in SHAPING}


def check_architecture(directory: Path, role: str, model: str) -> None:
    """Raises CheckpointError where a checkpoint has no such role, or one of another architecture than the model directory `model`.

    Reads no weights. A name that is not a directory is a hub's, and left to `matching`, once it is loaded.
    """
    files = sorted(directory.glob(f"{role}-*-of-*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{directory} has no {role}, which this run trains or reads; name the checkpoint of a run with the same roles"
        )
    path = Path(model).expanduser()
    saved = read_about(files[0]).get("made_of", {}).get("architecture")
    if saved is None or not path.is_dir():
        return
    own = architecture(path)
    if different := [name for name in SHAPING if saved.get(name) != own[name]]:
        told = ", ".join(f"{name} {saved.get(name)} there and {own[name]} here" for name in different[:3])
        raise CheckpointError(
            f"{directory} is of another model than {model}: {role}'s {told}; name the model that run began with, or start anew"
        )
