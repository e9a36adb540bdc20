"""A role of a checkpoint as a model directory, without the run: made as the run made it, its weights put in, exported as a run exports.

Needs one process and no GPU, whatever ranks and ZeRO stage the checkpoint is of.
"""

import dataclasses
import typing
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Shaped
from torch import Tensor

from hone.learner import config
from hone.learner.checkpoint import directory as checkpoints
from hone.learner.checkpoint.pieces import MASTER, Columns, Source
from hone.learner.checkpoint.role_files import matching, take_up
from hone.learner.checkpoint.shard_file import RoleReader
from hone.learner.config import DeepSpeedConfig
from hone.learner.engines.ema import SECTION as AVERAGE
from hone.learner.errors import CheckpointError
from hone.learner.learner import Learner
from hone.learner.roles import RoleSpec

CONFIGS: dict[str, Any] = {name: kind for name, kind in vars(config).items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
"""Settings of roles, by the name of their type."""
ONE_PROCESS = {
    "zero_stage": 0,
    "tensor_parallel_size": 1,
    "ring_attn_size": 1,
    "ring_attn_head_stride": None,
    "ring_attn_impl": "own",
    "enable_sleep": False,
    "adam_offload": False,
    "cpu_adam": "torch",
    "param_offload": False,
    "zpg": 1,
    "overlap_comm": False,
    "deepcompile": False,
    "use_liger_kernel": False,
}
"""What spreads a model over ranks, or needs a device, as one process without one has it."""
Settings = TypeVar("Settings")


def export(checkpoint: Path, out: Path, *, role: str = "policy", model: str | None = None, average: bool = False) -> Path:
    """Writes `role` as it stood at a step into the directory `out`, in Hugging Face format; returns the checkpoint it is of.

    `checkpoint` is a step_N, or a directory of such, whose newest complete one is meant. `model` stands for the model the run began
    with where that has moved; its tokenizer and configuration go along. With `average`, the moving average of its
    weights. Raises CheckpointError, ModelError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and is not an empty directory; name another to export to")
    path = checkpoint if checkpoints.step_of(checkpoint) is not None else checkpoints.find(checkpoint).path
    checkpoints.verify(path)
    reader = _reader(path, role)
    if average and not any(AVERAGE in reader.sections(name) for name, _ in reader.layout):
        raise CheckpointError(f"{path} has no moving average of its {role}; export its weights, or train with --train.enable-ema")
    made_of = next(iter(reader.abouts.values())).get("made_of")
    if made_of is None:
        raise CheckpointError(f"{path} does not say how its {role} was made; it is of a version before checkpoints could be exported")
    spec = RoleSpec(
        kind=made_of["kind"],
        model=_model(path, model or made_of["model"], named=model is not None),
        config=_read(path, CONFIGS.get(made_of["config_type"]), made_of["config"]),
        total_steps=made_of["total_steps"],
        labels=made_of["labels"],
    )
    learner = Learner(
        roles={role: spec},
        ds=dataclasses.replace(_read(path, DeepSpeedConfig, made_of["ds"]), **ONE_PROCESS),
        backend="single",
        rank=0,
        world_size=1,
        master_addr="",
        master_port=0,
        seed=0,
        max_tokens=1,
    )
    engine = learner.engines[role]
    own = matching(path, role, engine)
    take_up(engine, _Weights(own, section=AVERAGE if average else MASTER), own)
    learner.export(role, str(out))
    learner.close()
    return path


class _Weights:
    """A role's weights alone, or their average, which lie in `section`: see `Source`. Optimiser state would take twice their memory."""

    def __init__(self, source: Source, *, section: str) -> None:
        self._source, self._section, self.counters = source, section, source.counters

    def sections(self, name: str) -> frozenset[str]:
        return frozenset({MASTER}) if self._section in self._source.sections(name) else frozenset()

    def read(self, section: str, name: str, *, start: int, numel: int, columns: Columns | None = None) -> Shaped[Tensor, " numel"]:
        assert section == MASTER, section
        return self._source.read(self._section, name, start=start, numel=numel, columns=columns)


def _reader(path: Path, role: str) -> RoleReader:
    readers = {one: RoleReader(path, one) for one in sorted({file.name.split("-")[0] for file in path.glob("*-*-of-*.safetensors")})}
    trained = [one for one, reader in readers.items() if any(reader.sections(name) for name, _ in reader.layout)]
    if role not in trained:
        raise CheckpointError(f"{path} has no {role} that was trained; it has {', '.join(trained) or 'none at all'}: name one with --role")
    return readers[role]


def _model(path: Path, model: str, *, named: bool) -> str:
    if not named and not Path(model).is_dir():
        raise CheckpointError(f"{path} is of a run that began with {model}, which is not there any more; say where it is with --model DIR")
    return model


def _read(path: Path, kind: type[Settings] | None, values: dict[str, Any]) -> Settings:
    foreign = CheckpointError(f"{path} was made with settings that another version of hone has; export it with that version")
    if kind is None:
        raise foreign
    try:
        return _settings(kind, values)
    except (KeyError, TypeError, ValueError) as error:
        raise foreign from error


def _settings(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """A dataclass from what `asdict` and JSON made of it."""
    hints = typing.get_type_hints(kind)
    read = {
        name: _settings(hints[name], value)
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict)
        else tuple(value)
        if isinstance(value, list)
        else value
        for name, value in values.items()
    }
    return kind(**read)
