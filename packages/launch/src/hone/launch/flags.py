"""The command line into values: every token is looked at, and everything wrong with any of them is reported together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hone.launch.errors import Problem
from hone.launch.names import ALL_ALIASES, flag, plain, unknown
from hone.launch.schema import Setting, from_text, shown

ACTIONS = {"config": "FILE", "recipe": "NAME", "print_config": ""}
"""Flags that are no settings, and what they take."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a command line says: `values` and their `sources` by dotted name, flags that are `actions`, names found `bad`."""

    values: dict[str, object] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    actions: dict[str, str] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Option:
    """A flag as typed and the values behind it; `where` says which word it is. Values before any flag have none (`typed` "")."""

    typed: str
    where: str
    values: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Without hyphens in front, and with underscores."""
        return plain(self.typed)


def read(argv: Sequence[str], known: Mapping[str, Setting], elsewhere: Mapping[str, str]) -> Given:
    """Read what follows the verb; `elsewhere` maps settings of other verbs to their verb."""
    given = Given()
    for option in _options(argv):
        if not option.typed:
            given.problems.extend(_stray(value, option) for value in option.values)
        elif option.name in ACTIONS:
            _action(given, option)
        else:
            _setting(given, option, known, elsewhere)
    return given


def targets(name: str, tokens: Sequence[Any], known: Mapping[str, Setting]) -> list[tuple[str, Sequence[Any]]]:
    """The settings a name stands for, each with its share of the values; empty for an unknown name."""
    if name in known:
        return [(name, tokens)]
    alias = ALL_ALIASES.get(name)
    if alias is None or any(target not in known for target in alias.targets):
        return []
    if not alias.spread:
        return [(target, tokens) for target in alias.targets]
    last = len(alias.targets) - 1  # values left over go to the last target, which refuses them
    return [(target, tokens[i:] if i == last else tokens[i : i + 1]) for i, target in enumerate(alias.targets)]


def _options(argv: Sequence[str]) -> Iterator[Option]:
    """Flags with the values behind them. What begins with a hyphen is a flag, but for negative numbers and a lone hyphen."""
    option = Option(typed="", where="argument 2")
    for position, token in enumerate(argv, 2):  # the verb is the first
        if token.startswith("--") or (token.startswith("-") and token[1:2].isalpha()):
            yield option
            typed, equals, value = token.partition("=")
            option = Option(typed=typed, where=f"argument {position}", values=[value] if equals else [])
        else:
            option.values.append(token)
    yield option


def _setting(given: Given, option: Option, known: Mapping[str, Setting], elsewhere: Mapping[str, str]) -> None:
    name, negated = _positive(option.name, known)
    found = targets(name, option.values, known)
    if not option.typed.startswith("--"):
        mend = f"write {flag(option.name)}" if found else "options begin with two hyphens"
        given.problems.append(Problem(what=f"unknown option {option.typed}", mend=mend, where=option.where))
        return
    if not found:
        what, mend = unknown(option.typed, option.values, known, elsewhere)
        given.problems.append(Problem(what=what, mend=mend, where=option.where))
    for target, tokens in found:
        setting = known[target]
        try:
            value = _value(setting, tokens[: len(setting.members)], negated=negated)
        except ValueError as error:
            given.bad.add(target)
            given.problems.append(Problem(what=f"{option.typed}: {error}", mend=_usage(setting), where=option.where))
        else:
            given.values[target] = value
            given.sources[target] = f"flag {option.typed}"
    surplus = found[-1][1][len(known[found[-1][0]].members) :] if found else []
    given.problems.extend(_stray(token, option) for token in surplus)


def _positive(name: str, known: Mapping[str, Setting]) -> tuple[str, bool]:
    """The switch a name turns off (`group.no_switch` or `no_group.switch`), and True; any other name as it is, and False."""
    positive = name.removeprefix("no_").replace(".no_", ".")
    found = targets(positive, [], known)
    if name != positive and not targets(name, [], known) and found and all(known[target].type is bool for target, _ in found):
        return positive, True
    return name, False


def _value(setting: Setting, tokens: Sequence[str], *, negated: bool) -> object:
    if setting.type is not bool or (tokens and not negated):
        return from_text(setting, tokens)
    if tokens:
        raise ValueError(f"takes no value, got {shown(' '.join(tokens))}")
    return not negated


def _action(given: Given, option: Option) -> None:
    takes = ACTIONS[option.name]
    if len(option.values) == bool(takes) and "" not in option.values:
        given.actions[option.name] = "".join(option.values)
        return
    got = shown(" ".join(option.values)) if option.values else "nothing"
    what = f"{option.typed} takes {f'one {takes}' if takes else 'no value'}, got {got}"
    given.problems.append(Problem(what=what, mend=f"write {flag(option.name)} {takes}".rstrip(), where=option.where))


def _stray(token: str, option: Option) -> Problem:
    key, equals, value = token.partition("=")
    assignment = equals and all(part.isidentifier() for part in plain(key).split("."))
    mend = f"write {flag(plain(key))} {value}" if assignment else "every value stands behind its --flag"
    place = f"after {option.typed}" if option.typed else option.where
    return Problem(what=f"unexpected argument {shown(token)}", mend=mend, where=place)


def _usage(setting: Setting) -> str:
    limits = f", {setting.limits}" if setting.limits else ""
    return f"{setting.flag} {setting.metavar}".rstrip() + f"{limits}; the default is {setting.written}"
