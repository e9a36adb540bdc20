"""The layers into one configuration: defaults < recipe < what the backend implies < file < flags, each value with its source."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hone.launch import flags, recipes, toml
from hone.launch.commands import EveryConfig, defaults, implied_backend, training_verbs
from hone.launch.errors import Problem, UsageError
from hone.launch.names import closest
from hone.launch.schema import Setting, replaced, settings, value_of, written

ROLES = {"policy": "actor", "critic": "critic", "reference": "ref"}
"""Configuration group of each role a learner process can host."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A configuration, the source of each setting, and what was found wrong on the way; settings in `bad` hold a stand-in."""

    config: Any  # of PolicyGradientConfig or OfflineConfig: the rules of each know which
    sources: dict[str, str]
    recipe: str
    recipe_reason: str
    actions: dict[str, str]
    bad: frozenset[str]
    problems: tuple[Problem, ...]

    def where(self, names: Sequence[str]) -> str:
        """Values and their sources, as the place of a problem that joins several settings; defaults only where nothing else is."""
        chosen = [name for name in names if self.sources.get(name, "default") != "default"] or names
        return ", ".join(told(name, value_of(self.config, name), self.sources[name]) for name in chosen if name in self.sources)


def told(name: str, value: object, source: str) -> str:
    """A value as it was given: the flag as typed, else the setting and its source."""
    kind, _, typed = source.partition(" ")
    return f"{typed} {written(value)}" if kind == "flag" else f"{name} = {written(value)} ({source})"


def resolve(verb: str, argv: Sequence[str], *, gpus: int) -> Resolved:
    """Read everything the user said and lay it over the defaults. Collects problems; raises nothing for what a user can mend."""
    config = defaults(verb, _loss(argv))
    known = settings(config)
    elsewhere = {name: other for name, other in _first_verbs().items() if name not in known}
    given = flags.read(argv, known, elsewhere)
    problems = list(given.problems)
    layer = toml.Layer()
    if path := given.actions.get("config", ""):
        try:
            layer = toml.read(path, toml.read_text(path), known, elsewhere, verb=verb)
        except UsageError as error:
            problems += error.problems
    problems += layer.problems

    said = layer.values | given.values
    built_in = all(said.get(name) is None for name in config.built_in_unless)
    recipe, reason = recipes.choose(gpus=gpus, built_in=built_in)
    asked, where = given.actions.get("recipe"), "--recipe"
    if asked is None:
        asked, where = layer.header.get("recipe"), layer.sources.get("recipe", "")
    if asked is not None:
        recipe, reason = asked, ""
        if asked not in recipes.RECIPES:
            problems.append(_unknown_recipe(asked, where))
            recipe = "none"

    values, sources = {}, dict.fromkeys(known, "default")
    layers = {f"recipe {recipe}": recipes.values(recipe, known=known, built_in=built_in)}
    layers |= implied_backend(config, said)
    for source, layer_values in layers.items():
        values |= layer_values
        sources |= dict.fromkeys(layer_values, source)
    values |= said
    sources |= {name: where for name, where in layer.sources.items() if name in known} | given.sources
    for name, source, value in (*_shared_sizes(known, values), *_constant_length(known, values)):
        values[name] = value
        sources[name] = source
    config, refusals = _laid_over(config, values, known, sources)
    return Resolved(
        config=config,
        sources=sources,
        recipe=recipe,
        recipe_reason=reason,
        actions=given.actions,
        bad=frozenset(given.bad | layer.bad),
        problems=(*problems, *refusals),
    )


def _loss(argv: Sequence[str]) -> str | None:
    """What `--loss` says on the command line or, if not there, in the file: it decides which settings there are."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if "--loss" in words[:-1]:
        return words[words.index("--loss") + 1]
    path = words[words.index("--config") + 1] if "--config" in words[:-1] else None
    return toml.top_level(path, "loss") if path is not None else None


@functools.cache
def _first_verbs() -> dict[str, str]:
    """Every setting there is, and the first command that has it."""
    return {name: verb for verb in reversed(training_verbs()) for name in settings(defaults(verb))}


def _shared_sizes(known: Mapping[str, Setting], values: Mapping[str, object]) -> list[tuple[str, str, object]]:
    """Sizes nobody gave, taken from the one given for another role of the same group: (setting, source, value)."""
    found: list[tuple[str, str, object]] = []
    hosts = {role: values.get(f"placement.{role}", known[f"placement.{role}"].default) for role in ROLES if f"placement.{role}" in known}
    for size in ("num_nodes", "num_gpus_per_node"):
        for role, host in hosts.items():
            name = f"{ROLES[role]}.{size}"
            peers = (f"{ROLES[other]}.{size}" for other, place in hosts.items() if place == host)
            leader = next((peer for peer in peers if peer in values), None)
            if name not in values and leader is not None:
                found.append((name, f"as {leader}, in one group", values[leader]))
    return found


def _constant_length(known: Mapping[str, Setting], values: Mapping[str, object]) -> list[tuple[str, str, object]]:
    """An algorithm's constant length where nobody gave one, as above: the longest response, or none if it is reduced otherwise."""
    length, over, longest = "algo.reduction.length", "algo.reduction.over", "rollout.max_new_tokens"
    if length not in known or known[length].default is None or length in values:
        return []
    if values.get(over, "constant") != "constant":
        return [(length, f"as {over}", None)]
    return [(length, f"as {longest}", values[longest])] if longest in values else []


def _laid_over(
    config: EveryConfig, values: Mapping[str, object], known: Mapping[str, Setting], sources: Mapping[str, str]
) -> tuple[EveryConfig, list[Problem]]:
    """The configuration with the values; a group whose dataclass refuses their combination keeps what it had."""
    problems: list[Problem] = []
    for group, own in _by_group(values, known):
        try:
            config = replaced(config, own)
        except ValueError as error:
            where = ", ".join(told(name, value, sources[name]) for name, value in own.items())
            what, _, mend = str(error).partition("; ")
            problems.append(Problem(what=f"{group}: {what}", mend=mend or _combined(group, values, known), where=where))
    return config, problems


def _combined(group: str, values: Mapping[str, object], known: Mapping[str, Setting]) -> str:
    """How to mend values of a group that do not go together."""
    length = f"{group}.length"
    if length not in known:
        return "give values that go together, or leave them at their defaults"
    over = known[f"{group}.over"].flag
    if values.get(length) is not None:
        return f"drop {known[length].flag}, or add {over} constant"
    name = next(one for one in ("rollout.max_new_tokens", "data.max_len") if one in known)
    return f"add {known[length].flag} {values.get(name, known[name].default)}, which is {name}, or drop {over}"


def _by_group(values: Mapping[str, object], known: Mapping[str, Setting]) -> Iterator[tuple[str, dict[str, object]]]:
    for group in dict.fromkeys(known[name].group for name in values):
        yield group, {name: value for name, value in values.items() if known[name].group == group}


def _unknown_recipe(name: str, where: str) -> Problem:
    near = closest(name, recipes.RECIPES)
    mend = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(recipes.RECIPES)}"
    return Problem(what=f"there is no recipe {name}", mend=mend, where=where)
