"""Real rows through every program, a model and tokenizer of a user's own; bad rows end with 3 before a model is touched."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hone.launch.cli import main
from hone.launch.observe.run_directory import read_metrics
from tests.launch.conftest import GSM8K, save_model, write_rows

SOLUTIONS = GSM8K.with_name("example_model_solutions.jsonl")
there = pytest.mark.skipif(not SOLUTIONS.exists(), reason="the gsm8k problems are not beside this checkout (../shared/data/gsm8k)")
SMALL = ["--train.max-steps", "2", "--train.batch-size", "4", "--data.max-len", "512", "--data.max-samples", "12", "--recipe", "laptop"]
JUDGES = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_model(tmp_path_factory.mktemp("own") / "model", tokenizer, kind="llama", tied=True)


def solved() -> list[dict[str, Any]]:
    """Each problem with a right and a wrong solution, where the four models gave both."""
    found = []
    for line in SOLUTIONS.read_text().splitlines()[:200]:
        row = json.loads(line)
        by_truth = {row[judge]["is_correct"]: row[judge]["solution"] for judge in JUDGES}
        if len(by_truth) == 2:
            found.append({"question": row["question"], "right": by_truth[True], "wrong": by_truth[False]})
    return found


def right_marks(solution: str) -> list[bool]:
    """Of each line, whether its calculator marks hold."""
    lines = [line for line in solution.split("\n") if line.strip()]
    return [all(_holds(mark) for mark in re.findall(r"<<([^=<>]+)=([^<>]+)>>", line)) for line in lines]


def _holds(mark: tuple[str, str]) -> bool:
    term, result = mark
    return bool(re.fullmatch(r"[\d.+\-*/ ()]+", term)) and abs(eval(term) - float(result)) < 0.01  # digits and signs only


def run(verb: str, model: Path, rows: Path, directory: Path, *more: str) -> list[dict[str, int | float]]:
    words = [verb, "--model.model-name-or-path", str(model), "--data.dataset", str(rows), *SMALL, "--run.dir", str(directory), *more]
    assert main(words) == 0
    steps = read_metrics(directory)[0]
    assert [step["step"] for step in steps] == [1, 2] and all(step["train/skipped"] == 0 for step in steps)
    return steps


@there
@pytest.mark.parametrize("chat", [[], ["--data.apply-chat-template"]])
def test_worked_answers_are_imitated(chat: list[str], model: Path, hone_cache: Path, tmp_path: Path) -> None:
    (first, _) = run("sft", model, GSM8K, tmp_path / "run", "--eval.dataset", str(GSM8K), "--eval.max-samples", "3", *chat)
    assert first["train/nll"] == pytest.approx(5.99, abs=0.4)  # log 400: the model is random
    assert first["train/tokens"] > 4 * 50


@there
def test_documents_are_learnt_whole(model: Path, hone_cache: Path, tmp_path: Path) -> None:
    words = ["--data.pretrain-mode", "--data.input-key", "answer", "--data.max-samples", "60"]
    (first, _) = run("sft", model, GSM8K, tmp_path / "run", *words)
    assert 4 * 256 < first["train/tokens"] <= 4 * 512  # documents fill the rows together


@there
@pytest.mark.parametrize("verb", ["rm", "dpo"])
def test_a_right_solution_is_preferred_to_a_wrong_one(verb: str, model: Path, hone_cache: Path, tmp_path: Path) -> None:
    pairs = [{"question": row["question"], "chosen": row["right"], "rejected": row["wrong"]} for row in solved()]
    steps = run(verb, model, write_rows(tmp_path / "pairs.jsonl", pairs), tmp_path / "run")
    assert steps[0]["train/loss"] == pytest.approx(0.6931, abs=1e-3)  # nothing is preferred yet


@there
def test_solutions_marked_right_and_wrong_are_judged(model: Path, hone_cache: Path, tmp_path: Path) -> None:
    judged = [
        {"question": row["question"], "completion": row[side], "is_correct": side == "right"}
        for row in solved()
        for side in ("right", "wrong")
    ]
    steps = run("kto", model, write_rows(tmp_path / "judged.jsonl", judged), tmp_path / "run", "--data.label-key", "is_correct")
    assert steps[0]["train/loss"] == pytest.approx(0.5, abs=1e-3)


@there
def test_steps_are_judged_by_their_calculator_marks(model: Path, hone_cache: Path, tmp_path: Path) -> None:
    rows = []
    for row in solved():
        for side in ("right", "wrong"):
            lines = [line for line in row[side].split("\n") if line.strip()]
            rows.append({"question": row["question"], "steps": lines, "labels": right_marks(row[side])})
    steps = run("prm", model, write_rows(tmp_path / "steps.jsonl", rows), tmp_path / "run", "--data.max-len", "1000")
    assert steps[0]["train/prm_loss"] == pytest.approx(0.6931, abs=1e-3)


@there
def test_a_student_learns_from_a_teacher_of_another_size(
    model: Path, tokenizer: PreTrainedTokenizerFast, hone_cache: Path, tmp_path: Path
) -> None:
    teacher = save_model(tmp_path / "teacher", tokenizer, kind="qwen3", tied=False)
    some = run("kd", model, GSM8K, tmp_path / "some", "--teacher.model-name-or-path", str(teacher), "--teacher.top-k", "399")
    every = run("kd", model, GSM8K, tmp_path / "every", "--teacher.model-name-or-path", str(teacher), "--teacher.top-k", "0")
    # All tokens but one, and that one as "all others", are the whole distribution.
    assert some[0]["train/distillation_loss"] == pytest.approx(every[0]["train/distillation_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--data.dataset-split trian", "--data.dataset-split 'trian'"),
        ("--data.dataset-split train[5:]", "--data.dataset-split 'train[5:]' is empty"),
        ("--eval.dataset {rows} --eval.split test", "--eval.split 'test'"),
    ],
)
def test_a_split_that_is_not_there_is_told_by_the_flag_that_asked_for_it(
    words: str, told: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1", "completion": "2"}])
    line = ["sft", "--model.model-name-or-path", str(model), "--data.dataset", str(file), *words.format(rows=file).split()]
    assert main([*line, "--recipe", "laptop", "--run.dir", str(tmp_path / "run")]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert told in said and f"at {told.partition(' ')[0]} " in said


@pytest.mark.parametrize(
    ("verb", "rows", "told"),
    [
        ("sft", [{"prompt": "1"}], "no column of answers"),
        ("dpo", [{"prompt": "1", "chosen": "2", "rejected": "2"}], "chosen and rejected are the same"),
        ("kto", [{"prompt": "1", "completion": "2", "label": "yes"}], "neither true nor false"),
        ("prm", [{"prompt": "1", "steps": ["2"], "labels": [7]}], "the share of good in [0, 1]"),
    ],
)
def test_rows_that_cannot_be_learnt_from_end_with_three_before_anything_starts(
    verb: str, rows: list[dict[str, object]], told: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    words = [verb, "--model.model-name-or-path", str(model), "--data.dataset", str(file), "--recipe", "laptop"]
    assert main([*words, "--run.dir", str(tmp_path / "run")]) == 3
    assert told in capsys.readouterr().err and not (tmp_path / "run").exists()
