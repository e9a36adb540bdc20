"""Rows of ids are learnt from as they were sampled, whatever the tokenizer would make of their texts."""

import json
from pathlib import Path

import pytest

from hone.datasets.errors import DataError
from hone.datasets.labelled import Samples
from hone.datasets.layouts import exchange_rows, pair_rows
from hone.datasets.offline_config import PairData, SFTData
from hone.datasets.reading import open_one
from hone.datasets.samples import samples_of
from hone.datasets.tasks.arithmetic import build_tokenizer


def samples(path: Path, rows: list[dict[str, object]], *, pairs: bool = False, max_len: int = 64) -> Samples:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_one(str(path), flag="--data.dataset")
    config = PairData(max_len=max_len) if pairs else SFTData(max_len=max_len)
    found = pair_rows(source, config) if isinstance(config, PairData) else exchange_rows(source, config)
    return samples_of(found, build_tokenizer(), config)


def test_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    # The texts say something else: they are for a reader.
    row = {"prompt": "1+1=", "completion": "2", "prompt_ids": [3, 4], "completion_ids": [5, 5, 1]}
    (sample,) = samples(tmp_path / "rows.jsonl", [row]).samples
    assert list(sample.rows[0].tokens) == [3, 4, 5, 5, 1] and sample.rows[0].trained == b"\0\0\1\1\1"


def test_an_answer_that_was_cut_is_taught_no_end(tmp_path: Path) -> None:
    (sample,) = samples(tmp_path / "rows.jsonl", [{"prompt_ids": [3], "completion_ids": [5, 6]}]).samples
    assert list(sample.rows[0].tokens) == [3, 5, 6]


def test_a_pair_has_both_answers_behind_its_prompt(tmp_path: Path) -> None:
    (sample,) = samples(tmp_path / "rows.jsonl", [{"prompt_ids": [3], "chosen_ids": [5, 1], "rejected_ids": [6, 1]}], pairs=True).samples
    assert [list(row.tokens) for row in sample.rows] == [[3, 5, 1], [3, 6, 1]]
    assert [row.trained for row in sample.rows] == [b"\0\1\1"] * 2


def test_what_is_no_id_is_told_with_its_line(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt_ids": [3], "completion_ids": [5]},
        {"prompt_ids": [3], "completion_ids": []},
        {"prompt_ids": [3.5], "completion_ids": [5]},
        {"prompt_ids": [True], "completion_ids": [-1]},
    ]
    with pytest.raises(DataError, match="completion_ids are no token ids") as error:
        samples(tmp_path / "rows.jsonl", rows)
    assert "prompt_ids are no token ids" in str(error.value) and "rows.jsonl:4: [True]" in str(error.value)


def test_ids_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not have"):
        samples(tmp_path / "rows.jsonl", [{"prompt_ids": [3], "completion_ids": [400]}])


def test_a_pair_of_one_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="chosen and rejected are the same"):
        samples(tmp_path / "rows.jsonl", [{"prompt_ids": [3], "chosen_ids": [5], "rejected_ids": [5]}], pairs=True)
