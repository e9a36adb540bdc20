"""Rollout ahead of the learner, over-sampling and sleep: what cannot work is refused with exit code 2 before anything starts."""

import pytest

from hone.launch.cli import main
from hone.launch.config import default_config
from hone.launch.programs.rolling import window
from hone.launch.rules import notes
from hone.launch.schema import replaced
from hone.rollout.buffer import Window
from tests.launch.asking import crossed, only, resolved

ASYNC = "grpo --train.async-enable"


@pytest.mark.parametrize(
    ("line", "what", "mend"),
    [
        (f"{ASYNC} --run.backend local", "train.async_enable needs engines that sample while others compute", "--run.backend ray"),
        (
            "grpo --rollout.over-sampling 2 --run.backend local",
            "rollout.over_sampling needs engines that sample while",
            "--run.backend ray",
        ),
        (f"{ASYNC} --ds.enable-sleep", "ds.enable_sleep lets one side sleep while the other works", "drop one of them"),
        (f"{ASYNC} --placement.engine learner", "engines and policy share group learner", "--placement.engine rollout"),
        ("grpo --train.partial-rollout-enable", "without train.async_enable none is under way then", "add --train.async-enable"),
        ("grpo --train.async-queue-size 2", "train.async_queue_size without train.async_enable does nothing", "add --train.async-enable"),
        ("grpo --rollout.straggler-policy reissue", "without rollout.over_sampling does nothing", "add --rollout.over-sampling 1.5"),
        ("grpo --rollout.max-staleness 2", "rollout.max_staleness without rollout.over_sampling does nothing", "--rollout.over-sampling"),
        (
            f"{ASYNC} --rollout.over-sampling 2 --rollout.straggler-policy keep",
            "keep lets responses go on over an update, for which nothing holds them",
            "--train.partial-rollout-enable",
        ),
        (
            f"{ASYNC} --train.async-queue-size 3 --rollout.max-staleness 2",
            "3 batches sampled ahead make samples 3 versions old, and rollout.max_staleness is 2",
            "--rollout.max-staleness 3 or more",
        ),
        ("grpo --vllm.enable-sleep --placement.engine learner", "vllm.enable_sleep needs a GPU", "drop it"),
        ("grpo --vllm.sleep-level 2", "vllm.sleep_level without vllm.enable_sleep does nothing", "add --vllm.enable-sleep"),
    ],
)
def test_what_cannot_work_is_named_with_its_remedy(line: str, what: str, mend: str) -> None:
    problem = only(crossed(line))
    assert what in problem.what and mend in problem.mend


def test_sleep_on_gpus_wants_a_gpu_that_is_shared() -> None:
    own = "grpo --actor.model-name-or-path m --data.prompt-dataset p.jsonl --reward.remote-url r.py --vllm.enable-sleep"
    assert "the engines have GPUs of their own" in only(crossed(own, gpus=2)).what
    assert crossed(f"{own} --placement.engine learner", gpus=1) == []
    assert "vllm.enable_sleep lets one side sleep" in crossed(f"{own} --placement.engine learner --rollout.over-sampling 2", gpus=1)[0].what


@pytest.mark.parametrize(
    "line",
    [
        ASYNC,
        f"{ASYNC} --train.partial-rollout-enable --rollout.over-sampling 1.5 --rollout.straggler-policy keep --rollout.max-staleness 3",
        "grpo --rollout.over-sampling 1.5 --rollout.straggler-policy reissue --rollout.max-staleness 0",
    ],
)
def test_what_works_passes(line: str) -> None:
    assert crossed(line) == []


def test_samples_of_older_policies_without_a_correction_are_noted() -> None:
    assert any("trains on samples of older policies" in note for note in notes(resolved(ASYNC), 0))
    assert not any("older policies" in note for note in notes(resolved(f"{ASYNC} --algo.correction.level token"), 0))
    assert not any("older policies" in note for note in notes(resolved("grpo"), 0))


def test_the_window_is_what_was_asked() -> None:
    def of(**values: object) -> Window:
        base = {"rollout.batch_size": 8}
        return window(
            replaced(default_config("grpo"), {**base, **{name.replace("__", "."): value for name, value in values.items()}}), steps=9
        )

    assert of(train__async_enable=True) == Window(batch=8, ahead=1, staleness=1, extra=0, last_step=9)
    assert of(train__async_enable=True, train__async_queue_size=3, rollout__max_staleness=5).staleness == 5
    assert of(rollout__over_sampling=1.2) == Window(batch=8, ahead=0, staleness=1, extra=2, last_step=9)
    assert of(rollout__over_sampling=1.2, rollout__max_staleness=0).staleness == 0
    assert of(rollout__batch_size=10, rollout__over_sampling=1.1).extra == 1


def test_the_command_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grpo", "--train.async-enable", "--run.backend", "local"]) == 2
    assert "train.async_enable" in capsys.readouterr().err
    assert main(["grpo", "--rollout.vllm-generate-batch-size", "64"]) == 2
    assert "--rollout.over-sampling" in capsys.readouterr().err
