"""Answers in worked solutions: where the final answer stands in a text, and the exact number it is, if it is one.

Text -> answer (boxed, behind "####", in <answer> tags, or behind "the answer is") -> Number, compared exactly: no floats.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 400
"""A longer answer [characters] is no answer: it would cost more to read than it can be worth."""

_MARKED = re.compile(r"####[ \t]*([^\n]+)")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BOX = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{")
_BRACE = re.compile(r"(?<!\\)[{}]")
_SAID = re.compile(r"\b(?:final|the) answer[ \t]*(?:is|:)[ \t]*:?[ \t]*([^\n]+)", re.IGNORECASE)

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<money>[$\u20ac\u00a3\u00a5]?)\s*(?P<inner>[+-]?)"
    rf"(?:(?P<whole>\d{{1,12}})\s+(?P<mixed>\d{{1,12}}\s*/\s*\d{{1,12}})|(?P<top>{_DECIMAL})\s*/\s*(?P<bottom>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL})(?:(?:e|E|\s*\*\s*10\s*\^\s*)(?P<power>[+-]?\d{{1,3}}))?)"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}|\\[dt]?frac\s*(\d)\s*(\d)")
_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mbox|operatorname)\s*\{([^{}]*)\}")
# What may stand behind a number without changing it: words that are neither numbers themselves nor join another answer.
_UNIT = re.compile(r"(?:[A-Za-z\u00b0\u00b5%][\w\u00b0\u00b2\u00b3'%/.-]*(?:\^?[23])?)(?:\s+[A-Za-z(][\w'()/-]*){0,4}")
_NO_UNIT = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozens?|or|and|to|times|plus|minus|pi|sqrt|sin|cos|tan|log|ln|mod|over|half|"
    r"than|percent(?:age)? points?)\b|^[a-zA-Z](?:\b|\^)",
    re.IGNORECASE,
)
_ONE_LETTER_UNITS = frozenset("mgslLhCFKVWAJN")


@dataclass(frozen=True, kw_only=True)
class Number:
    """A rational number and the unit written behind it ("" for none)."""

    value: Fraction
    unit: str = ""


def final_answer(text: str) -> str | None:
    """The final answer a text gives, as it is written; None if it marks none. The last mark counts, boxed before others."""
    if (boxed := last_boxed(text)) is not None:
        return boxed.strip()
    if marked := _MARKED.findall(text):
        return marked[-1].strip()
    if (tagged := last_tagged(text)) is not None:
        return tagged.strip()
    said = _SAID.findall(text)
    return said[-1].strip() if said else None


def last_tagged(text: str) -> str | None:
    """What the last <answer> tags hold; None if there are none."""
    found, start = None, None
    for tag in _TAG.finditer(text):  # once through the text, however many tags are never closed
        if tag[1] and start is not None:
            found, start = text[start : tag.start()], None
        elif not tag[1] and start is None:
            start = tag.end()
    return found


def last_boxed(text: str) -> str | None:
    r"""What the last closed \boxed{...} or \fbox{...} holds, braces balanced; None if there is none."""
    boxes = {match.end() for match in _BOX.finditer(text)}
    closed: list[int] = []
    # Backwards, each opening brace takes the nearest closing one that is left: once through the text, whatever is never closed.
    for brace in reversed(list(_BRACE.finditer(text)) if boxes else []):
        if brace[0] == "}":
            closed.append(brace.start())
        elif closed:
            end = closed.pop()
            if brace.end() in boxes:
                return text[brace.end() : end]
    return None


def number(text: str) -> Number | None:
    r"""The exact number a text is: 1,200; $18.00; -3/4; 1 1/2; \frac{3}{4}; 50\%; 6.02*10^23; 72 \text{ cm}. None if it is none.

    A unit or a currency does not change the number; a word that would ("3 million", "3 or 4", "3x") makes it none.
    """
    if len(text) > LONGEST:
        return None
    plain = _plain(text)
    match = _NUMBER.match(plain)
    if match is None or (match["sign"] and match["inner"]):
        return None
    unit = plain[match.end() :]
    if unit and not _is_unit(unit, glued=not unit[0].isspace()):
        return None
    if match["mixed"]:
        top, bottom = (int(part) for part in match["mixed"].split("/"))
        value = None if bottom == 0 else int(match["whole"]) + Fraction(top, bottom)
    elif match["top"]:
        bottom = _decimal(match["bottom"])
        value = None if bottom == 0 else _decimal(match["top"]) / bottom
    else:
        value = _decimal(match["decimal"]) * Fraction(10) ** int(match["power"] or 0)
    if value is None:
        return None
    return Number(value=-value if "-" in (match["sign"], match["inner"]) else value, unit=unit.strip().rstrip("."))


def same(one: Number, other: Number) -> bool:
    """Whether the values are equal; where both have a unit of measure, so must those be ("5 km" is not "5 m")."""
    return one.value == other.value and not (one.unit != other.unit and {one.unit, other.unit} <= _MEASURES)


_LENGTHS = ("mm", "cm", "dm", "m", "km", "in", "ft", "yd", "mi")
_MEASURES = frozenset((*_LENGTHS, "mg", "g", "kg", "oz", "lb", "ml", "l", "L", "ms", "s", "min", "h"))


def _plain(text: str) -> str:
    """LaTeX dress and decoration taken off."""
    text = text.strip().replace("\u2212", "-").replace("\u2013", "-").replace("\\$", "$").replace("\\%", "%").replace("{,}", ",")
    text = re.sub(r"^\\[(\[]|\\[)\]]$", "", text).strip()
    text = re.sub(r"\\(?:left|right|displaystyle|,|;|!|:|quad|qquad)(?![a-zA-Z])|~", " ", text)
    text = text.replace("\\times", "*").replace("\\cdot", "*").replace("^\\circ", "\u00b0").replace("^{\\circ}", "\u00b0")
    text = re.sub(r"10\s*\^\s*\{([+-]?\d+)\}", r"10^\1", text)
    # 1\frac{1}{2} is one and a half.
    text = _FRACTION.sub(lambda found: f" {found[1] or found[3]}/{found[2] or found[4]}", text)
    text = _WORDS.sub(lambda found: f" {found[1]}", text)
    if text.count("$") >= 2 and text.startswith("$") and text.endswith("$"):
        text = text[1:-1]
    text = text.replace("**", "").strip().rstrip(".").strip()
    return re.sub(r"\s+", " ", re.sub(r"^[a-zA-Z]\s*=\s*", "", text))


def _is_unit(text: str, *, glued: bool) -> bool:
    text = text.strip()
    if text in _ONE_LETTER_UNITS:
        return not glued
    return bool(_UNIT.fullmatch(text)) and not _NO_UNIT.search(text)


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip(".") if not text.startswith(".") else f"0{text}")
