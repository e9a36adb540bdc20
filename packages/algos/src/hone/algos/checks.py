"""Mistakes named where they are made: shapes and dtypes against a function's annotations, numbers that are not finite.

`checked` reads the jaxtyping annotations of a function once, and compares the arguments of every call with them; nothing is
read back from a device. A letter must have one size throughout a call, and N_plus_1 one more than N. Where a shape is met
that no annotation allows, a ValueError names the argument, what it is, what it should be and how to get there.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from jaxtyping import AbstractArray, Bool, Shaped
from torch import Tensor

from hone.algos.ranges import Range, choices_of

P = ParamSpec("P")
R = TypeVar("R")

MEANINGS = {
    "T": "one entry per packed token",
    "N": "one per row",
    "N_plus_1": "where the rows meet, one more than there are rows",
    "P": "one per pair or prompt",
    "M": "one per mismatched row",
    "C": "one per column",
    "V": "one per word of the vocabulary",
    "K": "one per top token",
    "B": "one per padded row",
    "L": "one per slot",
}
SETTINGS = {
    **dict.fromkeys(("gamma", "lambd", "policy_lambd", "value_lambd", "clip_low", "fraction"), Range(low=0, high=1)),
    **dict.fromkeys(("clip_high", "clip", "eps", "log_clip_low", "log_clip_high", "min_std"), Range(low=0)),
    "dual_clip": Range(low=1, open_low=True),
}
"""Ranges of numeric settings that mean one thing wherever they occur; others are told by the function that has them."""
MEND_REWARDS = "mend the reward function, or drop the rows"
REMEDIES = {"floating point": "float()", "integer": "long()", "boolean": "bool()"}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What an annotation asks of a tensor: the kind of its entries ("" for any) and its axes, `open` if more may follow.

    `others` are the types that it allows in a tensor's place, such as None.
    """

    kind: str
    axes: tuple[str, ...]
    open: bool
    others: tuple[type, ...] = ()

    def __str__(self) -> str:
        return f"[{', '.join(self.axes)}{', ...' if self.open else ''}]"


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, refusing tensors that its annotations do not allow with a ValueError; values are not looked at.

    Where `cu_seqlens` lies on the CPU, it must also run from 0 to the number of packed tokens (if any are given) without falling.
    """
    parameters = inspect.signature(function).parameters
    specs = specs_of({name: parameter.annotation for name, parameter in parameters.items()})
    choices = {name: choices_of(parameter.annotation) for name, parameter in parameters.items()}
    settings = {name: allowed for name, allowed in choices.items() if allowed or name in SETTINGS}
    names = list(parameters)
    title = function.__name__

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        check_arguments(title, specs, arguments)
        for name, allowed in settings.items():
            if name in arguments:
                check_setting(title, name, arguments[name], allowed)
        return function(*args, **kwargs)

    return wrapper


def specs_of(annotations: Mapping[str, object]) -> dict[str, Spec]:
    """The specs of those names whose annotations ask for a tensor."""
    return {name: spec for name, annotation in annotations.items() if (spec := _spec(annotation)) is not None}


def check_arguments(function: str, specs: Mapping[str, Spec], arguments: Mapping[str, object]) -> None:
    """Raise ValueError for the first argument that does not fit its spec, or disagrees in size with one before it."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, spec in specs.items():
        value = arguments.get(name)
        if isinstance(value, Tensor):
            _check_tensor(function, name, value, spec, sizes)
        elif name in arguments and not isinstance(value, spec.others):
            what = "None" if value is None else f"a {type(value).__name__}"
            raise ValueError(f"{function}: {name} is {what}; it must be a torch tensor of shape {spec}")
    cu_seqlens = arguments.get("cu_seqlens")
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type == "cpu":
        check_offsets(function, cu_seqlens, tokens=sizes["T"][0] if "T" in sizes else None)
    for larger, smaller in (("N_plus_1", "N"), ("B_plus_1", "B")):
        if larger in sizes and smaller in sizes and sizes[larger][0] != sizes[smaller][0] + 1:
            (many, offsets), (few, per_row) = sizes[larger], sizes[smaller]
            raise ValueError(
                f"{function}: {offsets} has {many} entries, for {many - 1} rows, but {per_row} has {few}; give both the same rows"
            )


def check_setting(function: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError for a value that is none of the choices (if there are any), or out of `SETTINGS`' range, as NaN always is."""
    if choices and value not in choices:
        raise ValueError(f"{function}: {name} is {value!r}; choose one of {', '.join(map(repr, choices))}")
    limit = SETTINGS.get(name)
    if limit is not None and isinstance(value, float | int) and value not in limit:
        raise ValueError(f"{function}: {name} is {value}; it must lie in {limit}")


def check_offsets(function: str, cu_seqlens: Tensor, *, tokens: int | None) -> None:
    """Raise ValueError unless cu_seqlens runs from 0 to `tokens` (anywhere, if that is None) and never falls."""
    if cu_seqlens.numel() < 1 or int(cu_seqlens[0]) != 0 or (tokens is not None and int(cu_seqlens[-1]) != tokens):
        ends = f"runs from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}" if cu_seqlens.numel() else "is empty"
        end = "" if tokens is None else f" {tokens}"
        raise ValueError(f"{function}: cu_seqlens {ends}; it must run from 0 to the{end} packed tokens: [0, *lengths.cumsum(0)]")
    if bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"{function}: cu_seqlens falls somewhere; no row has fewer than 0 tokens: [0, *lengths.cumsum(0)]")


def require_finite(
    function: str,
    name: str,
    values: Shaped[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None = None,
    *,
    remedy: str = "mend what computed it",
) -> None:
    """Raise ValueError if a value (on the mask) is NaN or infinite: set to zero, it would train on and hide its cause."""
    broken = ~torch.isfinite(values) if mask is None else ~torch.isfinite(values) & mask
    if bool(broken.any()):
        first = int(broken.nonzero()[0, 0])
        looked_at = values.numel() if mask is None else int(mask.sum())
        raise ValueError(
            f"{function}: {int(broken.sum())} of {looked_at} {name} are not finite, at index {first} {float(values[broken][0])}; {remedy}"
        )


def _check_tensor(function: str, name: str, value: Tensor, spec: Spec, sizes: dict[str, tuple[int, str]]) -> None:
    kind = "boolean" if value.dtype == torch.bool else "floating point" if value.dtype.is_floating_point else "integer"
    kind = "complex" if value.dtype.is_complex else kind
    if spec.kind and kind != spec.kind:
        raise ValueError(
            f"{function}: {name} is {value.dtype}; it must be {spec.kind}: pass {name}.{REMEDIES[spec.kind]} if that is what it means"
        )
    if value.dim() != len(spec.axes) and not (spec.open and value.dim() > len(spec.axes)):
        padded = "; pack padded rows with `pack_padded`" if spec.axes == ("T",) and value.dim() == 2 else ""
        meaning = ", ".join(f"{axis}: {MEANINGS[axis]}" for axis in spec.axes if axis in MEANINGS)
        raise ValueError(
            f"{function}: {name} has shape {tuple(value.shape)}; it must be {spec}" + (f" ({meaning})" if meaning else "") + padded
        )
    for axis, size in zip(spec.axes, value.shape, strict=False):
        if axis.isdigit():
            if size != int(axis):
                raise ValueError(f"{function}: {name} has shape {tuple(value.shape)}; it must be {spec}")
            continue
        known, by = sizes.setdefault(axis, (size, name))
        if known != size:
            meaning = f" ({MEANINGS[axis]})" if axis in MEANINGS else ""
            raise ValueError(
                f"{function}: {name} has shape {tuple(value.shape)}, but {by} has {known} along {axis}{meaning}; give both alike"
            )


def _spec(annotation: object) -> Spec | None:
    """The spec of a jaxtyping annotation, looked for through unions such as `Float[Tensor, " N"] | None`."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts: tuple[object, ...] = typing.get_args(annotation) if union else (annotation,)
    for part in parts:
        if isinstance(part, type) and issubclass(part, AbstractArray):
            axes = str(part.dim_str).split()
            kinds = {"bool": "boolean", "float32": "floating point", "int64": "integer"}
            fitting = [kind for dtype, kind in kinds.items() if isinstance(part.dtypes, tuple) and dtype in part.dtypes]
            kind = fitting[0] if len(fitting) == 1 else ""
            others = tuple(other for other in parts if isinstance(other, type) and other is not part)
            others = (*others, int) if float in others else others  # as in every annotation: a float may be given as an int
            return Spec(kind=kind, axes=tuple(axis for axis in axes if axis != "..."), open="..." in axes, others=others)
    return None
