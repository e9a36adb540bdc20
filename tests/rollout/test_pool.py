"""The reward pool: what it locks.

1. Judgements come back in the order asked, whichever worker made them.
2. A function that raises, hangs, dies or returns no reward is a RewardError with its place, the prompt and the reason.
3. The worker that hung or died is replaced, with whatever it had started; the other workers and responses never notice.
4. What the function prints cannot disturb the answers.
5. After close nothing is left, in whatever state the workers were; a parent that is killed takes them along.
6. The event loop is never blocked.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hone.rollout.errors import RewardError
from hone.rollout.rewards.pool import _START_AGAIN_S, RewardPool
from hone.rollout.rewards.result import RewardItem

# The label says how the function behaves; line numbers below are asserted.
SOURCE = """
import ctypes, os, re, signal, subprocess, sys, time

def fail():
    raise KeyError("no such answer")

def reward_func(queries, prompts, labels):
    label = labels[0]
    if label == "spin":
        while True:
            pass
    if label == "sleep":
        time.sleep(1000)
    if label == "hold the interpreter":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if label == "children":
        subprocess.Popen(["sleep", "1000"])
        pid = os.fork()
        if pid == 0:
            time.sleep(1000)
        open(queries[0], "w").write(str(pid))
        time.sleep(1000)
    if label == "raise":
        fail()
    if label == "exit":
        sys.exit(3)
    if label == "_exit":
        os._exit(7)
    if label == "_exit and leave a child":
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(8)
    if label == "segfault":
        ctypes.string_at(0)
    if label == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if label == "print":
        sys.stdout.write("x" * 1_000_000)
        os.write(1, bytes(range(256)) * 1000)
    if label == "pid":
        return {"rewards": os.getpid()}
    if label == "slow":
        time.sleep(0.2)
    if isinstance(label, str) and label.startswith("return "):
        return eval(label[len("return "):])
    return {"rewards": len(queries[0]), "scores": len(prompts[0]), "extra_logs": {"label": label if isinstance(label, int) else 0}}
"""


SHORT = pytest.mark.parametrize("timeout_s", [2.0], indirect=True)


def item(label: object, prompt_id: str = "ab:0:7", query: str = "query") -> RewardItem:
    return RewardItem(prompt_id=prompt_id, query=query, prompt="p", label=label)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not is_zombie(pid)


def is_zombie(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def until(condition: object, patience_s: float = 20.0) -> None:
    assert callable(condition)
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text(SOURCE)
    return str(path)


@pytest.fixture(scope="module", params=[60.0])
def timeout_s(request: pytest.FixtureRequest) -> float:
    """Long, so that a busy machine changes no outcome; tests of the deadline itself ask for a short one."""
    seconds: float = request.param
    return seconds


@pytest.fixture(scope="module")
def pool(source: str, timeout_s: float, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardPool]:
    pool = RewardPool(source, workers=2, timeout_s=timeout_s, log=tmp_path_factory.mktemp("log") / "reward.log")
    yield pool
    pids = pool.pids
    assert len(pids) == 2
    pool.close()
    assert not any(alive(pid) for pid in pids)


def judge(pool: RewardPool, *items: RewardItem) -> list[tuple[float, float, dict[str, float]]]:
    found = asyncio.run(pool.judge(items))
    return [(judgement.reward, judgement.score, judgement.extra_logs) for judgement in found]


def test_judgements_come_in_the_order_asked(pool: RewardPool) -> None:
    asked = [item(number, query="q" * (number % 7)) for number in range(500)]
    assert judge(pool, *asked) == [(float(number % 7), 1.0, {"label": float(number)}) for number in range(500)]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("raise", r"raised KeyError: 'no such answer' at .*reward.py:5 for prompt 'ab:0:7'"),
        ("exit", r"raised SystemExit: 3 at .*reward.py:26 for prompt 'ab:0:7'"),
        ("_exit", r"ended its process \(exit status 7\) on prompt 'ab:0:7'"),
        ("_exit and leave a child", r"ended its process \(exit status 8\) on prompt 'ab:0:7'"),
        ("segfault", r"ended its process \(killed by SIGSEGV\) on prompt 'ab:0:7'"),
        ("return None", r"returned None \(NoneType\) for prompt 'ab:0:7'"),
        ("return {'rewards': float('nan')}", r'returned nan in "rewards" for prompt'),
        ("return {'rewards': 'good'}", r"returned 'good' \(str\)"),
        ("return {'rewards': [0, 1]}", r"returned 2 values"),
        ("return {'rewards': 1, 'reward': 1}", r"unknown key 'reward'"),
    ],
)
def test_failures_are_named_and_the_pool_stays_whole(pool: RewardPool, source: str, label: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        judge(pool, item(label))
    assert f"reward function reward_func ({source}:7)" in str(caught.value)
    until(lambda: len(pool.pids) == 2 and all(alive(pid) for pid in pool.pids))
    assert judge(pool, item(1), item(2)) == [(5.0, 1.0, {"label": 1.0}), (5.0, 1.0, {"label": 2.0})]


@SHORT
@pytest.mark.parametrize("label", ["spin", "sleep", "hold the interpreter"])
def test_a_hang_is_named_and_the_pool_stays_whole(pool: RewardPool, source: str, label: str) -> None:
    message = (
        rf"reward function reward_func \({source}:7\) did not answer within 2 s for prompt 'ab:0:7' \(query 'query'\); "
        "mend the function or raise reward.timeout-s"
    )
    with pytest.raises(RewardError, match=message):
        judge(pool, item(label))
    until(lambda: len(pool.pids) == 2 and all(alive(pid) for pid in pool.pids))
    assert judge(pool, item(1), item(2)) == [(5.0, 1.0, {"label": 1.0}), (5.0, 1.0, {"label": 2.0})]


@SHORT
def test_a_failure_leaves_the_others_alone(pool: RewardPool) -> None:
    """Two calls at once: the one with the hanging response fails, the other gets every answer, some from the same worker."""

    async def scenario() -> tuple[list[object], object]:
        sound = asyncio.create_task(pool.judge([item(number) for number in range(100)]))
        failing = asyncio.create_task(pool.judge([item("spin", prompt_id="bad")]))
        also_sound = asyncio.create_task(pool.judge([item(number) for number in range(100)]))
        results = await asyncio.gather(sound, failing, also_sound, return_exceptions=True)
        return [results[0], results[2]], results[1]

    sound, failed = asyncio.run(scenario())
    assert isinstance(failed, RewardError)
    assert "'bad'" in str(failed)
    for judgements in sound:
        assert isinstance(judgements, list)
        assert [judgement.extra_logs["label"] for judgement in judgements] == [float(number) for number in range(100)]


@SHORT
def test_the_deadline_is_each_responses_own(pool: RewardPool) -> None:
    """Twenty-four responses of 0.2 s on two workers take longer than the 2 s that each of them has."""
    assert len(judge(pool, *[item("slow") for _ in range(24)])) == 24


def test_what_a_function_prints_goes_to_the_log(pool: RewardPool, source: str, tmp_path: Path) -> None:
    assert judge(pool, item("print"), item(3)) == [(5.0, 1.0, {"label": 0.0}), (5.0, 1.0, {"label": 3.0})]
    log = tmp_path / "reward.log"
    chatty = RewardPool(source, workers=1, timeout_s=60.0, log=log)
    judge(chatty, item("print"))
    chatty.close()
    assert log.stat().st_size == 1_000_000 + 256_000


def test_an_interrupt_is_not_the_workers_business(pool: RewardPool) -> None:
    assert judge(pool, item("interrupt")) == [(5.0, 1.0, {"label": 0.0})]
    assert all(os.getpgid(pid) != os.getpgid(0) for pid in pool.pids)


@SHORT
def test_processes_started_by_the_function_die_with_its_worker(pool: RewardPool, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(RewardError, match="did not answer"):
        judge(pool, item("children", query=str(note)))
    until(lambda: not alive(int(note.read_text())))


def test_the_event_loop_goes_on_while_a_function_runs(pool: RewardPool) -> None:
    async def scenario() -> int:
        judging = asyncio.create_task(pool.judge([item("slow")]))
        turns = 0
        while not judging.done():
            await asyncio.sleep(0.001)
            turns += 1
        return turns

    assert asyncio.run(scenario()) > 10


@pytest.mark.parametrize("times", [1, 3, len(_START_AGAIN_S) + 2])
def test_a_system_that_refuses_processes_costs_no_slot(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, times: int
) -> None:
    """Otherwise the pool loses its slots one by one, and the last call waits for ever."""
    monkeypatch.setattr("hone.rollout.rewards.pool._START_AGAIN_S", (0.01,) * len(_START_AGAIN_S))
    log = tmp_path / "reward.log"
    with closing(RewardPool(source, workers=1, timeout_s=60.0, log=log)) as pool:
        started = subprocess.Popen.__init__
        refusals = [BlockingIOError(11, "Resource temporarily unavailable")] * times

        def refused(*arguments: Any, **settings: Any) -> None:
            if refusals:
                raise refusals.pop()
            started(*arguments, **settings)

        monkeypatch.setattr(subprocess.Popen, "__init__", refused)
        with pytest.raises(RewardError, match="exit status 7"):
            judge(pool, item("_exit"))
        if times > len(_START_AGAIN_S) + 1:
            with pytest.raises(BlockingIOError):
                judge(pool, item(1))
        assert judge(pool, item(1)) == [(5.0, 1.0, {"label": 1.0})]
    said = [record.getMessage() for record in caplog.records if record.name == "hone.rollout.rewards.pool"]
    assert len(said) == min(times, len(_START_AGAIN_S) + 1)
    assert all("Resource temporarily unavailable" in message for message in said)


def test_a_label_that_cannot_travel_is_an_error_not_a_hang(pool: RewardPool) -> None:
    with pytest.raises(Exception, match="pickle"):
        judge(pool, item(lambda: 0))
    assert judge(pool, item(1)) == [(5.0, 1.0, {"label": 1.0})]


def test_a_file_that_does_not_load_is_an_error_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    for content, message in (
        ("import no_such_module\n", r"does not load: ModuleNotFoundError: No module named 'no_such_module' at .*reward.py:1"),
        ("import os\nos._exit(4)\n", r"ended its process while loading \(exit status 4\)"),
    ):
        path.write_text(content)
        with pytest.raises(RewardError, match=message):
            RewardPool(str(path), workers=2, timeout_s=1.0)
    with pytest.raises(RewardError, match="does not exist"):
        RewardPool(str(tmp_path / "other.py"), workers=2, timeout_s=1.0)


def test_imports_do_not_count_against_the_deadline(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text('import time\ntime.sleep(1)\ndef reward_func(q, p, l):\n    return {"rewards": 1}\n')
    pool = RewardPool(str(path), workers=1, timeout_s=0.9)
    assert judge(pool, item(0)) == [(1.0, 1.0, {})]
    pool.close()


def test_close_ends_workers_in_the_middle_of_their_work(source: str) -> None:
    pool = RewardPool(source, workers=2, timeout_s=1000.0)
    pids = pool.pids

    async def scenario() -> list[object]:
        waiting = [asyncio.create_task(pool.judge([item(label)])) for label in ("spin", "sleep", 1, 2, 3)]
        await asyncio.sleep(0.2)
        await asyncio.to_thread(pool.close)
        return list(await asyncio.gather(*waiting, return_exceptions=True))

    outcomes = asyncio.run(scenario())
    assert len(outcomes) == 5
    assert all(isinstance(outcome, RewardError) and "closed before it judged" in str(outcome) for outcome in outcomes)
    assert pool.pids == ()
    assert not any(alive(pid) for pid in pids)
    pool.close()
    with pytest.raises(RewardError, match="is closed"):
        judge(pool, item(1))


def test_workers_do_not_outlive_a_parent_that_is_killed(source: str) -> None:
    program = f"""
import asyncio, threading
from hone.rollout.rewards.pool import _START_AGAIN_S, RewardPool
from hone.rollout.rewards.result import RewardItem
pool = RewardPool({source!r}, workers=2, timeout_s=1000.0)
print(*pool.pids, flush=True)
asyncio.run(pool.judge([RewardItem(prompt_id="p", query="q", prompt="p", label="hold the interpreter")]))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in re.findall(r"\d+", parent.stdout.readline())]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
        time.sleep(0.2)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    until(lambda: not any(alive(pid) for pid in pids))
