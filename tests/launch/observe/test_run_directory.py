import json
import math
import os
import re
import stat

import numpy as np
import pyarrow.parquet
import pytest

from hone.launch.errors import UsageError
from hone.launch.observe.files import replaced
from hone.launch.observe.run_directory import RunDirectory, read_events, read_metrics


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run", "ppo")


def test_everything_is_private_whatever_the_umask(tmp_path, open_umask):
    run = RunDirectory.create(tmp_path / "run", "ppo")
    run.write_config("[train]\n")
    run.write_manifest({"seed": 0})
    run.append_metrics({"step": 1})
    run.append_event("issued", prompts=["a"], step=1)
    run.write_rollouts(1, [{"prompt_id": "a"}])
    folders = [run.path, *(path for path in run.path.rglob("*") if path.is_dir())]
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert {path.name for path in folders} == {"run", "rollouts", "checkpoints", "logs"}
    assert {mode(path) for path in folders} == {0o700}
    assert {path.name for path in files} == {"config.toml", "manifest.json", "metrics.jsonl", "events.jsonl", "step_000001.parquet"}
    assert {mode(path) for path in files} == {0o600}


def test_the_default_name_says_verb_and_time_and_never_repeats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = RunDirectory.create(None, "grpo"), RunDirectory.create(None, "grpo")
    assert re.fullmatch(r"runs/grpo-\d{8}-\d{6}", str(first.path))
    assert first.path != second.path and second.path.is_dir()


def test_an_empty_directory_is_taken_and_closed_to_others(tmp_path):
    (tmp_path / "run").mkdir(mode=0o755)
    assert mode(RunDirectory.create(tmp_path / "run", "ppo").path) == 0o700


def test_a_directory_with_something_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"not empty \(notes.txt\).*\n?.*--run.dir"):
        RunDirectory.create(tmp_path, "ppo")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "a\x1b[31m", "evil\u202egnp.sh"])
def test_a_name_that_would_mislead_is_refused(tmp_path, name):
    with pytest.raises(UsageError) as caught:
        RunDirectory.create(f"{tmp_path}/{name}", "ppo")
    assert str(caught.value).replace("\n", "").isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_name_too_long_or_a_file_in_the_way_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / ("x" * 300), tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="cannot be made"):
            RunDirectory.create(path, "ppo")


def test_someone_elses_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(UsageError, match="belongs to user id"):
        RunDirectory.create(tmp_path / "run", "ppo")


def test_metrics_come_back_as_written(run):
    steps = [{"step": 1, "rollout/reward_mean": 0.1 + 0.2, "train/kl": 1e-300}, {"step": 2, "rollout/reward_mean": np.float32(0.5)}]
    for metrics in steps:
        run.append_metrics(metrics)
    assert read_metrics(run.path) == (steps, 0)


def test_a_value_that_is_not_finite_is_a_named_string_never_a_nan_token(run):
    run.append_metrics({"step": 3, "train/policy_loss": math.nan, "train/kl": -math.inf})

    def refuse(token):
        raise AssertionError(token)

    line = json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 3, "train/policy_loss": "nan", "train/kl": "-inf"}
    (event,), _ = read_events(run.path)
    assert (event["kind"], event["step"], event["metrics"]) == ("not_finite", 3, {"train/policy_loss": "nan", "train/kl": "-inf"})
    (row,), _ = read_metrics(run.path)
    assert math.isnan(row["train/policy_loss"]) and row["train/kl"] == -math.inf


def test_an_unknown_metric_or_a_missing_step_is_refused_and_not_written(run):
    with pytest.raises(ValueError, match="train/polcy_loss"):
        run.append_metrics({"step": 1, "train/polcy_loss": 0.1})
    with pytest.raises(ValueError, match="needs its step"):
        run.append_metrics({"train/kl": 0.1})
    assert not (run.path / "metrics.jsonl").exists()


def test_a_torn_last_line_is_counted_and_passed_over(run):
    run.append_event("issued", step=1, prompts=["a"])
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"kind": "trai')
    events, torn = read_events(run.path)
    assert ([event["kind"] for event in events], torn) == (["issued"], 1)


def test_events_hold_no_secrets(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "sentinel-123456789")
    run.append_event("failed", error="401 for https://me:pw@host/x with sentinel-123456789")
    text = (run.path / "events.jsonl").read_text()
    assert "sentinel" not in text and "me:pw" not in text and "https://***@host/x with ***" in text


def test_rollouts_come_back_with_their_types(run):
    rows = [
        {"prompt_id": "d:0:1", "sample": 0, "prompt": "1+1=", "response": "2", "label": {"answer": [2]}, "reward": 1, "score": 1.0}
        | {"truncated": False, "tokens": [5, 6], "version": 3, "seed": 2**62},
        {"prompt_id": "d:0:1", "sample": 1, "prompt": "1+1=", "response": "\ud83d", "label": None, "reward": 0.5, "score": 0.0}
        | {"truncated": True, "tokens": [], "version": 3, "seed": 7, "extra": "x"},
    ]
    path = run.write_rollouts(12, rows)
    assert path == run.path / "rollouts" / "step_000012.parquet"
    table = pyarrow.parquet.read_table(path)
    assert str(table.schema.field("reward").type) == "double"
    read = table.to_pylist()
    assert read[0] == rows[0] | {"label": '{"answer": [2]}', "reward": 1.0, "extra": None}
    assert read[1]["label"] == "null" and read[1]["response"] == "\\ud83d" and read[1]["extra"] == "x"


def test_a_step_without_samples_has_no_file(run):
    with pytest.raises(ValueError, match="no rows"):
        run.write_rollouts(1, [])
    assert list((run.path / "rollouts").iterdir()) == []


def test_a_whole_file_is_replaced_or_left_as_it_was(run):
    run.write_manifest({"seed": 0})
    with pytest.raises(TypeError):
        run.write_manifest({"seed": object()})
    with pytest.raises(pyarrow.ArrowInvalid):
        run.write_rollouts(1, [{"reward": "high"}])
    with pytest.raises(OSError, match="No space"), replaced(run.path / "manifest.json") as file:
        file.write(b"{")
        raise OSError(28, "No space left on device")
    assert json.loads((run.path / "manifest.json").read_text()) == {"seed": 0}
    assert sorted(path.name for path in run.path.rglob("*") if path.is_file()) == ["manifest.json"]
