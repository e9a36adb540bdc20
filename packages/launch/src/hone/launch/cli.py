"""The command `launch`: read what was asked, check it, and only then start anything.

Nothing heavy is imported before it is needed: the front screen needs no torch, and neither help nor a refusal needs Ray,
vLLM, DeepSpeed or transformers.
"""

import importlib
import importlib.metadata
import os
import shlex
import sys
from collections.abc import Sequence

from hone.launch import student_samples
from hone.launch.errors import Problem, UsageError, exit_code, present
from hone.launch.loop_verbs import LOOPS
from hone.launch.verbs import OFFLINE, TOOLS, USING, VERBS

EVERY = [*VERBS, *OFFLINE, *LOOPS, *USING, *TOOLS]
COMMANDS = ", ".join(EVERY)

PROGRAMS = {
    "generate": "hone.launch.programs.generate",
    "eval": "hone.launch.programs.evaluate",
    "chat": "hone.launch.programs.chat",
    "serve-rm": "hone.launch.programs.serve_rm",
}
"""Module of each command that uses a model; its `run(config, sources)` returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (by default this process's) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()  # here, where a closed pipe can still be told from a fault
        return code
    except BrokenPipeError:
        # Whoever read the output has enough (`| head`); the interpreter must not try to flush into the closed pipe either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:  # the edge of the program: every error becomes a message and a code
        return _ended(error, debug="--debug" in words)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h"):
        from hone.launch import screens

        screens.front(importlib.metadata.version("hone-launch"))
        return 0
    if words[0] == "--version":
        print(f"launch {importlib.metadata.version('hone-launch')}")
        return 0
    verb, rest = words[0], words[1:]
    if verb == "kd" and student_samples.asked(rest):
        verb, rest = "on_policy_distill", student_samples.with_teacher(student_samples.said(rest))
        print(
            f"note: the student's own samples are what `launch {verb}` learns from: {shlex.join(['launch', verb, *rest])}", file=sys.stderr
        )
    if verb in TOOLS:
        return _tool(verb, rest)
    if verb not in EVERY:
        raise UsageError([_unknown_verb(verb)])
    asked = [place for place, word in enumerate(rest) if word == "-h" or word.partition("=")[0] == "--help"]
    if asked:
        return _help(verb, rest[asked[0] :], _chosen(rest))
    return _run(verb, rest)


def _tool(verb: str, rest: list[str]) -> int:
    if {"-h", "--help"} & set(rest):
        from hone.launch import screens

        screens.tool(verb)
        return 0
    return importlib.import_module(f"hone.launch.tools.{verb.replace('-', '_')}").run(rest)


def _chosen(rest: list[str]) -> str | None:
    """The `--loss` whose settings are to be shown."""
    words = [part for word in rest for part in word.split("=", 1)]
    return words[words.index("--loss") + 1] if "--loss" in words[:-1] else None


def _help(verb: str, rest: list[str], loss: str | None) -> int:
    from hone.launch import screens
    from hone.launch.commands import defaults
    from hone.launch.schema import settings

    word = rest[0].partition("=")[2] or next((word for word in rest[1:2] if not word.startswith("-")), "")
    if not screens.options(verb, settings(defaults(verb, loss)), word):
        raise UsageError(
            [Problem(what=f"no option of `launch {verb}` has {word} in it", mend=f"`launch {verb} --help` lists all", where="--help")]
        )
    return 0


def _run(verb: str, rest: list[str]) -> int:
    from hone.launch.machine import visible_gpus
    from hone.launch.resolve import resolve
    from hone.launch.toml import to_toml

    if verb in USING:
        from hone.launch.using_rules import broken, lacking, notes
    elif verb in LOOPS:
        from hone.launch.loop_rules import broken, lacking, notes
    elif verb in OFFLINE:
        from hone.launch.offline_preflight import lacking
        from hone.launch.offline_rules import broken, notes
    else:
        from hone.launch.preflight import lacking
        from hone.launch.rules import broken, notes

    gpus = visible_gpus()
    if verb == "chat" and rest and not rest[0].startswith("-"):
        rest = ["--model.model-name-or-path", *rest]  # `launch chat MODEL`
    resolved = resolve(verb, rest, gpus=gpus)
    problems = [*resolved.problems, *broken(resolved, gpus), *lacking(resolved, gpus)]
    if problems:
        raise UsageError(problems)
    if resolved.recipe_reason:
        mend = "--recipe none for the plain defaults, --print-config to see every value"
        print(f"recipe {resolved.recipe}: {resolved.recipe_reason} ({mend})", file=sys.stderr)
    for note in notes(resolved, gpus):
        print(f"note: {note}", file=sys.stderr)
    if "print_config" in resolved.actions:
        print(to_toml(resolved.config, resolved.sources), end="")
        return 0

    if verb in USING:
        run = importlib.import_module(PROGRAMS[verb]).run
    elif verb in LOOPS:
        from hone.launch.programs.iterate import run
    elif verb in OFFLINE:
        from hone.launch.programs.offline import run
    else:
        from hone.launch.programs.policy_gradient import run

    try:
        return run(resolved.config, resolved.sources)
    except (Exception, KeyboardInterrupt) as error:  # here, because only here it is known what the file says of tracebacks
        return _ended(error, debug=resolved.config.run.debug)


def _ended(error: BaseException, *, debug: bool) -> int:
    present(error, debug=debug)
    return exit_code(error)


def _unknown_verb(verb: str) -> Problem:
    from hone.launch.foreign import PROGRAM_OF, VERB_OF
    from hone.launch.names import closest, plain

    name = plain(verb)
    near = [(VERB_OF | PROGRAM_OF)[name]] if name in VERB_OF | PROGRAM_OF else closest(name, EVERY)
    if verb.startswith("-"):
        return Problem(
            what=f"a command comes first, not {verb}",
            mend=f"launch COMMAND {verb} ...; commands: {COMMANDS}",
            where="command line",
        )
    mend = f"did you mean `launch {near[0]}`?" if near else f"commands: {COMMANDS}; `launch --help` tells what they do"
    return Problem(what=f"unknown command `{verb}`", mend=mend, where="command line")
