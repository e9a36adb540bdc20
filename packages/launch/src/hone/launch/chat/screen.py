"""The terminal's side of a conversation: what is typed comes in, answers go out as they are drawn; plain text where nobody watches."""

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from hone.launch.observe.text import encodable, inert

YOU, MODEL = "you", "model"
# For readline the colours must be marked as taking no room, or it would break lines too early.
_PROMPT = "\001\033[1;36m\002{} > \001\033[0m\002"


class Screen:
    """`watched`: a person types at a terminal. Otherwise answers alone go to stdout, everything else to stderr."""

    def __init__(self) -> None:
        self.watched = sys.stdin.isatty() and sys.stdout.isatty()
        self._out = Console(highlight=False)
        self._notes = self._out if self.watched else Console(stderr=True, highlight=False)

    def lines(self) -> Iterator[str]:
        """What is typed, a message at a time; a line that ends in a backslash goes on in the next."""
        if self.watched:
            import readline  # noqa: F401 - gives `input` its editing and its history
        while (line := self._line(YOU)) is not None:
            while line.endswith("\\") and (more := self._line("...")) is not None:
                line = f"{line[:-1]}\n{more}"
            if line.strip():
                yield line

    def _line(self, prompt: str) -> str | None:
        """A line without its end; None where there are no more."""
        if not self.watched:
            line = sys.stdin.readline()
            return line.removesuffix("\n") if line else None
        while True:
            try:
                return input(_PROMPT.format(prompt))
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print()
                self.note("Ctrl-D or /quit ends")

    def begin(self) -> None:
        """An answer begins."""
        if self.watched:
            self._out.print(Text(f"{MODEL} > ", "bold green"), end="")

    def say(self, text: str) -> None:
        """Some of an answer; what a terminal would obey is shown, not obeyed."""
        sys.stdout.write(encodable(inert(text, keep_newlines=True), self._out.encoding))
        sys.stdout.flush()

    def end(self, note: str, *, needed: bool) -> None:
        """The answer is over; a note that is not `needed` is for a person alone."""
        print(flush=True)
        if needed or self.watched:
            self.note(note)
        if self.watched:
            print()

    def note(self, text: str, style: str = "dim") -> None:
        """Something that is no part of the conversation."""
        self._notes.print(Text(inert(text, keep_newlines=True), style), soft_wrap=not self.watched)

    def head(self, rows: dict[str, str]) -> None:
        """What is talked to, and how."""
        widest = max(map(len, rows))
        for name, value in rows.items():
            self._notes.print(Text.assemble((f" {name:<{widest}}  ", "dim"), inert(value)), soft_wrap=True)
        self._notes.print()
