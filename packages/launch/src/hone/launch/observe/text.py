"""Text for people: foreign text made inert, numbers, durations, bars and sparklines.

Model output, data and file names are written by others. On a terminal their control bytes would be obeyed, so every one
of them becomes its visible escape (backslash, x, two digits); Rich markup stays literal because only rich.text.Text is ever printed.
"""

import math
import unicodedata
from collections.abc import Sequence

# Cc: C0, DEL and C1 controls; Cf: bidirectional overrides and zero-width marks; Cs: lone surrogates; Zl and Zp: line breaks in disguise.
_OBEYED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_SPARKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII_SPARKS = "_.-~=+*#"


def inert(text: str, *, keep_newlines: bool = False) -> str:
    """`text` with every control, format and surrogate character written as its visible escape; nothing in it can be obeyed."""
    if text.isascii() and text.isprintable():
        return text
    kept = "\n" if keep_newlines else ""
    return "".join(
        character if character in kept or unicodedata.category(character) not in _OBEYED else repr(character)[1:-1] for character in text
    )


def encodable(text: str, encoding: str) -> str:
    """`text` with what `encoding` cannot hold written as escapes, so that printing never fails."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def number(value: float | int) -> str:
    """A figure in at most 9 characters: 12, 0.412, 2.1e-06, 8,421, nan."""
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}" if isinstance(value, int) and abs(value) < 10**7 else f"{value:.3g}"
    size = abs(value)
    if size == 0 or 1e-3 <= size < 99.95:
        return f"{value:.3f}" if size < 1 else f"{value:.2f}" if size < 9.995 else f"{value:.1f}"
    return f"{value:,.0f}" if 99.95 <= size < 10**7 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """A span of time: 45 ms, 0.42 s, 12 s, 2m04s, 1h02m."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.5:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """All `values` in at most `width` characters, from their lowest to their highest.

    More values than characters: each character is the mean of its share. A share without a finite value is a blank.
    """
    if not values or width < 1:
        return ""
    cells = min(width, len(values))
    means: list[float | None] = []
    for cell in range(cells):
        share = [v for v in values[cell * len(values) // cells : (cell + 1) * len(values) // cells] if math.isfinite(v)]
        means.append(sum(share) / len(share) if share else None)
    present = [mean for mean in means if mean is not None]
    if not present:
        return " " * cells
    sparks, low, span = _ASCII_SPARKS if ascii_only else _SPARKS, min(present), max(present) - min(present)
    top = len(sparks) - 1
    return "".join(" " if mean is None else sparks[round((mean - low) / span * top) if span > 0 else top // 2] for mean in means)


def bar(fraction: float, width: int, *, ascii_only: bool = False) -> tuple[str, str]:
    """The full and the empty part of a bar of `width` characters; a fraction above 0 shows at least one."""
    share = min(max(fraction, 0.0), 1.0) if math.isfinite(fraction) else 0.0
    full = min(max(round(share * width), 1), width) if share > 0 else 0
    filled, blank = ("#", ".") if ascii_only else ("\u2501", "\u2500")
    return filled * full, blank * (width - full)
