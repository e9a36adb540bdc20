"""Whole loops in this process: what is written, what is learnt from, and that a run that stopped anywhere is the run that never did."""

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hone.launch.cli import main
from hone.launch.loops import select
from hone.launch.loops.state import State, fingerprint
from hone.launch.observe.run_directory import read_events, read_metrics
from hone.launch.scoring import RewardModel
from hone.rollout.rewards.result import RewardItem
from tests.golden.offline_curves import words
from tests.launch.conftest import write_reward
from tests.launch.running import started

SMALL = ["--rollout.batch-size", "16", "--rollout.n-samples-per-prompt", "3", "--train.iterations", "2", "--train.batch-size", "8"]
BY_LENGTH = """return {"rewards": [float(len(queries[0]) - len(prompts[0]))]}"""


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stages(run: Path) -> list[tuple[int, str]]:
    return [(one["iteration"], one["stage"]) for one in json.loads((run / "loop.json").read_text())["stages"]]


def same(one: Path, other: Path) -> None:
    """Everything two runs came to, but for times and places."""
    for iteration in ("iteration_1", "iteration_2", "iteration_3"):
        for name in ("generated.jsonl", "scored.jsonl", "train.jsonl"):
            assert (one / iteration / name).exists() == (other / iteration / name).exists(), name
            if (one / iteration / name).exists():
                assert (one / iteration / name).read_bytes() == (other / iteration / name).read_bytes(), name
    weights = [next((run / "model").glob("*.safetensors")).read_bytes() for run in (one, other)]
    assert weights[0] == weights[1]
    lines = [
        [{name: value for name, value in row.items() if not name.startswith("timing/")} for row in read_metrics(run)[0]]
        for run in (one, other)
    ]
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def whole(hone_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rejection-sampling run that never stopped."""
    run = tmp_path_factory.mktemp("loops") / "whole"
    assert main(["rejection-sampling", *SMALL, "--run.dir", str(run)]) == 0
    return run


def test_every_iteration_leaves_what_its_stages_made(whole: Path) -> None:
    assert stages(whole) == [
        *((iteration, stage) for iteration in (1, 2) for stage in ("generate", "score", "select", "train")),
        (2, "export"),
        (3, "generate"),  # the last model's measurement
        (3, "score"),
    ]
    seen: set[str] = set()
    for iteration in (1, 2):
        place = whole / f"iteration_{iteration}"
        generated, scored, learnt = (read(place / name) for name in ("generated.jsonl", "scored.jsonl", "train.jsonl"))
        assert [(row["prompt_id"], row["sample"]) for row in scored] == [(row["prompt_id"], row["sample"]) for row in generated]
        assert len(scored) == 48 and [row["sample"] for row in scored[:3]] == [0, 1, 2]
        assert all(row["reward"] == float(row["response"] == str(row["label"])) for row in scored)
        # What is trained on are the very ids that were sampled, of the first with the highest reward.
        for group, row in zip(select.groups(scored), learnt, strict=True):
            best = max(group, key=lambda one: one["reward"])
            assert (row["prompt_ids"], row["completion_ids"], row["sample"]) == (best["prompt_ids"], best["response_ids"], best["sample"])
        names = {row["prompt_id"] for row in scored}
        assert len(names) == 16 and not names & seen  # no prompt is drawn again before all were
        seen |= names
        assert read_metrics(place / "train")[0][-1]["step"] == 2  # 16 rows, 8 a step
        assert (place / "model").resolve() == (place / "train" / "model").resolve()
    answered = {row["prompt_id"]: row["response"] for row in read(whole / "iteration_3" / "generated.jsonl")}
    assert len(answered) == 16


def test_the_model_that_comes_of_it_loads_and_is_the_last(whole: Path) -> None:
    last = dict(AutoModelForCausalLM.from_pretrained(whole / "iteration_2" / "model").named_parameters())
    found = dict(AutoModelForCausalLM.from_pretrained(whole / "model").named_parameters())
    assert all(torch.equal(weight, last[name]) for name, weight in found.items())
    first = dict(AutoModelForCausalLM.from_pretrained(whole / "iteration_1" / "model").named_parameters())
    assert not all(torch.equal(weight, first[name]) for name, weight in found.items())
    assert AutoTokenizer.from_pretrained(whole / "model").eos_token == "<eos>"


def test_the_report_tells_every_iteration(whole: Path) -> None:
    text, figures = (whole / "report.md").read_text(), json.loads((whole / "loop.json").read_text())["stages"]
    assert text.startswith("# hone rejection-sampling: finished") and "| 1 | 16 | 48 |" in text and "| after | 16 | 48 |" in text
    chosen = next(one["figures"] for one in figures if one["stage"] == "select")
    scored = list(select.groups(read(whole / "iteration_1" / "scored.jsonl")))
    assert chosen["equal"] == sum(len({row["reward"] for row in group}) == 1 for group in scored)
    line = read_metrics(whole)[0][0]
    assert line["loop/equal"] == chosen["equal"] and line["loop/kept"] == 16
    rewards = [row["reward"] for group in scored for row in group]
    assert line["rollout/reward_mean"] == pytest.approx(sum(rewards) / len(rewards))


def test_a_run_that_stops_after_every_stage_is_the_run_that_never_stopped(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, add = tmp_path / "run", State.add

    def stopped(self: State, *words: Any, **names: Any) -> None:
        add(self, *words, **names)
        raise KeyboardInterrupt

    monkeypatch.setattr(State, "add", stopped)
    line = ["rejection-sampling", *SMALL, "--run.dir", str(run), "--ckpt.load-enable"]
    for count in range(1, 12):
        assert main(line) == 130
        assert len(stages(run)) == count
        assert (run / "report.md").read_text().startswith("# hone rejection-sampling: stopped")
        assert "go on with" in capsys.readouterr().out
    assert main(line) == 0  # nothing is left but to say so
    same(run, whole)


def test_a_stage_that_stops_within_goes_on_and_comes_to_the_same(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hone.launch.programs.offline as training

    run = tmp_path / "run"
    line = ["rejection-sampling", *SMALL, "--run.dir", str(run), "--ckpt.save-steps", "1"]
    finetune, asked = training.finetune, list[int]()

    def stopped(*words: Any, **names: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(State, "add", stopped)
        assert main(line) == 130
    # As a kill leaves it: whole prompts, and one in the middle of a row.
    generated = run / "iteration_1" / "generated.jsonl"
    lines = generated.read_bytes().splitlines(keepends=True)
    generated.write_bytes(b"".join(lines[:16]) + lines[16][:40])
    assert stages(run) == []

    def within(*words: Any, **names: Any) -> Iterator[Any]:
        asked.append(names["start"])
        for step in finetune(*words, **names):
            yield step
            if step.number == 2:  # the checkpoint after the first step is whole by now
                raise KeyboardInterrupt

    again = ["rejection-sampling", *SMALL, "--resume", str(run), "--ckpt.save-steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "finetune", within)
        assert main(again) == 130
    assert stages(run) == [(1, "generate"), (1, "score"), (1, "select")]
    with monkeypatch.context() as patch:
        patch.setattr(training, "finetune", lambda *words, **names: (asked.append(names["start"]), finetune(*words, **names))[1])
        assert main(again) == 0
    # The second attempt begins behind the checkpoint of the first, in a directory of its own.
    assert asked[:2] == [0, 1] and (run / "iteration_1" / "train-2" / "model").is_dir()
    same(run, whole)
    assert [event["finished"] for event in read_events(run)[0] if event["kind"] == "resumed"] == [0, 3]


def test_what_was_changed_behind_its_back_is_not_gone_on_with(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name, symlinks=True))

    line = ["rejection-sampling", *SMALL]
    assert main([*line, "--resume", str(copy("other")), "--train.seed", "7"]) == 4
    assert "was begun with other settings: train.seed 42 (now 7)" in " ".join(capsys.readouterr().err.split())
    torn = copy("torn")
    (torn / "iteration_3" / "scored.jsonl").write_text("{}\n")
    assert main([*line, "--resume", str(torn)]) == 4
    assert "is not what was written there" in " ".join(capsys.readouterr().err.split())
    assert main([*line, "--run.dir", str(copy("taken"))]) == 2
    assert "holds a run already" in " ".join(capsys.readouterr().err.split())


def test_more_iterations_go_on_from_the_last(whole: Path, tmp_path: Path) -> None:
    more = Path(shutil.copytree(whole, tmp_path / "more", symlinks=True))
    line = ["rejection-sampling", *SMALL, "--resume", str(more), "--train.iterations", "3", "--train.measure-last", "False"]
    assert main(line) == 0
    assert stages(more)[:11] == stages(whole) and stages(more)[11:] == [(3, "select"), (3, "train"), (3, "export")]
    assert fingerprint(more / "model") == fingerprint(more / "iteration_3" / "model") != fingerprint(whole / "model")


def test_pairs_are_preferred_and_equals_are_dropped_and_counted(hone_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    reward = write_reward(tmp_path / "reward.py", BY_LENGTH)
    line = ["iterative-dpo", *SMALL, "--run.dir", str(run), "--reward.remote-url", str(reward), "--train.measure-last", "False"]
    assert main([*line, "--ref.follows", "first", "--rollout.batch-size", "40"]) == 0
    scored = list(select.groups(read(run / "iteration_1" / "scored.jsonl")))
    learnt, figures = read(run / "iteration_1" / "train.jsonl"), json.loads((run / "loop.json").read_text())["stages"][2]["figures"]
    equal = [group for group in scored if len({row["reward"] for row in group}) == 1]
    assert 0 < len(equal) < 40 and figures["equal"] == len(equal) and figures["kept"] == len(learnt) == 40 - len(equal)
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in learnt)
    config = (run / "iteration_2" / "train" / "config.toml").read_text()
    assert str(run / "iteration_1") in config  # the policy goes on
    assert 'model_name_or_path = "' + str(hone_cache) in config  # the reference does not
    steps = read_metrics(run / "iteration_2" / "train")[0]
    # The policy is not where the reference is any more, so the first loss is not that of no preference.
    assert abs(steps[0]["train/loss"] - 0.6931) > 1e-4
    assert abs(read_metrics(run / "iteration_1" / "train")[0][0]["train/loss"] - 0.6931) < 1e-4


def test_nothing_to_learn_from_is_an_error_with_its_reasons(hone_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = write_reward(tmp_path / "reward.py", """return {"rewards": [0.5]}""")
    line = ["iterative-dpo", *SMALL, "--run.dir", str(tmp_path / "run"), "--reward.remote-url", str(reward)]
    assert main(line) == 3
    assert "of 16 prompts 16 have responses that all earned the same" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "run" / "report.md").read_text().startswith("# hone iterative-dpo: failed")
    assert stages(tmp_path / "run") == [(1, "generate"), (1, "score")]


def test_prompts_tell_rewards_and_the_best_is_asked_for(hone_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert (
        main(["conditional-sft", *SMALL, "--run.dir", str(run), "--condition.normalize", "--condition.template", "{reward:+.0f} {input}"])
        == 0
    )
    one, two = (read(run / f"iteration_{iteration}" / "scored.jsonl") for iteration in (1, 2))
    learnt = read(run / "iteration_1" / "train.jsonl")
    assert "asked" not in one[0] and len(learnt) == len(one) == 48
    best = max(row["condition"] for row in learnt)
    assert {row["asked"] for row in two} == {f"{best:+.0f} {row['prompt']}" for row in two}
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert all(row["prompt_ids"] == tokenizer.encode(row["asked"]) for row in two)
    for row, source in zip(learnt, one, strict=True):
        assert row["prompt"] == f"{row['condition']:+.0f} {source['prompt']}" and row["completion_ids"] == source["response_ids"]
        assert row["prompt_ids"] == tokenizer.encode(row["prompt"])
    # Judges see the prompt as the data has it.
    assert all(row["reward"] == float(row["response"] == str(row["label"])) for row in two)
    assert "{reward:+.0f} {input}" in (run / "report.md").read_text()


def test_a_reward_model_judges_what_was_sampled(hone_cache: Path, tmp_path: Path) -> None:
    assert main([*words("rm", tmp_path), "--train.max-steps", "1", "--run.dir", str(tmp_path / "rm")]) == 0
    run, judge = tmp_path / "run", str(tmp_path / "rm" / "model")
    line = ["rejection-sampling", *SMALL, "--train.iterations", "1", "--train.measure-last", "False", "--run.dir", str(run)]
    assert main([*line, "--reward.model-name-or-path", judge]) == 0
    scored = read(run / "iteration_1" / "scored.jsonl")
    model = RewardModel(judge, dtype="fp32", max_len=64, normalize=False, batch_size=8)
    items = [RewardItem(prompt_id="", query=row["prompt"] + row["sampled"], prompt=row["prompt"], label=None) for row in scored]
    expected = [one.reward for one in asyncio.run(model.judge(items))]
    assert [row["reward"] for row in scored] == pytest.approx(expected, abs=1e-5)
    assert len({row["reward"] for row in scored}) > 3


def test_vllm_has_ended_before_training_begins(hone_cache: Path, tmp_path: Path) -> None:
    # In a process of its own, and watched from outside: the engine's core is a descendant while it samples, and gone when rows are trained.
    run = tmp_path / "run"
    line = ["rejection-sampling", *SMALL, "--train.iterations", "1", "--train.measure-last", "False", "--rollout.engine", "vllm"]
    with started(line, run) as watched:
        watched.wait_for(lambda: (run / "iteration_1" / "generated.jsonl").exists() and watched.core() is not None)
        core = watched.core()
        assert core is not None
        watched.wait_for(lambda: (run / "iteration_1" / "train").exists())
        assert not core.is_running()
        output = watched.finish()
    assert watched.process.returncode == 0, output
    # Python's tracker of a spawned process's resources ends a moment after the process it belongs to.
    deadline = time.monotonic() + 10
    while watched.survivors() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert watched.survivors() == []
    scored = read(run / "iteration_1" / "scored.jsonl")
    assert len(scored) == 48 and all(row["reward"] == float(row["response"] == str(row["label"])) for row in scored)
    assert all(1 <= len(row["response_ids"]) <= 8 for row in scored)
