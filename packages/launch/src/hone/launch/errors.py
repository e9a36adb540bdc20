"""What stops a run, as text and as an exit code.

Every package raises its own exceptions whose text is complete (what, where, how to mend); only this file knows the codes,
by the names of the types, so that reading an error never imports a package that was not needed so far.
"""

import itertools
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace

USAGE, ENVIRONMENT, PREEMPTED, INTERRUPTED = 2, 5, 75, 128 + signal.SIGINT

CODES = {
    "hone.datasets.errors.DataError": 3,
    "hone.learner.errors.CheckpointError": 4,
    "hone.learner.errors.ModelError": 5,
    "hone.rollout.errors.RewardError": 6,
    "hone.rollout.errors.EnvironmentFailure": 6,
    "hone.rollout.errors.EngineError": 7,
    "hone.launch.remote.RankLost": ENVIRONMENT,
    "hone.learner.errors.NumericsError": 8,
    "hone.launch.gap.GapExceeded": 8,
    "builtins.FloatingPointError": 8,
    "hone.launch.interrupt.Preempted": PREEMPTED,
    "builtins.KeyboardInterrupt": INTERRUPTED,
}
"""Exit code of each error; a subclass has its nearest ancestor's. Anything else is a defect and ends with 1."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with what was asked: `what`, `where` (flag or file:line), how to `mend` it, and its exit `code`.

    A rule that joins several settings names them in `settings`, and whoever knows their sources fills in `where`.
    """

    what: str
    mend: str
    where: str = ""
    code: int = USAGE
    settings: tuple[str, ...] = ()

    def at(self, where: str) -> "Problem":
        """The same problem with its place."""
        return replace(self, where=where)

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.where and f"at: {self.where}", self.mend and f"fix: {self.mend}") if line)


class UsageError(Exception):
    """What was asked cannot run; carries every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a usage error without a problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))

    @property
    def code(self) -> int:
        """The lowest code among the problems: what is mended first."""
        return min(problem.code for problem in self.problems)


def _cause(error: BaseException) -> BaseException:
    """What a Ray task raised, out of the wrapper that carries it and its remote traceback across processes."""
    inner = getattr(error, "cause", None)
    return _cause(inner) if isinstance(inner, BaseException) and inner is not error else error


def exit_code(error: BaseException) -> int:
    """The exit code of design section 5 for an error."""
    error = _cause(error)
    if isinstance(error, UsageError):
        return error.code
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)
    return next((CODES[name] for name in names if name in CODES), 1)


def present(error: BaseException, *, debug: bool) -> None:
    """Print an error on stderr for a person: what, where, how to mend. The traceback only with `debug`."""
    from rich.console import Console
    from rich.text import Text

    from hone.launch.observe.redact import redact

    console = Console(stderr=True, highlight=False)
    cause = _cause(error)
    if debug:
        console.print(Text(redact("".join(traceback.format_exception(error)))), end="", soft_wrap=True)
    if isinstance(cause, KeyboardInterrupt):
        console.print(Text("interrupted", "bold"))
        return
    if isinstance(cause, UsageError):
        problems = cause.problems
    elif exit_code(cause) != 1:
        problems = (Problem(what=str(cause), mend=""),)
    else:
        mend = "this is a defect of hone, not of your input; run again with --debug for the traceback"
        problems = (Problem(what=f"{type(cause).__name__}: {cause}", mend=mend),)
    title = f"error: {len(problems)} problems; nothing was started" if len(problems) > 1 else "error: "
    console.print(Text(title, "bold red"), end="\n" if len(problems) > 1 else "")
    # Wrapped for a person at a terminal; a log keeps each line whole.
    width = console.width if sys.stderr.isatty() else sys.maxsize
    for number, problem in enumerate(problems, 1):
        head = f"\n{number:>3}. " if len(problems) > 1 else ""
        console.print(Text.assemble((head, "bold red"), (_wrapped(redact(problem.what), width, 5 if head else 7), "bold")), soft_wrap=True)
        for label, text in (("at ", problem.where), ("fix", problem.mend)):
            if text:
                console.print(Text.assemble((f"     {label} ", "cyan"), _wrapped(redact(text), width, 9)), soft_wrap=True)


def _wrapped(text: str, width: int, indent: int) -> str:
    """Text in lines of at most `width` columns, every line but the first indented; its own line breaks are kept."""
    wrapper = textwrap.TextWrapper(width=max(width - indent, 20), break_long_words=False, break_on_hyphens=False)
    # Lines that begin with a space are drawings (a caret, a table) and stay as they are.
    lines = [[line] if line.startswith(" ") else wrapper.wrap(line) or [""] for line in clean(text).split("\n")]
    return f"\n{' ' * indent}".join(itertools.chain.from_iterable(lines))


def clean(text: str) -> str:
    """Control characters of quoted input as escapes, so that a value can neither move the cursor nor colour the screen."""
    return "".join(char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode() for char in text)
