"""Frameworks whose pins cannot live beside vLLM's, each in an environment of its own (`just foreign`), playing real episodes.

The engine is scripted, everything else is real: the framework's own rollout, its client, the endpoint. Asserted of each: the ids
that are trained on are those that were sampled, each in its place, and the framework's reward arrived.
"""

import asyncio
import dataclasses
import socket
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hone.rollout.agents.calling import CommandAgent
from hone.rollout.agents.openenv import OpenEnv
from hone.rollout.executor import Sample
from hone.rollout.types import Prompt, Request
from tests.rollout.chatting import CALL, CALLED, END, tokenizer
from tests.rollout.test_adapters import played
from tests.rollout.test_calling import calling

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)
END_ID = tokenizer().convert_tokens_to_ids(END)


def python_of(name: str) -> Path:
    """The interpreter of a framework's environment; the test is skipped where there is none."""
    python = ROOT / ".foreign" / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{name} is not installed in .foreign/{name} (just foreign {name})")
    return python


def episode(name: str, replies: Iterable[str], *, text: str = "2+2") -> Sample:
    """One episode of the example of that name, in which the policy says `replies` in turn; checked to be token exact."""
    agent = CommandAgent(command=f"{python_of(name)} '{ROOT / 'examples' / 'foreign' / f'{name}_agent.py'}'")
    letters, left, drawn = tokenizer(), iter(replies), list[tuple[list[int], list[int]]]()

    def script(request: Request) -> list[int]:
        drawn.append((list(request.tokens), letters.encode(next(left) + END, add_special_tokens=False)))
        return drawn[-1][1]

    executor = calling(agent, script=script, max_new_tokens=200, agent_timeout_s=300.0)
    prompt = Prompt(prompt_id="p", tokens=(), text=text, label="4")
    (group,) = asyncio.run(dataclasses.replace(executor, max_len=4000).collect([prompt], step=1))
    (sample,) = group.samples
    ids, mask = sample.trajectory.tokens.tolist(), sample.trajectory.action_mask.tolist()
    for asked, written in drawn:
        assert ids[: len(asked)] == asked, "a request did not begin with the ids of the one before it"
        own = slice(len(asked), len(asked) + len(written))
        assert ids[own] == written and all(mask[own])
    assert sum(mask) == sum(len(written) for _, written in drawn) and sample.earlier == ()
    assert sample.extra_logs["endpoint/ids_not_trained"] == 0.0
    return sample


def test_gem_keeps_the_reward_of_every_turn() -> None:
    sample = episode("gem", (f"I say \\boxed{{{number}}}" for number in range(1, 21)))
    turns = int(sample.extra_logs["turns"])
    rewards = sample.trajectory.rewards
    ends = [place for place, own in enumerate(sample.trajectory.action_mask.tolist()) if own and sample.trajectory.tokens[place] == END_ID]
    assert len(ends) == turns == sample.extra_logs["endpoint/calls"] > 0
    assert rewards[ends[-1]] > 0  # found, or how near the last guess was
    assert rewards.nonzero().flatten().tolist() == [end for end in ends if rewards[end]]
    assert float(rewards.sum()) == pytest.approx(sample.reward)


def test_verifiers_weighs_its_rewards() -> None:
    sample = episode("verifiers", ["5", "4"])
    assert (sample.reward, sample.extra_logs["right"], sample.extra_logs["short"]) == (pytest.approx(1.1), 1.0, pytest.approx(0.1))
    assert "Are you sure?" in sample.response_text and sample.extra_logs["endpoint/calls"] == 2.0


def test_art_gathers_its_trajectory() -> None:
    sample = episode("art", ["5", "4"])
    assert (sample.reward, sample.extra_logs["tries"]) == (0.5, 2.0)
    assert "No. Once more." in sample.response_text


def test_nemo_gym_calls_its_tool_and_verifies() -> None:
    call = f'{CALL}{{"name": "get_weather", "arguments": {{"city": "Rome"}}}}{CALLED}'
    sample = episode("nemo_gym", [call, "cold"], text="How is the weather in Rome?")
    assert (sample.reward, sample.extra_logs["tool_calls"]) == (1.0, 1.0)
    assert "The weather in Rome is cold." in sample.response_text


SERVER = """
import sys
import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

class Said(Action):
    message: str

class Heard(Observation):
    echo: str

class Echo(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self.steps = 0

    def reset(self, seed=None, episode_id=None, **settings):
        self.steps = 0
        return Heard(echo=f"seeded {seed is not None}")

    def step(self, action, timeout_s=None, **settings):
        self.steps += 1
        if action.message == "fail":
            raise RuntimeError("no such move")
        return Heard(echo=action.message.upper(), reward=0.5 * self.steps, done=self.steps == 2)

    @property
    def state(self):
        return State(step_count=self.steps)

uvicorn.run(create_fastapi_app(Echo, Said, Heard), fd=int(sys.argv[1]), log_level="warning")
"""


@contextmanager
def openenv_server(tmp_path: Path) -> Iterator[str]:
    """An environment of OpenEnv's own package, served by its own server."""
    program = tmp_path / "server.py"
    program.write_text(SERVER)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # Connections wait in the socket's queue until the server reads it.
        process = subprocess.Popen([python_of("openenv"), program, str(listening.fileno())], pass_fds=[listening.fileno()])
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            process.terminate()
            process.wait()


def test_openenvs_own_server_is_played_in_process(tmp_path: Path) -> None:
    with openenv_server(tmp_path) as url:
        sample = played(OpenEnv(url, parse=lambda text: {"message": text}), "a", "b")
    assert (sample.response_text, sample.reward) == ("seeded Truea$Ab$", 1.5)
    assert [value for value in sample.trajectory.rewards.tolist() if value] == [0.5, 1.0]
