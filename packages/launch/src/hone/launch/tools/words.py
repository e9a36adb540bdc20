"""The words behind a tool's name: places in order, and options with a value each."""

from collections.abc import Collection, Sequence

from hone.launch.errors import Problem, UsageError
from hone.launch.names import closest


def read(words: Sequence[str], *, places: Sequence[str], options: Collection[str], switches: Collection[str], usage: str) -> dict[str, str]:
    """Value of each place and option given, by name; a switch's is "on". Raises UsageError with everything wrong with the words."""
    found: dict[str, str] = {}
    stood: list[str] = []
    problems: list[Problem] = []
    rest = [word for word in words if word != "--debug"]
    while rest:
        word = rest.pop(0)
        typed, equals, value = word.partition("=")
        name = "--" + typed.lstrip("-").replace("_", "-")
        if not word.startswith("-"):
            stood.append(word)
        elif name in switches and not equals:
            found[name] = "on"
        elif name not in options:
            near = closest(name, [*options, *switches])
            problems.append(
                Problem(what=f"unknown option {typed}", mend=f"did you mean {near[0]}?" if near else usage, where="command line")
            )
        elif not equals and (not rest or rest[0].startswith("--")):
            problems.append(Problem(what=f"{name} takes a value", mend=usage, where="command line"))
        else:
            found[name] = value if equals else rest.pop(0)
    if len(stood) != len(places):
        problems.append(Problem(what=f"{len(places)} places ({' '.join(places)}), not {len(stood)}", mend=usage, where="command line"))
    if problems:
        raise UsageError(problems)
    return {**dict(zip(places, stood, strict=True)), **found}


def new_place(path: str, *, where: str) -> None:
    """Refuse to write over what is there. Raises UsageError."""
    from pathlib import Path

    out = Path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError([Problem(what=f"{path} is there already", mend="name a new place to write to", where=where)])
