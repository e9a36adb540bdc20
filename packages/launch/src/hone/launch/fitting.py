"""Whether model directories are what the settings of their roles suppose: adapters' targets, frozen parts, routers, heads.

The learner's own checks over a model without weights, so transformers is imported, but only where something is asked of the
model's parts or a head is stored.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hone.launch.errors import Problem
from hone.launch.model_directory import holds_head, stated
from hone.launch.resolve import Resolved
from hone.learner.errors import ModelError

CLASSIFIERS = ("reward", "process")
"""Kinds of models that transformers must have a classifier of."""


def unfit(resolved: Resolved, roles: Collection[tuple[str, str, str]]) -> Iterator[Problem]:
    """What does not fit, of the (settings group, kind, directory) of roles that train; each thing once.

    The directories are those in which `model_directory.faults` found nothing.
    """
    told: set[str] = set()
    for group, kind, directory in roles:
        settings, path = getattr(resolved.config, group), Path(directory).expanduser()
        asked = _asked(resolved.config, group, settings)
        if kind not in CLASSIFIERS and not asked and (kind == "policy" or not holds_head(path, resolved.config.ds.value_head_prefix)):
            continue
        names = (*asked, f"{group}.model_name_or_path")
        if resolved.bad.intersection(names):
            continue
        try:
            _check(kind, str(path), settings, resolved.config.ds)
        except ModelError as error:
            if str(error) not in told:
                yield replace(stated(error, otherwise="name another model"), settings=names)
            told.add(str(error))


def _asked(config: Any, group: str, settings: Any) -> list[str]:
    """Settings that speak of parts of a group's model."""
    own = [f"{group}.{name}" for name in ("freeze", "aux_loss_coef") if getattr(settings, name)]
    return [*own, *(["ds.lora.target_modules", "ds.lora.rank"] if config.ds.lora.rank else [])]


def _check(kind: str, directory: str, settings: Any, ds: Any) -> None:
    from hone.learner.role_models import check_role
    from hone.learner.roles import RoleSpec

    check_role(RoleSpec(kind=kind, model=directory, config=settings, total_steps=1), ds)  # pyright: ignore[reportArgumentType] - it is one of the kinds
