"""Whole runs on real Ray, vLLM and DeepSpeed: the same command as a user's, ended by Ctrl-C and by the death of its engine."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hone.launch.interrupt import SAME_PRESS_S
from hone.launch.observe.ledger import replay
from hone.launch.observe.run_directory import read_events, read_metrics
from tests.launch.conftest import GSM8K, MADE_UP, SHORT_IS_GOOD, save_model, write_reward, write_rows
from tests.launch.running import Run, by_uv, plainly, started

# Four prompts of two samples, on the smallest of everything: what is tested is the parts, not the learning.
SIZES = ["--rollout.batch-size", "4", "--rollout.n-samples-per-prompt", "2", "--train.batch-size", "8", "--rollout.max-new-tokens", "8"]
OVER_TWO = [
    *(word for role in ("actor", "critic", "ref") for word in (f"--{role}.num-gpus-per-node", "2")),
    "--ds.tensor-parallel-size",
    "2",
]
"""Every learner's model over two ranks."""
ENGINE = ["--data.max-len", "512", "--vllm.kv-cache-gib", "0.25", "--run.threads", "1"]


def listening_elsewhere(run: Run) -> list[str]:
    """Listening sockets of the run that are not on loopback."""
    found = []
    for process in run.seen:
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.NoSuchProcess:
            continue
        found += [
            f"{process.name()} on {connection.laddr.ip}:{connection.laddr.port}"
            for connection in connections
            if connection.status == psutil.CONN_LISTEN and connection.laddr.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")
        ]
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_ctrl_c_once_finishes_the_step_saves_the_model_and_leaves_no_process(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """With a user's own parts: Llama tied on chat messages and over two ranks, Qwen3 untied on real word problems, each with OpenRLHF's
    reward contract."""
    model = save_model(tmp_path / "model", tokenizer, kind=kind, tied=kind == "llama")
    chat = [{"question": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in MADE_UP * 20]
    real = kind == "qwen3" and GSM8K.exists()
    prompts = GSM8K if real else write_rows(tmp_path / "rows.jsonl", chat)
    arguments = [
        *("ppo", "--actor.model-name-or-path", str(model), "--data.prompt-dataset", str(prompts), "--data.input-key", "question"),
        *("--data.label-key", "answer", "--reward.remote-url", str(write_reward(tmp_path / "reward.py", SHORT_IS_GOOD))),
        *(() if real else ("--data.apply-chat-template",)),
        *SIZES,
        *ENGINE,
        *(("--data.max-len", "900", "--data.max-samples", "500") if real else ()),
        *(OVER_TWO if kind == "llama" else ()),
    ]
    # One of the two as the README says it: under `uv run` Ray would, left alone, start its workers elsewhere.
    command = by_uv if kind == "qwen3" and shutil.which("uv") else plainly
    with started([*arguments, "--train.max-steps", "100"], tmp_path / "run", command=command) as run:
        run.wait_for(lambda: len(run.metrics()) >= 2)
        assert listening_elsewhere(run) == []
        run.interrupt()
        output = run.finish()
    assert run.process.returncode == 130, output
    assert "after this step" in output and "stopped" in output
    assert run.survivors() == []
    steps, _ = read_metrics(tmp_path / "run")
    assert 2 <= len(steps) < 100 and all(step["mismatch/logp_abs_diff_mean"] <= 1e-4 for step in steps)
    totals = replay(read_events(tmp_path / "run")[0]).verify()
    assert totals.trained == 4 * len(steps) and totals.open == 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.model_type == kind


def test_a_killed_engine_ends_the_run_with_its_name_and_leaves_no_process(tmp_path: Path, hone_cache: Path) -> None:
    arguments = ["grpo", *ENGINE, "--train.max-steps", "500", "--ds.zero-stage", "3", "--actor.num-gpus-per-node", "2"]
    arguments += ["--vllm.max-replacements", "0", "--vllm.sync-backend", "file"]
    with started(arguments, tmp_path / "run") as run:
        run.wait_for(lambda: len(run.metrics()) >= 2 and run.core() is not None)
        core = run.core()
        assert core is not None
        core.kill()
        output = run.finish(limit_s=60)
    assert run.process.returncode == 7, output
    assert "engine-0" in output
    assert run.survivors() == []
    assert all(step["mismatch/logp_abs_diff_mean"] <= 1e-4 for step in run.metrics())
    concluded = [event for event in read_events(tmp_path / "run")[0] if event["kind"] == "concluded"]
    assert len(concluded) == 1 and concluded[0]["outcome"] == "failed" and "engine-0" in concluded[0]["error"]
    assert "failed" in (tmp_path / "run" / "report.md").read_text().splitlines()[0]
    kept = tmp_path / "run" / "checkpoints" / f"failed_in_step_{len(run.metrics()) + 1}"
    AutoModelForCausalLM.from_pretrained(kept)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["verb"] == "grpo"
    assert list((tmp_path / "run" / "weights").iterdir()) == []


def test_an_engine_that_is_killed_and_one_that_hangs_are_replaced_and_the_run_goes_on(tmp_path: Path, hone_cache: Path) -> None:
    # Two engines, so that calls go on elsewhere: first one core is killed, then one is stopped, which no exit tells of.
    arguments = ["grpo", *ENGINE, "--vllm.num-engines", "2", "--vllm.health-timeout-s", "8", "--train.max-steps", "400"]
    directory = tmp_path / "run"

    def events(kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(directory)[0] if event["kind"] == kind]

    def replaced(times: int) -> bool:
        return len(events("engine_replaced")) >= times

    with started(arguments, directory) as run:
        for times, struck in enumerate((signal.SIGKILL, signal.SIGSTOP), start=1):
            steps = len(run.metrics())
            run.wait_for(lambda steps=steps: len(run.metrics()) >= steps + 2 and run.core() is not None)
            core = run.core()
            assert core is not None
            core.send_signal(struck)
            run.wait_for(lambda times=times: replaced(times))
        steps = len(run.metrics())
        run.wait_for(lambda: len(run.metrics()) >= steps + 3)
        run.interrupt()
        output = run.finish()
    assert run.process.returncode == 130, output
    assert run.survivors() == []
    lost = [event["error"] for event in events("engine_lost")]
    assert len(lost) == 2 and all(error.startswith("engine engine-") for error in lost), lost
    assert "was replaced; it has the current weights" in output
    metrics = run.metrics()
    assert all(step["mismatch/logp_abs_diff_mean"] <= 1e-4 for step in metrics)
    # Whatever was drawn anew was drawn by the weights of its step: nothing lost, nothing twice, nothing stale.
    assert all(step["staleness/version_lag_max"] == 0 for step in metrics)
    totals = replay(read_events(directory)[0]).verify()
    assert totals.open == 0 and totals.trained == 32 * len(metrics)


def test_ctrl_c_twice_ends_at_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer, kind="llama", tied=True)
    marker = tmp_path / "judging"
    slow = "if queries[0] == prompts[0] + '0': return {'rewards': [1.0]}  # the smoke rows\n"
    slow += f"import pathlib, time\npathlib.Path({str(marker)!r}).touch()\ntime.sleep(50)\nreturn {{'rewards': [1.0]}}"
    arguments = [
        *("grpo", "--run.backend", "local", "--actor.model-name-or-path", str(model), *SIZES, "--data.max-len", "512"),
        *("--data.prompt-dataset", str(write_rows(tmp_path / "rows.jsonl", MADE_UP)), "--data.input-key", "question"),
        *("--data.label-key", "answer", "--reward.remote-url", str(write_reward(tmp_path / "reward.py", slow))),
    ]
    with started(arguments, tmp_path / "run") as run:
        run.wait_for(marker.exists)
        run.interrupt()
        run.wait_for(lambda: "interrupted" in (tmp_path / "run" / "events.jsonl").read_text())
        time.sleep(2 * SAME_PRESS_S)  # a hand lifts in between
        run.interrupt()
        output = run.finish(limit_s=30)
    assert run.process.returncode == 130, output
    assert "press Ctrl-C again" in output and run.survivors() == []
