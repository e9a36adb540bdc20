"""Agent files and adapters: OpenRLHF's dictionaries, Gymnasium's tuples, and what a file without either is told."""

import asyncio
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hone.rollout.agents.gymnasium import GymnasiumEnv
from hone.rollout.agents.loading import check_agent_file, load
from hone.rollout.agents.openrlhf import OpenRLHFEnv
from hone.rollout.env import Action, Env, Turn, checked_turn
from hone.rollout.errors import EnvironmentFailure
from tests.rollout.test_executor import ids, prompt
from tests.rollout.test_multi_turn import collect, counting, multi_turn

# As such a file is written for OpenRLHF, but for its first import.
AGENT = """
from hone.rollout.agents.openrlhf import AgentInstanceBase, MultiTurnAgentExecutor
import torch

class AgentInstance(AgentInstanceBase):
    def __init__(self, *args, **kwargs):
        self.step_idx = 0
        self.max_steps = 3

    async def reset(self, states, **kwargs):
        return {"observation": states["observation"]}

    async def step(self, states, **kwargs):
        self.step_idx += 1
        done = self.step_idx >= self.max_steps
        reward = torch.tensor([0.5]) if done else torch.tensor(0.0)
        feedback = "" if done else f"<{states['label']}{len(states['observation_text'])}>"
        return {
            "rewards": reward,
            "scores": reward,
            "environment_feedback": feedback,
            "done": done,
            "sampling_params": states.get("sampling_params", None),
            "extra_logs": {"dummy_scores": reward},
        }

class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(AgentInstance)
"""


def written(tmp_path: Path, content: str) -> str:
    path = tmp_path / "agent.py"
    path.write_text(content)
    return str(path)


def test_an_openrlhf_file_runs_after_one_changed_import(tmp_path: Path) -> None:
    source = written(tmp_path, AGENT)
    check_agent_file(source)
    agent = load(source)
    ((sample,),) = (group.samples for group in collect(multi_turn(counting(), agent.make), [prompt("Q", label="L")]))
    # It is told the row as it stands: "Q", then "Qa$<L1>", then ...
    assert sample.trajectory.tokens.tolist() == ids("Qa$<L1>b$<L7>c$")
    assert (sample.reward, sample.score, sample.extra_logs) == (0.5, 0.5, {"dummy_scores": 0.5, "turns": 3.0})
    assert agent.where == f"AgentInstance ({source})"


def stepped(answer: object) -> Turn:
    async def step(states: dict[str, Any]) -> object:
        return answer

    return asyncio.run(OpenRLHFEnv(SimpleNamespace(step=step)).step(Action(text="a", raw="a$", cut=False)))


def test_a_dictionary_is_read_as_openrlhf_reads_it() -> None:
    required = {"rewards": 1, "environment_feedback": "", "done": False}
    assert stepped(required) == Turn(terminated=False, reward=1.0, feedback="")
    assert stepped({**required, "done": True, "scores": 0.5}) == Turn(terminated=True, reward=1.0, score=0.5)
    assert stepped({**required, "done": True, "truncated": True}) == Turn(terminated=False, truncated=True, reward=1.0)
    assert stepped({**required, "environment_images": ["x.png"]}).images == ["x.png"]
    for answer, message in (
        (None, r"returned None \(NoneType\); it must return a dict"),
        ({"rewards": 1}, r"returned no environment_feedback, done \(it returned rewards\)"),
        ({**required, "sampling_params": {"temperature": 0.1}}, "how tokens are sampled is the run's to say"),
    ):
        with pytest.raises(EnvironmentFailure, match=message):
            stepped(answer)


def test_a_reset_without_an_observation_is_refused() -> None:
    instance = SimpleNamespace(reset=lambda states: None)
    with pytest.raises(EnvironmentFailure, match='must return a dict whose "observation" is the text'):
        asyncio.run(OpenRLHFEnv(instance).reset("p", None, seed=0))


def test_a_method_that_blocks_holds_up_nobody_and_may_be_given_up(tmp_path: Path) -> None:
    source = written(
        tmp_path,
        "import threading, time\nmeeting = threading.Barrier(20)\n"
        "class AgentInstance:\n    def reset(self, states):\n        return states\n"
        "    def step(self, states):\n        meeting.wait(60) if states['label'] == 'meet' else time.sleep(1000)\n"
        "        return {'rewards': 1, 'environment_feedback': '', 'done': True}\n",
    )
    agent = load(source)
    collect(multi_turn(counting(), agent.make, n=20), [prompt("Q", label="meet")])  # one after another they would never meet
    with pytest.raises(EnvironmentFailure, match=r"did not answer step within 0.5 s"):
        collect(multi_turn(counting(), agent.make, step_timeout_s=0.5), [prompt("Q", label="for ever")])


class Guess:
    """Gymnasium's protocol: guess a number drawn from the seed."""

    def __init__(self) -> None:
        self.closed = False

    def reset(self, *, seed: int | None = None, options: None = None) -> tuple[str, dict[str, Any]]:
        assert seed is not None and 0 <= seed < 2**32
        self.left = 2
        return "guess", {}

    def step(self, action: str) -> tuple[object, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return ("no", 0.0, False, self.left == 0, {"left": self.left, "note": "cold"}) if action != "b" else ("yes", 1.0, True, True, {})

    def close(self) -> None:
        self.closed = True


def test_a_gymnasium_environment_of_text() -> None:
    environment = Guess()
    env = GymnasiumEnv(environment, render=lambda observation: f"[{observation}]")
    assert isinstance(env, Env)
    ((sample,),) = (group.samples for group in collect(multi_turn(counting(), lambda: env), [prompt("Q")]))
    assert sample.trajectory.tokens.tolist() == ids("Q[guess]a$[no]b$")
    assert (sample.reward, sample.trajectory.truncated, sample.extra_logs) == (1.0, False, {"left": 1.0, "turns": 2.0})
    assert environment.closed
    with pytest.raises(EnvironmentFailure, match=r"observed 7 \(int\); only text"):
        env._shown(7)


def test_a_figure_of_gymnasiums_info_that_is_not_finite_is_left_out_and_counted_and_a_reward_is_refused() -> None:
    class Odd(Guess):
        def step(self, action: str) -> tuple[object, float, bool, bool, dict[str, Any]]:
            observation, reward, terminated, truncated, _ = super().step(action)
            return observation, reward, terminated, truncated, {"return": math.nan, "length": 2, "best": math.inf}

    ((sample,),) = (group.samples for group in collect(multi_turn(counting(), lambda: GymnasiumEnv(Odd())), [prompt("Q")]))
    assert sample.extra_logs == {"length": 2.0, "info_not_finite": 4.0, "turns": 2.0}
    turn = Turn(terminated=True, reward=math.nan)
    with pytest.raises(EnvironmentFailure, match="gave the reward nan, not a finite number"):
        checked_turn(turn, where="it", prompt_id="p")


def test_gymnasium_gives_up_as_truncated() -> None:
    env = GymnasiumEnv(Guess())
    asyncio.run(env.reset("Q", None, seed=2**63))
    turns = [asyncio.run(env.step(Action(text=text, raw=text, cut=False))) for text in (" c\n", "d")]
    assert [(turn.terminated, turn.truncated, turn.feedback) for turn in turns] == [(False, False, "no"), (False, True, "")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("class Agent:\n    pass\n", "defines none of make_env, AgentInstance, AgentExecutor"),
        ("class AgentInstance(:\n", r"agent.py:1 has a syntax error"),
    ],
)
def test_a_file_is_judged_without_running_it(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(EnvironmentFailure, match=message):
        check_agent_file(written(tmp_path, content))
    check_agent_file(written(tmp_path, "raise SystemExit\nclass AgentInstance: ..."))
    with pytest.raises(EnvironmentFailure, match="does not exist"):
        check_agent_file(str(tmp_path / "other.py"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import openrlhf_missing\nclass AgentInstance: ...\n", "does not load: ModuleNotFoundError"),
        ("class AgentInstance: ...\n", "AgentInstance in .* has no step"),
        ("class AgentExecutor:\n    def execute(self): ...\n", "an executor that drives the engine itself is not supported"),
        ("x = 1\n", "defines none of"),
    ],
)
def test_a_file_without_an_environment_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(EnvironmentFailure, match=message):
        load(written(tmp_path, content))


def test_an_instance_that_cannot_be_made_and_an_environment_that_is_none(tmp_path: Path) -> None:
    agent = load(written(tmp_path, "class AgentInstance:\n    def __init__(self, size): ...\n    def step(self, states): ...\n"))
    with pytest.raises(EnvironmentFailure, match="one is made for each episode, without arguments"):
        agent.make()
    agent = load(written(tmp_path, "def make_env():\n    raise OSError('no licence server')\n"))
    with pytest.raises(
        EnvironmentFailure, match=r"make_env in .*agent.py raised OSError: no licence server; it is called for each episode"
    ):
        agent.make()
    agent = load(written(tmp_path, "def make_env():\n    return 3\n"))
    with pytest.raises(EnvironmentFailure, match="returned int, which lacks reset, step, close; return hone"):
        agent.make()
