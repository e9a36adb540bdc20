"""Whole runs of agents that own their loop: programs written for the openai and anthropic packages, trained for ten steps."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from transformers import AutoModelForCausalLM

from hone.datasets.config import DataConfig
from hone.launch.agent import agent_of
from hone.launch.cli import main
from hone.launch.config import default_config
from hone.launch.observe.run_directory import read_metrics
from hone.launch.prompts import prepare
from hone.launch.schema import replaced
from hone.rollout.errors import EnvironmentFailure
from tests.launch.conftest import SHORT_IS_GOOD, write_reward, write_rows
from tests.launch.running import started
from tests.rollout.chatting import CHATML, write_chat_model

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = ["--rollout.batch-size", "1", "--rollout.n-samples-per-prompt", "2", "--train.batch-size", "2", "--rollout.max-new-tokens", "24"]
MODEL = ["--data.max-len", "1024", "--actor.adam.lr", "1e-3", "--run.threads", "1", "--train.max-steps", "10"]


def arguments(tmp_path: Path, package: str, template: str = CHATML) -> list[str]:
    command = f"{sys.executable} '{EXAMPLES / f'{package}_agent.py'}'"
    model = write_chat_model(tmp_path / "model", template)
    data = ["--data.prompt-dataset", str(EXAMPLES / "sums.jsonl"), "--data.input-key", "question", "--data.label-key", "answer"]
    return ["grpo", "--rollout.agent-command", command, "--actor.model-name-or-path", str(model), *data, *SIZES, *MODEL]


def check(run: Path, tmp_path: Path) -> None:
    """Ten steps, each trained on what was sampled, with calls of the tool among them; and the policy has moved."""
    steps, _ = read_metrics(run)
    assert len(steps) == 10
    assert max(step["mismatch/logp_abs_diff_max"] for step in steps) <= 1e-4
    assert all(step["staleness/version_lag_max"] == 0 for step in steps)
    assert sum(step["rollout/extra/tool_calls"] for step in steps) >= 2
    assert max(step["rollout/extra/endpoint/calls"] for step in steps) > 1
    assert {step["rollout/extra/endpoint/segments"] for step in steps} == {1.0}
    rows: list[dict[str, Any]] = []
    for number in range(1, 11):
        rows += pyarrow.parquet.read_table(run / "rollouts" / f"step_{number:06}.parquet").to_pylist()
    assert len(rows) == 20 and any("<tool_response>" in row["response"] for row in rows)
    for row in rows:
        assert row["template"], "the contract does not say which chat template was used"
        assert len(row["tokens"]) == len(row["rollout_logp"]) and max(row["rollout_logp"]) <= 1e-6
        # A tool's answer is read, not written: of the response only the actions are in the row's ids.
        assert ("<tool_response>" in row["response"]) == (row["reward"] >= 0.1)
    before, after = (AutoModelForCausalLM.from_pretrained(path).lm_head.weight for path in (tmp_path / "model", run / "model"))
    assert not before.equal(after)


def test_a_program_for_openai_trains_ten_steps_in_this_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*arguments(tmp_path, "openai"), "--run.backend", "local", "--run.dir", str(run)]) == 0
    check(run, tmp_path)


@pytest.mark.timeout(900)
def test_a_program_for_anthropic_trains_ten_steps_on_ray_and_vllm(tmp_path: Path) -> None:
    with started([*arguments(tmp_path, "anthropic"), "--vllm.kv-cache-gib", "0.25"], tmp_path / "run") as run:
        output = run.finish(limit_s=800)
    assert run.process.returncode == 0, output
    assert run.survivors() == []
    check(tmp_path / "run", tmp_path)


def test_chat_rows_reach_the_agent_as_they_are_and_segments_are_trained_together(tmp_path: Path) -> None:
    agent = tmp_path / "agent.py"
    agent.write_text(
        """
from openai import AsyncOpenAI

async def agent(base_url, api_key, model, row):
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        for said in (row["prompt"], [{"role": "user", "content": "Anew."}]):
            reply = await client.chat.completions.create(model=model, messages=said)
    return len(reply.choices[0].message.content) / 10
"""
    )
    model = write_chat_model(tmp_path / "model")
    chat = [{"role": "system", "content": "Sum."}, {"role": "user", "content": "3+4="}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": chat}] * 4)
    data = ["--data.prompt-dataset", str(rows), "--data.input-key", "question", "--data.apply-chat-template", "--data.max-len", "512"]
    run = tmp_path / "run"
    command = ["grpo", "--run.backend", "local", "--rollout.agent-func-path", str(agent), "--actor.model-name-or-path", str(model), *data]
    assert main([*command, *SIZES, "--train.max-steps", "2", "--run.dir", str(run)]) == 0
    for step in read_metrics(run)[0]:
        assert step["rollout/num_samples"] == 2 and step["rollout/extra/endpoint/segments"] == 2.0
        assert step["train/optimizer_steps"] == 1 and step["rollout/groups"] == 1
        assert step["mismatch/logp_abs_diff_max"] <= 1e-4
    rows_seen = pyarrow.parquet.read_table(run / "rollouts" / "step_000001.parquet").to_pylist()
    assert [(row["sample"], row["segment"]) for row in rows_seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert rows_seen[0]["reward"] == rows_seen[1]["reward"]


def test_a_reward_function_judges_a_program_that_prints_none(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import json, os, sys, urllib.request
row = json.load(sys.stdin)
body = json.dumps({"messages": [{"role": "user", "content": row["prompt"]}]}).encode()
headers = {"x-api-key": os.environ["ANTHROPIC_API_KEY"]}
print(urllib.request.urlopen(urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)).status == 200)
"""
    )
    flags = arguments(tmp_path, "openai")
    flags[2] = f"{sys.executable} -S {program}"
    reward = write_reward(tmp_path / "reward.py", SHORT_IS_GOOD)
    run = tmp_path / "run"
    more = ["--reward.remote-url", str(reward), "--run.backend", "local", "--train.max-steps", "1", "--run.dir", str(run)]
    assert main([*flags, *more]) == 0
    (step,) = read_metrics(run)[0]
    rows = pyarrow.parquet.read_table(run / "rollouts" / "step_000001.parquet").to_pylist()
    assert [row["reward"] for row in rows] == [pytest.approx(1 / (1 + len(row["response"]))) for row in rows]
    assert step["rollout/extra/characters"] > 0


def test_agents_that_cannot_be_served_are_refused_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(code: int, *flags: str) -> str:
        assert main(["grpo", *flags, "--run.dir", str(tmp_path / "run")]) == code
        return " ".join(capsys.readouterr().err.split())

    file = tmp_path / "agent.py"
    file.write_text("def agent(base_url, api_key, model, row): return 1.0\n")
    assert "names the program 'no-such-program'" in refusal(6, "--rollout.agent-command", "no-such-program")
    both = refusal(2, "--rollout.agent-command", "python3", "--rollout.agent-func-path", str(file))
    assert "a file and a command both say who acts" in both
    assert not (tmp_path / "run").exists()
    dropping = CHATML.replace("{{ message.content }}", "{{ message.content if message.role != 'assistant' }}")
    flags = arguments(tmp_path, "openai", dropping)[1:]
    message = refusal(6, *flags, "--run.backend", "local")
    assert "cannot serve an agent: the template leaves the reply out" in message


def test_rows_with_images_are_refused(tmp_path: Path) -> None:
    model = str(write_chat_model(tmp_path / "model"))
    prompts = prepare(DataConfig(), model=model, batch_size=1, num_episodes=1, seed=0, max_new_tokens=8)
    pictured = dataclasses.replace(prompts, with_images=prompts.first[0])
    config = replaced(default_config("grpo"), {"rollout.agent_command": "python3"})
    with pytest.raises(EnvironmentFailure, match="agent `python3` would not see the images of the rows: an agent sends its own"):
        agent_of(config, model, pictured, on_start=lambda *_: None, note=print)
    assert agent_of(config, model, prompts, on_start=lambda *_: None, note=print)


def test_a_program_that_fails_ends_the_run_with_its_last_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = arguments(tmp_path, "openai")
    flags[2] = "python3 -S -c 'raise SystemExit(\"the board is gone\")'"
    assert main([*flags, "--run.backend", "local", "--run.dir", str(tmp_path / "run")]) == 6
    message = " ".join(capsys.readouterr().err.split())
    assert "agent `python3 -S -c" in message and "ended with exit status 1; the end of its standard error: the board is gone" in message
