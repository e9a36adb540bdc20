"""Environments, agents and judges that fail: what `tolerance` locks.

1. Without it the first failure ends the run. With it the failed prompt's group is dropped, told with a reason, and the others are
   those of a run without a fault; no sample of a failed group is ever returned, with a reward of zero or any other.
2. An episode that may be begun anew is begun anew, as often as was said, with the seeds it had.
3. As many failures in a row as a step has prompts end the run; an engine's failure always does.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from hone.rollout.config import RewardConfig, RolloutConfig
from hone.rollout.engines.scripted import ScriptedEngine
from hone.rollout.env import Action, Turn
from hone.rollout.errors import EngineError, EnvironmentFailure, RewardError
from hone.rollout.executor import Group
from hone.rollout.rewards.result import Judgement, RewardItem
from hone.rollout.tolerance import Tolerance, tolerance
from tests.rollout.test_calling import calling, program, question
from tests.rollout.test_executor import prompt, single_turn
from tests.rollout.test_multi_turn import Scripted, collect, counting, multi_turn

WAYS: dict[str, Callable[[], Any]] = {
    "never returns": lambda: asyncio.sleep(1000),
    "garbage": lambda: 7,
    "raises at turn 2": lambda: ZeroDivisionError("no such move"),
}


class Faulty(Scripted):
    """Two turns; at the second, prompt B's goes wrong in one of the `WAYS`, as often as `left` says."""

    way, left = "", 0

    async def step(self, action: Action) -> Any:
        self.seen.append(action)
        if len(self.seen) < 3:
            return Turn(terminated=False, feedback=".", reward=0.25)
        if self.seen[0][0] == "B" and Faulty.left > 0:
            Faulty.left -= 1
            wrong = WAYS[Faulty.way]()
            if isinstance(wrong, Exception):
                raise wrong
            return await wrong if asyncio.iscoroutine(wrong) else wrong
        return Turn(terminated=True, reward=1.0)


def told(retries: int = 0, in_a_row: int = 3, drops: Any = (EnvironmentFailure,)) -> tuple[Tolerance, list[tuple[str, str]]]:
    heard: list[tuple[str, str]] = []
    own = Tolerance(
        drops=drops,
        retries=retries,
        in_a_row=in_a_row,
        dropped=lambda prompt, reason: heard.append((f"dropped {prompt.text}", reason)),
        retried=lambda prompt, reason: heard.append((f"retried {prompt.text}", reason)),
    )
    return own, heard


def played(own: Tolerance, letters: str = "ABC", *, faults: int = 0, way: str = "garbage") -> tuple[list[Group], list[Faulty]]:
    Faulty.way, Faulty.left = way, faults
    made: list[Faulty] = []

    def make() -> Faulty:
        made.append(Faulty([]))
        return made[-1]

    acting = dataclasses.replace(multi_turn(counting(), make, n=2, step_timeout_s=0.5), tolerance=own)
    return collect(acting, [prompt(letter) for letter in letters]), made


def plain(groups: list[Group]) -> list[Any]:
    return [(group.prompt.text, [(sample.trajectory.tokens.tolist(), sample.reward) for sample in group.samples]) for group in groups]


@pytest.mark.parametrize("way", WAYS)
def test_1_a_group_whose_environment_fails_is_dropped_with_its_reason_and_the_others_are_as_ever(way: str) -> None:
    whole, _ = played(Tolerance())
    own, heard = told()
    groups, made = played(own, faults=9, way=way)
    assert plain(groups) == [group for group in plain(whole) if group[0] != "B"]
    ((what, reason),) = heard
    assert what == "dropped B" and "prompt" not in reason.removesuffix("mend the environment")
    assert reason.startswith("failed: environment Scripted ")
    assert all(env.closed == 1 for env in made)
    with pytest.raises(EnvironmentFailure):
        played(Tolerance(), faults=9, way=way)


@pytest.mark.parametrize("way", WAYS)
def test_2_an_episode_is_begun_anew_and_is_the_one_it_would_have_been(way: str) -> None:
    whole, _ = played(Tolerance())
    own, heard = told(retries=2)
    groups, made = played(own, faults=2, way=way)
    assert plain(groups) == plain(whole)
    assert [what for what, _ in heard] == ["retried B"] * 2 and len(made) == 8
    own, heard = told(retries=2)
    groups, _ = played(own, faults=99, way=way)
    assert [group.prompt.text for group in groups] == ["A", "C"] and heard[-1][0] == "dropped B"
    assert 2 <= sum(what == "retried B" for what, _ in heard) <= 4


def test_3_too_many_in_a_row_end_the_run_and_one_that_goes_well_begins_the_count_anew() -> None:
    own, heard = told(in_a_row=2)
    groups, _ = played(own, "BAC", faults=99)
    groups += played(own, "AB", faults=99)[0]
    assert [group.prompt.text for group in groups] == ["A", "C", "A"]
    with pytest.raises(EnvironmentFailure, match=r"not a Turn .*; 2 groups failed one after another"):
        played(own, "B", faults=99)
    assert [what for what, _ in heard] == ["dropped B"] * 3


def test_3_an_engines_failure_is_never_tolerated() -> None:
    def dead(_: object) -> Any:
        raise EngineError("engine gone")

    own, heard = told(retries=5)
    with pytest.raises(EngineError, match="gone"):
        collect(dataclasses.replace(multi_turn(ScriptedEngine(script=dead), lambda: Faulty([])), tolerance=own), [prompt("A")])
    assert heard == []


def living(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_1_an_agent_that_fails_costs_its_group_and_leaves_no_process(tmp_path: Path) -> None:
    body = """
import subprocess
ask("2+2")
if row["prompt_id"] == "bad":
    child = subprocess.Popen(["sleep", "1000"])
    open(PIDS, "a").write(f"{os.getpid()} {child.pid} ")
    MISDEED
print(1)
"""
    for misdeed in ("sys.exit('no such move')", "child.wait()", "print('no reward'); sys.exit()"):
        pids = tmp_path / "pids"
        pids.write_text("")
        agent = program(tmp_path, body.replace("PIDS", repr(str(pids))).replace("MISDEED", misdeed))
        own, heard = told()
        acting = dataclasses.replace(calling(agent, script=lambda _: [5, 6], agent_timeout_s=10.0), tolerance=own)
        groups = asyncio.run(acting.collect([question("good"), question("bad"), question("fine")], step=1))
        assert [(group.prompt.prompt_id, group.samples[0].reward) for group in groups] == [("good", 1.0), ("fine", 1.0)]
        assert [what for what, _ in heard] == ["dropped 2+2"] and "'bad'" not in heard[0][1]
        # Killed with their group, which a busy system may take a moment over; who has no parent left may wait to be buried.
        end = time.monotonic() + 20.0
        while left := [pid for pid in map(int, pids.read_text().split()) if living(pid)]:
            assert time.monotonic() < end, left
            time.sleep(0.02)


def test_1_a_judge_that_fails_costs_its_group_only_where_that_was_said() -> None:
    class Judge:
        async def judge(self, items: list[RewardItem]) -> list[Judgement]:
            if items[0].prompt_id == "id-B":
                raise RewardError("reward server gone for prompt 'id-B'")
            return [Judgement(reward=1.0, score=1.0, extra_logs={}) for _ in items]

    acting = single_turn(ScriptedEngine(script=lambda _: [97, 1]), Judge())  # pyright: ignore[reportArgumentType]
    own, heard = told(drops=(RewardError,))
    groups = asyncio.run(dataclasses.replace(acting, tolerance=own).collect([prompt(letter) for letter in "ABC"], step=1))
    assert [group.prompt.text for group in groups] == ["A", "C"] and heard == [("dropped B", "failed: reward server gone")]
    own, heard = told()
    with pytest.raises(RewardError, match="server gone"):
        asyncio.run(dataclasses.replace(acting, tolerance=own).collect([prompt("B")], step=1))
    assert heard == []


def test_the_settings_say_what_is_tolerated() -> None:
    def of(rollout: dict[str, Any], reward: dict[str, Any]) -> tuple[Any, int, int]:
        quiet: Any = lambda *_: None  # noqa: E731
        own = tolerance(RolloutConfig(batch_size=5, **rollout), RewardConfig(**reward), dropped=quiet, retried=quiet)
        return own.drops, own.retries, own.in_a_row

    assert of({}, {}) == ((), 0, 5)
    assert of({"env_failure": "drop"}, {}) == ((EnvironmentFailure,), 0, 5)
    assert of({"env_failure": "retry", "env_retries": 4}, {"on_error": "drop"}) == ((EnvironmentFailure, RewardError), 4, 5)
