"""`launch kd --kd.student-samples` is `launch on_policy_distill` in the words of kd."""

from pathlib import Path

import pytest

from hone.launch.builtin import builtin_model
from hone.launch.cli import main
from hone.launch.observe.run_directory import read_metrics
from hone.launch.student_samples import asked, said


def test_the_words_of_kd_become_those_of_the_other_command() -> None:
    words = ["--kd.student-samples", "--model.adam.lr=1e-4", "--teacher.model-name-or-path", "T", "--data.dataset", "--odd.one", "x"]
    assert asked(words) and not asked(["--kd.student", "kd.student_samples"])
    assert said(words) == ["--actor.adam.lr=1e-4", "--ref.model-name-or-path", "T", "--data.prompt-dataset", "--odd.one", "x"]


def test_what_the_other_command_does_not_know_it_answers(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["kd", "--kd.student-samples", "--teacher.model-name-or-path", "T", "--teacher.top-k", "3", "--model.model-name-or-path", "M"]
    assert main(line) == 2
    assert "launch on_policy_distill --ref.model-name-or-path T --ref.top-k 3 --actor.model-name-or-path M" in capsys.readouterr().err


def test_a_student_learns_from_its_own_samples(hone_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["kd", "--kd.student-samples", "--run.backend", "local", "--train.max-steps", "6", "--rollout.batch-size", "16"]
    assert main([*line, "--train.batch-size", "128", "--run.dir", str(tmp_path / "run")]) == 0
    assert "what `launch on_policy_distill` learns from" in capsys.readouterr().err
    rewards = [step["rollout/reward_mean"] for step in read_metrics(tmp_path / "run")[0]]
    assert len(rewards) == 6 and sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2  # recorded, not learnt from: the teacher knows the sums
    assert builtin_model().is_dir() and len(list(hone_cache.glob("arithmetic-*"))) >= 2
