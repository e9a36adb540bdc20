"""Multi-turn episodes: what they lock.

1. A trajectory is every id in the order it was read or sampled; only sampled ids are actions, and no id is made twice from text.
2. Every request begins with the ids of the one before it.
3. A turn's reward stands on the last id of its action; an episode that nobody judged is an error.
4. Running out of tokens or turns truncates; ending does not. Text that no longer fits is not read.
5. An environment that raises, hangs or answers nonsense stops the run with its name and the prompt; it is closed whatever happens.
6. Seeds differ between samples and between turns, and are the same in every run.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from hone.rollout.config import RolloutConfig
from hone.rollout.engines.scripted import ScriptedEngine
from hone.rollout.env import Action, Env, Turn
from hone.rollout.errors import EngineError, EnvironmentFailure
from hone.rollout.executor import Group
from hone.rollout.multi_turn import MultiTurn
from hone.rollout.tolerance import Tolerance
from hone.rollout.types import Prompt, Request
from tests.rollout.test_executor import END, Letters, ids, prompt


class BothWays(Letters):
    """Letters that can also be encoded; without special tokens the end token is nothing."""

    encoded: list[str]

    def __init__(self) -> None:
        self.encoded = []

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        kept = [token for token in token_ids if not (skip_special_tokens and token == END)]
        return super().decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=clean_up_tokenization_spaces)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        self.encoded.append(text)
        return ids(text)


@dataclass
class Scripted:
    """Answers its turns from a list; `seen` keeps what it was told."""

    turns: Sequence[Any]
    begin: Callable[[str], Any] = lambda text: text
    seen: list[Any] = field(default_factory=list)
    closed: int = 0

    async def reset(self, prompt: str, label: object, *, seed: int) -> Any:
        self.seen.append((prompt, label, seed))
        return self.begin(prompt)

    async def step(self, action: Action) -> Any:
        self.seen.append(action)
        turn = self.turns[len(self.seen) - 2]
        if isinstance(turn, BaseException):
            raise turn
        return turn

    async def close(self) -> None:
        self.closed += 1


def mistyped(**fields: object) -> Turn:
    """A turn with what a dataclass takes and a checker of types would not."""
    turn = Turn(terminated=True, reward=1.0)
    for name, value in fields.items():
        object.__setattr__(turn, name, value)
    return turn


def multi_turn(engine: ScriptedEngine, environment: Callable[[], Env], **settings: Any) -> MultiTurn:
    n = settings.pop("n", 1)
    defaults: dict[str, Any] = {"max_len": 100, "max_turns": 10, "step_timeout_s": 60.0, "tokenizer": BothWays(), **settings}
    return MultiTurn(
        engine=engine,
        environment=environment,
        where="Scripted",
        config=RolloutConfig(n_samples_per_prompt=n, max_new_tokens=8, temperature=0.7, timeout_s=60.0),
        run_seed=5,
        engine_version="scripted 1",
        tokenizer_hash="t",
        template_hash="c",
        **defaults,
    )


def collect(executor: MultiTurn, prompts: Sequence[Prompt], on_group: Callable[[Group], None] | None = None) -> list[Group]:
    return asyncio.run(executor.collect(prompts, step=3, on_group=on_group))


def counting() -> ScriptedEngine:
    """Writes a, b, c, ... and an end token, one letter a turn; log-probability -turn, version 10 + turn."""

    class Counting(ScriptedEngine):
        async def generate(self, requests: Sequence[Request]) -> Any:
            turn = int(requests[0].request_id.split("#")[1])
            self.version, self.logp = 10 + turn, -1.0 - turn
            return await super().generate(requests)

    return Counting(script=lambda request: [ord("a") + int(request.request_id.split("#")[1]), END])


def test_a_trajectory_is_all_that_was_read_and_sampled() -> None:
    env = Scripted([Turn(terminated=False, feedback="XY", reward=0.25), Turn(terminated=True, reward=2.0, score=0.5, feedback="lost")])
    engine, tokenizer = counting(), BothWays()
    ((sample,),) = (group.samples for group in collect(multi_turn(engine, lambda: env, tokenizer=tokenizer), [prompt("Q", label=7)]))
    trajectory = sample.trajectory
    assert trajectory.tokens.tolist() == ids("Qa$XYb$")
    assert trajectory.action_mask.tolist() == [False, True, True, False, False, True, True]
    assert_close(trajectory.rollout_logp, torch.tensor([0.0, -1, -1, 0, 0, -2, -2]))
    assert_close(trajectory.rewards, torch.tensor([0, 0, 0.25, 0, 0, 0, 2.0]))
    assert trajectory.version.tolist() == [10, 10, 10, 11, 11, 11, 11]
    assert not trajectory.truncated
    assert (sample.reward, sample.score, sample.response_text, sample.label) == (2.25, 0.5, "a$XYb$", 7)
    assert sample.extra_logs == {"turns": 2.0}
    assert env.seen[0][:2] == ("Q", 7)
    assert env.seen[1:] == [Action(text="a", raw="a$", cut=False), Action(text="b", raw="b$", cut=False)]
    assert tokenizer.encoded == ["XY", "lost"]  # neither the prompt nor what was sampled
    assert env.closed == 1


def test_every_request_begins_with_the_one_before_it() -> None:
    engine = counting()
    turns = [*(Turn(terminated=False, feedback="." * length) for length in (0, 3, 1)), Turn(terminated=True, reward=1.0)]
    collect(multi_turn(engine, lambda: Scripted(turns)), [prompt("Q")])
    asked = [call[0].tokens for call in engine.calls]
    assert len(asked) == 4
    for before, after in pairwise(asked):
        assert after[: len(before)] == before


def test_a_text_to_begin_with_that_is_not_the_prompt_is_tokenised_once() -> None:
    tokenizer = BothWays()
    env = Scripted([Turn(terminated=True, reward=1.0)], begin=lambda text: f"{text}+board")
    ((sample,),) = (group.samples for group in collect(multi_turn(counting(), lambda: env, tokenizer=tokenizer), [prompt("Q")]))
    assert sample.trajectory.tokens.tolist() == ids("Q+boarda$")
    assert sample.response_text == "+boarda$"
    assert tokenizer.encoded == ["Q+board", ""]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_turns": 2}, "Qa$..b$"),
        ({"max_len": 9}, "Qa$..b$"),  # what the environment says then would fill the row
        ({"max_len": 10}, "Qa$..b$..c"),
        ({"max_len": 2}, "Qa"),
    ],
)
def test_running_out_of_turns_or_tokens_truncates(settings: dict[str, int], text: str) -> None:
    env = Scripted([Turn(terminated=False, feedback="..", reward=1.0)] * 20)
    ((sample,),) = (group.samples for group in collect(multi_turn(counting(), lambda: env, **settings), [prompt("Q")]))
    assert sample.trajectory.tokens.tolist() == ids(text)
    assert sample.trajectory.truncated
    assert sample.trajectory.action_mask[-1]
    last = env.seen[-1]
    assert last.cut == (settings.get("max_len") in (2, 10))


def test_an_end_on_the_last_turn_is_an_end_and_giving_up_is_not() -> None:
    for turn, truncated in ((Turn(terminated=True, reward=1.0), False), (Turn(terminated=False, truncated=True, reward=1.0), True)):
        env = Scripted([turn])
        ((sample,),) = (group.samples for group in collect(multi_turn(counting(), lambda env=env: env, max_turns=1), [prompt("Q")]))
        assert sample.trajectory.truncated is truncated


def test_seeds_are_each_turns_and_samples_own_and_the_same_in_every_run() -> None:
    runs = []
    for _ in range(2):
        engine, envs = counting(), [Scripted([Turn(terminated=False), Turn(terminated=True, reward=1.0)]) for _ in range(6)]
        left = list(envs)
        collect(multi_turn(engine, lambda left=left: left.pop(), n=3), [prompt("P"), prompt("Q")])
        runs.append(({call[0].request_id: call[0].contract.seed for call in engine.calls}, sorted(env.seen[0][2] for env in envs)))
    assert runs[0] == runs[1]
    assert len(runs[0][0]) == len(set(runs[0][0].values())) == 12
    assert len(set(runs[0][1])) == 6


def test_order_is_that_of_prompts_and_samples_and_no_more_episodes_go_on_than_allowed() -> None:
    going = most = 0

    class Slow(Scripted):
        async def step(self, action: Action) -> Turn:
            nonlocal going, most
            going += 1
            most = max(most, going)
            await asyncio.sleep(0.01 if self.seen[0][0] == "A" else 0.0)
            going -= 1
            return Turn(terminated=True, reward=1.0)

    told: list[str] = []
    executor = multi_turn(counting(), lambda: Slow([]), n=2, episodes_in_flight=3)
    groups = collect(executor, [prompt(letter) for letter in "ABCD"], on_group=lambda group: told.append(group.prompt.text))
    assert [group.prompt.text for group in groups] == ["A", "B", "C", "D"]
    assert [[sample.trajectory.sample for sample in group.samples] for group in groups] == [[0, 1]] * 4
    assert sorted(told) == ["A", "B", "C", "D"]
    assert most <= 3


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([ZeroDivisionError("by zero")], r"Scripted raised ZeroDivisionError: by zero in step, on prompt 'id-Q'"),
        ([None], r"Scripted returned None \(NoneType\) from step, not a Turn for prompt 'id-Q'"),
        ([Turn(terminated=True, reward=math.nan)], r"gave the reward nan, not a finite number"),
        ([Turn(terminated=True, reward=1.0, score=math.inf)], r"gave the score inf"),
        ([mistyped(extra_logs={"steps": "many"})], r"gave the steps 'many'"),
        ([mistyped(feedback=7)], r"gave the feedback 7 \(int\), not text"),
        ([Turn(terminated=False), Turn(terminated=True)], r"ended an episode without any reward \(None is not zero\)"),
    ],
)
def test_an_environment_that_fails_stops_the_run_and_is_closed(turns: list[Any], message: str) -> None:
    env, others = Scripted(turns), Scripted([Turn(terminated=True, reward=1.0)])
    left = [env, others]
    with pytest.raises(EnvironmentFailure, match=message):
        collect(multi_turn(counting(), lambda: left.pop(0)), [prompt("Q"), prompt("R")])
    assert env.closed == 1
    assert others.closed == len(others.seen[:1])


def test_a_beginning_that_is_no_text_is_refused() -> None:
    with pytest.raises(EnvironmentFailure, match=r"returned \('Q', \{\}\) \(tuple\) from reset, not the text to begin with"):
        collect(multi_turn(counting(), lambda: Scripted([], begin=lambda text: (text, {}))), [prompt("Q")])


def test_an_environment_that_hangs_meets_its_deadline_and_others_are_cancelled_and_closed() -> None:
    class Hanging(Scripted):
        async def step(self, action: Action) -> Turn:
            await asyncio.sleep(1000)
            raise AssertionError

    envs = [Hanging([]) for _ in range(4)]
    left = list(envs)
    with pytest.raises(EnvironmentFailure, match=r"did not answer step within 0.2 s \(raise reward.timeout-s if it may\), on prompt"):
        collect(multi_turn(counting(), lambda: left.pop(), n=4, step_timeout_s=0.2), [prompt("Q")])
    assert [env.closed for env in envs] == [1, 1, 1, 1]


def test_a_timeout_of_the_environments_own_is_told_as_its_own() -> None:
    with pytest.raises(EnvironmentFailure, match="raised TimeoutError: the game server in step"):
        collect(multi_turn(counting(), lambda: Scripted([TimeoutError("the game server")])), [prompt("Q")])


def test_a_failing_engine_is_named_and_environments_are_closed() -> None:
    def dead(_: Request) -> Sequence[int]:
        raise EngineError("engine gone")

    env = Scripted([])
    with pytest.raises(EngineError, match="gone"):
        collect(multi_turn(ScriptedEngine(script=dead), lambda: env), [prompt("Q")])
    assert env.closed == 1


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt 'id-QQQ' has 3 tokens, which leaves no room for a turn in 3"):
        collect(multi_turn(counting(), lambda: Scripted([]), max_len=3), [prompt("QQQ")])


def test_a_beginning_longer_than_the_window_is_the_environments_failure_which_costs_its_group_alone() -> None:
    env = Scripted([], begin=lambda text: text + 4 * ".")
    told = (
        r"environment Scripted began with 5 tokens, which leaves no room for a turn in 5 \(raise data.max-len if it may\), on prompt 'id-Q'"
    )
    with pytest.raises(EnvironmentFailure, match=told):
        collect(multi_turn(counting(), lambda: env, max_len=5), [prompt("Q")])
    assert env.closed == 1
    dropped: list[str] = []
    tolerance = Tolerance(drops=(EnvironmentFailure,), in_a_row=2, dropped=lambda prompt, reason: dropped.append(prompt.text))
    turns = [Turn(terminated=True, reward=1.0)]
    executor = multi_turn(
        counting(),
        lambda: Scripted(turns, begin=lambda text: text if text == "R" else text + 4 * "."),
        max_len=5,
        tolerance=tolerance,
    )
    assert [group.prompt.text for group in collect(executor, [prompt("Q"), prompt("R")])] == ["R"]
    assert dropped == ["Q"]


def test_a_greedy_episode_is_greedy_in_every_turn() -> None:
    engine = counting()
    turns = [Turn(terminated=False, feedback="."), Turn(terminated=True, reward=1.0)]
    (group,) = collect(multi_turn(engine, lambda: Scripted(turns), n=2, greedy=True), [prompt("Q")])
    assert len(group.samples) == 2 and group.greedy is not None
    asked = {call[0].request_id: call[0].greedy for call in engine.calls}
    assert {name for name, greedy in asked.items() if greedy} == {"3:id-Q:2#0", "3:id-Q:2#1"} and len(asked) == 6
