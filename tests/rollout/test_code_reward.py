"""A reward for code: what it locks.

1. It is earned by every test and by nothing else: what a program printed or returned is compared outside its sandbox.
2. A label without tests is an error, a response without a program no answer.
3. A program that is slow, or that attacks, fails; the pool stays whole, and the run goes on.
"""

import asyncio
import time
from contextlib import closing

import pytest

from hone.rollout.errors import RewardError
from hone.rollout.rewards.function import check_reward_file
from hone.rollout.rewards.pool import RewardPool
from hone.rollout.rewards.result import Judgement, RewardItem
from tests.rollout.namespaces import kernel_has_namespaces

if not kernel_has_namespaces():
    pytest.skip("this kernel gives no namespaces or has no Landlock", allow_module_level=True)

SUMS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
CALLS = {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}


def fenced(source: str) -> str:
    return f"First I thought\n```\nx\n```\nbut then:\n```python\n{source}\n```\nDone."


GOOD = "a, b = map(int, input().split())\nprint(a + b)"


@pytest.mark.parametrize(
    ("source", "label", "reward", "passed"),
    [
        (GOOD, SUMS, 1.0, 1.0),
        ("print(3)", SUMS, 0.0, 0.5),
        ("print('passed')\nraise SystemExit(0)", SUMS, 0.0, 0.0),
        (f"{GOOD}\nraise SystemExit(1)", SUMS, 0.0, 0.0),
        ("syntax error", SUMS, 0.0, 0.0),
        ("def add(a, b): return a + b", CALLS, 1.0, 1.0),
        ("class Solution:\n    def add(self, a, b):\n        print('hello')\n        return a + b", CALLS, 1.0, 1.0),
        ("class Yes(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Yes(0)", CALLS, 0.0, 0.0),
        ("import os\nprint('true'); os._exit(0)", CALLS, 0.0, 0.0),
        ("import json\njson.dumps = lambda *a: 'true'\ndef add(a, b): return 0", CALLS, 0.0, 0.0),
        ("def add(a, b): return True", {"fn_name": "add", "inputs": [[0, 1]], "outputs": [1]}, 0.0, 0.0),
        ("def add(a, b): return a + b", {"fn_name": "add", "inputs": [[0.1, 0.2]], "outputs": [0.3]}, 1.0, 1.0),
        ("def other(a, b): return a + b", CALLS, 0.0, 0.0),
    ],
)
def test_code_is_rewarded_for_what_it_does(source: str, label: dict[str, object], reward: float, passed: float) -> None:
    from hone.rollout.rewards import code

    found = code.grade(fenced(source), label)
    assert found == {"rewards": reward, "extra_logs": {"answered": 1.0, "tests_passed": passed, "stopped": 0.0}}


def test_no_program_is_no_answer_and_no_tests_are_an_error() -> None:
    from hone.rollout.rewards import code

    assert code.grade("I would add them.", '{"inputs": [""], "outputs": ["1"]}')["rewards"] == 0.0
    for label in (
        None,
        "3",
        {"inputs": []},
        {"inputs": ["1"], "outputs": []},
        {"inputs": [1], "outputs": [1]},
        {"inputs": [], "outputs": []},
    ):
        with pytest.raises(RewardError, match="holds no tests for builtin:code"):
            code.grade(fenced(GOOD), label)


def test_a_program_that_is_slow_in_every_test_fails_and_does_not_outlast_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    from hone.rollout.rewards import code

    monkeypatch.setattr(code, "ALL_TESTS_S", 2.0)
    label = {"inputs": [""] * 50, "outputs": ["1"] * 50}
    started = time.monotonic()
    found = code.grade(fenced("import time\ntime.sleep(0.5)\nprint(1)"), label)
    assert found["rewards"] == 0.0
    assert time.monotonic() - started < 10


def test_code_is_judged_in_the_pool_and_a_bomb_harms_nobody() -> None:
    check_reward_file("builtin:code")
    programs = [GOOD, "import os\nwhile True: os.fork()", "import os\nos.kill(-1, 9)", "print(open('/etc/passwd').read())", GOOD]
    items = [RewardItem(prompt_id=str(n), query=fenced(one), prompt="", label=SUMS) for n, one in enumerate(programs)]
    with closing(RewardPool("builtin:code", workers=2, timeout_s=60.0)) as pool:
        pids = pool.pids
        found: list[Judgement] = asyncio.run(pool.judge(items))
        assert [judgement.reward for judgement in found] == [1.0, 0.0, 0.0, 0.0, 1.0]
        assert pool.pids == pids
