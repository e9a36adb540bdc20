"""What the reference says: asked once, before training or as rows are drawn, and remembered for later epochs and the next run."""

import os
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from hone.algos.batch import Packed
from hone.datasets import samples as samples_module
from hone.datasets.labelled import TokenRow
from hone.launch import offline_groups
from hone.launch.cli import main
from hone.launch.observe.run_directory import read_metrics
from hone.launch.reference import Memory, key
from hone.learner.config import DeepSpeedConfig
from tests.golden.offline_curves import words
from tests.launch.conftest import write_rows
from tests.launch.test_offline_runs import steps_of


class Counted:
    """Says of each token its id, and counts the rows it was asked for."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def logp(self, role: str, batch: Packed) -> Tensor:
        assert role == "reference"
        self.rows.append(batch.rows)
        return batch.tokens.float()


def row(number: int) -> TokenRow:
    """A row of its own length and ids."""
    ids = [100 * number + place for place in range(2 + number % 5)]
    return TokenRow(tokens=array("i", ids), trained=b"\0" + b"\1" * (len(ids) - 1))


def asked_for(memory: Memory, numbers: list[int], asked: Counted) -> list[list[int]]:
    return [said.int().tolist() for said in memory.of([row(number) for number in numbers], numbers, asked)]


def test_a_row_is_asked_for_once_by_whichever_run_comes_first(tmp_path: Path) -> None:
    one, other, asked = Memory(tmp_path, "m", rows=700), Memory(tmp_path, "m", rows=700), Counted()
    assert not one.whole and len(one) == 700
    for memory, numbers, missing in [
        (one, [5, 3, 5, 9], [3]),
        (other, [9, 3, 4], [1]),
        (one, [4, 9], []),
        (one, list(range(700)), [256, 256, 184]),
        (other, list(range(699, -1, -1)), []),
    ]:
        asked.rows.clear()
        assert asked_for(memory, numbers, asked) == [list(row(number).tokens) for number in numbers]
        assert asked.rows == missing
    assert one.whole and Memory(tmp_path, "m", rows=700).whole and not Memory(tmp_path, "n", rows=700).whole


def test_runs_that_share_a_memory_do_not_write_over_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.lseek

    def seek(handle: int, offset: int, whence: int) -> int:
        found = plain(handle, offset, whence)
        time.sleep(0.02)  # long enough for another to look for the end as well, if it could
        return found

    monkeypatch.setattr(os, "lseek", seek)

    def ask(numbers: list[int]) -> None:
        memory = Memory(tmp_path, "m", rows=60)
        for number in numbers:
            asked_for(memory, [number, (number + 1) % 60], Counted())

    numbers = [list(range(0, 60, 6)), list(range(59, -1, -6)), list(range(2, 60, 4))]
    threads = [threading.Thread(target=ask, args=(own,)) for own in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory = Memory(tmp_path, "m", rows=60)
    known = sorted({one for own in numbers for number in own for one in (number, (number + 1) % 60)})
    asked = Counted()
    assert asked_for(memory, known, asked) == [list(row(number).tokens) for number in known] and not asked.rows


def test_what_a_run_that_was_killed_had_half_written_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    asked = Counted()
    asked_for(Memory(tmp_path, "m", rows=10), [1, 2], asked)
    with (tmp_path / "m.logp").open("ab") as file:
        file.write(b"\1\2\3")
    memory = Memory(tmp_path, "m", rows=10)
    assert asked_for(memory, [1, 2, 3, 4], asked) == [list(row(number).tokens) for number in (1, 2, 3, 4)]
    assert asked.rows == [2, 2]


def test_the_reference_is_asked_once_and_remembered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))
    memory = tmp_path / "cache" / "reference"
    assert main([*words("dpo", tmp_path), "--run.dir", str(tmp_path / "dpo")]) == 0
    first = capsys.readouterr().out
    # Another loss over the same rows and the same reference.
    assert main([*words("ipo", tmp_path), "--run.dir", str(tmp_path / "ipo")]) == 0
    second = capsys.readouterr().out
    assert "starting reference" in first and "starting reference" not in second
    assert len(list(memory.iterdir())) == 4  # rows to learn from and rows held out, each in two files
    for file in memory.iterdir():
        file.unlink()
    assert main([*words("dpo", tmp_path), "--run.dir", str(tmp_path / "again")]) == 0
    assert "starting reference" in capsys.readouterr().out
    assert steps_of(tmp_path / "again") == steps_of(tmp_path / "dpo")
    # Other rows to learn from are another question, and those held out are the same.
    assert main([*words("dpo", tmp_path), "--data.max-samples", "54", "--run.dir", str(tmp_path / "fewer")]) == 0
    assert len(list(memory.iterdir())) == 6


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows the reference is asked for, call by call."""
    found: list[int] = []
    plain = offline_groups.LocalGroup.logp

    def logp(self: offline_groups.LocalGroup, role: str, batch: Packed) -> Tensor:
        if role == "reference":
            found.append(batch.rows)
        return plain(self, role, batch)

    monkeypatch.setattr(offline_groups.LocalGroup, "logp", logp)
    yield found


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_asked_as_rows_are_drawn_it_says_what_it_says_before(
    name: str, questions: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))
    line = [*words(name, tmp_path), "--train.max-epochs", "2", "--train.max-steps", "12"]
    assert main([*line, "--run.dir", str(tmp_path / "before"), "--ref.when", "before"]) == 0
    assert "starting reference" in capsys.readouterr().out and sum(questions) == 2 * (60 + 12)
    # With a memory of its own: the rows of each step in the first epoch, those held out when they are measured, and no more.
    for file in (tmp_path / "cache" / "reference").iterdir():
        file.unlink()
    questions.clear()
    assert main([*line, "--run.dir", str(tmp_path / "drawn"), "--ref.when", "drawn"]) == 0
    assert "starting reference" not in capsys.readouterr().out
    assert sum(questions) == 2 * (60 + 12) and max(questions) <= 24
    for mine, theirs in zip(steps_of(tmp_path / "drawn"), steps_of(tmp_path / "before"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    # What is known by now needs no reference before training, either.
    questions.clear()
    assert main([*line, "--run.dir", str(tmp_path / "again"), "--ref.when", "before"]) == 0
    assert questions == [] and steps_of(tmp_path / "again") == steps_of(tmp_path / "drawn")


@pytest.mark.parametrize("name", ["dpo", "kto", "sft"])
def test_a_run_over_many_rows_goes_on_as_if_it_had_never_stopped(
    name: str, questions: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(samples_module, "UPFRONT_ROWS", 40)
    monkeypatch.setattr(samples_module, "SAMPLED_ROWS", 20)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "+".join(str(one) for one in range(row % 9 + 1))} for row in range(120)])
    own = (
        ["--data.pretrain-mode", "--data.dataset", str(texts), "--data.max-samples", "120", "--eval.dataset", str(texts)]
        if name == "sft"
        else []
    )
    line = [*words(name, tmp_path), *own, "--train.batch-size", "4", "--data.max-len", "32", "--train.max-steps", "6"]
    assert main([*line, "--ckpt.save-steps", "3", "--run.dir", str(tmp_path / "whole")]) == 0
    assert len(read_metrics(tmp_path / "whole")[0]) == 6
    known = list(questions)
    assert main([*line, "--run.dir", str(tmp_path / "again"), "--resume", str(tmp_path / "whole" / "checkpoints" / "step_3")]) == 0
    assert steps_of(tmp_path / "again") == steps_of(tmp_path / "whole")
    assert questions == known and (len(known) >= 6) == (name != "sft")  # all that is drawn was asked for by the first run
    weights = [sorted((tmp_path / run / "model").glob("*.safetensors")) for run in ("whole", "again")]
    assert weights[0] and [file.read_bytes() for file in weights[0]] == [file.read_bytes() for file in weights[1]]


def test_answers_of_another_model_or_number_format_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12345678")

    def name(dtype: str = "fp32") -> str:
        return key("rows", model=str(tmp_path), ds=DeepSpeedConfig(param_dtype=dtype))

    first = name()
    assert name() == first and name("bf16") != first
    (tmp_path / "model.safetensors").write_bytes(b"123456789")  # trained on, in place
    assert name() != first
