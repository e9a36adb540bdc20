"""`launch generate`: what stands in the file, whatever stopped the run that wrote it; real models, engines and rewards."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hone.launch.builtin import builtin_model
from hone.launch.cli import main
from tests.launch.conftest import CHATML, save_model, write_reward, write_rows
from tests.launch.running import COMMAND

SMALL = ["--data.max-samples", "12", "--rollout.n-samples-per-prompt", "3"]
LONGEST = """return {"rewards": [float(len(queries[0]) - len(prompts[0]))], "scores": [1.0]}"""


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rows_come_in_the_order_of_the_data_with_the_samples_of_each_prompt(hone_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["generate", *SMALL, "--out", str(out)]) == 0
    rows = read(out)
    assert [(row["index"], row["sample"]) for row in rows] == [(index, sample) for index in range(12) for sample in range(3)]
    assert len({row["seed"] for row in rows}) == 36 and "reward" not in rows[0]
    for row in rows:
        assert eval(row["prompt"].removesuffix("=")) == row["label"]  # the built-in task's own rows
        assert 1 <= row["length"] <= 8 and "<eos>" not in row["response"]
    assert oct(out.stat().st_mode)[-3:] == "600"


def test_the_same_seed_gives_the_same_file_and_another_does_not(hone_cache: Path, tmp_path: Path) -> None:
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        assert main(["generate", *SMALL, "--rollout.seed", seed, "--out", str(tmp_path / f"{name}.jsonl")]) == 0
    one, again, other = ((tmp_path / f"{name}.jsonl").read_text() for name in ("one", "again", "other"))
    assert one == again != other


def test_temperature_zero_is_what_transformers_finds_likeliest(hone_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["generate", "--data.max-samples", "5", "--rollout.temperature", "0", "--out", str(out)]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(builtin_model()), AutoTokenizer.from_pretrained(builtin_model())
    for row in read(out):
        whole = model.generate(**tokenizer(row["prompt"], return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(whole[0], skip_special_tokens=True) == row["prompt"] + row["response"]


@pytest.mark.parametrize("cut", ["mid-line", "mid-prompt", "between prompts", "nothing yet"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_stopped_run_goes_on_and_asks_nothing_twice(
    cut: str, ending: str, hone_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / f"out.{ending}"
    assert main(["generate", *SMALL, "--out", str(whole)]) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    kept = {"mid-line": 12, "mid-prompt": 13, "between prompts": 15, "nothing yet": 0}[cut]
    settings = json.loads((tmp_path / "whole.jsonl.settings.json").read_text())
    (tmp_path / f"out.{ending}.settings.json").write_text(json.dumps(settings))
    work = out if ending == "jsonl" else tmp_path / "out.parquet.part"
    work.write_bytes(b"".join(lines[:kept]) + (lines[kept][:20] if cut == "mid-line" else b""))

    import hone.launch.programs.generate as program

    asked: list[str] = []
    ask = program.answer
    monkeypatch.setattr(
        program, "answer", lambda *words, **names: (asked.extend(prompt.prompt_id for prompt in words[2]), ask(*words, **names))[1]
    )
    assert main(["generate", *SMALL, "--out", str(out)]) == 0
    assert asked == [json.loads(line)["prompt_id"] for line in lines[kept // 3 * 3 :: 3]]
    if ending == "jsonl":
        assert out.read_bytes() == whole.read_bytes()
    else:
        found = pyarrow.parquet.read_table(out).to_pylist()
        assert [row | {"label": json.loads(row["label"])} for row in found] == read(whole)
        assert not work.exists()
    capsys.readouterr()
    assert main(["generate", *SMALL, "--out", str(out)]) == 0  # once more, with nothing left to do
    assert "12 of 12 prompts are in" in capsys.readouterr().out and len(asked) == 12 - kept // 3


def test_a_killed_process_leaves_a_file_that_is_gone_on_with(hone_cache: Path, tmp_path: Path) -> None:
    words = ["generate", "--data.max-samples", "2000", "--rollout.n-samples-per-prompt", "4", "--out", "out.jsonl"]
    environment = {**os.environ, "HONE_CACHE": str(hone_cache)}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        while not (tmp_path / "out.jsonl").exists() or (tmp_path / "out.jsonl").stat().st_size < 4096:
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    before = (tmp_path / "out.jsonl").read_bytes()
    assert 0 < before.count(b"\n") < 8000
    assert main(["generate", *words[1:-1], str(tmp_path / "out.jsonl")]) == 0
    after = (tmp_path / "out.jsonl").read_bytes()
    assert after.count(b"\n") == 8000 and after.startswith(before[: before.rindex(b"\n") + 1])


def test_the_best_of_several_is_kept(hone_cache: Path, tmp_path: Path) -> None:
    reward = write_reward(tmp_path / "reward.py", LONGEST)
    judged = ["--data.max-samples", "12", "--reward.remote-url", str(reward)]
    assert main(["generate", *judged, "--rollout.n-samples-per-prompt", "5", "--out", str(tmp_path / "all.jsonl")]) == 0
    assert main(["generate", *judged, "--best-of", "5", "--out", str(tmp_path / "best.jsonl")]) == 0
    everything, best = read(tmp_path / "all.jsonl"), read(tmp_path / "best.jsonl")
    assert len(everything) == 60 and [row["index"] for row in best] == list(range(12))
    for row in best:
        samples = [one for one in everything if one["index"] == row["index"]]
        rewards = [one["reward"] for one in samples]
        first = samples[rewards.index(max(rewards))]
        assert {name: row[name] for name in first} == first
        assert row["best_of"] == 5 and row["mean_reward"] == pytest.approx(sum(rewards) / 5)
    assert any(row["reward"] > row["mean_reward"] for row in best)


def test_own_prompts_own_model_and_a_chat_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer, kind="llama", tied=False)
    messages = [[{"role": "user", "content": "How many legs have 3 cats?"}], [{"role": "user", "content": "And 4?"}]]
    rows = write_rows(tmp_path / "rows.jsonl", [{"input": one} for one in messages])
    words = ["--model.model-name-or-path", str(model), "--data.prompt-dataset", str(rows), "--data.apply-chat-template"]
    out, sizes = tmp_path / "out.jsonl", ["--data.max-len", "256", "--rollout.max-new-tokens", "4", "--run.backend", "local"]
    assert main(["generate", *words, *sizes, "--out", str(out)]) == 0
    assert CHATML.startswith("{% for")
    assert [row["prompt"] for row in read(out)] == [
        f"<|im_start|>user\n{one[0]['content']}<|im_end|>\n<|im_start|>assistant\n" for one in messages
    ]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_vllm_answers_what_transformers_answers(hone_cache: Path, tmp_path: Path) -> None:
    # A process of its own: vLLM changes what a process imports and logs.
    words = ["--data.max-samples", "6", "--rollout.temperature", "0"]
    assert main(["generate", *words, "--out", str(tmp_path / "local.jsonl")]) == 0
    command = [sys.executable, "-c", COMMAND, "generate", *words, "--run.backend", "vllm", "--out", str(tmp_path / "vllm.jsonl")]
    done = subprocess.run(command, env={**os.environ, "HONE_CACHE": str(hone_cache)}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ours, theirs = read(tmp_path / "local.jsonl"), read(tmp_path / "vllm.jsonl")
    assert [row["response"] for row in theirs] == [row["response"] for row in ours]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "out.csv"], "ends in neither .jsonl nor .parquet"),
        (["--out", "nowhere/out.jsonl"], "there is no directory nowhere"),
        (["--out", "foreign.jsonl"], "was not written by `launch generate`"),
        (["--best-of", "4", "--rollout.n-samples-per-prompt", "2"], "best_of writes one response of each prompt"),
        (["--best-of", "4", "--rollout.temperature", "0"], "there is no best one"),
        (["--data.prompt-dataset", "rows.jsonl"], "reads only the digits and signs"),
        (["--rollout.max-new-tokens", "64"], "leaves no room for a prompt"),
        (["--model.model-name-or-path", "./missing"], "./missing"),
        (["--reward.remote-url", "missing.py"], "missing.py does not exist"),
        (["--train.batch-size", "3"], "--train.batch-size has no effect in this command"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_starts(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "foreign.jsonl").write_text("{}\n")
    write_rows(tmp_path / "rows.jsonl", [{"input": "1+1="}])
    assert main(["generate", *words]) in (2, 5, 6)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "cache").exists() and not (tmp_path / "responses.jsonl").exists()


def test_rows_of_other_settings_or_other_data_are_not_gone_on_with(
    hone_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out.jsonl")]
    assert main(["generate", *SMALL, *out]) == 0
    written = (tmp_path / "out.jsonl").read_bytes()
    assert main(["generate", *SMALL, *out, "--rollout.seed", "7"]) == 2
    assert "rollout.seed 42 (now 7)" in capsys.readouterr().err
    beside = tmp_path / "out.jsonl.settings.json"
    beside.write_text(beside.read_text().replace('"prompts": "', '"prompts": "0'))
    assert main(["generate", *SMALL, *out]) == 2
    assert "was begun with other prompts" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == written


def test_two_processes_do_not_write_to_one_file(hone_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    out = tmp_path / "out.jsonl"
    assert main(["generate", *SMALL, "--out", str(out)]) == 0
    with out.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["generate", *SMALL, "--out", str(out)]) == 2
    assert "another process is writing" in capsys.readouterr().err
