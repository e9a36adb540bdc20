"""`launch serve-rm`: a real server process, asked by the client that training has, and by hand."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from hone.launch.cli import main
from hone.launch.observe.run_directory import read_metrics
from tests.launch.conftest import SHORT_IS_GOOD, SIZES, save_model, write_reward
from tests.launch.running import COMMAND


@pytest.fixture(scope="module")
def reward_model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reward-model")
    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(**SIZES, **ends, vocab_size=len(tokenizer), num_labels=1)
    config.mean, config.std = 0.5, 2.0
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@contextmanager
def served(*words: str, token: str = "") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The URL of `launch serve-rm` in a process of its own, on a free port."""
    environment = {**os.environ, "HONE_REWARD_TOKEN": token}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve-rm", *words, "--server.port", "0"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("rewards at http://127.0.0.1:"), process.stderr.read()
        yield line.split()[2].rstrip(";"), process
    finally:
        process.kill()
        process.communicate()


def ask(url: str, body: object, **headers: str) -> tuple[int, dict[str, list[float]]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=headers), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"{}") if "json" in error.headers["Content-Type"] else {}


def test_scores_are_those_of_plain_transformers(reward_model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["How many legs?", "12<|im_end|>", "a", "How many legs have 3 cats? 12 legs, of course."]
    # As in training, whatever is scored has an end, and nothing behind it.
    ended = [text.removesuffix("<|im_end|>") + "<|im_end|>" for text in texts]
    plain = AutoModelForSequenceClassification.from_pretrained(reward_model)
    with torch.no_grad():
        expected = [float(plain(torch.tensor([tokenizer.encode(text)])).logits) for text in ended]
    words = ["--model.model-name-or-path", str(reward_model), "--model.param-dtype", "fp32"]
    with served(*words) as (url, process):
        status, answer = ask(url, {"query": texts, "prompts": ["", "", "", ""], "labels": [None] * 4})
        assert status == 200 and answer["rewards"] == pytest.approx(expected, abs=1e-5) and answer["scores"] == answer["rewards"]
        assert ask(url, {"query": texts[1] + "\n"})[1]["rewards"] == pytest.approx(expected[1:2], abs=1e-5)
        for body in ({"query": ["a", "\ud800"]}, {"query": "a", "prompts": "\udfff"}):
            status, refused = ask(url, body)
            assert status == 422 and "half of a surrogate pair" in str(refused)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "answered 2 requests, 5 rows" in out
    assert "legs" not in out + err  # nothing of a request is told
    with served(*words, "--model.normalize") as (url, process):
        assert ask(url, {"query": texts})[1]["rewards"] == pytest.approx([(one - 0.5) / 2 for one in expected], abs=1e-5)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_what_is_no_request_is_refused(tmp_path: Path) -> None:
    reward = write_reward(tmp_path / "reward.py", SHORT_IS_GOOD)
    with served("--reward.remote-url", str(reward), "--server.max-rows", "2", "--server.max-bytes", "2000", token="secret") as (url, _):
        good, key = {"query": ["ab"], "prompts": ["a"], "labels": [1]}, {"Authorization": "Bearer secret"}
        assert ask(url, good)[0] == 401 and ask(url, good, Authorization="Bearer other")[0] == 401
        status, answer = ask(url, good, **key)
        assert (status, answer) == (200, {"rewards": [0.5], "scores": [0.5], "extra_logs": {"characters": [1.0]}})
        assert ask(url, b"{", **key)[0] == 422 and ask(url, {"prompts": []}, **key)[0] == 422
        assert ask(url, {"query": ["a"], "labels": [1, 2]}, **key)[0] == 422 and ask(url, {"query": [1]}, **key)[0] == 422
        assert ask(url, {"query": ["a"] * 3}, **key)[0] == 413 and ask(url, {"query": ["a" * 3000]}, **key)[0] == 413
        assert ask(url.replace("get_reward", "other"), good, **key)[0] == 404
        assert ask(url, good, **key)[0] == 200  # it still serves


def test_training_learns_from_what_is_served(hone_cache: Path, tmp_path: Path) -> None:
    reward = write_reward(tmp_path / "reward.py", SHORT_IS_GOOD)
    words = ["--run.backend", "local", "--rollout.batch-size", "8", "--train.batch-size", "32", "--train.max-steps", "2"]
    with served("--reward.remote-url", str(reward)) as (url, _):
        assert main(["grpo", *words, "--reward.remote-url", url, "--run.dir", str(tmp_path / "served")]) == 0
    assert main(["grpo", *words, "--reward.remote-url", str(reward), "--run.dir", str(tmp_path / "called")]) == 0
    found, expected = ([step["rollout/reward_mean"] for step in read_metrics(tmp_path / name)[0]] for name in ("served", "called"))
    assert len(found) == 2 and found == expected


def test_what_cannot_be_served_is_said(
    tokenizer: PreTrainedTokenizerFast, reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str, code: int = 2) -> str:
        assert main(["serve-rm", *words]) == code
        return " ".join(capsys.readouterr().err.split())

    assert "nothing to serve" in said()
    model = ["--model.model-name-or-path", str(reward_model)]
    assert "both say who judges" in said(*model, "--reward.remote-url", "builtin:math")
    assert "a server is what this starts" in said("--reward.remote-url", "http://127.0.0.1:1/get_reward")
    policy = save_model(tmp_path / "policy", tokenizer, kind="llama", tied=False)
    assert "has no trained head" in said("--model.model-name-or-path", str(policy), code=5)
    with served("--reward.remote-url", "builtin:math") as (url, _):
        port = url.split(":")[2].split("/")[0]
        assert "cannot be listened at" in said("--reward.remote-url", "builtin:math", "--server.port", port, code=5)
