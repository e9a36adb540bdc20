"""Configuration files: TOML into values with the line each stands on, and a configuration back into TOML."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hone.launch.commands import EveryConfig, defaults_of
from hone.launch.errors import Problem, UsageError
from hone.launch.flags import targets
from hone.launch.names import closest, flag, unknown
from hone.launch.schema import Setting, from_toml, settings, shown, value_of

HEADER = ("verb", "recipe")
"""Keys above the first table: the command a file is for, and the recipe below it."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a file says: `header` keys, `values` and their `sources` by dotted name, names found `bad`."""

    header: dict[str, str] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


def read_text(path: str) -> str:
    """The text of a configuration file; UsageError names what is there instead."""
    file = Path(path)
    try:
        return file.read_bytes().decode("utf-8-sig")
    except IsADirectoryError:
        inside = sorted(entry.name for entry in file.iterdir() if entry.suffix == ".toml")
        what, mend = f"{path} is a directory", f"name a file in it: {', '.join(inside[:5])}" if inside else "it holds no .toml file"
    except FileNotFoundError:
        what, mend = f"there is no file {path}", nearest(path)
    except OSError as error:
        what, mend = f"{path} cannot be read: {error.strerror}", "mend its permissions"
    except UnicodeDecodeError as error:
        what, mend = f"{path} is not UTF-8: byte {error.start + 1} is 0x{error.object[error.start]:02x}", "convert it to UTF-8"
    except ValueError as error:
        what, mend = f"{path!r} is not a path: {error}", "name a TOML file"
    raise UsageError([Problem(what=what, mend=mend, where="--config")])


def read(path: str, text: str, known: Mapping[str, Setting], elsewhere: Mapping[str, str], *, verb: str) -> Layer:
    """Judge every key of a file; a syntax error ends it (UsageError), all else is collected."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError([_syntax(path, text, error)]) from error
    layer, lines = Layer(), _lines(text)
    for key, value in _flat(document):
        name, where = key.replace("-", "_"), f"{path}:{_line(key, lines)}"
        listed = isinstance(value, list)
        found = targets(name, value if listed else [value], known)
        if name in HEADER:
            layer.header[name] = str(value)
            layer.sources[name] = where
        elif not found:
            what, mend = unknown(flag(name), [str(one) for one in (value if listed else [value])], known, elsewhere)
            layer.problems.append(Problem(what=_as_key(what).replace("option", "key"), mend=_as_key(mend), where=where))
        for target, share in found:
            whole = share[0] if len(share) == 1 and not (target == name and listed) else list(share)
            try:
                layer.values[target] = from_toml(known[target], whole)
                layer.sources[target] = where
            except ValueError as error:
                layer.bad.add(target)
                layer.problems.append(Problem(what=f"{name}: {error}", mend=f"the default is {known[target].default}", where=where))
    if layer.header.get("verb", verb) != verb:
        other = layer.header["verb"]
        mend = f"run `launch {other} --config {path}`, or take the line out to use what both commands share"
        raise UsageError([Problem(what=f"this file is for `launch {other}`", mend=mend, where=layer.sources["verb"])])
    return layer


def top_level(path: str, key: str) -> str | None:
    """A text above the first table of a file; None where there is none, or no file that can be read, which `read` tells of."""
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8-sig")).get(key)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def to_toml(config: EveryConfig, sources: Mapping[str, str] | None = None) -> str:
    """Every setting as TOML that `--config` reads back to the same configuration; with `sources`, whence each value is."""
    lines = [f'verb = "{config.verb}"', 'recipe = "none"  # every value is written out below']
    group = ""
    for name, setting in settings(defaults_of(config)).items():
        if setting.group != group:
            group = setting.group
            lines += ["", f"[{group}]"]
        value, key = value_of(config, name), name.rpartition(".")[2]
        # TOML has no null: what is unset by default is left out, anything else is unset by the word.
        line = f"# {key} is not set" if value is None and setting.default is None else f"{key} = {_literal(value)}"
        lines.append(line if sources is None else f"{line:<44}  # {sources[name]}")
    return "\n".join(lines) + "\n"


def nearest(path: str) -> str:
    """How to mend a path that leads nowhere: the most similar neighbour, or where it breaks off."""
    wanted = Path(path)
    parent = next(one for one in (wanted.parent, *wanted.parent.parents, Path("/")) if one.is_dir())
    missing = wanted.relative_to(parent).parts[0] if wanted.is_relative_to(parent) else wanted.name
    near = closest(missing, [entry.name for entry in parent.iterdir()])
    place = f"in {parent if parent.is_absolute() else parent.absolute()}"
    return f"did you mean {parent / near[0]}? (looked {place})" if near else f"nothing {place} is called anything like {shown(missing)}"


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_literal(one) for one in value)}]"
    if isinstance(value, int | float):
        return repr(value)
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _flat(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lines(text: str) -> dict[str, int]:
    """Line of every key and table header as written; good enough to point at, values are never taken from here."""
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.split("\n"), 1):
        header = re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line)
        key = re.match(r"\s*([\w.\"'\- ]+?)\s*=", line)
        if header:
            table = _unquoted(header[1])
            found.setdefault(table, number)
        elif key:
            found.setdefault(f"{table}.{_unquoted(key[1])}".lstrip("."), number)
    return found


def _unquoted(key: str) -> str:
    return re.sub(r"[\"' ]", "", key)


def _line(key: str, lines: Mapping[str, int]) -> int:
    """The key's line, or that of the nearest table around it: a key of an inline table has no line of its own."""
    parts = key.split(".")
    return next((lines[".".join(parts[:end])] for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in lines), 1)


def _syntax(path: str, text: str, error: tomllib.TOMLDecodeError) -> Problem:
    lines = text.replace("\r\n", "\n").split("\n")
    place = re.search(r"\(at line (\d+), column (\d+)\)$", str(error))
    # Without a place the document ended too early; then the caret stands behind its last character.
    line, column = (int(place[1]), int(place[2])) if place else (len(lines), len(lines[-1]) + 1)
    reason = re.sub(r" \(at .*\)$", "", str(error))
    content = lines[min(line, len(lines)) - 1].replace("\t", " ")
    start = max(0, column - 60)
    caret = f"{content[start : start + 100]}\n{' ' * (column - 1 - start)}^"
    mend = "configuration files are TOML" if path.endswith((".yaml", ".yml", ".json")) else "mend the line the caret points at"
    return Problem(what=f"{reason}\n{caret}", mend=mend, where=f"{path}:{line}:{column}")


def _as_key(mend: str) -> str:
    return re.sub(r"--([\w.\-]+)", lambda found: found[1].replace("-", "_"), mend)
