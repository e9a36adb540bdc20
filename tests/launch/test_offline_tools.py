"""What is done with trained models from the command line: adapters merged, rows scored; and the page that tells of all of it."""

import datetime
import json
import re
from pathlib import Path

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from hone.launch.cli import main
from hone.launch.observe.run_directory import read_metrics
from hone.launch.tools.score import OPTIONS, SWITCHES
from tests.golden.offline_curves import words
from tests.launch.conftest import save_model, write_rows

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "finetune.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
SHORT = ["--recipe", "laptop", "--train.max-steps", "1", "--train.batch-size", "2", "--data.max-len", "256"]


@pytest.mark.parametrize(
    ("name", "auto"),
    [("dpo", AutoModelForCausalLM), ("rm", AutoModelForSequenceClassification), ("prm", AutoModelForTokenClassification)],
)
def test_a_merged_adapter_is_the_model_that_the_run_wrote(name: str, auto: type, hone_cache: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "merged"
    assert main([*words(name, tmp_path), "--ds.lora.rank", "4", "--run.dir", str(run)]) == 0
    assert main(["merge-lora", str(tmp_path / "model"), str(run / "model" / "adapter"), str(out)]) == 0
    merged, written = (dict(auto.from_pretrained(place).named_parameters()) for place in (out, run / "model"))
    assert merged.keys() == written.keys()
    for weight, tensor in written.items():
        torch.testing.assert_close(merged[weight], tensor, atol=1e-6, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    adapter = peft.PeftConfig.from_pretrained(str(run / "model" / "adapter"))
    assert adapter.auto_mapping == {"model_type": AutoConfig.from_pretrained(out).model_type}
    assert main(["merge-lora", str(tmp_path / "model"), str(run / "model" / "adapter"), str(out)]) == 2


@pytest.mark.parametrize("moved", [False, True])
def test_an_adapter_does_not_go_into_another_architecture_of_the_same_shapes(
    moved: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, other = (save_model(tmp_path / kind, tokenizer, kind=kind, tied=True) for kind in ("llama", "qwen3"))
    adapter = tmp_path / "adapter"
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(right), peft.LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(adapter)
    if moved:  # its own configuration tells, as every adapter's that is written here
        peft.PeftConfig.from_pretrained(str(adapter)).save_pretrained(str(adapter), auto_mapping_dict={"model_type": "llama"})
        right.rename(tmp_path / "elsewhere")
    assert main(["merge-lora", str(other), str(adapter), str(tmp_path / "out")]) == 5
    said = capsys.readouterr().err
    assert "architecture llama" in said and "is qwen3; name the model it was trained on" in said
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_is_refused(tmp_path: Path, hone_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge-lora", "model", str(tmp_path), str(tmp_path / "out")]) == 5
    assert "holds no adapter" in capsys.readouterr().err
    assert main(["merge-lora", "model", "adapter", "out", "--dtype", "fp32"]) == 2
    assert "did you mean --param-dtype?" in capsys.readouterr().err


def test_a_reward_model_scores_a_file_as_transformers_does(hone_cache: Path, tmp_path: Path) -> None:
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    assert main([*words("rm", tmp_path), "--run.dir", str(run)]) == 0
    rows.write_text("".join(json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1), "id": n}) + "\n" for n in range(1, 9)))
    assert main(["score", str(run / "model"), str(rows), str(tmp_path / "out.jsonl"), "--batch-size", "3"]) == 0
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in scored] == list(range(1, 9)) and set(scored[0]) == {"prompt", "completion", "id", "score"}
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    for row in scored:
        with torch.no_grad():
            logits = model(tokenizer.encode(f"{row['prompt']}{row['completion']}<eos>", return_tensors="pt")).logits
        assert row["score"] == pytest.approx(float(logits[0, 0]), abs=1e-5)
    assert main(["score", str(run / "model"), str(rows), str(tmp_path / "z.jsonl"), "--normalize"]) == 0
    normal = [json.loads(line)["score"] for line in (tmp_path / "z.jsonl").read_text().splitlines()]
    expected = [(row["score"] - model.config.mean) / model.config.std for row in scored]
    assert normal == pytest.approx(expected, abs=1e-4)


def test_a_function_scores_a_file(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "completion": "2", "answer": "2"}\n{"prompt": "1+1=", "completion": "3", "answer": "2"}\n')
    line = ["score", "--function", str(ROOT / "examples" / "reward.py"), str(rows), str(tmp_path / "out.jsonl"), "--label-key", "answer"]
    assert main(line) == 0
    assert [json.loads(line)["score"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [1.0, 0.1]


def test_columns_that_are_no_json_are_kept_as_text_and_folders_are_made(tmp_path: Path) -> None:
    day = datetime.date(2026, 11, 22)
    pq.write_table(pa.table({"prompt": ["1+1="], "completion": ["2"], "answer": ["2"], "day": [day]}), tmp_path / "rows.parquet")
    out = tmp_path / "new" / "folder" / "out.jsonl"
    line = ["score", "--function", str(ROOT / "examples" / "reward.py"), str(tmp_path / "rows.parquet"), str(out), "--label-key", "answer"]
    assert main(line) == 0
    assert json.loads(out.read_text()) == {"prompt": "1+1=", "completion": "2", "answer": "2", "day": "2026-11-22", "score": 1.0}


def by_function(rows: Path, out: Path) -> list[str]:
    return ["score", "--function", str(ROOT / "examples" / "reward.py"), str(rows), str(out), "--label-key", "answer"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_scores_are_written_as_the_ending_says_whatever_the_columns_hold(name: str, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / name
    said = {"prompt": "1+1=", "completion": "2", "answer": "2"}
    lines = [json.dumps({**said, "note": "a\ud800", "id": 1, "more": ["\udfff"]}), json.dumps({**said, "id": "two"})]
    rows.write_text("\n".join(lines) + "\n")
    assert main(by_function(rows, out)) == 0
    if name == "out.jsonl":
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert found == [{**json.loads(line), "score": 1.0} for line in lines]
    else:
        found = pq.read_table(out).to_pylist()
        assert found[0] == {**said, "note": "a\\ud800", "id": "1", "more": ["\\udfff"], "score": 1.0}
        assert found[1] == {**said, "note": None, "id": '"two"', "more": None, "score": 1.0}
    assert sorted(file.name for file in tmp_path.iterdir()) == [name, "rows.jsonl"]


def test_scoring_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1", "completion": "2", "answer": "2"}])
    line = by_function(rows, tmp_path / "out.jsonl")
    line[2] = str(tmp_path / "reward.py")
    Path(line[2]).write_text("def reward_func(queries, prompts, labels):\n    raise ValueError('no')\n")
    assert main(line) == 6
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["reward.py", "rows.jsonl"]


def test_a_model_that_is_not_there_is_told_as_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1", "completion": "2"}])
    assert main(["score", "./nowhere", str(rows), str(tmp_path / "out.jsonl")]) == 5
    assert main(["chat", "--model.model-name-or-path", "./nowhere"]) == 5
    assert capsys.readouterr().err.count("nowhere") >= 2


def test_the_help_of_score_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {option} " in told for option in (*OPTIONS, *SWITCHES))


@pytest.mark.parametrize(
    ("row", "more", "told"),
    [
        ({"prompt": "1"}, "", "name one with --answer-key"),
        ({"promt": "1", "response": "2"}, "", "name one with --input-key; did you mean 'promt'?"),
        ({"prompt": "1", "response": "2"}, "--answer-key respons", "name one with --answer-key; did you mean 'response'?"),
        ({"prompt": [{"role": "user", "content": "1"}], "response": "2"}, "", "turn on --apply-chat-template"),
    ],
)
def test_what_score_is_missing_is_told_in_its_own_options(
    row: dict[str, object], more: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [row])
    line = ["score", "--function", str(ROOT / "examples" / "reward.py"), str(rows), str(tmp_path / "out.jsonl"), *more.split()]
    assert main(line) == 3
    said = capsys.readouterr().err
    assert told in said and "--data." not in said


@pytest.mark.parametrize("command", [command for command in COMMANDS if " launch score " not in command and command.count(" ") > 3])
def test_every_command_of_the_page_runs(
    command: str, tokenizer: PreTrainedTokenizerFast, hone_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    model = save_model(tmp_path / "model", tokenizer, kind="llama", tied=True)
    teacher = save_model(tmp_path / "teacher", tokenizer, kind="qwen3", tied=True)
    places = {"DIR": str(model), "TEACHER": str(teacher)}
    typed = [places.get(word, word) for word in command.split()]
    assert typed[:3] == ["uv", "run", "launch"]
    assert main([*typed[3:], *SHORT, "--run.dir", str(tmp_path / "run")]) == 0
    assert len(read_metrics(tmp_path / "run")[0]) == 1


def test_the_score_command_of_the_page_runs(
    tokenizer: PreTrainedTokenizerFast, hone_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    model = save_model(tmp_path / "model", tokenizer, kind="llama", tied=True)
    line = ["rm", "--model.model-name-or-path", str(model), "--data.dataset", "examples/pairs.jsonl"]
    assert main([*line, *SHORT, "--run.dir", str(tmp_path / "run")]) == 0
    (command,) = [command for command in COMMANDS if " launch score " in command]
    places = {"RM": str(tmp_path / "run" / "model"), "scored.jsonl": str(tmp_path / "scored.jsonl")}
    assert main([places.get(word, word) for word in command.split()[3:]]) == 0
    assert len((tmp_path / "scored.jsonl").read_text().splitlines()) == 4


def test_every_link_of_the_page_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    assert "uv run launch sft" in COMMANDS
