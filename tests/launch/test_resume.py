"""A run killed on the way and taken up again against the run that never stopped; and what a full disk or a wrong checkpoint meets."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hone.launch.cli import main
from hone.launch.observe.ledger import replay
from hone.launch.observe.run_directory import read_events, read_metrics
from hone.launch.saving import Checkpoints
from hone.learner.checkpoint import directory as checkpoints
from hone.learner.checkpoint.files import Files
from hone.learner.checkpoint.snapshot import Outcome
from tests.launch.running import started

WALL = ("timing/", "perf/")
SIZES = ["--run.backend", "local", "--rollout.batch-size", "6", "--rollout.n-samples-per-prompt", "4", "--train.batch-size", "12"]
ASKED = ["ppo", *SIZES, "--train.max-steps", "6", "--train.seed", "3", "--ckpt.save-steps", "3"]


def measured(run: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in step.items() if not name.startswith(WALL)} for step in read_metrics(run)[0]]


@pytest.fixture(scope="module")
def whole(hone_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without a stop, in a directory of their own; checkpoints after the third and the last."""
    home = tmp_path_factory.mktemp("whole")
    assert main([*ASKED, "--run.dir", str(home / "run"), "--ckpt.path", str(home / "ckpt")]) == 0
    return home


def test_a_killed_run_taken_up_again_is_the_run_that_never_stopped(whole: Path, tmp_path: Path) -> None:
    place = ["--ckpt.path", str(tmp_path / "ckpt")]
    with started([*ASKED, *place], tmp_path / "killed") as run:
        run.wait_for(lambda: (tmp_path / "ckpt" / "step_3").exists() and len(run.metrics()) >= 3)
        run.process.send_signal(signal.SIGKILL)
        run.process.wait()
    shutil.rmtree(tmp_path / "ckpt" / "step_6", ignore_errors=True)  # if it was quicker than the signal

    assert main([*ASKED, *place, "--ckpt.load-enable", "--run.dir", str(tmp_path / "resumed")]) == 0
    assert measured(tmp_path / "resumed") == measured(whole / "run")
    assert [step["step"] for step in measured(whole / "run")] == [1, 2, 3, 4, 5, 6]
    weights = [load_file(run / "model" / "model.safetensors") for run in (whole / "run", tmp_path / "resumed")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    # every prompt once, the same ones
    events = [read_events(run)[0] for run in (whole / "run", tmp_path / "resumed")]
    issued = [[prompt for event in of_run if event["kind"] == "issued" for prompt in event["prompts"]] for of_run in events]
    assert issued[0] == issued[1] and len(set(issued[1])) == len(issued[1]) == 36
    totals = replay(events[1]).verify()
    assert (totals.issued, totals.trained, totals.open) == (36, 36, 0)
    assert [event["step"] for event in events[1] if event["kind"] == "resumed"] == [3]
    # and the state after the last step, of both roles, down to the optimiser's
    for role in ("policy", "critic"):
        last = [load_file(next((home / "ckpt" / "step_6").glob(f"{role}-*"))) for home in (whole, tmp_path)]
        assert last[0].keys() == last[1].keys() and all(torch.equal(tensor, last[1][name]) for name, tensor in last[0].items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--train.seed", "4"], "another run: --train.seed 3 then, 4 now"),
        (["--rollout.batch-size", "3"], "another run: --rollout.batch-size 6 then, 3 now"),
        (["--ckpt.path", "nowhere"], "no complete checkpoint in nowhere"),
    ],
)
def test_a_checkpoint_that_does_not_fit_ends_with_4_before_a_model_is_loaded(
    whole: Path, tmp_path: Path, change: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*ASKED, "--ckpt.load-enable", "--ckpt.path", str(whole / "ckpt"), "--run.dir", str(tmp_path / "run"), *change]
    assert main(arguments) == 4
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_flipped_byte_is_named(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copytree(whole / "ckpt", tmp_path / "ckpt")
    for step in (3, 6):
        (file,) = (path / f"step_{step}").glob("critic-*")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    assert main([*ASKED, "--ckpt.load-enable", "--ckpt.path", str(path), "--run.dir", str(tmp_path / "run")]) == 4
    assert "critic-00000-of-00001.safetensors does not hold what was written" in capsys.readouterr().err


class Instant:
    """A group whose ranks have written at once, `error` or not."""

    def __init__(self) -> None:
        self.error = ""

    def save(self, directory: str) -> None:
        return

    def saved(self, wait: bool) -> list[Outcome] | None:
        return [Outcome(error=self.error)]


def test_a_full_disk_is_told_and_the_next_save_tries_again(tmp_path: Path) -> None:
    events: list[tuple[str, int]] = []
    group, full = Instant(), os.strerror(errno.ENOSPC)

    class Full(Files):
        room = False

        def make_directory(self, path: Path) -> None:
            if not self.room:
                raise OSError(errno.ENOSPC, full)
            super().make_directory(path)

    files = Full()
    saves = Checkpoints([group], tmp_path, keep=1, event=lambda kind, **fields: events.append((kind, fields["step"])), files=files)
    saves.begin(1, {})
    saves.poll(wait=False)
    files.room, group.error = True, f"[Errno 28] {full}"
    saves.begin(2, {"run.json": "{}"})
    saves.poll(wait=False)
    assert not list(tmp_path.iterdir())  # what was half written makes room
    group.error = ""
    for step in (3, 4):
        saves.begin(step, {"run.json": "{}"})
        saves.poll(wait=True)
    expected = [("checkpoint_failed", 1), ("checkpoint_failed", 2), ("checkpoint_saved", 3), ("checkpoint_saved", 4)]
    assert events == expected and [path.name for path in tmp_path.iterdir()] == ["step_4"]
    assert json.loads((checkpoints.find(tmp_path).path / "run.json").read_text()) == {}
