"""The three signatures: told apart by their parameters, called as their users know it, or refused with the way to tell them apart.

1. OpenRLHF's, TRL's and verl's functions are recognised before anything runs and again when loaded, sync or async.
2. What fits more than one form, or mixes them, is an error that names all three.
3. Each gets the response as its own trainer hands it over: TRL and verl without special tokens.
4. Several rewards are weighted; one that does not apply (None) counts for nothing.
"""

import asyncio
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from hone.rollout.config import RewardConfig
from hone.rollout.errors import RewardError
from hone.rollout.rewards import judges
from hone.rollout.rewards.function import check_reward_file, load
from hone.rollout.rewards.result import Judgement, RewardItem, checked
from hone.rollout.types import Prompt

ITEM = RewardItem(
    prompt_id="ab:0:7",
    query="1+1=2<eos>",
    prompt="1+1=",
    label="2",
    response="2",
    columns={"answer": "2", "level": 3, "data_source": "sums"},
)
PROMPT = Prompt(prompt_id="ab:0:7", tokens=(1,), text="1+1=", label="2")


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


def judged(source: str, item: RewardItem = ITEM) -> Judgement:
    check_reward_file(source)
    with closing(load(source)) as function:
        return checked(function(item), function=function.where, prompt_id=item.prompt_id)


@pytest.mark.parametrize(
    ("definition", "reward"),
    [
        ("def reward_func(queries, prompts, labels): return {'rewards': len(queries[0])}", 10.0),
        ("async def reward_func(queries, prompts, labels): return {'rewards': len(queries[0])}", 10.0),
        ("def reward_func(prompts, completions, **columns): return [len(completions[0]) + columns['level'][0]]", 4.0),
        ("def reward_func(completions, **kwargs): return [float(kwargs['prompts'] == ['1+1='])]", 1.0),
        ("def reward_func(completions, answer): return [float(completions == answer)]", 1.0),
        ("def reward_func(completions, labels): return [float(completions == labels)]", 1.0),
        ("def reward_func(prompts, completions, ground_truth=None, **kwargs): return [7]", 7.0),
        ("async def reward_func(*, completions, **kwargs): return [8]", 8.0),
        ("import numpy\ndef reward_func(completions, **kwargs): return numpy.array([0.5])", 0.5),
        ("def compute_score(data_source, solution_str, ground_truth, extra_info=None): return solution_str == ground_truth", 1.0),
        ("def compute_score(data_source, solution_str, ground_truth, extra_info): return len(data_source) + extra_info['level']", 7.0),
        ("async def compute_score(solution_str, **kwargs): return {'score': kwargs['ground_truth'] == '2', 'pred': 'two', 'n': 3}", 1.0),
        ("def compute_score(*, data_source, solution_str, ground_truth, extra_info): return 2", 2.0),
    ],
)
def test_each_form_is_called_as_its_own_trainer_calls_it(tmp_path: Path, definition: str, reward: float) -> None:
    assert judged(write(tmp_path, definition)).reward == reward


def test_figures_beside_a_verl_score_are_logged_and_words_are_not(tmp_path: Path) -> None:
    body = "return {'score': 0.5, 'acc': True, 'pred': '4'}"
    source = write(tmp_path, f"def compute_score(data_source, solution_str, ground_truth, extra_info=None): {body}")
    assert judged(source) == Judgement(reward=0.5, score=0.5, extra_logs={"acc": 1.0})


def test_a_verl_row_keeps_its_answer_beside_the_style(tmp_path: Path) -> None:
    source = write(tmp_path, "def compute_score(data_source, solution_str, ground_truth, extra_info=None): return float(ground_truth)")
    item = RewardItem(prompt_id="p", query="q", prompt="q", label={"style": "rule", "ground_truth": "42"})
    assert judged(source, item).reward == 42.0


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("def reward_func(**kwargs): return 1", r"reward.py:1 is reward_func\(\*\*kwargs\), which fits more than one form"),
        ("def reward_func(prompts, **kwargs): return 1", "fits more than one form; name the parameters"),
        ("def reward_func(labels, **kwargs): return 1", "fits more than one form"),
        ("def reward_func(queries, completions, labels): return 1", r"mixes several forms \(completions and queries\)"),
        ("def reward_func(completions, solution_str): return 1", "mixes several forms"),
        ("def compute_score(solution_str, ground_truth): return 1", "cannot be called with verl's data_source, solution_str, "),
        ("def reward_func(completions, /, **kwargs): return 1", "completions cannot be: drop the /"),
        ("def reward_func(prompts, labels): return 1", "cannot be called as expected"),
        (
            "def compute_score(data_source, solution_str, ground_truth, extra_info): ...\ndef reward_func(queries, prompts, labels): ...",
            r"defines both reward_func and compute_score; name the one that judges: .*reward.py:reward_func",
        ),
    ],
)
def test_what_could_be_two_forms_is_refused_with_the_way_out(tmp_path: Path, definition: str, message: str) -> None:
    source = write(tmp_path, definition)
    for judge in (check_reward_file, load):
        with pytest.raises(RewardError, match=message) as caught:
            judge(source)
        assert "def " in str(caught.value) or "name the one" in str(caught.value) or "drop the /" in str(caught.value)


def test_a_function_can_be_named(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        "def compute_score(data_source, solution_str, ground_truth, extra_info): return 1\n"
        "def reward_func(queries, prompts, labels): return {'rewards': 2}\n"
        "def format_reward(completions, **kwargs): return [3]\n",
    )
    assert [judged(f"{source}:{name}").reward for name in ("compute_score", "reward_func", "format_reward")] == [1.0, 2.0, 3.0]
    for judge in (check_reward_file, load):
        with pytest.raises(RewardError, match=r"defines no format_rewards .* name it \(.*:format_reward\)"):
            judge(f"{source}:format_rewards")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1.0", r"returned 1.0 \(float\) for prompt 'ab:0:7'; expected a list with one number for each completion"),
        ("return [1.0, 2.0]", "2 values"),
        ("return []", "0 values"),
        ("return [float('nan')]", "nan"),
        ("return {'rewards': [1.0]}", r"\(dict\)"),
    ],
)
def test_a_trl_function_returns_one_number_in_a_list(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        judged(write(tmp_path, f"def reward_func(completions, **kwargs): {body}"))


def test_a_verl_dict_has_a_score(tmp_path: Path) -> None:
    source = write(tmp_path, "def compute_score(data_source, solution_str, ground_truth, extra_info): return {'reward': 1}")
    with pytest.raises(RewardError, match="a dict with 'reward' and without 'score'"):
        judged(source)


def test_a_column_that_the_rows_lack_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"asks for solution, which the rows do not have \(they have answer, completions, data_source"):
        judged(write(tmp_path, "def reward_func(completions, solution): return [1]"))


def test_coroutines_share_one_loop(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        "import asyncio\nloops = set()\n"
        "async def reward_func(completions, **kwargs):\n    await asyncio.sleep(0)\n"
        "    loops.add(asyncio.get_running_loop())\n    return [len(loops)]\n",
    )
    with closing(load(source)) as function:
        assert [function(ITEM) for _ in range(3)] == [{"rewards": [1]}] * 3


class Fixed:
    """A judge that always says the same."""

    def __init__(self, *found: Judgement | Exception) -> None:
        self.found, self.closed = found, False

    async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
        await asyncio.sleep(0)
        for one in self.found:
            if isinstance(one, Exception):
                raise one
        return [one for one in self.found if isinstance(one, Judgement)]

    def close(self) -> None:
        self.closed = True


def said(reward: float, score: float | None = None, **extra: float) -> Judgement:
    return Judgement(reward=reward, score=reward if score is None else score, extra_logs=extra)


SILENT = Judgement(reward=math.nan, score=math.nan, extra_logs={}, applies=False)


def weighted(weights: tuple[float, ...], *columns: Sequence[Judgement | Exception]) -> list[Judgement]:
    names = tuple(f"r{index}" for index in range(len(columns)))
    judge = judges.Weighted(judges=tuple(Fixed(*column) for column in columns), names=names, weights=weights)
    return asyncio.run(judge.judge([ITEM] * len(columns[0])))


def test_several_rewards_are_a_weighted_sum() -> None:
    """1 x 1 + 0.5 x 3 = 2.5; in the second row the other does not apply: 2 alone."""
    found = weighted((1.0, 0.5), [said(1.0, 0.0, a=5.0), said(2.0)], [said(3.0), SILENT])
    assert found[0] == Judgement(reward=2.5, score=1.5, extra_logs={"r0": 1.0, "r1": 3.0, "r0/a": 5.0})
    assert found[1] == Judgement(reward=2.0, score=2.0, extra_logs={"r0": 2.0})


def test_a_response_that_no_reward_applies_to_is_an_error() -> None:
    with pytest.raises(RewardError, match="no reward applies to prompt 'ab:0:7': r0, r1 returned None"):
        weighted((1.0, 1.0), [SILENT], [SILENT])
    with pytest.raises(RewardError, match="no reward applies"):
        weighted((1.0,), [SILENT])


def test_the_first_failure_of_several_is_raised_as_it_is() -> None:
    with pytest.raises(RewardError, match="second is down"):
        weighted((1.0, 1.0), [said(1.0)], [RewardError("second is down")])


def test_every_judge_is_closed() -> None:
    class Stuck(Fixed):
        def close(self) -> None:
            raise OSError("will not close")

    parts = (Fixed(), Stuck(), Fixed())
    with pytest.raises(OSError, match="will not close"):
        judges.Weighted(judges=parts, names=("a", "b", "c"), weights=(1.0, 1.0, 1.0)).close()
    assert parts[0].closed
    assert parts[2].closed


def test_urls_of_a_list_are_one_reward_and_files_are_each_one() -> None:
    assert judges.sources("a.py, b.py:f,builtin:math") == [("a.py",), ("b.py:f",), ("builtin:math",)]
    assert judges.sources("a.py,http://x/r,b.py,http://y/r") == [("a.py",), ("http://x/r", "http://y/r"), ("b.py",)]


@pytest.mark.parametrize(
    ("remote_url", "weights", "message"),
    [
        ("a.py,,b.py", None, "empty entry"),
        ("a.py,a.py", None, "names a reward twice"),
        ("a.py,b.py", "1", "1 weights for 2 rewards"),
        ("http://h/x,http://h/y", "1,1", "2 weights for 1 rewards"),
        ("a.py,b.py", "1,x", "are not numbers"),
        ("a.py,b.py", "1,nan", "are not numbers"),
        ("a.py,b.py", "0,0", "not all 0"),
        ("builtin:maths", None, "there is no built-in reward 'maths'; the built-in ones are builtin:code, builtin:gsm8k, builtin:math"),
        ("ftp://h/x", None, "has the scheme 'ftp'"),
    ],
)
def test_settings_that_make_no_reward_are_refused_without_running_anything(remote_url: str, weights: str | None, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        judges.check(RewardConfig(remote_url=remote_url, weights=weights))


def test_two_files_judge_for_real_and_a_wrong_shape_is_found_at_the_start(tmp_path: Path) -> None:
    exact = write(tmp_path, "def reward_func(queries, prompts, labels): return {'rewards': 1.0, 'extra_logs': {'n': 2}}", "exact.py")
    short = write(tmp_path, "async def reward_func(completions, **kwargs): return [-len(completions[0])]", "short.py")
    config = RewardConfig(remote_url=f"{exact},{short}", weights="2,0.5", num_workers=1)
    with closing(judges.build(config, default="unused")) as judge:
        asyncio.run(judges.smoke(judge, [PROMPT, PROMPT]))
        assert asyncio.run(judge.judge([ITEM]))[0] == Judgement(
            reward=1.5, score=1.5, extra_logs={"exact": 1.0, "short": -1.0, "exact/n": 2.0}
        )
    wrong = write(tmp_path, "def reward_func(completions, **kwargs): return 1.0", "wrong.py")
    with (
        closing(judges.build(RewardConfig(remote_url=wrong, num_workers=1), default="unused")) as judge,
        pytest.raises(RewardError, match=r"failed on the smoke rows at the start: reward function .*wrong.py:1.* returned 1.0"),
    ):
        asyncio.run(judges.smoke(judge, [PROMPT]))
