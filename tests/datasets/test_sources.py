"""Reading JSON lines: what is accepted, and the one error that each bad file gets."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hone.datasets.errors import DataError
from hone.datasets.sources import read_json_lines

Write = Callable[[bytes | str], str]
ALL = 10**9


def test_rows_keep_their_line_numbers_over_blank_lines_mark_and_carriage_returns(write: Write) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": "\xc3\xa9\xe2\x80\xa8x"}\r\n\n{"a": null}'
    source = read_json_lines(write(content), max_samples=ALL)
    assert [(row.line, row.columns["a"]) for row in source.rows] == [(1, 1), (4, "\u00e9\u2028x"), (6, None)]
    assert source.bad == ()


def test_the_fingerprint_is_blake2b_of_every_byte_even_past_max_samples(write: Write) -> None:
    content = b'{"a": 1}\n{"a": 2}\n{"a": 3}\n'
    source = read_json_lines(write(content), max_samples=2)
    assert [row.columns for row in source.rows] == [{"a": 1}, {"a": 2}]
    assert source.fingerprint == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_a_bad_line_past_max_samples_is_not_looked_at(write: Write) -> None:
    assert read_json_lines(write('{"a": 1}\nnot json\n'), max_samples=1).bad == ()


@pytest.mark.parametrize(
    ("line", "what", "detail"),
    [
        (b'{"a": 1,}', "invalid JSON", "column 9"),
        (b'{"a": NaN}', "invalid JSON", "NaN is not JSON"),
        (b"[" * 100_000, "invalid JSON", "recursion"),
        (b'{"a": "\xff"}', "not UTF-8", "byte 8 of the line is 0xff"),
        (b'["a"]', "not a JSON object", "list: '[\"a\"]'"),
        (b'{"a": "\x1b[31m"}', "invalid JSON", r"'{\"a\": \"\x1b[31m\"}'".replace('\\"', '"')),
        (b'{"a": ' + b"x" * 200, "invalid JSON", repr('{"a": ' + "x" * 74)),
    ],
)
def test_a_line_that_is_no_row_is_named_with_its_first_80_bytes_escaped(write: Write, line: bytes, what: str, detail: str) -> None:
    source = read_json_lines(write(b'{"a": 1}\n' + line + b"\n"), max_samples=ALL)
    (bad,) = source.bad
    assert (bad.what, bad.line) == (what, 2)
    assert detail in bad.detail
    assert "\x1b" not in bad.detail


def test_an_empty_file_and_one_of_blank_lines_have_no_rows(write: Write) -> None:
    for content in ("", "\n \r\n\n", b"\xef\xbb\xbf"):
        with pytest.raises(DataError, match=r"rows\.jsonl has no rows"):
            read_json_lines(write(content), max_samples=ALL)


def test_a_missing_file_names_the_nearest(write: Write) -> None:
    path = write("{}")
    with pytest.raises(DataError, match=r"--data\.prompt-dataset .*does not exist.*did you mean 'rows\.jsonl'\?"):
        read_json_lines(path.replace("rows", "row"), max_samples=ALL)


def test_a_missing_folder_names_the_nearest_that_exists(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the nearest folder that exists is " + repr(str(tmp_path))):
        read_json_lines(str(tmp_path / "a" / "b" / "rows.jsonl"), max_samples=ALL)


def test_a_path_through_a_file_does_not_exist(write: Write) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_json_lines(write("{}") + "/rows.jsonl", max_samples=ALL)


def test_a_directory_lists_the_files_it_holds(write: Write, tmp_path: Path) -> None:
    write("{}")
    with pytest.raises(DataError, match=r"is a directory; it holds 'rows\.jsonl'; name one"):
        read_json_lines(str(tmp_path), max_samples=ALL)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_says_so(write: Write) -> None:
    path = write("{}")
    Path(path).chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read_json_lines(path, max_samples=ALL)


def test_a_name_too_long_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read_json_lines(str(tmp_path / ("x" * 300)), max_samples=ALL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1\x15\x04", "is a Parquet file"),
        (b"\x1f\x8b\x08", "is a gzip file; unpack it first"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text"),
        (b'[\n {"a": 1},\n {"a": 2}\n]', "is one JSON list of 2 rows, not JSON lines; convert it: jq"),
        (b'[{"a": 1}, {"a": 2}]', "is one JSON list of 2 rows"),
        (b'{\n "a": 1\n}', "is one JSON object over many lines"),
    ],
)
def test_another_format_is_recognised(write: Write, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_json_lines(write(content), max_samples=ALL)
