"""`launch eval`: pass@k of whole runs against the samples that were written, and by hand."""

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from hone.launch.cli import main
from hone.launch.measured import Answered, figures, ks, report
from tests.launch.conftest import GSM8K, save_model, write_rows


def answered(*rewards: float, source: str = "") -> Answered:
    return Answered(source=source, rewards=rewards, tokens=(3,) * len(rewards), truncated=(False,) * len(rewards))


def by_drawing(rewards: tuple[float, ...], k: int) -> float:
    """The share of all choices of k samples that hold a right one: what the estimator is, counted."""
    choices = list(itertools.combinations(rewards, k))
    return sum(max(choice) > 0.5 for choice in choices) / len(choices)


def test_passes_are_counted_as_choices_of_k_samples() -> None:
    prompts = [(1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)]
    found = figures([answered(*one) for one in prompts], above=0.5, k=[1, 2, 4])
    for k in (1, 2, 4):
        each = [by_drawing(one, k) for one in prompts]
        mean = sum(each) / 4
        assert found[f"pass@{k}"] == pytest.approx(mean)
        spread = (sum((one - mean) ** 2 for one in each) / 3) ** 0.5
        assert found[f"pass@{k}_stderr"] == pytest.approx(spread / 2)
    assert (found["prompts"], found["samples"], found["tokens_mean"]) == (4, 16, 3.0)


def test_what_counts_as_right_is_above_the_threshold() -> None:
    assert figures([answered(0.5, 0.6)], above=0.5, k=[1])["pass@1"] == 0.5
    assert figures([answered(0.5, 0.6)], above=0.4, k=[1])["pass@1"] == 1


def test_sources_are_told_apart_and_rows_without_one_count_for_the_whole() -> None:
    found = report([answered(1.0, source="b"), answered(0.0, source="a"), answered(0.0, source="b"), answered(1.0)], above=0.5, k=[1])
    assert list(found["sources"]) == ["b", "a"]
    assert [found["sources"][name]["pass@1"] for name in ("b", "a")] == [0.5, 0.0]
    assert found["whole"]["pass@1"] == 0.5 and found["whole"]["prompts"] == 4


def test_each_k() -> None:
    assert ks(None, 1) == [1] and ks(None, 4) == [1, 2, 4] and ks(None, 6) == [1, 2, 4, 6] and ks("8, 1", 8) == [1, 8]
    for words in ("0", "a", "1,,2", "1.5", ""):
        with pytest.raises(ValueError, match="are not numbers from 1"):
            ks(words, 4)
    with pytest.raises(ValueError, match="pass@8 needs 8 samples"):
        ks("1,8", 4)


def told(run: Path) -> dict[str, Any]:
    return json.loads((run / "eval.json").read_text())


def test_without_arguments_the_built_in_model_is_measured(hone_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["eval", "--run.dir", str(run)]) == 0
    found = told(run)["whole"]
    assert (found["prompts"], found["samples"]) == (100, 400)
    assert 0.1 < found["pass@1"] < found["pass@2"] < found["pass@4"] < 1
    rows = pyarrow.parquet.read_table(run / "rollouts" / "step_000001.parquet").to_pylist()
    right = sum(row["reward"] > 0.5 for row in rows)
    assert len(rows) == 400 and found["pass@1"] == pytest.approx(right / 400) and found["reward_mean"] == pytest.approx(right / 400)
    for row in rows:  # the reward is the sum's, not the reward's word for it
        assert (row["response"].removesuffix("<eos>") == str(json.loads(row["label"]))) == (row["reward"] == 1)
    assert f"{100 * found['pass@1']:.1f} ± " in capsys.readouterr().out
    assert 'verb = "eval"' in (run / "config.toml").read_text() and (run / "manifest.json").exists()
    # The written configuration repeats the run.
    assert main(["eval", "--config", str(run / "config.toml"), "--run.dir", str(tmp_path / "again")]) == 0
    assert told(tmp_path / "again") == told(run)


def test_at_temperature_zero_one_response_is_drawn(hone_cache: Path, tmp_path: Path) -> None:
    assert main(["eval", "--rollout.temperature", "0", "--data.max-samples", "10", "--run.dir", str(tmp_path / "run")]) == 0
    found = told(tmp_path / "run")
    assert found["whole"]["samples"] == 10 and "pass@1" in found["whole"] and "pass@2" not in found["whole"]


@pytest.mark.parametrize("grader", ["builtin:gsm8k", "builtin:math"])
def test_rows_of_gsm8k_are_graded_by_their_answers(grader: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    if not GSM8K.exists():
        pytest.skip(f"no {GSM8K}")
    with GSM8K.open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(6), strict=False)]
    sources: list[dict[str, object]] = [{**row, "data_source": "even" if index % 2 else "odd"} for index, row in enumerate(rows)]
    file = write_rows(tmp_path / "rows.jsonl", sources)
    model = save_model(tmp_path / "model", tokenizer, kind="llama", tied=False)
    words = ["--model.model-name-or-path", str(model), "--data.prompt-dataset", str(file), "--data.input-key", "question"]
    judged = ["--data.label-key", "answer", "--reward.remote-url", grader, "--run.backend", "local"]
    sizes = ["--data.max-len", "1024", "--rollout.max-new-tokens", "8", "--rollout.n-samples-per-prompt", "2", "--eval.k", "2"]
    assert main(["eval", *words, *judged, *sizes, "--run.dir", str(tmp_path / "run")]) == 0
    found = told(tmp_path / "run")
    assert [(name, one["prompts"]) for name, one in found["sources"].items()] == [("odd", 3), ("even", 3)]
    assert found["whole"]["pass@2"] == 0  # a model of chance
    written = pyarrow.parquet.read_table(tmp_path / "run" / "rollouts" / "step_000001.parquet").to_pylist()
    assert [json.loads(row["label"]) for row in written[::2]] == [row["answer"] for row in rows]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eval.k", "8"], "pass@8 needs 8 samples of a prompt, and 4 are drawn"),
        (["--eval.k", "x"], "are not numbers from 1"),
        (["--eval.k", "2", "--rollout.temperature", "0"], "pass@2 needs 2 samples"),
        (["--data.prompt-dataset", "rows.jsonl", "--model.model-name-or-path", "model"], "your own prompts need a reward"),
        (["--rollout.temperature", "-1"], "out of range"),
        (["--run.dir", "full"], "full is not empty"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_starts(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    write_rows(tmp_path / "rows.jsonl", [{"input": "1+1="}])
    assert main(["eval", *words]) in (2, 5)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()
