"""Agents that own their loop, as functions and as commands: what they are given, what they may answer, and how they fail.

1. A command finds the endpoint where both client libraries look, and the row on its standard input.
2. Its last line gives the reward; a function returns it; a reward function judges where the agent does not, and only there.
3. A failure names the agent, the prompt, the end of its standard error, and what the endpoint last refused it.
4. A deadline kills the whole process group. A dead engine is what is told, not what the agent made of it.
5. An episode out of calls or context is truncated; one without any reply is an error.
"""

import asyncio
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hone.rollout.agents.calling import CallingAgent, CommandAgent, FunctionAgent, check_command, environment, outcome
from hone.rollout.agents.loading import check_agent_file, load
from hone.rollout.config import RolloutConfig
from hone.rollout.endpoint.rollout import Calling
from hone.rollout.endpoint.templates import served_template
from hone.rollout.engines.scripted import ScriptedEngine
from hone.rollout.errors import EngineError, EnvironmentFailure
from hone.rollout.executor import Group, Judge
from hone.rollout.rewards.result import Judgement, RewardItem
from hone.rollout.types import Prompt, Request
from tests.rollout.chatting import END, tokenizer, user

PYTHON = shutil.which("python3") or sys.executable
# What a client library does, without one: an import of theirs takes a second.
ASK = """
import json, os, sys, urllib.request
row = json.load(sys.stdin)
def ask(*said, **more):
    body = json.dumps({"messages": [{"role": "user", "content": text} for text in said], **more}).encode()
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
"""


def program(tmp_path: Path, body: str) -> CommandAgent:
    file = tmp_path / "program with spaces.py"
    file.write_text(ASK + body)
    return CommandAgent(command=f"{PYTHON} -S '{file}'")


class Length:
    """Judges by the length of the last reply."""

    def __init__(self) -> None:
        self.seen: list[RewardItem] = []

    async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
        self.seen += items
        return [Judgement(reward=float(len(item.response or "")), score=0.5, extra_logs={"judged": 1.0}) for item in items]


def calling(agent: CallingAgent, *replies: str, judge: Judge | None = None, n: int = 1, script: Any = None, **settings: Any) -> Calling:
    letters = tokenizer()
    left = list(replies)
    ends = (letters.eos_token_id,)
    return Calling(
        engine=ScriptedEngine(script=script or (lambda _: letters.encode(left.pop(0), add_special_tokens=False))),
        agent=agent,
        judge=judge,
        tokenizer=letters,
        served=served_template(letters, stop_ids=ends),
        stop_ids=ends,
        config=RolloutConfig(n_samples_per_prompt=n, **{"max_new_tokens": 30, "agent_timeout_s": 60.0, **settings}),
        run_seed=3,
        max_len=100,
        engine_version="scripted",
        tokenizer_hash="",
        template_hash="",
    )


def question(name: str = "p") -> Prompt:
    return Prompt(prompt_id=name, tokens=(), text="2+2", label="4", given=[user("2+2")])


def collect(agent: CallingAgent, *replies: str, **settings: Any) -> Group:
    (group,) = asyncio.run(calling(agent, *replies, **settings).collect([question()], step=1))
    return group


def test_calls_of_collect_share_the_endpoint_and_its_bound() -> None:
    seen: list[tuple[str, str]] = []

    async def agent(base_url: str, api_key: str, model: str, row: dict[str, Any]) -> float:
        seen.append((base_url.partition("/s/")[0], "in"))
        body, headers = {"messages": row["prompt"]}, {"x-api-key": api_key}
        async with aiohttp.ClientSession() as client, client.post(base_url + "/chat/completions", json=body, headers=headers) as answer:
            assert answer.status == 200
        seen.append((base_url.partition("/s/")[0], "out"))
        return 1.0

    async def both() -> None:
        of_agent = calling(FunctionAgent(function=agent, where="agent"), *[f"4{END}"] * 8, n=2, agents_in_flight=1)
        await asyncio.gather(*(of_agent.collect([question(name)], step=1) for name in ("p", "q")))
        assert of_agent._post.users == 0
        await of_agent.collect([question("r")], step=2)

    asyncio.run(both())
    assert [what for _, what in seen] == ["in", "out"] * 6
    assert len({address for address, _ in seen[:8]}) == 1


def test_1_2_a_command_is_given_the_row_and_prints_its_reward(tmp_path: Path) -> None:
    agent = program(
        tmp_path,
        """
assert row["prompt"] == [{"role": "user", "content": "2+2"}] and row["label"] == "4" and row["prompt_id"] == "p", row
assert os.environ["ANTHROPIC_BASE_URL"] + "/v1" == os.environ["OPENAI_BASE_URL"] and os.environ["HONE_MODEL"] == "policy"
said = ask("2+2")
print("thinking aloud")
print(json.dumps({"reward": float(said == row["label"]), "score": 0.25, "sample": row["sample"]}))
""",
    )
    group = collect(agent, f"4{END}", f"4{END}", n=2)
    for index, sample in enumerate(group.samples):
        assert (sample.reward, sample.score, sample.response_text) == (1.0, 0.25, f"4{END}")
        assert sample.extra_logs["sample"] == index == sample.trajectory.sample
        assert sample.trajectory.rewards.tolist() == [0.0] * (sample.trajectory.tokens.numel() - 1) + [1.0]
    assert group.samples[0].trajectory.contract.seed != group.samples[1].trajectory.contract.seed


def test_2_a_function_returns_its_reward_and_a_judge_stands_in_for_none(tmp_path: Path) -> None:
    file = tmp_path / "agent.py"
    file.write_text(
        """
import json, urllib.request

def agent(base_url, api_key, model, row):
    body = json.dumps({"model": model, "max_tokens": 9, "messages": row["prompt"]}).encode()
    request = urllib.request.Request(base_url + "/messages", body, {"x-api-key": api_key})
    json.load(urllib.request.urlopen(request))
    return REWARD
"""
    )
    check_agent_file(str(file))
    file.write_text(file.read_text().replace("REWARD", "{'reward': 2, 'score': None, 'said': 1}"))
    agent = load(str(file))
    assert isinstance(agent, FunctionAgent) and agent.where == f"agent ({file})"
    (sample,) = collect(agent, f"four{END}").samples
    assert (sample.reward, sample.score, sample.extra_logs["said"]) == (2.0, 2.0, 1.0)
    with pytest.raises(EnvironmentFailure, match=r"gave a reward, and --reward.remote-url names another judge; drop one of them"):
        collect(agent, f"four{END}", judge=Length())
    silent = FunctionAgent(function=lambda *given: agent.function(*given) and None, where="silent")
    judge = Length()
    (sample,) = collect(silent, f"four{END}", judge=judge).samples
    assert (sample.reward, sample.score, sample.extra_logs["judged"]) == (4.0, 0.5, 1.0)
    assert [(item.response, item.label, item.prompt) for item in judge.seen] == [("four", "4", "2+2")]
    with pytest.raises(
        EnvironmentFailure, match=r"agent silent gave no reward \(None is not zero\): return one, or name a reward function"
    ):
        collect(silent, f"four{END}")


@pytest.mark.parametrize(("value", "reward"), [(1, 1.0), (True, 1.0), (0.5, 0.5), ({"reward": 3}, 3.0), (None, None), ({"won": 1}, None)])
def test_2_what_counts_as_a_reward(value: object, reward: float | None) -> None:
    assert outcome(value).reward == reward


def test_2_rewards_of_turns_stand_each_on_its_own_reply(tmp_path: Path) -> None:
    chat = """
messages = [{"role": "user", "content": "2+2"}]
for _ in range(2):
    body = json.dumps({"messages": messages}).encode()
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
    reply = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
    messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "Sure?"}]
print(json.dumps(REWARD))
"""
    (sample,) = collect(program(tmp_path, chat.replace("REWARD", '{"rewards": [0.25, -1]}')), f"4{END}", f"55{END}").samples
    row = sample.trajectory
    ends = [place for place, own in enumerate(row.action_mask.tolist()) if own and row.tokens[place] == tokenizer().eos_token_id]
    assert {place: value for place, value in enumerate(row.rewards.tolist()) if value} == {ends[0]: 0.25, ends[1]: -1.0}
    assert (sample.reward, sample.score) == (-0.75, -0.75)
    for wrong, message in (
        ('{"rewards": [1]}', "gave the rewards of 1 turns for 2 replies; give one for each reply of one conversation"),
        ('{"rewards": [1, 1], "reward": 3}', "gave the reward 3 and rewards of turns that sum to 2; leave the reward out"),
        ('{"rewards": 1}', "gave the rewards 1, not a list with one number for each reply"),
        ('{"rewards": [1, "x"]}', "gave the reward of turn 2 'x', not a finite number"),
    ):
        with pytest.raises(EnvironmentFailure, match=message):
            collect(program(tmp_path, chat.replace("REWARD", wrong)), f"4{END}", f"55{END}")
    twice = "ask('2+2'); ask('1+1')\nprint(json.dumps({'rewards': [1, 1]}))"
    with pytest.raises(EnvironmentFailure, match="gave the rewards of 2 turns for 2 conversations"):
        collect(program(tmp_path, twice), f"4{END}", f"2{END}")


@pytest.mark.parametrize("value", ["1", [1], {"reward": float("nan")}, {"reward": 1, "moves": "many"}, object()])
def test_2_what_does_not(value: object) -> None:
    with pytest.raises(EnvironmentFailure, match="not a finite number; return a number, or an object with reward"):
        outcome(value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "ask('q'); sys.exit('no such move')",
            r"(?s)ended with exit status 1; the end of its standard error:\nno such move, on prompt 'p'",
        ),
        ("ask('q'); os.kill(os.getpid(), 11)", r"was killed by SIGSEGV; the end of its standard error:\n\(nothing\)"),
        ("ask('q'); print('done')", r"gave no reward \(None is not zero\)"),
        ("print(1)", r"ended an episode without reading one reply of the policy, on prompt 'p'"),
        ("ask('q'); ask('q'); ask('q')", r"(?s)HTTP Error 400.*\(its last request was refused: budget_exhausted\)"),
        ("ask('q' * 200)", r"(?s)HTTP Error 400.*\(its last request was refused: context_length_exceeded\)"),
    ],
)
def test_3_a_command_that_fails_is_told_of(body: str, message: str, tmp_path: Path) -> None:
    agent = program(tmp_path, body)
    with pytest.raises(EnvironmentFailure, match=message) as failed:
        collect(agent, f"a{END}", f"b{END}", max_turns=2)
    assert str(failed.value).startswith(f"agent `{agent.command}` ")


def test_3_a_function_that_raises_is_told_of() -> None:
    async def agent(base_url: str, api_key: str, model: str, row: object) -> None:
        raise KeyError("no such move")

    with pytest.raises(EnvironmentFailure, match=r"agent here raised KeyError: 'no such move', on prompt 'p'; mend the agent"):
        collect(FunctionAgent(function=agent, where="here"))


def test_4_a_deadline_kills_the_agent_with_its_children(tmp_path: Path) -> None:
    agent = program(
        tmp_path,
        f"""
import subprocess, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1000)"])
open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(1000)
""",
    )
    with pytest.raises(EnvironmentFailure, match=r"did not finish an episode within 2 s \(raise rollout.agent-timeout-s if it may\)"):
        collect(agent, agent_timeout_s=2.0)
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        deadline = time.monotonic() + 30
        while _alive(pid):
            assert time.monotonic() < deadline, f"{pid} was left running"
            time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_4_a_dead_engine_is_what_is_told(tmp_path: Path) -> None:
    def dead(_: Request) -> Sequence[int]:
        raise EngineError("engine gone")

    with pytest.raises(EngineError, match="engine gone"):
        collect(program(tmp_path, "ask('q')"), script=dead)


@pytest.mark.parametrize("body", ["ask('q')\ntry:\n    ask('q')\nexcept OSError:\n    pass\nprint(1)", "ask('q', max_tokens=1)\nprint(1)"])
def test_5_an_episode_that_was_stopped_is_truncated(body: str, tmp_path: Path) -> None:
    (sample,) = collect(program(tmp_path, body), f"a{END}", max_turns=1).samples
    assert sample.trajectory.truncated
    (sample,) = collect(program(tmp_path, body), f"a{END}", f"a{END}", max_turns=2).samples
    assert sample.trajectory.truncated == ("max_tokens" in body)


def test_a_command_is_looked_at_before_anything_starts() -> None:
    check_command("python3 -c 'print(1)'")
    for command, message in (
        ("no-such-program --flag", "names the program 'no-such-program', which is not to be found"),
        ("python3 'unclosed", "cannot be read: No closing quotation; quote it as for a shell"),
        ("", "names the program '', which is not to be found"),
    ):
        with pytest.raises(EnvironmentFailure, match=message):
            check_command(command)


def test_the_environment_leads_both_libraries_here_and_past_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "a token of somebody's own")
    given = environment("http://127.0.0.1:1/s/x/v1", "key")
    assert given["NO_PROXY"] == "example.org,127.0.0.1" and "ANTHROPIC_AUTH_TOKEN" not in given
    assert (given["OPENAI_API_KEY"], given["ANTHROPIC_API_KEY"], given["PATH"]) == ("key", "key", os.environ["PATH"])
