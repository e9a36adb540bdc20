import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.launch.observe.text import bar, duration, encodable, inert, number, sparkline


def test_every_control_byte_becomes_its_visible_escape():
    hostile = "a\x1b[31mred\x1b]52;c;aGk=\x07\x00\x9b\r\n\u202e[bold]<script>"
    assert inert(hostile) == "a\\x1b[31mred\\x1b]52;c;aGk=\\x07\\x00\\x9b\\r\\n\\u202e[bold]<script>"
    assert inert("a\nb\r", keep_newlines=True) == "a\nb\\r"


@given(st.text(st.characters(codec=None)))
def test_nothing_a_terminal_obeys_survives(text):
    shown = {ord(character) for character in inert(text)}
    controls, bidirectional, zero_width, surrogates = (
        {*range(32), *range(127, 160)},
        {*range(0x202A, 0x202F)},
        {0x200B, 0x2060},
        range(0xD800, 0xE000),
    )
    assert not shown & {*controls, *bidirectional, *range(0x2066, 0x206A), *zero_width, *surrogates}
    encodable(inert(text), "ascii").encode("ascii")


def test_ordinary_text_is_left_alone():
    for text in ("plain", "Gr\u00fc\u00dfe, \u4f60\u597d \U0001f600"):
        assert inert(text) == text
    assert encodable("\u4f60", "latin-1") == "\\u4f60"


NUMBERS = {12: "12", 0.0: "0.000", 0.4117: "0.412", -5.335: "-5.33", 52.04: "52.0", 8421.3: "8,421", 2.1e-6: "2.1e-06", 3e9: "3.0e+09"}


@pytest.mark.parametrize(("value", "shown"), NUMBERS.items())
def test_numbers(value, shown):
    assert number(value) == shown


def test_a_number_that_is_not_finite_says_so():
    assert (number(math.nan), number(-math.inf)) == ("nan", "-inf")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0449, "45 ms"), (0.42, "0.42 s"), (2.06, "2.1 s"), (12.4, "12 s"), (59.6, "1m00s"), (124.0, "2m04s"), (3725.0, "1h02m")],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_a_sparkline_runs_from_its_lowest_to_its_highest():
    assert sparkline([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8) == "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
    assert sparkline([0.0, 7.0], 8, ascii_only=True) == "_#"
    assert sparkline([1.0, 1.0, 1.0], 8) == "\u2584" * 3
    # Four values in two characters: means 0.5 and 2.5 are the lowest and the highest.
    assert sparkline([0.0, 1.0, 2.0, 3.0], 2) == "\u2581\u2588"
    assert sparkline([0.0, math.nan, 1.0], 3) == "\u2581 \u2588"
    assert (sparkline([], 5), sparkline([1.0], 0), sparkline([math.inf], 1)) == ("", "", " ")


def test_a_bar_is_as_full_as_its_share():
    assert bar(0.5, 4, ascii_only=True) == ("##", "..")
    assert bar(1e-9, 4, ascii_only=True) == ("#", "...")
    assert (bar(0.0, 4)[0], bar(7.0, 4)[1], bar(math.nan, 4)[0], bar(0.5, 0)) == ("", "", "", ("", ""))
