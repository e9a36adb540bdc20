"""Ranges of numeric settings, written once beside the field: `lr: Annotated[float, Range(low=0, open_low=True)]`.

Used to reject a value with its limit (`violations`, all at once; `require_valid`, which `judge`, the controllers and the offline
losses call) and to print the limit in the help; the mathematics never sees them.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Range:
    """An interval; a missing end is open to infinity, `open_low`/`open_high` exclude the end itself."""

    low: int | float | None = None
    high: int | float | None = None
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: int | float) -> bool:
        if math.isnan(value):
            return False
        above = self.low is None or (value > self.low if self.open_low else value >= self.low)
        below = self.high is None or (value < self.high if self.open_high else value <= self.high)
        return above and below

    def __str__(self) -> str:
        left = "(-inf" if self.low is None else f"{'(' if self.open_low else '['}{self.low:g}"
        right = "inf)" if self.high is None else f"{self.high:g}{')' if self.open_high else ']'}"
        return f"{left}, {right}"


def range_of(annotation: object) -> Range | None:
    """The Range in `Annotated[..., Range(...)]`, looked for through unions such as `Annotated[...] | None`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return next((meta for meta in typing.get_args(annotation)[1:] if isinstance(meta, Range)), None)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((found for part in typing.get_args(annotation) if (found := range_of(part))), None)
    return None


def choices_of(annotation: object) -> tuple[object, ...]:
    """The values a Literal allows, none for any other annotation."""
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


@functools.cache
def require_valid(config: object) -> None:
    """Raise ValueError naming every setting of a (nested) dataclass outside its range, and every one that is no choice of its Literal.

    Configurations are frozen, so one that passed is not looked at again.
    """
    told = [f"{name} is {value!r}, it must lie in {limit}" for name, value, limit in violations(config)]
    told += [f"{name} is {value!r}, choose one of {', '.join(map(repr, choices))}" for name, value, choices in _strange(config)]
    if told:
        raise ValueError(f"{type(config).__name__}: {'; '.join(told)}")


def _strange(config: object, prefix: str = "") -> Iterator[tuple[str, object, tuple[object, ...]]]:
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _strange(value, f"{name}.")
        elif (choices := choices_of(hints[field.name])) and value not in choices:
            yield name, value, choices


def violations(config: object, prefix: str = "") -> Iterator[tuple[str, object, Range]]:
    """Every numeric field of a (nested) dataclass outside its range, as (dotted name, value, range)."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from violations(value, f"{name}.")
        elif (limit := range_of(hints[field.name])) is not None and value is not None:
            values = typing.cast("tuple[int | float, ...]", value if isinstance(value, tuple) else (value,))
            yield from ((name, one, limit) for one in values if one not in limit)
