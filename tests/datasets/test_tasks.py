"""Every task's grader accepts the task's own answers, and none of another row's."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hone.datasets.config import DataConfig
from hone.datasets.errors import DataError
from hone.datasets.prompt_layouts import PROMPT_LAYOUTS, recognise
from hone.datasets.schemas import load_prompts
from hone.datasets.tasks import arithmetic, reasoning
from hone.rollout.rewards import gsm8k, math_grading

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
MATH = [
    {"problem": "What is $\\frac14+\\frac12$?", "level": "1", "solution": "It is $\\boxed{\\frac{3}{4}}$."},
    {"problem": "Solve $x^2=4$, $x>0$.", "level": "2", "solution": "So $x=2$, hence $\\boxed{2}$."},
    {"problem": "Expand $(x+1)^2$.", "level": "1", "solution": "We get $\\boxed{x^2+2x+1}$."},
]
WITH_LIBRARY = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed (hone-datasets[reasoning])"
)
TASKS = ["chain_sum", "simple_equations", "base_conversion", "gcd", "letter_counting", "spell_backward", "leg_counting", "syllogism"]


@pytest.mark.skipif(not GSM8K.exists(), reason="the gsm8k problems are not beside this checkout (../shared/data/gsm8k)")
def test_gsm8k_shaped_rows_are_recognised_and_their_worked_answers_accepted() -> None:
    rows = load_prompts(DataConfig(prompt_dataset=str(GSM8K), prompt_split="train[:1000]")).rows
    grades = [gsm8k.grade(str(row.label), row.label)["rewards"] for row in rows]
    assert grades == [1.0] * 1000
    of_the_next = [gsm8k.grade(str(rows[index + 1].label), row.label)["rewards"] for index, row in enumerate(rows[:-1])]
    same = [gsm8k.gold_number(rows[index + 1].label) == gsm8k.gold_number(row.label) for index, row in enumerate(rows[:-1])]
    assert of_the_next == [float(one) for one in same] and sum(of_the_next) < 50


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed (hone-rollout[math])")
def test_math_shaped_rows_are_recognised_and_their_solutions_accepted(write: Callable[[bytes | str], str]) -> None:
    rows = load_prompts(DataConfig(prompt_dataset=write("\n".join(map(json.dumps, MATH))))).rows
    assert [(row.prompt, row.label) for row in rows] == [(row["problem"], row["solution"]) for row in MATH]
    for index, row in enumerate(rows):
        grades = [math_grading.grade(str(other.label), row.label)["rewards"] for other in rows]
        assert grades == [float(place == index) for place in range(3)]


def test_layouts_with_a_grader_name_one_that_reads_their_labels() -> None:
    named = {layout.name: layout.reward for layout in PROMPT_LAYOUTS if layout.reward}
    assert named == {"GSM8K": "builtin:gsm8k", "MATH": "builtin:math"}
    assert recognise({"question": "a", "answer": "1"}) is None  # without the mark of a worked answer


def test_the_arithmetic_judge_accepts_its_own_answers_alone() -> None:
    problems = arithmetic.problems(0, 50)
    for offset, reward in ((0, 1.0), (1, 0.0)):
        queries = [f"{problem.prompt}{problem.label + offset}" for problem in problems]
        judged = arithmetic.reward_func(queries, [problem.prompt for problem in problems], [problem.label for problem in problems])
        assert judged["rewards"] == [reward] * 50


@WITH_LIBRARY
@pytest.mark.parametrize("task", TASKS)
def test_a_procedural_task_accepts_its_own_answers_and_gives_the_same_rows_for_a_seed(task: str) -> None:
    rows = load_prompts(DataConfig(prompt_dataset=f"reasoning-gym:{task}@3", max_samples=20, label_key="label")).rows
    labels = [row.label for row in rows]
    assert reasoning.reward_func([f"so <answer>{label['answer']}</answer>" for label in labels], labels) == [1.0] * 20
    assert reasoning.reward_func([str(label["answer"]) for label in labels], labels) == [1.0] * 20
    assert max(reasoning.reward_func(["<answer>no answer at all</answer>"] * 20, labels)) < 1
    again = reasoning.source(f"reasoning-gym:{task}@3", max_samples=20)
    assert [row.columns["prompt"] for row in again.rows] == [row.prompt for row in rows]
    other = reasoning.source(f"reasoning-gym:{task}@4", max_samples=20)
    assert other.fingerprint != again.fingerprint and other.rows[0].columns != again.rows[0].columns


@WITH_LIBRARY
def test_an_unknown_task_and_a_seed_that_is_none_are_named() -> None:
    with pytest.raises(DataError, match=r"reasoning-gym has no task 'chain_sun'; it has \d+; did you mean 'chain_sum'\?"):
        reasoning.source("reasoning-gym:chain_sun", max_samples=5)
    with pytest.raises(DataError, match="the seed of 'reasoning-gym:chain_sum@x' is 'x'; write a whole number"):
        reasoning.source("reasoning-gym:chain_sum@x", max_samples=5)
    with pytest.raises(ValueError, match="is no entry of reasoning-gym"):
        reasoning.grade("4", {"answer": "4"})
