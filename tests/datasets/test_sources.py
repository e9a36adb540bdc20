"""Reading a file: what is accepted, and the one error that each bad file gets."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hone.datasets.errors import DataError
from hone.datasets.sources import read_file

Write = Callable[[bytes | str], str]
ALL = 10**9


def test_rows_keep_their_line_numbers_over_blank_lines_mark_and_carriage_returns(write: Write) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": "\xc3\xa9\xe2\x80\xa8x"}\r\n\n{"a": null}'
    source = read_file(write(content), max_samples=ALL)
    assert [(row.line, row.columns["a"]) for row in source.rows] == [(1, 1), (4, "\u00e9\u2028x"), (6, None)]
    assert source.bad == ()


def test_the_fingerprint_is_blake2b_of_every_byte_even_past_max_samples(write: Write) -> None:
    content = b'{"a": 1}\n{"a": 2}\n{"a": 3}\n'
    source = read_file(write(content), max_samples=2)
    assert [row.columns for row in source.rows] == [{"a": 1}, {"a": 2}]
    assert source.fingerprint == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_a_bad_line_past_max_samples_is_not_looked_at(write: Write) -> None:
    assert read_file(write('{"a": 1}\nnot json\n'), max_samples=1).bad == ()


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
    source = read_file(write(b'{"a": 1}\n' + line + b"\n"), max_samples=ALL)
    (bad,) = source.bad
    assert (bad.what, bad.line) == (what, 2)
    assert detail in bad.detail
    assert "\x1b" not in bad.detail


def test_an_empty_file_and_one_of_blank_lines_have_no_rows(write: Write) -> None:
    for content in ("", "\n \r\n\n", b"\xef\xbb\xbf"):
        with pytest.raises(DataError, match=r"rows\.jsonl has no rows"):
            read_file(write(content), max_samples=ALL)


def test_a_missing_file_names_the_nearest(write: Write) -> None:
    path = write("{}")
    with pytest.raises(DataError, match=r"--data\.prompt-dataset .*does not exist.*did you mean 'rows\.jsonl'\?"):
        read_file(path.replace("rows", "row"), max_samples=ALL)


def test_a_missing_folder_names_the_nearest_that_exists(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the nearest folder that exists is " + repr(str(tmp_path))):
        read_file(str(tmp_path / "a" / "b" / "rows.jsonl"), max_samples=ALL)


def test_a_path_through_a_file_does_not_exist(write: Write) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_file(write("{}") + "/rows.jsonl", max_samples=ALL)


def test_a_directory_lists_the_files_it_holds(write: Write, tmp_path: Path) -> None:
    Path(write("{}")).rename(tmp_path / "rows.txt")
    with pytest.raises(DataError, match=r"is a directory without data files .*; it holds 'rows\.txt'; name a data file"):
        read_file(str(tmp_path), max_samples=ALL)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_says_so(write: Write) -> None:
    path = write("{}")
    Path(path).chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read_file(path, max_samples=ALL)


def test_a_name_too_long_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read_file(str(tmp_path / ("x" * 300)), max_samples=ALL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1\x15\x04", "is a damaged Parquet file: .*; copy or download it again"),
        (b"ARROW1\0\0\x15\x04", "is a damaged Arrow file: .*; copy or save it again"),
        (b"\xff\xff\xff\xff\x15\x04", "is a damaged Arrow file"),
        (b"(\xb5/\xfd", "is a zstd file; unpack it first"),
        (b"\x1f\x8b\x08", "is a gzip file; unpack it first"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text"),
        (b"[ ]", "has no rows"),
        (b'[{"a": "\xff"}]', r"rows\.jsonl:1 is not UTF-8"),
        (b'{\n "a": 1\n}', "is one JSON object over many lines"),
    ],
)
def test_another_format_is_recognised(write: Write, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_file(write(content), max_samples=ALL)


def test_a_single_line_that_is_no_row_is_told_as_a_line(write: Write) -> None:
    source = read_file(write(b'{"a": NaN}\n'), max_samples=ALL)
    assert [(row.line, row.what) for row in source.bad] == [(1, "invalid JSON")]


def test_a_json_list_is_read_with_the_lines_its_objects_begin_on(write: Write) -> None:
    content = '\ufeff[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}\n]\n'
    source = read_file(write(content), max_samples=ALL)
    assert [(row.line, row.columns["a"]) for row in source.rows] == [(2, 1), (4, 2), (5, 3)]
    assert [row.columns["a"] for row in read_file(write(content), max_samples=2).rows] == [1, 2]


@pytest.mark.parametrize(
    ("content", "line", "detail"),
    [
        ('[{"a": 1},\n 7]', 2, "int: '7'"),
        ('[{"a": 1},\n {"a" 2}]', 2, "Expecting ':' delimiter"),
        ('[{"a": 1},\n {"a": 2}\n', 3, "the list is cut off"),
        ('[{"a": 1}\n {"a": 2}]', 2, "a comma or ] expected"),
        ('[{"a": 1},\n]', 2, "Expecting value"),
        ('[{"a": 1}]\n{"a": 2}', 1, "text after its end"),
    ],
)
def test_a_faulty_json_list_names_the_line(write: Write, content: str, line: int, detail: str) -> None:
    source = read_file(write(content), max_samples=ALL)
    (bad,) = source.bad
    assert bad.line == line and detail in bad.detail
    assert len(source.rows) == 1 + content.startswith('[{"a": 1},\n {"a": 2}')


def test_rows_are_read_again_from_their_places_and_a_changed_file_is_noticed(write: Write) -> None:
    path = write('{"a": "\u00e9"}\n\n{"a": 2}')
    rows = read_file(path, max_samples=ALL).rows
    assert [row.columns["a"] for row in (rows[1], rows[0], rows[-1])] == [2, "\u00e9", 2]
    assert [row.line for row in rows[0:2]] == [1, 3]
    with pytest.raises(IndexError):
        rows[2]
    Path(path).write_text("x" * 40)
    with pytest.raises(DataError, match=r"rows\.jsonl:3 has changed while it was in use"):
        rows[1]


def test_csv_keeps_lines_over_quoted_breaks_and_quotes(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfq,a\r\n"one, ""two""\nthree",1\r\n\r\n\xc3\xa9,\n'
    (tmp_path / "rows.csv").write_bytes(content)
    source = read_file(str(tmp_path / "rows.csv"), max_samples=ALL)
    assert [(row.line, dict(row.columns)) for row in source.rows] == [
        (2, {"q": 'one, "two"\nthree', "a": "1"}),
        (5, {"q": "\u00e9", "a": ""}),
    ]
    assert source.fingerprint == hashlib.blake2b(content, digest_size=16).hexdigest()
    assert read_file(str(tmp_path / "rows.csv"), max_samples=1).fingerprint == source.fingerprint
    (tmp_path / "rows.tsv").write_text("q\ta\nx, y\t2\n")
    assert read_file(str(tmp_path / "rows.tsv"), max_samples=ALL).rows[0].columns == {"q": "x, y", "a": "2"}


@pytest.mark.parametrize(
    ("content", "what", "line", "detail"),
    [
        (b"q,a\nx,1\ny\n", "not as many values as the header has columns", 3, "1 values, 2 columns"),
        (b"q,a\nx,1\ny,2,3\n", "not as many values as the header has columns", 3, "3 values, 2 columns"),
        (b'q,a\nx,1\n"y,2\nz,3\n', "invalid CSV", 3, "unexpected end of data"),
        (b'q,a\nx,1\n"y"z,2\n', "invalid CSV", 3, "',' expected after '\"'"),
        (b"q,a\nx,1\n\xff,2\n", "not UTF-8", 3, "udcff"),
    ],
)
def test_a_faulty_csv_row_is_named(tmp_path: Path, content: bytes, what: str, line: int, detail: str) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    (bad,) = read_file(str(tmp_path / "rows.csv"), max_samples=ALL).bad
    assert (bad.what, bad.line) == (what, line) and detail in bad.detail


@pytest.mark.parametrize(
    ("content", "message"),
    [("", r"rows\.csv:1 is no CSV header"), ("q,q\n1,2\n", "each with a name of its own"), ("q,a\n", "has no rows under its header")],
)
def test_a_csv_without_header_or_rows_says_so(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_file(str(tmp_path / "rows.csv"), max_samples=ALL)


def test_a_field_longer_than_pythons_own_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"q\n{'x' * 200_000}\n")
    assert len(str(read_file(str(tmp_path / "rows.csv"), max_samples=ALL).rows[0].columns["q"])) == 200_000
