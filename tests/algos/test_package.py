"""The package as a researcher meets it: its names, its cheap import, its README, its ranges."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest

import hone.algos
from hone.algos.ranges import Range, range_of

SOURCES = Path(hone.algos.__file__).parent
# What other functions are made of, and nobody asks for by name.
BENEATH = {("hone.algos.corrections", "check_bounds"), ("hone.algos.pairs", "paired_loss")}
README = Path(__file__).parents[2] / "packages/algos/README.md"


def test_every_name_offered_is_there():
    names = [name for name in dir(hone.algos) if not name.startswith("_") and name not in ("import_module", "re", "Path")]
    assert {"PPO", "GRPO", "clipped_surrogate", "gae", "Batch"} <= set(names)
    for name in names:
        assert getattr(hone.algos, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'DPO2'"):
        hone.algos.DPO2  # noqa: B018 - the access is the test


def test_every_public_function_is_on_offer():
    internal = {"checks", "kernels", "masking", "ranges", "table"} | {"conformance"}  # the last has a door of its own
    offered = {(home, name) for name, home in hone.algos._HOMES.items()}
    for source in SOURCES.glob("*.py"):
        functions = [node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]
        public = {(f"hone.algos.{source.stem}", name) for name in functions if not name.startswith("_")}
        if source.stem not in internal | {"__init__"}:
            assert public - offered <= BENEATH, f"add to __init__.pyi, or to BENEATH: {public - offered - BENEATH}"


def test_configuration_can_be_read_without_torch():
    code = "import sys, hone.algos, hone.algos.ranges; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_in_the_readme_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(example.splitlines()) <= 14
    exec(compile(example, str(README), "exec"), {})
    (printed,) = re.findall(r"```text\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("limit", "text", "inside", "outside"),
    [
        (Range(low=0), "[0, inf)", [0, 0.5, 1e9], [-1e-9, float("nan")]),
        (Range(low=0, open_low=True, high=1), "(0, 1]", [1e-9, 1], [0, 1.1]),
        (Range(high=2, open_high=True), "(-inf, 2)", [-5, 1.9], [2]),
    ],
)
def test_ranges(limit, text, inside, outside):
    assert str(limit) == text
    assert all(value in limit for value in inside)
    assert not any(value in limit for value in outside)


def test_a_range_is_found_through_a_union():
    limit = Range(low=1)
    assert range_of(Annotated[int, limit] | None) == limit
    assert range_of(Annotated[int, "metres"]) is None
    assert range_of(int | None) is None
