"""Every fault a run may meet while it acts, and the test that meets it: one table, and whole runs for what stands nowhere else.

A witness is a test by its file and name; the table holds only if each exists. The whole runs end with the ledger's invariant:
every prompt that was drawn is trained on once, or dropped with a reason, and where the run went on to its end none is open.
"""

import ast
import dataclasses
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hone.launch import local
from hone.launch.cli import main
from hone.launch.observe.ledger import Totals, replay
from hone.launch.observe.metrics import is_healthy
from hone.launch.observe.run_directory import read_events, read_metrics
from hone.rollout.rewards import http
from tests.rollout.test_reward_http import Answer, Asked, Server, scores

TESTS = Path(__file__).parents[1]

WITNESSES: dict[str, tuple[str, ...]] = {
    "F1 an engine is killed while it idles": (
        "rollout/test_fleet.py::test_an_idle_engine_that_died_is_replaced_before_anything_is_sent_to_it",
        "launch/test_cluster_run.py::test_an_engine_that_is_killed_and_one_that_hangs_are_replaced_and_the_run_goes_on",
    ),
    "F2 an engine is killed in the middle of a call": (
        "rollout/test_fleet.py::test_calls_of_an_engine_that_dies_are_asked_again_elsewhere_and_it_is_replaced",
        "rollout/test_fleet.py::test_every_call_of_a_lost_engine_is_answered_once",
        "rollout/test_vllm_engine.py::test_a_killed_core_is_an_error_with_its_name_and_leaves_nothing",
    ),
    "F3 an engine raises in its forward pass": (
        "rollout/test_fleet.py::test_errors_keep_their_kind_and_name_the_engine",
        "rollout/test_fleet.py::test_what_kills_every_engine_it_meets_is_named",
    ),
    "F4 an engine hangs": (
        "rollout/test_fleet.py::test_an_engine_that_hangs_is_found_by_a_probe_and_its_calls_go_elsewhere",
        "launch/test_cluster_run.py::test_an_engine_that_is_killed_and_one_that_hangs_are_replaced_and_the_run_goes_on",
    ),
    "F5 every engine is dead": (
        "rollout/test_fleet.py::test_below_its_minimum_the_fleet_says_whom_it_lost",
        "launch/test_cluster_run.py::test_a_killed_engine_ends_the_run_with_its_name_and_leaves_no_process",
    ),
    "F6 an engine dies again and again": ("rollout/test_fleet.py::test_a_flapping_engine_is_retired_and_the_others_go_on",),
    "F9 an engine dies in a weight sync": (
        "launch/test_publish.py::test_an_engine_that_dies_in_an_update_is_replaced_and_all_are_updated_anew",
        "rollout/test_weight_sync.py::test_engines_stay_paused_when_sending_fails",
    ),
    "F10 a sync says it is done and applied nothing": (
        "rollout/test_weight_sync.py::test_an_update_that_is_received_but_not_applied_is_detected",
        "rollout/test_weight_sync.py::test_an_update_that_never_reaches_the_engine_is_detected",
        "launch/test_publish.py::test_stale_weights_end_the_run",
    ),
    "F11 one tensor differs, or the tied head was left behind": (
        "rollout/test_weight_sync.py::test_a_tensor_altered_on_the_way_is_named_and_nothing_is_sampled_until_a_full_sync",
        "rollout/test_weight_sync.py::test_a_tied_head_left_behind_is_named_and_a_full_sync_mends_it",
    ),
    "F12 a prefix cached under old weights": (
        "rollout/test_weight_sync.py::test_a_prefix_cached_under_old_weights_is_not_used_under_new_ones",
    ),
    "F13 an engine samples otherwise than the learner recomputes": (
        "launch/test_faults.py::test_f13_a_temperature_other_than_the_contracts_is_measured_and_marked",
        "launch/test_faults.py::test_f13_the_gate_ends_the_run_before_the_step_is_learnt_from_and_names_the_temperature",
        "launch/test_gap.py::test_a_temperature_is_named_with_its_value",
        "launch/test_gap.py::test_a_truncated_distribution_is_named",
        "launch/test_gap.py::test_another_prompt_is_named",
    ),
    "F14 three requests in ten for rewards fail": (
        "rollout/test_reward_http.py::test_faults_at_random_change_no_reward",
        "rollout/test_reward_http.py::test_a_server_that_hangs_is_tried_again",
        "launch/test_faults.py::test_f14_f15_a_reward_server_that_fails_for_a_while_changes_no_number",
    ),
    "F15 a reward server is away and comes back": (
        "rollout/test_reward_http.py::test_a_server_that_is_away_for_a_while_costs_time_and_no_reward",
        "launch/test_faults.py::test_f14_f15_a_reward_server_that_fails_for_a_while_changes_no_number",
    ),
    "F16 a reward server is away for ever": (
        "rollout/test_reward_http.py::test_a_server_that_is_away_for_ever_ends_the_run",
        "launch/test_faults.py::test_f16_a_reward_server_that_stays_away_ends_the_run_which_then_goes_on_as_if_it_had_not",
    ),
    "F17 a reward is no number, or of the wrong shape": (
        "rollout/test_rewards.py::test_what_is_not_a_reward_is_an_error_with_its_value",
        "rollout/test_reward_http.py::test_what_will_not_pass_is_one_error_at_once",
        "launch/test_local_run.py::test_a_reward_that_is_none_stops_the_run_with_its_name_and_prompt",
        "rollout/test_tolerance.py::test_1_a_judge_that_fails_costs_its_group_only_where_that_was_said",
    ),
    "F18 a reward hangs, crashes, or starts processes": (
        "rollout/test_pool.py::test_failures_are_named_and_the_pool_stays_whole",
        "rollout/test_pool.py::test_a_hang_is_named_and_the_pool_stays_whole",
        "rollout/test_pool.py::test_a_failure_leaves_the_others_alone",
        "rollout/test_pool.py::test_processes_started_by_the_function_die_with_its_worker",
        "rollout/test_sandbox.py::test_a_fork_bomb_ends_at_its_limit",
    ),
    "F19 an environment never returns, answers nonsense, raises, or leaks processes": (
        "rollout/test_multi_turn.py::test_an_environment_that_hangs_meets_its_deadline_and_others_are_cancelled_and_closed",
        "rollout/test_multi_turn.py::test_an_environment_that_fails_stops_the_run_and_is_closed",
        "rollout/test_tolerance.py::test_1_a_group_whose_environment_fails_is_dropped_with_its_reason_and_the_others_are_as_ever",
        "rollout/test_tolerance.py::test_2_an_episode_is_begun_anew_and_is_the_one_it_would_have_been",
        "rollout/test_tolerance.py::test_1_an_agent_that_fails_costs_its_group_and_leaves_no_process",
        "launch/test_processes.py::test_orphans_end_with_the_run_and_older_processes_stay",
        "launch/test_faults.py::test_f19_an_environment_that_fails_costs_its_groups_and_the_ledger_says_why",
    ),
}
"""Fault -> the tests that meet it (paths below tests/)."""


@pytest.mark.parametrize("fault", WITNESSES)
def test_every_fault_has_its_witnesses(fault: str) -> None:
    for witness in WITNESSES[fault]:
        file, _, name = witness.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, witness


def test_the_table_is_whole() -> None:
    assert [int(fault.split()[0][1:]) for fault in WITNESSES] == [*range(1, 7), *range(9, 20)]


SIZES = ["--run.backend", "local", "--rollout.batch-size", "4", "--rollout.n-samples-per-prompt", "2", "--train.batch-size", "8"]
STEPS = ["--train.max-steps", "3", "--train.seed", "1", "--ckpt.save-steps", "1"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(http, "_LONGEST_PAUSE_S", 0.1)


def run(home: Path, *flags: str, at: str = "run") -> int:
    return main(["grpo", *SIZES, *STEPS, *flags, "--ckpt.path", str(home / "ckpt"), "--run.dir", str(home / at)])


def balanced(directory: Path) -> Totals:
    """The ledger of a run: raises where a prompt is lost, or trained twice."""
    totals = replay(read_events(directory)[0]).verify()
    assert totals.issued == totals.trained + totals.dropped + totals.open
    return totals


def rewards(directory: Path) -> list[dict[str, Any]]:
    """Every figure of every step but what a clock or the machine's memory says."""
    return [
        {name: value for name, value in step.items() if not name.startswith(("timing/", "perf/"))} for step in read_metrics(directory)[0]
    ]


def judged_by(home: Path, *flags: str, say: Callable[[Asked], Answer | None] = scores, at: str = "run") -> tuple[int, Server]:
    with closing(Server(say=say)) as server:
        url = ["--reward.remote-url", server.url, "--reward.rows-per-request", "1", *flags]
        return run(home, *url, at=at), server


@pytest.fixture(scope="module")
def clean(hone_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Three steps without a fault."""
    home = tmp_path_factory.mktemp("clean")
    assert judged_by(home)[0] == 0
    return rewards(home / "run")


def faults_at_random(away: bool) -> Callable[[Asked], Answer | None]:
    """Three answers in ten fail (`away`: a dozen, one after another, after the first twenty)."""
    seen, lock = [0], threading.Lock()
    kinds: list[Answer | None] = [(500, {}, b""), (503, {}, b""), (429, {"Retry-After": "0"}, b""), None]

    def say(asked: Asked) -> Answer | None:
        with lock:
            seen[0] += 1
            number = seen[0]
        failing = 20 < number <= 32 if away else number % 10 in (1, 4, 7) and number > 8
        return kinds[number % 4] if failing else scores(asked)

    return say


@pytest.mark.parametrize("away", [False, True])
def test_f14_f15_a_reward_server_that_fails_for_a_while_changes_no_number(
    away: bool, clean: list[dict[str, Any]], quick: None, tmp_path: Path
) -> None:
    code, server = judged_by(tmp_path, say=faults_at_random(away))
    assert code == 0 and rewards(tmp_path / "run") == clean
    assert len(server.asked) >= 24 + (12 if away else 6), "the fault was never met"
    totals = balanced(tmp_path / "run")
    assert (totals.trained, totals.dropped, totals.open) == (12, 0, 0)


def test_f16_a_reward_server_that_stays_away_ends_the_run_which_then_goes_on_as_if_it_had_not(
    clean: list[dict[str, Any]], quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = [2 + 2 * 8 + 3]  # the smoke rows, two steps, and some of the third

    def say(asked: Asked) -> Answer:
        left[0] -= 1
        return scores(asked) if left[0] >= 0 else (503, {}, b"down for good")

    assert judged_by(tmp_path, "--reward.retry-s", "2", "--reward.max-in-flight", "1", say=say)[0] == 6
    message = " ".join(capsys.readouterr().err.split())
    assert "reward server" in message and "it is never counted as zero" in message
    totals = balanced(tmp_path / "run")
    assert (totals.trained, totals.open) == (4 * len(rewards(tmp_path / "run")), 4)
    assert judged_by(tmp_path, "--ckpt.load-enable", at="again")[0] == 0
    assert rewards(tmp_path / "again") == clean
    totals = balanced(tmp_path / "again")
    assert (totals.issued, totals.trained, totals.open) == (12, 12, 0)


def hotter_from(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine samples at temperature 2 from `step` on, whatever the contract says."""
    sampled, calls = local.TransformersEngine.generate, [0]

    async def hotter(self: Any, requests: Any) -> Any:
        calls[0] += 1
        other = [dataclasses.replace(one, contract=dataclasses.replace(one.contract, temperature=2.0)) for one in requests]
        return await sampled(self, other if calls[0] >= step else requests)

    monkeypatch.setattr(local.TransformersEngine, "generate", hotter)


def test_f13_the_gate_ends_the_run_before_the_step_is_learnt_from_and_names_the_temperature(
    hone_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hotter_from(3, monkeypatch)
    many = ["--rollout.n-samples-per-prompt", "8", "--train.batch-size", "32", "--ckpt.save-steps", "-1"]
    assert run(tmp_path, *many, "--rollout.max-gap", "0.05") == 8
    message = " ".join(capsys.readouterr().err.split())
    assert "step 3: engine and learner are" in message and "suspect: temperature" in message and "--rollout.max-gap" in message
    told = float(message.split("as at temperature ")[1].split(",")[0])
    assert told == pytest.approx(2.0, rel=0.05)
    events = read_events(tmp_path / "run")[0]
    (gap,) = [event for event in events if event["kind"] == "gap_exceeded"]
    assert (gap["step"], gap["limit"], gap["suspect"]) == (3, 0.05, "temperature") and gap["gap"] > 0.05
    assert [step["step"] for step in read_metrics(tmp_path / "run")[0]] == [1, 2]
    (rescued,) = [event for event in events if event["kind"] == "rescued"]
    assert rescued["model"].endswith("failed_in_step_3") and (Path(rescued["model"]) / "config.json").is_file()
    totals = balanced(tmp_path / "run")
    assert (totals.trained, totals.dropped, totals.open) == (8, 0, totals.issued - 8) and totals.open >= 4


def test_f13_a_temperature_other_than_the_contracts_is_measured_and_marked(
    hone_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hotter_from(1, monkeypatch)
    assert run(tmp_path) == 0
    name = "mismatch/logp_abs_diff_mean"
    for step in read_metrics(tmp_path / "run")[0]:
        assert step[name] > 0.05 and not is_healthy(name, step[name])
    assert f"`{name}` outside" in (tmp_path / "run" / "report.md").read_text()


FAULTY = """
import asyncio
from hone.rollout.env import Turn

class Sometimes:
    async def reset(self, prompt, label, *, seed):
        self.wrong, self.label = hash(int(label)) % 3, str(label)
        return prompt

    async def step(self, action):
        if self.wrong == 0:
            raise KeyError("no such move")
        if self.wrong == 1 and int(self.label) % 2:
            return None
        return Turn(terminated=True, reward=float(action.text.strip() == self.label))

    async def close(self): ...

make_env = Sometimes
"""


@pytest.mark.parametrize("policy", ["drop", "retry"])
def test_f19_an_environment_that_fails_costs_its_groups_and_the_ledger_says_why(policy: str, hone_cache: Path, tmp_path: Path) -> None:
    agent = tmp_path / "agent.py"
    agent.write_text(FAULTY)
    flags = ["--rollout.agent-func-path", str(agent), "--rollout.env-failure", policy, "--rollout.batch-size", "8"]
    assert run(tmp_path, *flags) == 0
    totals = balanced(tmp_path / "run")
    assert totals.issued == 24 and totals.trained > 0 and totals.dropped > 0 and totals.open == 0
    where = f"failed: environment make_env ({agent})"
    assert {reason.removeprefix(where).split(" in step")[0].strip() for reason in totals.reasons} <= {
        "raised KeyError: 'no such move'",
        "returned None (NoneType) from step, not a Turn; mend its step: nothing was trained on this episode",
    }
    events = read_events(tmp_path / "run")[0]
    retried = [event for event in events if event["kind"] == "episode_retried"]
    assert len(retried) >= 2 * totals.dropped if policy == "retry" else not retried
