"""Asking the launcher something without a terminal: problems of a command line, and the configuration it resolves to."""

from hone.launch.errors import Problem
from hone.launch.preflight import lacking
from hone.launch.resolve import Resolved, resolve
from hone.launch.rules import broken


def resolved(line: str, *, gpus: int = 0) -> Resolved:
    """`line` is what is typed after `launch`, in words without spaces."""
    verb, *argv = line.split()
    return resolve(verb, argv, gpus=gpus)


def settled(line: str, *, gpus: int = 0) -> Resolved:
    """A command line that reads without a problem."""
    answer = resolved(line, gpus=gpus)
    assert not answer.problems, [str(problem) for problem in answer.problems]
    return answer


def typed(line: str) -> list[Problem]:
    """Problems of the words alone."""
    return list(resolved(line).problems)


def crossed(line: str, *, gpus: int = 0) -> list[Problem]:
    """Problems between settings."""
    return list(broken(resolved(line, gpus=gpus), gpus))


def missing(line: str, *, gpus: int = 0) -> list[Problem]:
    """Problems with what the settings point at."""
    return list(lacking(resolved(line, gpus=gpus), gpus))


def only(problems: list[Problem]) -> Problem:
    """The single problem there must be."""
    assert len(problems) == 1, [str(problem) for problem in problems]
    return problems[0]
