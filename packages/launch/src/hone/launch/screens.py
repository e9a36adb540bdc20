"""What `--help` shows: the commands there are, and every option of one with default, range and meaning."""

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from hone.launch.loop_verbs import LOOPS
from hone.launch.verbs import OFFLINE, TOOLS, USING, VERBS

if TYPE_CHECKING:  # the front screen reads no settings
    from hone.launch.schema import Setting

WIDE = 110
"""Columns from which an option and its meaning stand side by side."""

GENERAL = {
    "--config FILE": "Settings from a TOML file; flags win over it. A finished run's config.toml repeats that run.",
    "--recipe NAME": "Settings for a kind of machine, below the file and the flags: {recipes}. "
    "[default laptop where no GPU is visible or the built-in model is trained, else none]",
    "--print-config": "Print every value and where it comes from, as TOML, and stop.",
    "--debug": "Show tracebacks.",
    "--help [WORD]": "This page; with a WORD only the options that have it in their name or meaning.",
}


def front(version: str) -> None:
    """The commands, a line each, and the first one to try."""
    console = Console(highlight=False)
    console.print(f"[bold]hone[/] {version}: RL post-training, from one core to a cluster\n", soft_wrap=True)
    console.print("[cyan]try first[/]")
    console.print("  [bold]launch ppo[/]  trains a small model on this machine; downloads nothing\n")
    commands = VERBS | OFFLINE | LOOPS | USING | TOOLS
    widest = max(map(len, commands))
    for section in dict.fromkeys(verb.section for verb in commands.values()):
        console.print(f"[cyan]{section}[/]")
        for name, verb in commands.items():
            if verb.section == section:
                console.print(f"  [bold]{name:<{widest}}[/]  {verb.summary}", soft_wrap=True)
    console.print("\n[cyan]help[/]")
    for command, meaning in {
        "COMMAND --help": "every option, its default, range and meaning",
        "COMMAND --help WORD": "those with WORD in them",
    }.items():
        console.print(f"  launch {command:<21}{meaning}", soft_wrap=True)


def tool(name: str) -> None:
    """A tool's story and examples."""
    console, entry = Console(highlight=False), TOOLS[name]
    console.print(f"[bold]launch {name}[/]: {entry.summary}\n", soft_wrap=True)
    console.print(Text(entry.story))
    if entry.options:
        console.print("\n[cyan]options[/]")
        widest = max(len(option) for option, _ in entry.options)
        for option, meaning in entry.options:
            console.print(Text(f"  {option:<{widest}}  {meaning}"), soft_wrap=True)
    console.print("\n[cyan]examples[/]")
    for example in entry.examples:
        console.print(Text(f"  {example}"), soft_wrap=True)


def options(verb: str, settings: "Mapping[str, Setting]", word: str) -> bool:
    """A command's story, examples and options; with a `word` only the options it occurs in. Whether there was anything to show."""
    from hone.launch.recipes import RECIPES

    console, entry = Console(highlight=False), (VERBS | OFFLINE | LOOPS | USING)[verb]
    shown = {
        name: one for name, one in settings.items() if word.lower().replace("_", "-") in f"{one.flag} {_meaning(one, settings)}".lower()
    }
    if word and not shown:
        return False
    if not word:
        console.print(f"[bold]launch {verb}[/]: {entry.summary}\n", soft_wrap=True)
        console.print(Text(entry.story))
        console.print("\n[cyan]examples[/]")
        for example in entry.examples:
            console.print(Text(f"  {example}"), soft_wrap=True)
        console.print("\n[cyan]general[/]")
        for option, meaning in GENERAL.items():
            _entry(console, option, meaning.format(recipes=", ".join(RECIPES)))
    group = ""
    for one in shown.values():
        if one.group != group:
            group = one.group
            console.print(Text.assemble("\n", (group, "cyan"), (f"  {one.group_doc}", "dim")))
        _entry(console, f"{one.flag} {one.metavar}".rstrip(), _meaning(one, settings))
    if not word:
        console.print(
            Text("\nHyphens and underscores are the same; a switch is turned off by --GROUP.no-NAME or by the value False.", "dim")
        )
    return True


def _meaning(one: "Setting", known: "Mapping[str, Setting]") -> str:
    """A setting's text with all that is to know about its value: range, default, recipes, other names."""
    from hone.launch.names import aliases, flag
    from hone.launch.recipes import tables
    from hone.launch.schema import written

    facts = [one.limits if one.limits not in one.doc else "", f"default {one.written}"]
    facts += [f"{recipe} {written(values[one.name])}" for recipe, values in tables(known)[0].items() if one.name in values]
    facts += [f"also {flag(name)}" for name, alias in aliases(known).items() if one.name in alias.targets]
    return f"{one.doc} [{'; '.join(fact for fact in facts if fact)}]"


def _entry(console: Console, option: str, meaning: str) -> None:
    """An option and its meaning, side by side where there is room, one above the other where there is not."""
    indent = 44 if console.width >= WIDE else 6
    head = f"  {option}"
    lines = textwrap.wrap(meaning, max(console.width - indent - 1, 20), break_long_words=False, break_on_hyphens=False)
    beside = len(head) + 2 <= indent
    if not beside:
        # A long list of choices goes on below, after a comma.
        pieces = textwrap.wrap(option.replace(",", ", "), console.width - 6, break_long_words=False, break_on_hyphens=False)
        for number, piece in enumerate(pieces):
            console.print(Text(("      " if number else "  ") + piece.replace(", ", ","), "bold"), soft_wrap=True)
    for number, line in enumerate(lines):
        lead = Text(head.ljust(indent), "bold") if beside and number == 0 else Text(" " * indent)
        console.print(lead + Text(line), soft_wrap=True)
