"""Heads from and to model directories, as transformers' own classifiers store them; the only file that reads or writes a head."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from hone.learner.errors import ModelError
from hone.learner.heads import HEADS, Head, Statistics, ValueHead
from hone.learner.model_files import PREFIX

STATISTICS = ("mean", "std")
"""Under these it keeps what normalises a reward model's scores."""
HeadKind = Literal["critic", "reward", "process"]
CLASSIFIERS = {
    "ForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "ForTokenClassification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}


def check_head(
    directory: Path,
    kind: HeadKind,
    *,
    hidden_size: int,
    labels: int,
    prefix: str,
    normalize: bool = False,
    must_be_stored: bool = False,
) -> bool:
    """Whether a head called `prefix` is stored, by the headers of the files alone.

    Raises ModelError for one of another shape, one without statistics to `normalize` by, and none where it `must_be_stored`.
    """
    with torch.device("meta"):
        fresh = HEADS[kind](hidden_size, labels, dtype=torch.float32)
    stored = {name: _stored_shape(directory, f"{prefix}.{name}") for name, _ in fresh.named_parameters()}
    if stored["weight"] is None:
        if must_be_stored:
            raise ModelError(
                f"{directory} has no {prefix}.weight, and a {kind} model that is not trained has nothing to say without its head; name a "
                "trained one, or set --ds.value-head-prefix to what its head is called"
            )
        return False
    for name, parameter in fresh.named_parameters():
        shape = stored[name]
        if shape != tuple(parameter.shape):
            has = "is missing" if shape is None else f"has shape {shape}"
            raise ModelError(
                f"{directory}: {prefix}.{name} {has}, a {kind} head of {labels} {'label' if labels == 1 else 'labels'} has "
                f"{tuple(parameter.shape)}; name a {kind} model, or set --ds.value-head-prefix to the head's name"
            )
    if normalize and kind != "process":
        _statistics(directory)
    return True


def load_head(
    directory: Path,
    kind: HeadKind,
    *,
    hidden_size: int,
    labels: int,
    prefix: str,
    dtype: torch.dtype,
    normalize: bool = False,
    must_be_stored: bool = False,
) -> Head:
    """The stored head called `prefix`, else a fresh one of `labels` outputs, which says 0 everywhere.

    With `normalize`, a stored head takes the directory's statistics. Raises ModelError as `check_head`.
    """
    head = HEADS[kind](hidden_size, labels, dtype=dtype)
    wanted = {"hidden_size": hidden_size, "labels": labels, "prefix": prefix, "normalize": normalize, "must_be_stored": must_be_stored}
    if not check_head(directory, kind, **wanted):
        return head
    stored = {name: _stored_tensor(directory, f"{prefix}.{name}") for name, _ in head.named_parameters()}
    head.load_state_dict({name: tensor.to(dtype) for name, tensor in stored.items()})
    if normalize and kind != "process":
        head.statistics = _statistics(directory)
    return head


def classifier_config(backbone: PreTrainedModel, head: Head, prefix: str) -> PretrainedConfig:
    """The configuration to store beside backbone and head.

    Raises ModelError for a reward or process model of an architecture that transformers has no such classifier of; a critic is
    for this project to load again.
    """
    config = copy.deepcopy(backbone.config)
    name = type(backbone).__name__.removesuffix("Model") + head.architecture
    if not isinstance(head, ValueHead) and type(config) not in CLASSIFIERS[head.architecture]:
        raise ModelError(f"transformers has no {name}, so nothing else could load this model; use another architecture")
    config.architectures = [name]
    config.num_labels = head.out_features
    if prefix != "score":
        setattr(config, PREFIX, prefix)
    return config


def kept_statistics(config: PretrainedConfig) -> dict[str, float]:
    """What a configuration says of a reward model's scores: `mean` and `std`, or nothing."""
    return {name: float(config.__dict__[name]) for name in STATISTICS if name in config.__dict__}


def keep_statistics(config: PretrainedConfig, kept: Mapping[str, float]) -> None:
    """Puts what `kept_statistics` found in place of what the configuration says."""
    forget_statistics(config)
    for name, value in kept.items():
        setattr(config, name, value)


def forget_statistics(config: PretrainedConfig) -> None:
    """Those of a reward model that goes on training are no longer its own."""
    for name in STATISTICS:
        config.__dict__.pop(name, None)


def _statistics(directory: Path) -> Statistics:
    settings = _settings(directory)
    mean, std = settings.get("mean"), settings.get("std")
    if not isinstance(mean, int | float) or not isinstance(std, int | float) or not std > 0:
        raise ModelError(
            f"{directory}/config.json has no mean and std of the model's rewards (mean {mean}, std {std}), so they cannot be normalised; "
            "turn --ds.normalize-reward off, or write the two numbers there (training a reward model with this project does)"
        )
    return Statistics(mean=float(mean), std=float(std))


def _settings(directory: Path) -> dict[str, object]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def _stored_shape(directory: Path, name: str) -> tuple[int, ...] | None:
    file = _holder(directory, name)
    if file is None:
        return None
    with safe_open(file, framework="pt") as tensors:
        return tuple(tensors.get_slice(name).get_shape())


def _stored_tensor(directory: Path, name: str) -> Tensor:
    file = _holder(directory, name)
    assert file is not None, f"{name} was found before"
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _holder(directory: Path, name: str) -> Path | None:
    """The file that holds a tensor."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - not a dict; it has no __contains__
                return file
    return None
