"""docs/parity.md and the tests say the same: every row names its tests, every test has its row, every pointer leads somewhere."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from tests.parity import peers

PAGE = (peers.ROOT / "docs" / "parity.md").read_text()
HEADER = ["What", "hone", "OpenRLHF", "TRL", "Verdict", "Test"]
POINTER = re.compile(r"`(\w+\.py):(\w+)`")


def rows() -> list[list[str]]:
    """The cells of every table row, without headers and rules."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("|")]
    return [row for row in cells if row != HEADER and not set("".join(row)) <= set("-|")]


def parity_tests() -> set[str]:
    """Names of all tests that run a peer's arithmetic."""
    files = [path for path in Path(__file__).parent.glob("test_*.py") if path.name not in ("test_page.py", "test_isolation.py")]
    return {
        node.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_row_names_its_tests_and_every_test_has_a_row() -> None:
    named = [re.findall(r"`(test_\w+)`", row[-1]) for row in rows()]
    assert len(named) > 50
    assert all(named)
    assert {name for names in named for name in names} == parity_tests()


def test_the_page_is_about_the_releases_that_are_run() -> None:
    assert set(peers.RELEASES) == {"openrlhf", "trl"}
    title = PAGE.partition("\n")[0]
    assert all(version in title for version in peers.RELEASES.values())


def test_every_row_is_complete() -> None:
    for row in rows():
        assert len(row) == len(HEADER), row
        assert row[4].startswith(("agree", "differ")), row


def test_every_function_of_ours_exists() -> None:
    names = {name for row in rows() for name in re.findall(r"`((?:learner\.)?\w+\.\w+)`", row[1])}
    assert len(names) > 40
    for name in names:
        module, _, function = (name if name.startswith("learner.") else f"algos.{name}").rpartition(".")
        assert hasattr(importlib.import_module(f"hone.{module}"), function), name


@pytest.mark.parametrize(("column", "peer"), [(2, "openrlhf"), (3, "trl")])
def test_every_pointer_into_a_peer_leads_somewhere(column: int, peer: str) -> None:
    if not (peers.DIRECTORY / peer).is_dir():
        pytest.skip(f"{peer} is not in {peers.DIRECTORY.name}/; `just peers` puts it there")
    pointers = {pointer for row in rows() for pointer in POINTER.findall(row[column])}
    assert len(pointers) > 10
    for file, name in pointers:
        assert any(name in definitions(path) for path in (peers.DIRECTORY / peer).rglob(file)), f"{peer} has no {name} in a {file}"


def definitions(path: Path) -> set[str]:
    """Names of all functions and classes of a file, at any depth."""
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
