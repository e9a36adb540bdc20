"""Whole runs over labelled rows in this process: what is learnt, what is written, what goes on after a stop, what loads elsewhere."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hone.launch.builtin import builtin_model
from hone.launch.cli import main
from hone.launch.observe.metrics import check_names
from hone.launch.observe.run_directory import read_events, read_metrics
from tests.golden.offline_curves import record, words
from tests.launch.conftest import write_rows

TIMES = ("timing/", "perf/")


def steps_of(run: Path) -> list[dict[str, int | float]]:
    """A run's steps without what a clock or the machine says."""
    return [{name: value for name, value in step.items() if not name.startswith(TIMES)} for step in read_metrics(run)[0]]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(directory).named_parameters())


def test_without_arguments_the_built_in_model_learns_what_it_is_shown(hone_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["sft", "--run.dir", str(run), "--train.max-steps", "20"]) == 0
    steps, torn = read_metrics(run)
    assert torn == 0 and [step["step"] for step in steps] == list(range(1, 21))
    for step in steps:
        check_names(step)
    assert [step["step"] for step in steps if "eval/loss" in step] == [10, 20]
    assert steps[-1]["eval/loss"] < 0.1 < steps[0]["train/loss"]
    assert (run / "report.md").read_text().startswith("# hone sft: finished") and "## Loss" in (run / "report.md").read_text()
    assert "Ledger" not in (run / "report.md").read_text()

    # The untrained model gives most answers with the wrong sign; this one was shown right answers only.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    asked = tokenizer(["3+4=", "7+1=", "2+6="], return_tensors="pt")["input_ids"]
    answered = model.generate(asked, max_new_tokens=2, do_sample=False)
    assert tokenizer.batch_decode(answered) == ["3+4=7<eos>", "7+1=8<eos>", "2+6=8<eos>"]


@pytest.mark.parametrize("name", ["sft", "kto", "rm"])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(name: str, hone_cache: Path, tmp_path: Path) -> None:
    line = [*words(name, tmp_path), "--ckpt.save-steps", "4"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main([*line, "--run.dir", str(whole)]) == 0
    assert main([*line, "--run.dir", str(again), "--resume", str(whole / "checkpoints" / "step_4")]) == 0
    assert steps_of(again) == steps_of(whole)
    files = [sorted((run / "model").glob("*.safetensors")) for run in (whole, again)]
    assert files[0] and [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    assert json.loads((whole / "model_best" / "best.json").read_text()) == json.loads((again / "model_best" / "best.json").read_text())


def test_going_on_with_other_rows_is_refused(hone_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*words("sft", tmp_path), "--ckpt.save-steps", "4"]
    assert main([*line, "--run.dir", str(tmp_path / "whole")]) == 0
    more = ["--data.max-samples", "48", "--run.dir", str(tmp_path / "again"), "--resume", str(tmp_path / "whole")]
    assert main([*line, *more]) == 3
    assert "the data has changed since the run was saved" in capsys.readouterr().err


def test_a_reward_model_gives_the_same_scores_in_plain_transformers(hone_cache: Path, tmp_path: Path) -> None:
    steps = record("rm", tmp_path)
    directory = tmp_path / "rm" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    from hone.datasets.tasks.labelled_arithmetic import pairs
    from hone.launch.offline_data import EVALUATION_SEED

    held_out = pairs(3 + EVALUATION_SEED, 12)
    sides: dict[str, torch.Tensor] = {}
    for side in ("chosen", "rejected"):
        ids = [tokenizer.encode(f"{row.columns['prompt']}{row.columns[side]}<eos>", return_tensors="pt") for row in held_out.rows]
        with torch.no_grad():
            sides[side] = torch.cat([model(one).logits[:, 0] for one in ids])
    assert float(sides["chosen"].mean()) == pytest.approx(steps[-1]["eval/chosen_reward"], rel=1e-5)
    assert float(sides["rejected"].mean()) == pytest.approx(steps[-1]["eval/rejected_reward"], rel=1e-5)
    every = torch.cat(list(sides.values())).double()
    assert (model.config.mean, model.config.std) == pytest.approx((float(every.mean()), float(every.std())), rel=1e-5)


def test_the_best_model_is_kept_beside_the_last(hone_cache: Path, tmp_path: Path) -> None:
    # A rate that ruins the model after the first evaluation: the last is not the best.
    line = [
        *words("sft", tmp_path),
        "--model.lr-scheduler",
        "constant",
        "--model.adam.lr",
        "0.3",
        "--eval.steps",
        "1",
        "--model.max-norm",
        "1e9",
    ]
    assert main([*line, "--run.dir", str(tmp_path / "run")]) == 0
    losses = [step["eval/loss"] for step in read_metrics(tmp_path / "run")[0]]
    best = json.loads((tmp_path / "run" / "model_best" / "best.json").read_text())
    assert best == {"key": "eval/loss", "value": min(losses), "step": losses.index(min(losses)) + 1} and best["step"] < len(losses)
    last, kept = weights(tmp_path / "run" / "model"), weights(tmp_path / "run" / "model_best")
    assert any(not torch.equal(weight, kept[name]) for name, weight in last.items())
    assert [event["step"] for event in read_events(tmp_path / "run")[0] if event["kind"] == "best"][-1] == best["step"]


def test_adapters_train_and_the_model_that_is_written_has_them_in_it(hone_cache: Path, tmp_path: Path) -> None:
    line = [*words("dpo", tmp_path), "--ds.lora.rank", "4", "--train.enable-ema"]
    assert main([*line, "--run.dir", str(tmp_path / "run")]) == 0
    steps = read_metrics(tmp_path / "run")[0]
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    assert (tmp_path / "run" / "model" / "adapter" / "adapter_config.json").is_file()
    before, after = weights(tmp_path / "model"), weights(tmp_path / "run" / "model")
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())
    assert (tmp_path / "run" / "model_ema" / "config.json").is_file()


def test_a_language_model_can_say_whether_steps_are_good(hone_cache: Path, tmp_path: Path) -> None:
    line = [*words("prm", tmp_path), "--data.reward-tokens", "+,-"]
    assert main([*line, "--run.dir", str(tmp_path / "run")]) == 0
    steps = read_metrics(tmp_path / "run")[0]
    assert steps[0]["train/prm_loss"] == pytest.approx(0.69, abs=0.2)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model") is not None


def test_margins_that_the_loss_does_not_know_are_told_and_not_read(hone_cache: Path, tmp_path: Path) -> None:
    line = [*words("log_exp", tmp_path), "--train.max-steps", "1"]
    file = tmp_path / "data.dataset.jsonl"
    file.write_text(file.read_text().replace('"margin": 0.5', '"margin": "half"'))
    assert main([*line, "--run.dir", str(tmp_path / "run")]) == 0
    (told,) = [event["note"] for event in read_events(tmp_path / "run")[0] if event["kind"] == "rows_noted"]
    assert told == "the column 'margin' is not read: --loss log_exp knows no margins, --loss sigmoid does"
    assert main([*words("rm_margin", tmp_path), "--run.dir", str(tmp_path / "other"), "--train.max-steps", "1"]) == 0
    assert not [event for event in read_events(tmp_path / "other")[0] if event["kind"] == "rows_noted"]


@pytest.mark.parametrize("weights", [None, "0.8,0.2", "0.25,0.75"])
def test_two_datasets_are_learnt_from_by_their_weights(weights: str | None, hone_cache: Path, tmp_path: Path) -> None:
    # An answer of the first has two tokens with its end, one of the second six: the tokens of a step tell how many it has of each.
    files = [
        write_rows(tmp_path / f"{answer}.jsonl", [{"prompt": f"{row}+0=", "completion": answer} for row in range(120)])
        for answer in ("1", "12345")
    ]
    line = [*words("sft", tmp_path), "--eval.dataset", str(files[0]), "--train.batch-size", "20", "--data.max-samples", "120"]
    line += ["--data.dataset", ",".join(map(str, files)), *(["--data.dataset-probs", weights] if weights else [])]
    assert main([*line, "--run.dir", str(tmp_path / "run")]) == 0
    tokens = [int(step["train/tokens"]) for step in read_metrics(tmp_path / "run")[0]]
    seconds = [(count - 2 * 20) / 4 for count in tokens]
    assert all(one == int(one) and 0 <= one <= 20 for one in seconds) and len(set(seconds)) > 1
    share = 0.5 if weights is None else float(weights.partition(",")[2])
    assert abs(sum(seconds) / 200 - share) < 3 * math.sqrt(share * (1 - share) / 200)


@pytest.mark.parametrize(("weights", "told"), [("0.7,0.2", "sums to 0.9, not to 1"), ("1", "has 1 weights for 2 datasets")])
def test_weights_that_cannot_be_meant_end_with_three(
    weights: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], hone_cache: Path
) -> None:
    files = [write_rows(tmp_path / f"{name}.jsonl", [{"prompt": "1+1=", "completion": "2"}] * 6) for name in "ab"]
    line = [*words("sft", tmp_path), "--eval.dataset", str(files[0]), "--data.dataset", ",".join(map(str, files))]
    assert main([*line, "--data.dataset-probs", weights, "--run.dir", str(tmp_path / "run")]) == 3
    assert told in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["sft", "grpo"])
def test_a_run_that_learns_nothing_does_not_end_well(
    verb: str, hone_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if verb == "grpo":
        builtin_model()  # which is learnt, too
    norms = [math.nan, math.nan, 1.0]
    monkeypatch.setattr("hone.learner.engines.single.get_total_norm", lambda _: torch.tensor(norms.pop(0)))
    rolling = ["--run.backend", "local", "--rollout.batch-size", "4", "--rollout.n-samples-per-prompt", "2", "--train.batch-size", "8"]
    line = [verb, *rolling] if verb == "grpo" else words(verb, tmp_path)
    # Two steps in a row may be left out, and with a third that is not, something was learnt.
    for steps, code in (("2", 8), ("3", 0)):
        norms[:] = [math.nan, math.nan, 1.0]
        run = tmp_path / steps
        assert main([*line, "--train.max-steps", steps, "--run.dir", str(run)]) == code
        assert (run / "model").exists() == (code == 0)
    assert "nothing was learnt" in capsys.readouterr().err
    assert (tmp_path / "2" / "report.md").read_text().startswith(f"# hone {verb}: failed")
