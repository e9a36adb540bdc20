"""Reward functions as files: what is refused before anything runs, what when loading, and what as a result."""

import inspect
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from hone.rollout.errors import RewardError
from hone.rollout.rewards.function import check_reward_file, load
from hone.rollout.rewards.result import Judgement, RewardItem, checked

GOOD = 'def reward_func(queries, prompts, labels, **kwargs):\n    return {"rewards": float(queries[0] == prompts[0] + labels[0])}\n'
ITEM = RewardItem(prompt_id="ab:0:7", query="qp", prompt="p", label="l")


@pytest.fixture(autouse=True)
def imports_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`load` is made for a process of its own: it leaves modules and an import path behind."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(directory: Path, source: str, name: str = "reward.py") -> str:
    path = directory / name
    path.write_text(source)
    return str(path)


@pytest.mark.parametrize(
    "signature",
    [
        "queries, prompts, labels",
        "queries, prompts, labels, **kwargs",
        "q, p, l",
        "queries, prompts, labels, scale=1.0",
        "*lists",
        "*, queries, prompts, labels",
        "queries, /, prompts, labels, *, strict=True",
    ],
)
def test_accepted_signatures_are_called_with_the_right_lists(tmp_path: Path, signature: str) -> None:
    body = "    found = locals()\n    return found\n"
    source = write(tmp_path, f"def reward_func({signature}):\n{body}")
    check_reward_file(source)
    found = load(source)(ITEM)
    assert isinstance(found, dict)
    flat = {**found, **found.get("kwargs", {})}
    lists = (
        flat["lists"]
        if "lists" in flat
        else [flat[name] for name in (("q", "p", "l") if "q" in flat else ("queries", "prompts", "labels"))]
    )
    assert list(lists) == [["qp"], ["p"], ["l"]]


@pytest.mark.parametrize(
    ("signature", "shown"),
    [
        ("queries, prompts", "reward_func(queries, prompts)"),
        ("queries, prompts, labels, images", "reward_func(queries, prompts, labels, images)"),
        ("prompts, queries, labels", "reward_func(prompts, queries, labels)"),
        ("queries, prompts, labels, *, scale", "reward_func(queries, prompts, labels, *, scale)"),
        ("", "reward_func()"),
    ],
)
def test_refused_signatures_are_shown_with_the_expected_one(tmp_path: Path, signature: str, shown: str) -> None:
    source = write(tmp_path, f"import math\n\ndef reward_func({signature}):\n    return {{}}\n")
    for judge in (check_reward_file, load):
        with pytest.raises(RewardError) as caught:
            judge(source)
        assert f"{source}:3 is {shown}" in str(caught.value)
        assert "write def reward_func(queries, prompts, labels)" in str(caught.value)


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "reward_math.py")
    with pytest.raises(RewardError, match=r"reward_maths.py does not exist; did you mean .*reward_math.py\?"):
        check_reward_file(str(tmp_path / "reward_maths.py"))
    with pytest.raises(RewardError, match="nor does its directory"):
        check_reward_file(str(tmp_path / "nowhere" / "reward.py"))
    with pytest.raises(RewardError, match="is a directory"):
        check_reward_file(f"{tmp_path}/")
    for source in ("no_such_package.rewards", "no_such:reward", "reward"):
        with pytest.raises(RewardError, match="neither a Python file"):
            check_reward_file(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ndef reward_func(queries, prompts, labels)\n    return 1\n", r"reward.py:2 has a syntax error: expected ':'"),
        ("x = '\0'\n", "reward.py.* null byte"),
        ("x = 1\n", r"defines no reward_func \(it defines x\); add def"),
        ("", r"it defines nothing"),
        (
            "def helper(): ...\ndef reward_fn(q, p, l): ...\n",
            r"it defines helper, reward_fn\); rename reward_fn to reward_func, name it \(",
        ),
        ("class Judge:\n    def reward_func(q, p, l): ...\n", r"it defines Judge\)"),
        ("import json\nasync def reward_func(queries, prompts): ...\n", r"reward.py:2 is reward_func"),
    ],
)
def test_what_cannot_be_a_reward_file_is_refused_where_it_is_wrong(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        check_reward_file(write(tmp_path, source))


@pytest.mark.parametrize(
    "source",
    [
        "from helpers import reward_func\n",
        "from helpers import *\n",
        "from helpers import grade as reward_func\n",
        "import helpers\nreward_func = helpers.grade\n",
        "import helpers\nhelper, reward_func = 1, helpers.grade\n",
        "import helpers\nif True:\n    def reward_func(q, p, l): return helpers.grade(q, p, l)\n",
        "try:\n    import no_such\nexcept ImportError:\n    def reward_func(q, p, l): return {'rewards': 1}\n",
        "import functools\ndef wrap(f):\n    return lambda q, p, l: {'rewards': 1}\n@wrap\ndef reward_func(only_text): ...\n",
    ],
)
def test_other_ways_to_define_it_are_found_and_loaded(tmp_path: Path, source: str) -> None:
    write(tmp_path, "def grade(queries, prompts, labels):\n    return {'rewards': 1}\nreward_func = grade\n", "helpers.py")
    path = write(tmp_path, source)
    check_reward_file(path)
    assert load(path)(ITEM) == {"rewards": 1}


def test_checking_runs_nothing(tmp_path: Path) -> None:
    check_reward_file(write(tmp_path, f"raise SystemExit('this file was run')\n{GOOD}"))


def test_a_module_by_its_dotted_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hone_test_rewards").mkdir()
    write(tmp_path / "hone_test_rewards", "", "__init__.py")
    path = write(tmp_path / "hone_test_rewards", GOOD, "maths.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    check_reward_file("hone_test_rewards.maths")
    function = load("hone_test_rewards.maths")
    assert function.where == f"reward_func ({path}:1)"
    assert function(RewardItem(prompt_id="x", query="ab", prompt="a", label="b")) == {"rewards": 1.0}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import json\nimport no_such_module\n", r"does not load: ModuleNotFoundError: No module named 'no_such_module' at .*reward.py:2;"),
        ("import helpers\n", r"does not load: ZeroDivisionError: division by zero at .*reward.py:1;"),
        ("import sys\nsys.exit(3)\n", r"does not load: SystemExit: 3 at .*reward.py:2;"),
        ("reward_func = 5\n", r"is 5 \(int\), not a function"),
        ("from helpers_async import reward_func\n", r"helpers_async.py:1 is reward_func\(q, p\)"),
        ("from helpers_async import *\n", r"defines no reward_func \(it defines other_func\)"),
    ],
)
def test_what_only_shows_when_loading(tmp_path: Path, source: str, message: str) -> None:
    write(tmp_path, "1 / 0\n", "helpers.py")
    names = "" if "import reward_func" in source else "__all__ = ['other_func']\n"
    write(tmp_path, f"async def reward_func(q, p): ...\ndef other_func(): ...\n{names}", "helpers_async.py")
    with pytest.raises(RewardError, match=message):
        load(write(tmp_path, source))


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        [0.5],
        (0.5,),
        torch.tensor(0.5),
        torch.tensor([0.5], dtype=torch.bfloat16),
        [torch.tensor(0.5)],
        numpy.float32(0.5),
        numpy.array([0.5]),
    ],
)
def test_a_number_may_come_in_any_of_these(value: object) -> None:
    judgement = checked({"rewards": value, "scores": value, "extra_logs": {"a": value}}, function="f", prompt_id="p")
    assert judgement == Judgement(reward=0.5, score=0.5, extra_logs={"a": 0.5})
    assert [type(number) for number in (judgement.reward, judgement.score, judgement.extra_logs["a"])] == [float] * 3


def test_missing_scores_are_the_rewards_and_booleans_are_zero_and_one() -> None:
    assert checked({"rewards": -2}, function="f", prompt_id="p") == Judgement(reward=-2.0, score=-2.0, extra_logs={})
    assert checked({"rewards": [True], "scores": None, "extra_logs": None}, function="f", prompt_id="p").reward == 1.0
    assert checked({"rewards": torch.tensor([2.0]), "scores": [False]}, function="f", prompt_id="p").score == 0.0


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"returned None \(NoneType\) for prompt 'ab:0:7'; expected a dict"),
        (1.0, r"returned 1.0 \(float\)"),
        (torch.tensor([1.0]), r"returned tensor\(\[1.\]\) \(Tensor\)"),
        ([{"rewards": 1.0}], "expected a dict"),
        ({}, r'returned {} without "rewards"'),
        ({"score": 1.0, "rewards": 1.0}, r"the unknown key 'score' .* expected \"scores\""),
        ({"rewards": None}, r'returned None \(NoneType\) in "rewards" .* expected one finite number'),
        ({"rewards": "1.0"}, r"returned '1.0' \(str\) in \"rewards\""),
        ({"rewards": math.nan}, r'returned nan in "rewards"'),
        ({"rewards": torch.tensor([math.inf])}, r'returned tensor\(\[inf\]\) in "rewards"'),
        ({"rewards": -math.inf}, "returned -inf"),
        ({"rewards": 1e39}, "fp32 can hold"),
        ({"rewards": 10**400}, "fp32 can hold"),
        ({"rewards": 1j}, r"\(complex\)"),
        ({"rewards": []}, r'returned 0 values in "rewards" \(\[\]\) .* expected one, for the one query'),
        ({"rewards": [0.0, 1.0]}, r'returned 2 values in "rewards" \(\[0.0, 1.0\]\)'),
        ({"rewards": [[1.0]]}, r'\[\[1.0\]\] \(list\) in "rewards"'),
        ({"rewards": {"a": 1.0}}, r"\(dict\)"),
        ({"rewards": 1.0, "scores": math.nan}, r'returned nan in "scores"'),
        ({"rewards": 1.0, "scores": [1.0, 1.0]}, r'2 values in "scores"'),
        ({"rewards": 1.0, "extra_logs": [1.0]}, r'\(list\) in "extra_logs"'),
        ({"rewards": 1.0, "extra_logs": {"a": "x"}}, r"'x' \(str\) in \"extra_logs\" under 'a'"),
    ],
)
def test_what_is_not_a_reward_is_an_error_with_its_value(result: object, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        checked(result, function="reward_func (reward.py:3)", prompt_id="ab:0:7")
    text = str(caught.value)
    assert text.startswith("reward function reward_func (reward.py:3) returned ")
    assert "'ab:0:7'" in text
    assert text.endswith("Mend the function: a reward that fails stops the run, it is never counted as zero.")


def test_a_coroutine_returned_by_a_plain_function_is_not_a_reward() -> None:
    async def later() -> dict[str, float]:
        return {"rewards": 1.0}

    pending = later()
    assert inspect.iscoroutine(pending)
    with pytest.raises(RewardError, match=r"\(coroutine\)"):
        checked(pending, function="f", prompt_id="p")
    pending.close()


def test_a_huge_value_is_shown_in_part() -> None:
    with pytest.raises(RewardError) as caught:
        checked({"rewards": "x" * 100_000}, function="f", prompt_id="p")
    assert len(str(caught.value)) < 600
