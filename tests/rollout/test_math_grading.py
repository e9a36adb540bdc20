"""Grading answers: exact numbers (builtin:gsm8k) and symbolic equality (builtin:math, where math-verify is installed).

1. The final answer is where a text marks it; a text that marks none has none, whatever numbers it holds.
2. Numbers are exact: commas, money, units, percent, fractions, mixed numbers and powers of ten change nothing.
3. Over GSM8K, every worked answer is right and every altered one is wrong.
4. A label that cannot be read is an error; an answer that cannot be read, or costs too much to, is no reward.
"""

import asyncio
import importlib.util
import json
import re
import time
from collections.abc import Callable
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.rollout.errors import RewardError
from hone.rollout.rewards.answers import final_answer, last_boxed, last_tagged, number, same
from hone.rollout.rewards.function import check_reward_file, load
from hone.rollout.rewards.gsm8k import grade
from hone.rollout.rewards.pool import RewardPool
from hone.rollout.rewards.result import RewardItem

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
MATH_VERIFY = importlib.util.find_spec("math_verify") is not None
with_math_verify = pytest.mark.skipif(not MATH_VERIFY, reason="math-verify is not installed (hone-rollout[math])")


def test_the_answer_is_where_it_is_marked() -> None:
    assert final_answer("so 3 + 4 = 7\n#### 7") == "7"
    assert final_answer("#### 3\nwait, no\n#### 4") == "4"
    assert final_answer(r"thus $\boxed{\frac{1}{2}}$ and then \boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert final_answer(r"\boxed{\text{if } \{x\} > 0} #### 3") == r"\text{if } \{x\} > 0"
    assert final_answer(r"\boxed{3} and an unclosed \boxed{4") == "3"
    assert final_answer("<answer> 12 </answer>") == "12"
    assert final_answer("The answer is 12 apples.") == "12 apples."
    assert final_answer("Final answer: 12") == "12"
    assert final_answer("3 + 4 = 7, so there are 7 of them") is None
    assert final_answer("") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-42", -42),
        ("\u22127", -7),
        ("1,234,567", 1234567),
        ("1{,}200", 1200),
        ("$18.00", 18),
        ("\\$1,234.50", Fraction(2469, 2)),
        ("-$5", -5),
        ("$-5", -5),
        ("$18$", 18),
        ("\\(18\\)", 18),
        ("3/4", Fraction(3, 4)),
        ("-\\frac{3}{4}", Fraction(-3, 4)),
        ("\\dfrac34", Fraction(3, 4)),
        ("1 1/2", Fraction(3, 2)),
        ("1\\frac{1}{2}", Fraction(3, 2)),
        ("2 1/2 cups", Fraction(5, 2)),
        ("0.1", Fraction(1, 10)),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("1e3", 1000),
        ("6.02 \\times 10^{2}", 602),
        ("50%", 50),
        ("50\\%", 50),
        ("72 \\text{ cm}", 72),
        ("72cm", 72),
        ("12 apples.", 12),
        ("1200 dollars per month", 1200),
        ("90^\\circ", 90),
        ("x = 5", 5),
        ("**9**", 9),
    ],
)
def test_a_number_is_exact_however_it_is_dressed(text: str, value: Fraction | int) -> None:
    found = number(text)
    assert found is not None
    assert found.value == value


@pytest.mark.parametrize(
    "text",
    ["", "many", "3 million", "3 or 4", "3, 4", "12,34", "3x", "5m", "x", "3 times", "3/0", "--3", "2\\pi", "3 dozen", "(1, 2)", "9" * 500],
)
def test_what_is_more_than_a_number_is_none(text: str) -> None:
    assert number(text) is None


def test_units_of_measure_must_agree_and_other_words_need_not() -> None:
    pairs = [("5 km", "5 m", False), ("5 km", "5", True), ("5 km", "5 km", True), ("$5", "5 dollars", True), ("5 cats", "5 pets", True)]
    for one, other, equal in pairs:
        left, right = number(one), number(other)
        assert left is not None and right is not None
        assert same(left, right) is equal, (one, other)


def test_gsm8k_rewards() -> None:
    assert grade("so #### 1,200 dollars", "... #### 1200") == {"rewards": 1.0, "extra_logs": {"answered": 1.0, "readable": 1.0}}
    assert grade("so 1200", "1200") == {"rewards": 0.0, "extra_logs": {"answered": 0.0, "readable": 0.0}}
    assert grade("#### a lot", 1200) == {"rewards": 0.0, "extra_logs": {"answered": 1.0, "readable": 0.0}}
    assert grade("#### 0.30000000000000000001", "0.3")["rewards"] == 0.0  # equal as floats
    for label in ("a lot", None, True, ""):
        with pytest.raises(RewardError, match=r"holds no number; give the answer's column with --data.label-key"):
            grade("#### 3", label)


def worked(limit: int | None = None) -> list[str]:
    lines = GSM8K.read_text().splitlines()[:limit]
    return [json.loads(line)["answer"] for line in lines]


def altered(answer: str) -> list[str]:
    """The same solution with another number at its end."""
    head, _, last = answer.rpartition("####")
    value = int(last.strip().replace(",", ""))
    return [f"{head}#### {other}" for other in (value + 1, value - 1, value * 10 + 3, f"{value}.5", f"{value or 1}/7", f"{value} thousand")]


def wrong(grader: Callable[[str, object], dict[str, Any]], answers: list[str]) -> list[str]:
    """The answers that are graded other than they should be."""
    rejected = [answer for answer in answers if grader(answer, answer)["rewards"] != 1.0]
    boxed = [(re.sub(r"####\s*(\S+)", r"So it is \\boxed{\1}.", answer), answer) for answer in answers[::10]]
    rejected += [one for one, label in boxed if grader(one, label)["rewards"] != 1.0]
    # One way of altering for every answer, all six in turn.
    changed = [(altered(answer)[index % 6], answer) for index, answer in enumerate(answers)]
    return rejected + [other for other, answer in changed if grader(other, answer)["rewards"] != 0.0]


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K problems do not lie beside this checkout (../shared/data/gsm8k)")
def test_every_worked_answer_of_gsm8k_is_right_and_every_altered_one_is_wrong() -> None:
    answers = worked()
    assert len(answers) > 7000
    assert wrong(grade, answers) == []


@with_math_verify
@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K problems do not lie beside this checkout (../shared/data/gsm8k)")
def test_math_grades_gsm8k_alike() -> None:
    from hone.rollout.rewards import math_grading

    assert wrong(math_grading.grade, worked(limit=100)) == []


@with_math_verify
@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("(1,2)", "(1, 2)", True),
        ("(1,2)", "(2,1)", False),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("\\pi", "3.14", False),
        ("[0,1)", "[0,1]", False),
        ("2\\sqrt{3}", "3\\sqrt{2}", False),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("\\text{A}", "A", True),
        ("\\text{A}", "B", False),
        ("9^9", "387420489", True),
        ("7", "7 \\text{ or } 8", False),
        ("So $x$ is \\boxed{\\frac{3}{4}}.", "3/4", True),
    ],
)
def test_symbolic_answers(gold: str, answer: str, equal: bool) -> None:
    from hone.rollout.rewards import math_grading

    assert math_grading.grade(f"Hence \\boxed{{{answer}}}.", gold)["rewards"] == float(equal)


@with_math_verify
@pytest.mark.parametrize(
    "answer",
    ["9^9^9^9", "9^{9^{9^9}}", "(2^100000000)!", "10^10^8", "2**(3**(4**5))", "99999999!", "(" * 200 + "1" + ")" * 200, "1+" * 5000],
)
def test_an_answer_that_costs_too_much_is_unreadable_at_once(answer: str) -> None:
    from hone.rollout.rewards import math_grading

    math_grading.grade("\\boxed{x+1}", "x+1")
    started = time.monotonic()
    found = math_grading.grade(f"\\boxed{{{answer}}}", "x+1")
    assert found == {"rewards": 0.0, "extra_logs": {"answered": 1.0, "readable": 0.0}}
    assert time.monotonic() - started < 1.0


@with_math_verify
def test_a_comparison_that_does_not_end_is_stopped_by_the_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    from hone.rollout.rewards import math_grading

    monkeypatch.setattr(math_grading, "_PATIENCE_S", 1)
    monkeypatch.setattr(math_grading, "excessive", lambda _: False)
    math_grading._read.cache_clear()
    started = time.monotonic()
    assert math_grading.grade("\\boxed{9^9^9^9}", "x+1")["rewards"] == 0.0
    assert time.monotonic() - started < 8.0
    math_grading._read.cache_clear()


@with_math_verify
def test_a_label_that_is_no_answer_is_an_error() -> None:
    from hone.rollout.rewards import math_grading

    for label in (None, "", "9^9^9^9"):
        with pytest.raises(RewardError, match="label"):
            math_grading.grade("\\boxed{1}", label)


@pytest.mark.parametrize("name", ["gsm8k", *(["math"] if MATH_VERIFY else [])])
def test_the_built_in_rewards_run_in_the_pool(name: str) -> None:
    check_reward_file(f"builtin:{name}")
    with closing(RewardPool(f"builtin:{name}", workers=1, timeout_s=60.0)) as pool:
        rows = [RewardItem(prompt_id="p", query=f"2+2=#### {text}", prompt="2+2=", label="#### 4") for text in ("4", "4.0", "5")]
        assert [judgement.reward for judgement in asyncio.run(pool.judge(rows))] == [1.0, 1.0, 0.0]


@pytest.mark.skipif(MATH_VERIFY, reason="math-verify is installed")
def test_what_is_not_installed_is_named() -> None:
    with pytest.raises(RewardError, match=r"builtin:math needs math-verify, .* install hone-rollout\[math\], or use builtin:gsm8k"):
        load("builtin:math")


def _slow_boxed(text: str) -> str | None:
    """As it is defined: from each mark on, the last first, braces are counted."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed\s*\{|\\fbox\s*\{", text)]):
        depth = 1
        for position in range(start, len(text)):
            if text[position] in "{}" and text[position - 1] != "\\":
                depth += 1 if text[position] == "{" else -1
                if depth == 0:
                    return text[start:position]
    return None


def _slow_tagged(text: str) -> str | None:
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE)
    return found[-1] if found else None


@given(st.lists(st.sampled_from(["{", "}", "\\", "\\boxed{", "\\fbox {", "\\boxed", "<answer>", "</Answer>", "a", "\n", " "]), max_size=24))
def test_marks_are_found_where_their_definitions_find_them(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert last_boxed(text) == _slow_boxed(text)
    assert last_tagged(text) == _slow_tagged(text)


def test_marks_that_are_never_closed_cost_once_through_the_text() -> None:
    # By their definitions each costs a pass of its own: 10^10 steps and more.
    many = 200_000
    assert last_boxed("\\boxed{" * many) is None and last_boxed("\\boxed{1}" + "\\boxed{" * many) == "1"
    assert last_tagged("<answer>" * many) is None and last_tagged("<answer>1</answer>" + "<answer>" * many) == "1"
