"""The settings of a configuration, read off its dataclasses: name, type, range, default, meaning; and values from text or TOML.

A setting is named by its dotted path with underscores, `rollout.batch_size`; on the command line hyphens do as well.
tyro knows how a type is written on a command line; the checks and their messages are here, so that a flag and a line of a
file are judged alike and all of them are judged before anything is reported.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hone.algos.ranges import Range, range_of


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value a user can set."""

    name: str
    annotation: object
    default: object
    doc: str
    group_doc: str

    @property
    def flag(self) -> str:
        """As typed."""
        return "--" + self.name.replace("_", "-")

    @property
    def group(self) -> str:
        """What stands before the last dot."""
        return self.name.rpartition(".")[0]

    @property
    def type(self) -> object:
        """The type without its range and without None."""
        return _bare(self.annotation)

    @property
    def optional(self) -> bool:
        """Whether None is a value."""
        return type(None) in typing.get_args(self.annotation)

    @property
    def choices(self) -> tuple[object, ...]:
        """Every allowed value, where they can be counted."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is typing.Literal else ()

    @property
    def members(self) -> tuple[object, ...]:
        """Annotations of the values written one after another: several for a tuple, else one."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is tuple else (self.annotation,)

    @property
    def metavar(self) -> str:
        """The value as help shows it: INT, {a,b}, FLOAT FLOAT."""
        return "" if self.type is bool else _spec(self.type).metavar

    @property
    def written(self) -> str:
        """The default as one would type it."""
        return {True: "on", False: "off"}[bool(self.default)] if self.type is bool else written(self.default)

    @property
    def limits(self) -> str:
        """The range of allowed numbers, in words short enough for help."""
        texts = dict.fromkeys(_words(limit) for member in self.members if (limit := range_of(member)))
        return ("each " if len(self.members) > 1 else "") + ", ".join(texts) if texts else ""

    @property
    def expected(self) -> str:
        """What a value must be, for an error."""
        kinds = {int: "int", float: "float", str: "text", bool: "True or False"}
        if self.choices:
            text = "one of " + ", ".join(str(choice) for choice in self.choices)
        elif len(self.members) > 1:
            text = f"{len(self.members)} values ({' '.join(kinds.get(_bare(member), '?') for member in self.members)})"  # pyright: ignore[reportArgumentType]
        else:
            text = kinds.get(self.type, str(self.type))  # pyright: ignore[reportArgumentType] - a type is hashable
        return text + " or None" * self.optional


def settings(config: object) -> dict[str, Setting]:
    """Every setting of a configuration that has an effect with its algorithm, by name."""
    unused: frozenset[str] = config.unused  # pyright: ignore[reportAttributeAccessIssue] - every whole configuration tells
    found = {one.name: one for one in _walk(config, "", "")}
    return {name: one for name, one in found.items() if name not in unused and one.group.partition(".")[0] not in unused}


def value_of(config: object, name: str) -> object:
    """The value a configuration holds under a dotted name."""
    return functools.reduce(getattr, name.split("."), config)


def replaced(config: typing.Any, values: Mapping[str, object]) -> typing.Any:
    """A copy of a nested dataclass with other values under dotted names; ValueError where a dataclass refuses a combination."""
    own = {name: value for name, value in values.items() if "." not in name}
    for group in dict.fromkeys(name.partition(".")[0] for name in values if "." in name):
        inner = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{group}.")}
        own[group] = replaced(getattr(config, group), inner)
    return dataclasses.replace(config, **own)


def from_text(setting: Setting, tokens: Sequence[str]) -> object:
    """The value written as `tokens` on a command line; ValueError says what was expected."""
    refusal = ValueError(f"expected {setting.expected}, got {shown(' '.join(tokens)) if tokens else 'nothing'}")
    if setting.optional and [token.lower() for token in tokens] == ["none"]:
        return None
    if setting.type is bool:
        value = {"true": True, "false": False}.get(" ".join(tokens).lower())
        if value is None:
            raise refusal
        return value
    if len(tokens) != len(setting.members) or any(_surrogates(token) for token in tokens):
        raise refusal
    try:
        value = _spec(setting.type).instance_from_str(list(tokens))
    except ValueError as error:
        raise refusal from error
    return _within(setting, value)


def from_toml(setting: Setting, value: object) -> object:
    """The value of a TOML key; unlike a flag's it has a type already, which must be the setting's."""
    values = value if isinstance(value, list) else [value]
    textual = setting.type is str or str in [type(choice) for choice in setting.choices]
    unset = setting.optional and value in ("None", "none")
    scalar = all(isinstance(one, str | int | float) for one in values)
    if (
        not scalar
        or isinstance(value, list) != (len(setting.members) > 1)
        or (any(isinstance(one, str) != textual for one in values) and not unset)
    ):
        raise ValueError(f"expected {setting.expected}, got {shown(repr(value))}")
    return from_text(setting, [str(one) for one in values])


def written(value: object) -> str:
    """A value as one would type it."""
    if isinstance(value, tuple):
        return " ".join(written(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def shown(text: str) -> str:
    """A quoted value short enough for a message."""
    return f"`{text}`" if len(text) <= 80 else f"`{text[:77]}...`"


def _within(setting: Setting, value: object) -> object:
    values = value if isinstance(value, tuple) else (value,)
    for one, member in zip(values, setting.members, strict=True):
        limit = range_of(member)
        if limit is not None and one not in limit:  # pyright: ignore[reportOperatorIssue] - a member with a range is a number
            raise ValueError(f"{one} is out of range; it must be {_words(limit)}")
    return value


def _words(limit: Range) -> str:
    if limit.low is not None and limit.high is not None:
        return f"in {limit}"
    if limit.low is not None:
        return f"{'above' if limit.open_low else 'at least'} {limit.low:g}"
    return f"{'below' if limit.open_high else 'at most'} {limit.high:g}"


def _bare(annotation: object) -> object:
    if typing.get_origin(annotation) is typing.Annotated:
        return _bare(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        assert len(parts) == 1, f"a setting has one type, or None: {annotation}"
        return _bare(parts[0])
    return annotation


@functools.cache
def _spec(kind: typing.Any) -> typing.Any:
    # Imported here: the front screen and its errors read no types.
    from tyro.constructors import ConstructorRegistry, PrimitiveTypeInfo

    return ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, set()))


def _walk(config: object, prefix: str, doc: str) -> Iterator[Setting]:
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    hints = typing.get_type_hints(type(config), include_extras=True)
    docs = _field_docs(type(config))
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    # Its own values before its groups: one table each in TOML, one paragraph each in help.
    for name in sorted(values, key=lambda name: dataclasses.is_dataclass(values[name])):
        value, text = values[name], docs.get(name, "")
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{prefix}{name}.", text)
        else:
            yield Setting(name=f"{prefix}{name}", annotation=hints[name], default=value, doc=text, group_doc=doc)


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, its bases' included; whitespace joined."""
    docs: dict[str, str] = {}
    for base in reversed([kind for kind in cls.__mro__ if dataclasses.is_dataclass(kind)]):
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for line, below in itertools.pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
                docs[line.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return docs


def _surrogates(token: str) -> bool:
    """Whether a token held bytes that are not UTF-8; Python hands them over as lone surrogates."""
    return any("\ud800" <= char <= "\udfff" for char in token)
