"""The `--data` flags of a whole run: several datasets, layouts, templates; and the rows' columns as a reward function sees them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from hone.launch.cli import main
from hone.launch.observe.run_directory import read_metrics
from tests.launch.conftest import MADE_UP, save_model, write_rows
from tests.launch.test_local_run import SMALL

VERL = [
    {
        "data_source": "legs",
        "prompt": [{"role": "user", "content": row["question"]}],
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "extra_info": {"index": index},
        "solution": row["answer"],
    }
    for index, row in enumerate(MADE_UP)
]
TRL = "def reward_func(completions, solution, **columns):\n    return [float(solution[0]) + len(columns['extra_info'][0])]\n"
OWN = """def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == 'legs' and int(ground_truth) == 4 * (extra_info['index'] + 1)
    return {'score': float(ground_truth), 'index': extra_info['index']}
"""


def test_trl_and_verl_functions_get_the_columns_of_verls_layout_from_two_weighted_datasets(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", tokenizer, kind="qwen3", tied=True)
    pq.write_table(pa.Table.from_pylist(VERL[:20]), tmp_path / "first.parquet")
    write_rows(tmp_path / "second.jsonl", VERL[20:])
    (tmp_path / "trl.py").write_text(TRL)
    (tmp_path / "verl.py").write_text(OWN)
    template = "{{ kind }}: {{ messages[0]['content'] }}{{ '\\n' }}"
    (tmp_path / "own.jinja").write_text(template)
    command = [
        *("grpo", *SMALL, "--actor.model-name-or-path", str(model), "--run.dir", str(tmp_path / "run"), "--train.max-steps", "2"),
        *("--data.prompt-dataset", f"{tmp_path / 'first.parquet'},{tmp_path / 'second.jsonl'}", "--data.prompt-probs", "0.5,0.5"),
        *(
            "--data.prompt-split",
            "train[:50%]",
            "--data.apply-chat-template",
            "--data.tokenizer-chat-template",
            str(tmp_path / "own.jinja"),
        ),
        *("--data.chat-template-kwargs", '{"kind": "Riddle"}', "--data.max-len", "256", "--rollout.max-new-tokens", "8"),
        *("--reward.remote-url", f"{tmp_path / 'trl.py'},{tmp_path / 'verl.py'}", "--reward.weights", "1,1"),
    ]
    assert main(command) == 0
    steps, _ = read_metrics(tmp_path / "run")
    rows = [row for file in sorted((tmp_path / "run" / "rollouts").iterdir()) for row in pq.read_table(file).to_pylist()]
    asked = {row["prompt"] for row in rows}
    assert all(text.startswith("Riddle: How many legs have ") for text in asked)
    counts = {int(text.split()[5]) for text in asked}
    assert counts <= {*range(1, 11), *range(21, 31)} and min(counts) <= 10 and max(counts) >= 21
    # TRL's function: the solution (4 legs a cat) plus one key in extra_info; verl's: the ground truth.
    legs = [4 * int(text.split()[5]) for text in (row["prompt"] for row in rows)]
    assert sum(step["rollout/reward_mean"] for step in steps) / 2 == pytest.approx(sum(2 * one + 1 for one in legs) / len(legs), rel=1e-5)


ROWS = "".join(json.dumps(row) + "\n" for row in MADE_UP)
TALK = '{"input": [{"role": "user", "content": "x"}]}\n'


@pytest.mark.parametrize(
    ("name", "content", "flags", "said"),
    [
        # reliability.md C.3 row 29, 30, 31, 36, 37, 39, 40, 44, 47, and their like
        ("rows.jsonl", None, "", "there is no 'rows.jsonl' in"),
        ("rows.jsonl", b"", "", "rows.jsonl has no rows"),
        ("rows.jsonl", b'{"input": "a"}\n{"input": \n', "", "rows.jsonl:2: column "),
        ("rows.jsonl", b'{"input": "a"}\n{"input": "\xff"}\n', "", "rows.jsonl:2: byte 12 of the line is 0xff"),
        ("rows.jsonl", b"PAR1xxxxPAR", "", "rows.jsonl is a damaged Parquet file"),
        ("rows.parquet", b"PAR1xxxxPAR", "", "rows.parquet is a damaged Parquet file"),
        ("rows.arrow", b"ARROW1\0\0xx", "", "rows.arrow is a damaged Arrow file"),
        ("rows.csv", b"input\na,b\n", "", "rows.csv:2: 2 values, 1 columns"),
        ("rows.json", b'[{"input": "a"},\n {"input": "b"]', "", "rows.json:2: Expecting ',' delimiter"),
        ("rows.jsonl", b"\x1f\x8b\x08", "", "rows.jsonl is a gzip file"),
        ("rows.jsonl", ROWS.encode(), "", "did you mean 'question'?"),
        ("rows.jsonl", ROWS.encode(), "--data.input-key qestion", "did you mean 'question'?"),
        ("rows.jsonl", b'{"promt": "a"}\n', "", "did you mean 'promt'?"),
        ("rows.jsonl", b'{"input": "a"}\n{"input": null}\n{"input": " "}\n{"input": []}\n', "", "prompt 'input' is empty (3 rows)"),
        ("rows.jsonl", TALK.replace("user", "usr").encode(), "--data.apply-chat-template", "has role 'usr'; did you mean 'user'?"),
        ("rows.jsonl", TALK.encode(), "", "chat messages without a chat template (1 row)"),
        ("rows.jsonl", b'{"input": "a"}\n', "--data.label-key answer", "no column 'answer' (1 row)"),
        ("rows.jsonl", b'{"input": "a"}\n', "--data.prompt-split trian", "has no such split, but 'train'"),
        ("rows.jsonl", b'{"input": "a"}\n', "--data.prompt-split train[5:]", "rows.jsonl has 1 rows"),
        ("rows.jsonl", b'{"input": "a"}\n', "--data.prompt-split train[", "is no split"),
        ("rows.jsonl", b'{"input": "a"}\n', "--data.prompt-probs 0.5,0.5", "has 2 weights for 1 datasets"),
        ("rows.jsonl", b'{"input": "a"}\n', "--data.prompt-probs 0.5", "sums to 0.5, not to 1"),
        ("rows.jsonl", TALK.encode(), "--data.apply-chat-template --data.tokenizer-chat-template chatm", "did you mean 'chatml'?"),
        (
            "rows.jsonl",
            TALK.encode(),
            "--data.apply-chat-template --data.tokenizer-chat-template own.jinja",
            "own.jinja:2 is no Jinja template",
        ),
        ("rows.jsonl", TALK.encode(), "--data.apply-chat-template --data.chat-template-kwargs think", "'think' is not JSON"),
    ],
)
def test_bad_data_ends_with_3_and_a_place_before_any_model_is_loaded(
    name: str,
    content: bytes | None,
    flags: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jinja").write_text("fine\n{% for x in %}")
    (tmp_path / "reward.py").write_text("def reward_func(queries, prompts, labels):\n    return {}\n")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    # The model is a hub id that is nowhere: were it asked for, the run would end with 5 and name it.
    named = ["--actor.model-name-or-path", "no-such/model", "--reward.remote-url", "reward.py", "--run.dir", "run"]
    assert main(["grpo", *named, "--data.prompt-dataset", name, *flags.split()]) == 3
    told = capsys.readouterr().err
    assert said in told and "no-such/model" not in told and "Traceback" not in told
    assert not (tmp_path / "run").exists()
