"""Every public function of hone.algos that takes tensors, found by reading its modules, and arguments made from its annotations.

Read here without `checks.py`, which is under test: what an annotation asks for is told by jaxtyping alone.
"""

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import AbstractArray
from torch import Tensor

import hone.algos
from hone.algos.batch import Packed
from hone.algos.reduce import Reduction
from hone.algos.shaping import RunningMoments

# Kernels are reached through plain functions, which check; the kit takes functions and cases; the checks are what checks.
NOT_READ = ("hone.algos.kernels", "hone.algos.conformance", "hone.algos.checks")

SIZES = {"T": 6, "N": 4, "N_plus_1": 5, "P": 2, "M": 3, "C": 3, "V": 5, "K": 2, "B": 2, "B_plus_1": 3, "L": 3}
EMPTY = {**SIZES, "T": 0, "N": 0, "N_plus_1": 1, "P": 0, "M": 0, "B": 0, "B_plus_1": 1}
OFFSETS = {1: [0], 3: [0, 3, 6], 5: [0, 2, 2, 5, 6]}  # the second of four rows has no token at all

# A value for every parameter that is no tensor, by name; what one function needs otherwise stands in OWN.
SETTINGS = {
    "alpha": 0.05,
    "beta": 0.1,
    "buffer": 2,
    "cap": 2.0,
    "clip": 0.2,
    "clip_high": 0.28,
    "clip_low": 0.2,
    "coef": 0.1,
    "cov_high": 5.0,
    "cov_low": -5.0,
    "desirable_weight": 1.0,
    "divergence": "kl",
    "eps": 1e-6,
    "estimator": "k3",
    "flip": 0.1,
    "fraction": 0.3,
    "gamma": 0.95,
    "gamma_beta_ratio": 0.5,
    "gradient": "as_written",
    "high": 2.0,
    "k": 2,
    "lambd": 0.9,
    "level": "sequence",
    "log_clip_high": 0.4,
    "log_clip_low": 0.4,
    "low": 0.1,
    "max_length": 4,
    "mode": "mask",
    "moments": RunningMoments(count=2, mean=0.5, squares=2.0),
    "name": "figure",
    "nll_coef": 0.1,
    "policy_lambd": 0.9,
    "policy_version": 3,
    "ratio_cap": 10.0,
    "reduction": Reduction(over="sequence"),
    "step_weight": 1.0,
    "temperature": 0.7,
    "threshold": 0.04,
    "undesirable_weight": 1.0,
    "value_lambd": 1.0,
}
# Numbers that their annotation does not tell: (entries of a tensor of this size) -> the tensor.
VALUES: dict[str, Callable[..., Tensor]] = {
    "action_mask": lambda size: torch.arange(size) % 3 != 1,
    "group": lambda size: torch.arange(size) % 2,
    "greedy_scores": lambda size: torch.arange(size) / 2,
    "lambd": lambda size: 1 / (1.0 + torch.arange(size)),
    "scores": lambda size: (torch.arange(size) % 2).float(),
    "step_ends": lambda size: torch.arange(size) % 3 == 2,
    "sums": lambda size: torch.tensor([1.0, 2.0]),
    "targets": lambda size, columns: torch.full((size, columns), 1 / columns),
    "valid": lambda rows, slots: torch.ones(rows, slots, dtype=torch.bool),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an annotation asks of a tensor: "Float", "Int", "Bool" or "Shaped", and the names of its axes.

    `optional` and `number`: None, or a float, may stand in its place.
    """

    kind: str
    axes: tuple[str, ...]
    optional: bool
    number: bool


def asked(annotation: object) -> Asked | None:
    """The demand of a jaxtyping annotation, alone or in a union with others."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = typing.get_args(annotation) if union else (annotation,)
    for part in parts:
        if isinstance(part, type) and issubclass(part, AbstractArray):
            kind, axes = part.__name__.split("[")[0], tuple(str(part.dim_str).replace("...", "").split())
            return Asked(kind=kind, axes=axes, optional=type(None) in parts, number=float in parts)
    return None


BITS = {"cleared", "known_exp", "ones_where"}
"""Work on bits, whose width must be told, or on two tensors that belong together: test_masking.py holds them."""


def functions() -> dict[str, Callable[..., object]]:
    """Public functions with a tensor among their parameters, as "module.function"."""
    found: dict[str, Callable[..., object]] = {}
    for info in pkgutil.walk_packages(hone.algos.__path__, "hone.algos."):
        if not info.name.startswith(NOT_READ):
            for name, function in vars(importlib.import_module(info.name)).items():
                public = inspect.isfunction(function) and function.__module__ == info.name and not name.startswith("_")
                if public and tensors(function) and name not in BITS:
                    found[f"{info.name.removeprefix('hone.algos.')}.{name}"] = function
    return found


def tensors(function: Callable[..., object]) -> dict[str, Asked]:
    """The function's tensor parameters by name."""
    demands = {name: asked(parameter.annotation) for name, parameter in inspect.signature(function).parameters.items()}
    return {name: demand for name, demand in demands.items() if demand is not None}


def arguments(function: Callable[..., object], sizes: dict[str, int] = SIZES, *, dtype: torch.dtype = torch.float64) -> dict[str, object]:
    """Arguments by name that fit the annotations: small negative floats, small integers, some rows and tokens off the masks."""
    made: dict[str, object] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        demand = asked(parameter.annotation)
        if demand is not None:
            made[name] = tensor(name, demand, sizes, dtype=dtype)
        elif name in ("rows", "batch"):
            made[name] = stage(parameter.annotation, sizes, dtype=dtype)
        elif name == "generator":
            made[name] = torch.Generator().manual_seed(0)
        elif parameter.default is inspect.Parameter.empty:
            assert name in SETTINGS, f"{function.__name__} takes {name}: tests/reference/arguments.py needs a value for it"
            made[name] = SETTINGS[name]
    return made


def tensor(name: str, demand: Asked, sizes: dict[str, int], *, dtype: torch.dtype) -> Tensor:
    """A tensor of that kind and shape; numbers differ from entry to entry."""
    shape = tuple(sizes.get(axis) if axis in sizes else int(axis) for axis in demand.axes)
    if name == "cu_seqlens":
        return torch.tensor(OFFSETS[shape[0]], dtype=torch.int32)
    if name in VALUES:
        value = VALUES[name](*shape)
        return value.to(dtype) if value.is_floating_point() else value
    count = int(torch.tensor(shape).prod())
    if demand.kind == "Bool":
        return (torch.arange(count) % 3 != 1).reshape(shape)
    if demand.kind == "Int":
        return (torch.arange(count).reshape(shape) % max(shape[-1], 1) if len(shape) > 1 else torch.arange(count)) % 3
    return (-0.1 - torch.rand(count, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)).reshape(shape).to(dtype)


def stage(kind: type[Packed], sizes: dict[str, int], *, dtype: torch.dtype = torch.float64) -> Packed:
    """Rows of the stage asked for, every tensor field filled."""
    demands = {name: asked(hint) for name, hint in typing.get_type_hints(kind).items()}
    fields = {name: tensor(name, demand, sizes, dtype=dtype) for name, demand in demands.items() if demand is not None}
    return kind(**fields)  # type: ignore[arg-type] - by name
