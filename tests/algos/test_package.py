"""The package as a researcher meets it: its names, its cheap import, its README, its ranges."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest

import hone.algos
from hone.algos.ranges import Range, range_of

README = Path(__file__).parents[2] / "packages/algos/README.md"


def test_every_name_offered_is_there():
    names = [name for name in dir(hone.algos) if not name.startswith("_") and name not in ("import_module", "TYPE_CHECKING")]
    assert {"PPO", "GRPO", "clipped_surrogate", "gae", "Batch"} <= set(names)
    for name in names:
        assert getattr(hone.algos, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'DPO2'"):
        hone.algos.DPO2  # noqa: B018 - the access is the test


def test_the_names_for_type_checkers_are_those_at_run_time():
    source = Path(hone.algos.__file__).read_text()
    declared = set(re.findall(r"^    from hone\.algos\.([\w.]+) import (\w+) as \2$", source, flags=re.MULTILINE))
    assert {name for _, name in declared} == {name for names in hone.algos._HOMES.values() for name in names}


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
