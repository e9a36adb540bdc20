"""`launch export CHECKPOINT OUT`: a checkpoint's model in Hugging Face format."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hone.launch.errors import Problem, UsageError

USAGE = "launch export CHECKPOINT OUT [--role policy|critic] [--model DIR] [--average]"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was typed."""

    checkpoint: str
    out: Path
    role: str = "policy"
    model: str | None = None
    average: bool = False


def run(words: Sequence[str]) -> int:
    """Export; returns the exit code. Raises UsageError, CheckpointError, ModelError."""
    asked = read([word for word in words if word != "--debug"])
    if asked.out.exists() and (not asked.out.is_dir() or any(asked.out.iterdir())):
        what = f"{asked.out} is there already and is not an empty directory"
        raise UsageError([Problem(what=what, mend="name a new directory to export to", where="argument 3")])
    from hone.launch.saving import place_of  # torch, from here on
    from hone.learner.checkpoint.export import export

    root, step = place_of(asked.checkpoint, verb="*")
    path = export(root if step is None else root / f"step_{step}", asked.out, role=asked.role, model=asked.model, average=asked.average)
    print(f"the {'average of the ' * asked.average}{asked.role} of {path} is in {asked.out}")
    return 0


def read(words: Sequence[str]) -> Asked:
    """The words behind the verb. Raises UsageError with everything wrong with them."""
    places: list[str] = []
    options: dict[str, str] = {}
    problems: list[Problem] = []
    average = False
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            places.append(word)
        elif word == "--average":
            average = True
        elif name not in ("--role", "--model"):
            problems.append(Problem(what=f"unknown option {name}", mend=USAGE, where="command line"))
        elif not equals and (not rest or rest[0].startswith("-")):
            problems.append(Problem(what=f"{name} takes a value", mend=USAGE, where="command line"))
        else:
            options[name.removeprefix("--")] = value if equals else rest.pop(0)
    if len(places) != 2:
        problems.append(
            Problem(what=f"a checkpoint and a directory to export to, not {len(places)} paths", mend=USAGE, where="command line")
        )
    if problems:
        raise UsageError(problems)
    return Asked(checkpoint=places[0], out=Path(places[1]), average=average, **options)
