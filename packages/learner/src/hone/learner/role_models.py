"""The model of a role: whether it is what the role's settings suppose, told without reading a weight, and then the model itself."""

from typing import Any

import torch

from hone.learner.adapters import adaptation
from hone.learner.config import DeepSpeedConfig, RefConfig
from hone.learner.model import CriticModel, PolicyModel, check_critic, check_policy, load_critic, load_policy
from hone.learner.roles import DTYPES, RoleSpec

WITH_HEAD = ("critic", "reward", "process")
"""Kinds of roles whose model has a head of its own."""


def check_role(spec: RoleSpec, ds: DeepSpeedConfig) -> None:
    """Raises ModelError for a model that is not what the role's settings suppose; see `check_policy` and `check_critic`."""
    (check_critic if spec.kind in WITH_HEAD else check_policy)(spec.model, **_asked(spec, ds))


def load_role(spec: RoleSpec, ds: DeepSpeedConfig, *, name: str, device: torch.device) -> PolicyModel | CriticModel:
    """The model of a role, read from `name`. Raises ModelError as `check_role`, and as `load_policy`."""
    recompute = not isinstance(spec.config, RefConfig) and spec.config.gradient_checkpointing_enable
    how: dict[str, Any] = {"dtype": DTYPES[ds.param_dtype], "device": device, "gradient_checkpointing": recompute}
    return (load_critic if spec.kind in WITH_HEAD else load_policy)(name, **how, **_asked(spec, ds))


def _asked(spec: RoleSpec, ds: DeepSpeedConfig) -> dict[str, Any]:
    adapted = adaptation(ds, freeze=getattr(spec.config, "freeze", None), trained=spec.trained)
    asked: dict[str, Any] = {"adaptation": adapted, "aux_loss_coef": getattr(spec.config, "aux_loss_coef", 0.0)}
    if spec.kind not in WITH_HEAD:
        return asked
    labels = spec.labels if spec.kind == "process" else 1
    head = {"kind": spec.kind, "labels": labels, "value_head_prefix": ds.value_head_prefix, "normalize": ds.normalize_reward}
    return {**asked, **head, "must_be_stored": not spec.trained}
