"""docs/algorithms.md: made from the dataclasses, a line for each, and what it marks as ours exists."""

from pathlib import Path

import pytest

from hone.algos.algorithms import ALGORITHMS, OFFLINE
from hone.algos.table import algorithm_line, algorithms_page, flattened, references

PAGE = Path(__file__).parents[2] / "docs/algorithms.md"
EVERY = {name: algorithm() for name, algorithm in {**ALGORITHMS, **OFFLINE}.items()}


def test_the_page_is_what_the_dataclasses_say():
    assert PAGE.read_text() == algorithms_page(), "run: just docs"


@pytest.mark.parametrize("name", sorted(EVERY))
def test_every_algorithm_has_one_line_with_an_idea_and_its_papers(name):
    assert PAGE.read_text().count(f"| `{name}` | ") == 1
    _, _, _, idea, _, _, papers, _ = algorithm_line(EVERY[name]).split("|")
    assert len(idea.strip()) > 15
    assert "arxiv.org" in papers or name == "sft"


@pytest.mark.parametrize("name", sorted(EVERY))
def test_settings_marked_as_not_the_papers_exist(name):
    assert EVERY[name].house <= {setting for setting, _ in flattened(EVERY[name])}


def test_references_are_found_once_and_in_order():
    assert references("arXiv 2402.03300 eq 3; 1707.06347, 2402.03300; not 20.5 or 123") == [
        "[2402.03300](https://arxiv.org/abs/2402.03300)",
        "[1707.06347](https://arxiv.org/abs/1707.06347)",
    ]


def test_defaults_are_spelt_out():
    line = algorithm_line(EVERY["dr_grpo"])
    assert "no KL, clip 0.2 / 0.2, by constant (3000)" in line
    assert "KL* 0.04 k3 in the loss" in algorithm_line(EVERY["grpo"])
