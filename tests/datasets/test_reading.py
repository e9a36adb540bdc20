"""Every kind of dataset gives the same rows; several are opened at once; splits and parts of them are those asked for."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hone.datasets import arrow_rows
from hone.datasets.config import DataConfig
from hone.datasets.errors import DataError
from hone.datasets.reading import open_datasets, open_one, probabilities
from hone.datasets.schemas import load_prompts
from hone.datasets.splits import read_split, split_files

ROWS = [{"input": f"how much is {count}?", "answer": str(count)} for count in range(40)]
KINDS = ["jsonl", "json", "csv", "parquet", "arrow file", "arrow stream", "saved", "saved with splits", "folder"]
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


def lay(folder: Path, kind: str, rows: list[dict[str, str]]) -> str:
    """The rows as a dataset of one kind; its name."""
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        (folder / "r.json").write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        (folder / "r.csv").write_text("input,answer\n" + "".join(f"{row['input']},{row['answer']}\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(table, folder / "r.parquet", row_group_size=7)
    elif kind == "arrow file":
        with pa.ipc.new_file(str(folder / "r.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    elif kind == "arrow stream":
        stream(folder / "r.arrow", table)
    elif kind == "saved":
        saved(folder / "r.saved", rows)
    elif kind == "saved with splits":
        saved(folder / "r.dict" / "train", rows)
        saved(folder / "r.dict" / "test", rows[:3])
        (folder / "r.dict" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    else:
        (folder / "r.folder" / "data").mkdir(parents=True)
        for shard in range(2):
            pq.write_table(table.slice(20 * shard, 20), folder / "r.folder" / "data" / f"train-{shard:05}-of-00002.parquet")
        pq.write_table(table.slice(0, 5), folder / "r.folder" / "data" / "test-00000-of-00001.parquet")
    return str(next(folder.glob("r.*")))


def stream(file: Path, table: pa.Table) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=9)


def saved(folder: Path, rows: list[dict[str, str]]) -> None:
    """As Hugging Face's `save_to_disk` lays a dataset out."""
    folder.mkdir(parents=True)
    half = len(rows) // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
        stream(folder / f"data-{shard:05}-of-00002.arrow", pa.Table.from_pylist(part))
    files = [{"filename": f"data-{shard:05}-of-00002.arrow"} for shard in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))


def prompts(path: str, **settings: object) -> list[str]:
    return [str(row.prompt) for row in load_prompts(DataConfig(prompt_dataset=path, label_key="answer", **settings)).rows]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows_in_the_same_order(kind: str, tmp_path: Path) -> None:
    found = load_prompts(DataConfig(prompt_dataset=lay(tmp_path, kind, ROWS), label_key="answer")).rows
    expected = [(row["input"], row["answer"]) for row in ROWS]
    assert [(row.prompt, row.label) for row in found] == expected
    assert [(row.prompt, row.label) for row in (found[17], found[3], found[-1])] == [expected[17], expected[3], expected[-1]]
    assert len({row.uid for row in found}) == len(found)


def test_a_large_parquet_file_is_converted_once_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arrow_rows, "HELD_BYTES", 10)
    path = lay(tmp_path, "parquet", ROWS)
    assert prompts(path) == [row["input"] for row in ROWS]
    (made,) = (tmp_path / "cache" / "datasets").iterdir()
    before = made.stat().st_ino
    assert open_datasets(path)[0].sources[0].rows[39].columns == ROWS[39]
    assert [file.stat().st_ino for file in (tmp_path / "cache" / "datasets").iterdir()] == [before]


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "saved"])
def test_a_truncated_table_is_named(kind: str, tmp_path: Path) -> None:
    path = Path(lay(tmp_path, kind, ROWS))
    file = path / "data-00001-of-00002.arrow" if path.is_dir() else path
    file.write_bytes(file.read_bytes()[: 300 if kind == "saved" else -20])
    with pytest.raises(DataError, match=r"is a damaged (Parquet|Arrow) file: "):
        prompts(str(path))


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"splits": "train", "_data_files": 3}', b"\xff"])
@pytest.mark.parametrize(("kind", "name"), [("saved", "state.json"), ("saved with splits", "dataset_dict.json")])
def test_a_saved_dataset_with_a_damaged_note_names_it(kind: str, name: str, content: str | bytes, tmp_path: Path) -> None:
    path = Path(lay(tmp_path, kind, ROWS))
    (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"{name}.* (again|save it again)"):
        prompts(str(path))


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ("a: [1", "no YAML at its head: .*line 1, column 6.*; mend those lines"),
        ("- a", "should be a dict; mend those lines"),
        (
            "configs:\n- config_name: default\n  data_files:\n  - path: x",
            r"has \{'path': 'x'\} among its data files; write a split and a path",
        ),
        ("configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '*'\n  - x", "has 'x' among its data files"),
    ],
)
def test_a_card_that_cannot_be_read_is_told(card: str, told: str, tmp_path: Path) -> None:
    path = Path(lay(tmp_path, "folder", ROWS))
    (path / "README.md").write_text(f"---\n{card}\n---\n# d\n")
    with pytest.raises(DataError, match=rf"its card \(README\.md\) .*{told}"):
        prompts(str(path))


def test_a_saved_dataset_that_lacks_a_file_names_it(tmp_path: Path) -> None:
    path = Path(lay(tmp_path, "saved", ROWS))
    (path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of its 2 data files: .data-00001-of-00002\.arrow."):
        prompts(str(path))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(40)),
        ("train[:3]", range(3)),
        ("train[5:7]", range(5, 7)),
        ("train[-2:]", range(38, 40)),
        ("train[:10%]", range(4)),
        ("train[10%:20%]", range(4, 8)),
        ("train[95%:]", range(38, 40)),
        ("train[30:99]", range(30, 40)),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "folder"])
def test_a_part_of_a_split_has_the_rows_asked_for_and_their_own_ids(kind: str, split: str, expected: range, tmp_path: Path) -> None:
    path = lay(tmp_path, kind, ROWS)
    assert prompts(path, prompt_split=split) == [ROWS[place]["input"] for place in expected]
    whole = {str(row.prompt): row.uid for row in load_prompts(DataConfig(prompt_dataset=path)).rows}
    part = load_prompts(DataConfig(prompt_dataset=path, prompt_split=split)).rows
    assert all(row.uid == whole[str(row.prompt)] for row in part)


def test_parts_and_the_maximum_go_together_and_an_empty_part_is_refused(tmp_path: Path) -> None:
    path = lay(tmp_path, "jsonl", ROWS)
    assert prompts(path, prompt_split="train[10:20]", max_samples=3) == [row["input"] for row in ROWS[10:13]]
    with pytest.raises(DataError, match=r"--data\.prompt-split 'train\[40:50\]' is empty: .* has \d+ rows; ask"):
        prompts(path, prompt_split="train[40:50]")


def test_another_split_of_a_folder_and_of_a_saved_dataset(tmp_path: Path) -> None:
    for kind, count in (("folder", 5), ("saved with splits", 3)):
        (tmp_path / kind).mkdir()
        assert len(prompts(lay(tmp_path / kind, kind, ROWS), prompt_split="test")) == count


@pytest.mark.parametrize("kind", ["jsonl", "saved", "saved with splits", "folder"])
def test_an_unknown_split_names_those_there_are(kind: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"--data\.prompt-split 'trian': .* has no such split, but .*'train'.*; name one; did you mean 'train'\?"
    ):
        prompts(lay(tmp_path, kind, ROWS), prompt_split="trian")


@pytest.mark.parametrize("text", ["train[", "train[1]", "", "train[a:b]", "train[:200%]"])
def test_what_is_no_split_says_how_one_is_written(text: str) -> None:
    with pytest.raises(DataError, match=r"--data\.prompt-split .*train\[:1000\]|a share lies between"):
        read_split(text, flag="--data.prompt-split")


def test_several_datasets_are_joined_with_their_sizes_and_weights(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b,c"
    first.mkdir(), second.mkdir()
    names = f"{lay(first, 'jsonl', ROWS[:10])},{lay(tmp_path, 'parquet', ROWS[10:15])}"
    both = load_prompts(DataConfig(prompt_dataset=names, prompt_probs="0.25,0.75"))
    assert [str(row.prompt) for row in both.rows] == [row["input"] for row in ROWS[:15]]
    assert (both.sizes, both.weights) == ((10, 5), (0.25, 0.75))
    assert prompts(lay(second, "jsonl", ROWS[:2])) == [row["input"] for row in ROWS[:2]]  # a path that is there, comma and all


def test_faulty_rows_of_several_datasets_are_told_together(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"input": ""}\n')
    with pytest.raises(DataError) as caught:
        prompts(f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}")
    assert str(caught.value).count("1 of 1 rows cannot be used") == 2


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("0.5", "has 1 weights for 2 datasets"),
        ("0.5,x", "is no list of numbers"),
        ("0.5,0.6", "sums to 1.1, not to 1; in these proportions: 0.4545,0.5455"),
        ("0,1", r"has a weight outside \(0, 1\]"),
        ("nan,1", r"has a weight outside \(0, 1\]"),
        ("1.5,-0.5", r"has a weight outside \(0, 1\]"),
    ],
)
def test_weights_that_do_not_count_or_sum_are_refused(weights: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"--data\.prompt-probs '{weights}' {message}"):
        probabilities(weights, 2)


def test_an_empty_name_in_a_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has an empty name; write names separated by single commas"):
        open_datasets(f"{tmp_path / 'a.jsonl'},,b")


def test_messages_of_a_table_have_only_their_own_keys(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "name": "Ada", "content": "u"}]
    pq.write_table(pa.Table.from_pylist([{"input": talk}]), tmp_path / "r.parquet")
    (row,) = load_prompts(DataConfig(prompt_dataset=str(tmp_path / "r.parquet"), apply_chat_template=True)).rows
    assert list(row.prompt) == talk


def test_files_fall_to_splits_by_name_and_by_card() -> None:
    names = ["README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/dev.jsonl", "eval/0.csv"]
    assert split_files(names, {}, config=None, shown="d") == {
        "train": names[1:3],
        "validation": ["data/dev.jsonl"],
        "test": ["eval/0.csv"],
    }
    assert split_files(["a.jsonl", "b.jsonl"], {}, config=None, shown="d") == {"train": ["a.jsonl", "b.jsonl"]}
    card = {
        "configs": [
            {
                "config_name": "main",
                "data_files": [{"split": "train", "path": "main/train*"}, {"split": "test", "path": ["main/test.csv"]}],
            },
            {"config_name": "socratic", "data_files": "socratic/*"},
        ]
    }
    files = ["main/train-1.csv", "main/test.csv", "socratic/x.csv"]
    assert split_files(files, card, config="main", shown="d") == {"train": ["main/train-1.csv"], "test": ["main/test.csv"]}
    assert split_files(files, card, config="socratic", shown="d") == {"train": ["socratic/x.csv"]}
    with pytest.raises(DataError, match="has the configurations 'main', 'socratic', none was asked for"):
        split_files(files, card, config=None, shown="d")
    with pytest.raises(DataError, match=r"not 'mian'; did you mean 'main'\?; name one"):
        split_files(files, card, config="mian", shown="d")
    with pytest.raises(DataError, match="has no data files"):
        split_files(["README.md", "script.py"], {}, config=None, shown="d")


@pytest.mark.skipif(not GSM8K.exists(), reason="the gsm8k problems are not beside this checkout (../shared/data/gsm8k)")
@pytest.mark.parametrize("kind", KINDS)
def test_real_word_problems_go_through_every_kind_unchanged(kind: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:40]]
    if kind == "csv":
        import csv

        with (tmp_path / "r.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(rows)
        path = str(tmp_path / "r.csv")
    else:
        path = lay(tmp_path, kind, rows)
    found = load_prompts(DataConfig(prompt_dataset=path, input_key="question", label_key="answer", prompt_split="train[:20]")).rows
    assert [(row.prompt, row.label) for row in found] == [(row["question"], row["answer"]) for row in rows[:20]]


@pytest.mark.parametrize("kind", KINDS)
def test_one_dataset_is_one_source(kind: str, tmp_path: Path) -> None:
    source = open_one(lay(tmp_path, kind, ROWS), split="train[:30]", flag="--data.dataset")
    assert [dict(row.columns) for row in source.rows] == ROWS[:30]
    with pytest.raises(DataError, match=r"--data\.dataset 'a,b' names 2 datasets|--data\.dataset 'a' does not exist"):
        open_one("a,b", flag="--data.dataset")


DAMAGED = """
import random, sys
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq
from hone.datasets.errors import DataError
from hone.datasets.layouts import exchange_rows
from hone.datasets.offline_config import SFTData
from hone.datasets.reading import open_one

folder, draw, found = Path(sys.argv[1]), random.Random(1), {True: 0, False: 0}
said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
table = pa.Table.from_pylist([{"prompt": f"q{row} \\u00e9", "completion": f"a{row}", "messages": said} for row in range(40)])
with pa.OSFile(str(folder / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
    writer.write_table(table)
with pa.OSFile(str(folder / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
    writer.write_table(table)
pq.write_table(table, folder / "table.parquet", compression="none")
for file in sorted(folder.iterdir()):
    content = file.read_bytes()
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 4])):
            damaged[draw.randrange(len(damaged))] = draw.choice([0, 255, draw.randrange(32, 127), draw.randrange(256)])
        (folder / f"damaged{file.suffix}").write_bytes(damaged)
        try:
            list(exchange_rows(open_one(str(folder / f"damaged{file.suffix}")), SFTData(input_key="prompt", output_key="completion")).rows)
            found[True] += 1
        except DataError:
            found[False] += 1
    (folder / f"damaged{file.suffix}").unlink()
print(found[True], found[False])
"""


def test_a_table_that_was_damaged_anywhere_is_told_or_read(tmp_path: Path) -> None:
    # In a process of its own: Arrow takes a file at its word, and an offset that leads nowhere ends the process.
    ended = subprocess.run([sys.executable, "-c", DAMAGED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    read, told = map(int, ended.stdout.split())
    assert read + told == 900 and min(read, told) > 50


@pytest.mark.parametrize("text", ["train[3:2]", "train[3:3]", "train[20%:10%]"])
def test_a_part_that_ends_before_it_begins_is_told_as_that(text: str, tmp_path: Path) -> None:
    path = lay(tmp_path, "jsonl", [{"input": str(number)} for number in range(10)])
    with pytest.raises(DataError, match=r"is empty: it ends where it begins, or before") as caught:
        open_datasets(path, split=text, split_flag="--eval.split")
    assert str(caught.value).startswith("--eval.split") and "rows" not in str(caught.value)


def test_a_header_of_another_encoding_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("input,r\u00e9ponse\n1,2\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"rows\.csv:1 is not UTF-8: .*; convert the file to UTF-8"):
        open_datasets(str(tmp_path / "rows.csv"))
