"""Environments of other projects, played as they are: Gymnasium, TextArena and reasoning-gym by their own packages, OpenEnv over a
real socket (its own package is played in test_foreign.py), TRL's environment factory with the tools of a real chat template.

1. `make_env` may return an object of any of these protocols; one that fits several, or none, is refused with what it could be.
2. A reward stands where the environment gave it; what is not judged stays not judged.
3. A tool that fails, and a call that is no JSON, are told to the policy, counted, and end nothing.
"""

import asyncio
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import pytest
import textarena
from aiohttp import web

from hone.rollout.agents import trl
from hone.rollout.agents.adapting import adapted
from hone.rollout.agents.calling import FunctionAgent
from hone.rollout.agents.gymnasium import GymnasiumEnv
from hone.rollout.agents.loading import Agent, check_agent_file, load
from hone.rollout.agents.openenv import OpenEnv, only_text
from hone.rollout.agents.reasoning_gym import ReasoningGymEnv
from hone.rollout.agents.textarena import TextArenaEnv
from hone.rollout.engines.scripted import ScriptedEngine
from hone.rollout.env import Action, Env
from hone.rollout.errors import EnvironmentFailure
from hone.rollout.executor import Sample
from tests.rollout.chatting import CALL, CALLED, END, wrote
from tests.rollout.test_agents import written
from tests.rollout.test_calling import Length, calling, question
from tests.rollout.test_executor import END as STOP
from tests.rollout.test_executor import prompt
from tests.rollout.test_multi_turn import collect, multi_turn


def saying(*turns: str) -> ScriptedEngine:
    """Writes these turns, one after another, each with an end token."""
    return ScriptedEngine(script=lambda request: [*map(ord, turns[int(request.request_id.split("#")[1])]), STOP])


def played(env: Env, *turns: str, label: object = None, said: str = "Q") -> Sample:
    executor = multi_turn(saying(*turns), lambda: env, max_len=4000)
    executor = dataclasses.replace(executor, config=dataclasses.replace(executor.config, max_new_tokens=99))
    ((sample,),) = (group.samples for group in collect(executor, [prompt(said, label=label)]))
    return sample


def acted(env: Env, text: str) -> Any:
    return asyncio.run(env.step(Action(text=text, raw=text, cut=False)))


class Hidden(gymnasium.Env[str, str]):
    """Guess a digit: warm or cold."""

    observation_space, action_space = gymnasium.spaces.Text(9), gymnasium.spaces.Text(9)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return "guess", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return ("hit", 1.0, True, False, {}) if action == "3" else ("cold", -0.25, False, False, {})


def test_1_2_a_gymnasium_environment_with_its_wrappers_as_make_env_returns_it(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "from gymnasium.wrappers import TimeLimit\nfrom tests.rollout.test_adapters import Hidden\n"
        "def make_env():\n    return TimeLimit(Hidden(), 5)\n",
    )
    check_agent_file(file)
    agent = load(file)
    assert isinstance(agent, Agent) and isinstance(agent.make(), GymnasiumEnv)
    sample = played(agent.make(), "1", "3")
    assert sample.response_text == "guess1$cold3$"
    assert (sample.reward, [value for value in sample.trajectory.rewards.tolist() if value]) == (0.75, [-0.25, 1.0])


def moves(*cells: int) -> Callable[[str], str]:
    """An opponent with these moves; what it was shown is kept."""
    left, shown = list(cells), list[str]()

    def opponent(observation: str) -> str:
        shown.append(observation)
        return f"[{left.pop(0)}]"

    opponent.shown = shown  # pyright: ignore[reportFunctionMemberAccess]
    return opponent


@pytest.mark.parametrize(("seat", "ours", "others", "reward"), [(0, (0, 1, 2), (3, 4), 1.0), (1, (3, 5, 7), (0, 1, 2), -1.0)])
def test_2_a_game_of_textarena_against_a_function_pays_at_its_end(
    seat: int, ours: Sequence[int], others: Sequence[int], reward: float
) -> None:
    opponent = moves(*others)
    game = TextArenaEnv(textarena.make("TicTacToe-v0-raw"), players=2, seat=seat, opponent=opponent)
    sample = played(game, *(f"[{cell}]" for cell in ours))
    assert (sample.reward, sample.trajectory.truncated) == (reward, False)
    assert sample.extra_logs["invalid_move"] == 0.0 and sample.extra_logs["turns"] == (3.0 if seat == 0 else 2.0)
    paid = sample.trajectory.rewards.nonzero().flatten().tolist()
    assert paid == [sample.trajectory.tokens.numel() - 1]
    # What the policy wrote stands in its row once, as it was sampled; the other's moves are told.
    assert sample.response_text.count("\n[Player") == 2
    assert f"[Player {seat}]" not in sample.response_text and sample.response_text.count("You are Player") == 1
    assert f"You are Player {1 - seat}" in opponent.shown[0]  # pyright: ignore[reportFunctionMemberAccess]


def test_2_a_game_that_tells_its_history_again_is_read_once(tmp_path: Path) -> None:
    file = written(tmp_path, "import textarena\ndef make_env():\n    return textarena.make('GuessTheNumber-v0')\n")
    agent = load(file)
    assert isinstance(agent, Agent) and isinstance(agent.make(), TextArenaEnv)
    sample = played(agent.make(), *(f"[{number}]" for number in range(1, 21)))
    assert sample.response_text.count("You are playing Guess The Number") == 1
    assert sample.extra_logs["turns"] > 1 and 0 <= sample.reward <= 1


def test_an_invalid_move_is_the_games_to_judge_and_a_seat_without_others_is_refused() -> None:
    game = TextArenaEnv(textarena.make("TicTacToe-v0-raw"), players=2, opponent=moves(0, 1, 2))
    sample = played(game, "no move", "none either")
    assert (sample.reward, sample.extra_logs["invalid_move"]) == (-1.0, 1.0)
    for settings in ({"players": 2}, {"players": 1, "seat": 1}):
        with pytest.raises(EnvironmentFailure, match=r"needs a seat from 0 to . for the policy .* and an opponent for the others"):
            TextArenaEnv(textarena.make("TicTacToe-v0-raw"), **settings)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries it brings; they are not ours to mend
    import reasoning_gym

SUMS = reasoning_gym.create_dataset("chain_sum", size=5, seed=1)


def test_1_2_a_task_of_reasoning_gym_judges_the_entry_that_the_row_names(tmp_path: Path) -> None:
    env = adapted(SUMS, where="make_env")
    assert isinstance(env, ReasoningGymEnv)
    entry = SUMS[3]
    for label in (3, "3"):
        sample = played(ReasoningGymEnv(SUMS, render=lambda text: f"<{text}>"), f"so <answer>{entry['answer']}</answer>", label=label)
        assert sample.response_text.startswith(f"<{entry['question']}>so") and sample.reward == 1.0
    whole = played(env, "no answer", label=dict(entry), said=entry["question"])
    assert (whole.response_text, whole.reward, whole.extra_logs["unreadable"]) == ("no answer$", 0.0, 0.0)
    with pytest.raises(EnvironmentFailure, match=r"the label 5 is no entry of the task and no number from 0 to 4"):
        played(ReasoningGymEnv(SUMS), "1", label=5)


def test_a_grader_that_raises_is_told_apart_from_an_answer_it_cannot_read() -> None:
    class Picky:
        broken = False

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"question": "q", "answer": "1", "metadata": {}}

        def score_answer(self, answer: str, entry: Mapping[str, Any]) -> float:
            if self.broken:
                raise RuntimeError("no rules")
            return float(int(answer) == 1)

    junk = played(ReasoningGymEnv(Picky()), "junk", label=0)
    assert (junk.reward, junk.extra_logs["unreadable"]) == (0.0, 1.0)
    broken = Picky()
    broken.broken = True
    with pytest.raises(EnvironmentFailure, match="raised RuntimeError: no rules in step"):
        played(ReasoningGymEnv(broken), "1", label=0)


def serving(script: Sequence[object], told: list[Any]) -> Callable[[web.Request], Any]:
    """A server of OpenEnv's wire that answers from a list, a dict as an observation's data; anything else hangs up."""

    async def handle(request: web.Request) -> web.WebSocketResponse:
        socket, left = web.WebSocketResponse(), list(script)
        await socket.prepare(request)
        async for message in socket:
            asked = json.loads(message.data)
            told.append(asked)
            if asked["type"] == "close" or not isinstance(answer := left.pop(0), dict):
                break
            await socket.send_json(answer if "type" in answer else {"type": "observation", "data": answer})
        await socket.close()
        return socket

    return handle


def with_server(script: Sequence[object], turns: Sequence[str], told: list[Any]) -> Sample:
    async def play() -> Sample:
        application = web.Application()
        application.add_routes([web.get("/ws", serving(script, told))])
        runner = web.AppRunner(application)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            url = "http://{}:{}/".format(*runner.addresses[0][:2])
            executor = multi_turn(saying(*turns), lambda: OpenEnv(url, parse=lambda text: {"message": text}))
            (group,) = await executor.collect([prompt("Q")], step=3)
            return group.samples[0]
        finally:
            await runner.cleanup()

    return asyncio.run(play())


def seen(text: str, *, reward: float | None = None, done: bool = False) -> dict[str, Any]:
    return {"observation": {"echo": text}, "reward": reward, "done": done}


def test_2_an_openenv_server_is_played_over_its_socket() -> None:
    told: list[Any] = []
    sample = with_server([seen("hi"), seen("one", reward=0.5), seen("end", done=True)], ["a", "b"], told)
    assert (sample.response_text, sample.reward, sample.trajectory.truncated) == ("hia$oneb$", 0.5, False)
    assert [message["type"] for message in told] == ["reset", "step", "step", "close"]
    assert set(told[0]["data"]) == {"seed"} and told[1]["data"] == {"message": "a"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"type": "error", "data": {"code": "EXECUTION_ERROR", "message": "no board"}}, "answered step with EXECUTION_ERROR: no board"),
        (None, r"hung up in step .* the episode is lost"),
        ({"observation": {"x": "a", "y": "b"}, "reward": 1, "done": False}, r"the observation has 2 fields of text \(x, y\)"),
    ],
)
def test_what_an_openenv_server_may_not_do(answer: object, message: str) -> None:
    told: list[Any] = []
    with pytest.raises(EnvironmentFailure, match=message):
        with_server([seen("hi"), answer], ["a", "b"], told)
    assert [one["type"] for one in told].count("step") == 1  # asked once: a step that is repeated is another step


def test_an_openenv_client_and_an_environment_of_its_are_played_alike() -> None:
    class InProcess:
        def reset(self, seed: int | None = None, episode_id: str | None = None) -> SimpleNamespace:
            return SimpleNamespace(echo="hi", done=False, reward=None, metadata={})

        def step(self, action: str) -> SimpleNamespace:
            return SimpleNamespace(echo=action, done=action == "b", reward=1.0 if action == "b" else None, metadata={})

        def close(self) -> None:
            self.closed = True

    class Client(InProcess):
        async def reset(self, **settings: Any) -> SimpleNamespace:  # pyright: ignore[reportIncompatibleMethodOverride]
            return SimpleNamespace(observation=super().reset(**settings), reward=None, done=False)

        async def step(self, action: str) -> SimpleNamespace:  # pyright: ignore[reportIncompatibleMethodOverride]
            answer = super().step(action)
            return SimpleNamespace(observation=answer, reward=answer.reward, done=answer.done)

    for source in (InProcess(), Client()):
        sample = played(OpenEnv(source, parse=str), "a", "b")
        assert (sample.response_text, sample.reward, source.closed) == ("hia$ab$", 1.0, True)
    with pytest.raises(EnvironmentFailure, match=r"make_env returned InProcess, an OpenEnv, whose actions are objects: say how"):
        adapted(InProcess(), where="make_env")
    with pytest.raises(EnvironmentFailure, match=r"0 fields of text \(no field at all\)"):
        only_text({})


def test_1_what_fits_no_protocol_or_several_is_refused() -> None:
    class Both:
        def reset(self, *, seed: int, options: object = None, num_players: int = 1) -> None: ...
        def step(self, action: str) -> None: ...
        def get_observation(self) -> None: ...
        def close(self) -> None: ...

    with pytest.raises(EnvironmentFailure, match=r"returned Both, which could be a Gymnasium environment or a game of TextArena; wrap it"):
        adapted(Both(), where="make_env")

    class Neither(Both):
        def reset(self, board: str) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]

    with pytest.raises(EnvironmentFailure, match="whose reset takes arguments of no protocol that is known"):
        adapted(Neither(), where="make_env")
    with pytest.raises(EnvironmentFailure, match="returned the class Hidden itself, not an object of it"):
        adapted(Hidden, where="make_env")  # the class, not an object of it


def test_1_a_file_with_two_ways_to_act_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, "def make_env(): ...\ndef agent(base_url, api_key, model, row): ...\n")
    with pytest.raises(EnvironmentFailure, match="defines make_env and agent, which are different ways to act; keep one"):
        load(file)


FACTORY = """
class Sums:
    def reset(self, label, **row):
        self.label, self.calls = label, []
        return f" Seed {row['seed'] > 0}."

    def add(self, a: int, b: int) -> str:
        '''
        Adds two numbers.

        Args:
            a: One.
            b: The other.
        '''
        self.calls.append((a, b))
        if a == 9:
            raise ValueError("nine is too much")
        return str(a + b)

    def get_reward(self) -> float:
        return float(str(sum(self.calls[-1])) == self.label) if self.calls else 0.0

    def _secret(self): ...

environment_factory = FACTORY
"""


def tool_loop(tmp_path: Path, *replies: str, factory: str = "Sums", body: str = FACTORY, **settings: Any) -> Sample:
    file = written(tmp_path, body.replace("FACTORY", factory))
    check_agent_file(file)
    agent = load(file)
    assert isinstance(agent, FunctionAgent)
    executor = dataclasses.replace(calling(agent, *replies, **{"max_new_tokens": 60, **settings}), max_len=2000)
    (group,) = asyncio.run(executor.collect([question()], step=1))
    return group.samples[0]


def test_2_a_trl_environment_is_played_with_its_tools(tmp_path: Path) -> None:
    sample = tool_loop(tmp_path, wrote(1, 1) + wrote(2, 2) + END, f"4{END}")
    assert '"name": "add"' in sample.prompt_text and "Adds two numbers." in sample.prompt_text
    assert "_secret" not in sample.prompt_text and "get_reward" not in sample.prompt_text
    assert "2+2 Seed True.<|im_end|>" in sample.prompt_text
    assert "<tool_response>2</tool_response><tool_response>4</tool_response>" in sample.response_text
    assert (sample.reward, sample.extra_logs["tool_calls"], sample.extra_logs["tool_failures"]) == (1.0, 2.0, 0.0)
    assert sample.earlier == () and not sample.trajectory.truncated


def test_what_reset_says_is_a_further_part_of_a_message_of_parts() -> None:
    class Board:
        def reset(self, **row: object) -> str:
            return "board"

    parts = [{"type": "text", "text": "Play."}]
    row = {"prompt": [{"role": "user", "content": parts}], "label": None, "seed": 1, "columns": {}}
    (message,) = asyncio.run(trl._begun(Board(), row))
    assert message["content"] == [*parts, {"type": "text", "text": "board"}] and len(parts) == 1


def test_3_a_tool_that_fails_and_a_call_that_is_no_json_are_told_to_the_policy(tmp_path: Path) -> None:
    unknown = f'{CALL}{{"name": "sub", "arguments": {{}}}}{CALLED}'
    replies = [wrote(9, 1), f"{CALL}no JSON{CALLED}", unknown, f'{CALL}{{"name": "add", "arguments": {{"a": 1}}}}{CALLED}', "enough"]
    sample = tool_loop(tmp_path, *(reply + END for reply in replies))
    unread = "the tool call is no JSON object with a name and arguments"
    for told in ("nine is too much", unread, "Tool sub not found.", "missing a required argument: 'b'"):
        assert str({"error": told}) in sample.response_text
    assert (sample.extra_logs["tool_calls"], sample.extra_logs["tool_failures"]) == (4.0, 4.0)
    assert sample.extra_logs["endpoint/tool_parse_errors"] == 1.0


def test_a_trl_episode_out_of_calls_ends_as_truncated_and_is_judged(tmp_path: Path) -> None:
    sample = tool_loop(tmp_path, *([wrote(2, 2) + END] * 2), max_turns=2)
    assert (sample.trajectory.truncated, sample.reward) == (True, 1.0)


def test_trl_environments_by_name_and_one_that_does_not_judge_itself(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match=r"has no environment None \(the row's column `environment`\); .* has sums"):
        tool_loop(tmp_path, factory="{'sums': Sums}")
    silent = FACTORY.replace("get_reward", "_reward")
    with pytest.raises(EnvironmentFailure, match=r"gave no reward \(None is not zero\)"):
        tool_loop(tmp_path, f"4{END}", body=silent)
    assert tool_loop(tmp_path, f"four{END}", body=silent, judge=Length()).reward == 4.0
    with pytest.raises(EnvironmentFailure, match="made a int, which has no reset"):
        tool_loop(tmp_path, factory="int")
