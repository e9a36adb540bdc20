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
from transformers import PreTrainedTokenizerFast

from hone.launch import local
from hone.launch.cli import main
from hone.launch.observe.ledger import replay
from hone.launch.observe.run_directory import read_events, read_metrics
from hone.launch.saving import Checkpoints, place_of
from hone.learner.checkpoint import directory as checkpoints
from hone.learner.checkpoint.files import Files
from hone.learner.checkpoint.snapshot import Outcome
from hone.learner.errors import CheckpointError
from tests.launch.conftest import save_model
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


def test_a_run_goes_on_from_the_step_it_is_told(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [*ASKED, "--run.dir", str(tmp_path / "run"), "--resume", str(whole / "ckpt" / "step_3")]
    assert main(asked) == 0
    assert measured(tmp_path / "run") == measured(whole / "run")
    assert [event["step"] for event in read_events(tmp_path / "run")[0] if event["kind"] == "resumed"] == [3]
    assert (tmp_path / "run" / "checkpoints" / "step_6").is_dir()  # its own, beside those it came from


def test_what_resume_may_name(whole: Path, tmp_path: Path) -> None:
    assert place_of(str(whole / "ckpt" / "step_3"), verb="ppo") == (whole / "ckpt", 3)
    assert place_of(str(whole / "ckpt"), verb="ppo") == (whole / "ckpt", None)
    assert place_of(str(whole / "run"), verb="ppo") == (whole / "ckpt", None)  # as the run itself has written down
    runs = tmp_path / "runs"
    for name, step in {"ppo-20260101-000000": 4, "ppo-20260101-000001": 2, "grpo-20260102-000000": 9}.items():
        (runs / name / "checkpoints" / f"step_{step}").mkdir(parents=True)
    (runs / "ppo-20260103-000000" / "checkpoints" / "step_7.partial").mkdir(parents=True)
    assert place_of("latest", verb="ppo", runs=runs) == (runs / "ppo-20260101-000001" / "checkpoints", None)
    assert place_of("latest", verb="*", runs=runs) == (runs / "ppo-20260101-000001" / "checkpoints", None)
    with pytest.raises(CheckpointError, match=r"no run of rloo in .*runs has a complete checkpoint; name .* --resume PATH"):
        place_of("latest", verb="rloo", runs=runs)
    with pytest.raises(CheckpointError, match=r"no checkpoint or run .*nowhere"):
        place_of(str(tmp_path / "nowhere"), verb="ppo")


def test_a_checkpoint_of_another_model_format_or_half_written_ends_with_4_before_a_model_is_loaded(
    whole: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "build", lambda plan: pytest.fail("a model would have been loaded"))

    def refused(*words: str) -> str:
        assert main([*ASKED, "--run.dir", str(tmp_path / "run"), *words]) == 4
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    other = save_model(tmp_path / "other", tokenizer, kind="llama", tied=True)
    said = refused("--resume", str(whole / "ckpt"), "--actor.model-name-or-path", str(other))
    assert "is of another model than" in said and "model_type qwen3 there and llama here" in said

    copy = shutil.copytree(whole / "ckpt" / "step_3", tmp_path / "format" / "step_3")
    body = {**checkpoints.read_manifest(copy), "format": 7}
    (copy / "manifest.json").write_text(json.dumps({**body, "manifest_sha256": checkpoints._digest(body)}))
    assert "is of checkpoint format 7, this version reads 1" in refused("--resume", str(copy))

    half = shutil.copytree(whole / "ckpt" / "step_3", tmp_path / "half" / "step_3.partial")
    assert "only half-written ones: step_3.partial" in refused("--resume", str(half.parent))
    (half / "manifest.json").unlink()
    torn = half.rename(half.with_name("step_3"))
    assert "has no manifest.json, so it is no complete checkpoint" in refused("--resume", str(torn))
    assert "no checkpoint or run nowhere" in refused("--resume", "nowhere")


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


def test_an_old_checkpoint_that_cannot_go_makes_no_failure_of_the_new_one(tmp_path: Path) -> None:
    events: list[str] = []

    class Stuck(Files):
        def remove(self, directory: Path) -> None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    saves = Checkpoints([Instant()], tmp_path, keep=1, event=lambda kind, **_: events.append(kind), files=Stuck())
    for step in (1, 2, 3):
        saves.begin(step, {"run.json": "{}"})
        saves.poll(wait=True)
    assert events == ["checkpoint_saved", "checkpoint_saved", "checkpoint_left", "checkpoint_saved", "checkpoint_left"]
    assert checkpoints.find(tmp_path).step == 3


def test_a_disk_that_is_full_for_a_while_costs_a_run_that_checkpoint_and_nothing_else(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real loop and the real writer: the disk is full while the first checkpoint is written, in the middle of a file."""
    write, left = Files.write, [3]

    def full_at_first(files: Files, descriptor: int, data: memoryview) -> None:
        left[0] -= 1
        if left[0] == 0:
            write(files, descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(files, descriptor, data)

    monkeypatch.setattr(Files, "write", full_at_first)
    assert main([*ASKED, "--run.dir", str(tmp_path / "run"), "--ckpt.path", str(tmp_path / "ckpt")]) == 0
    assert left[0] < 0 and "the checkpoint of step 3 was not written" in (printed := capsys.readouterr()).out + printed.err
    assert measured(tmp_path / "run") == measured(whole / "run")  # training went on as if nothing had happened
    told = [(event["kind"], event["step"]) for event in read_events(tmp_path / "run")[0] if event["kind"].startswith("checkpoint_")]
    assert told == [("checkpoint_failed", 3), ("checkpoint_saved", 6)]
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["step_6"]
    checkpoints.verify(tmp_path / "ckpt" / "step_6")


def test_a_checkpoint_of_any_step_exports_the_model_of_that_step(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(whole / "run"), str(tmp_path / "last")]) == 0
    assert f"the policy of {whole / 'ckpt' / 'step_6'} is in {tmp_path / 'last'}" in capsys.readouterr().out
    last, final = (load_file(path / "model.safetensors") for path in (tmp_path / "last", whole / "run" / "model"))
    assert last.keys() == final.keys() and all(torch.equal(tensor, last[name]) for name, tensor in final.items())
    assert main(["export", str(whole / "ckpt" / "step_3"), str(tmp_path / "third"), "--role", "critic"]) == 0
    assert "score.weight" in load_file(tmp_path / "third" / "model.safetensors")
    for words, code, said in (
        (["export", str(whole / "run")], 2, "a checkpoint and a directory to export to, not 1 paths"),
        (["export", str(whole / "run"), str(tmp_path / "last")], 2, "is there already and is not an empty directory"),
        (["export", "nowhere", str(tmp_path / "new")], 4, "no checkpoint or run nowhere"),
        (["export", str(whole / "run"), str(tmp_path / "new"), "--role", "reward"], 4, "it has critic, policy: name one with --role"),
        (["export", str(whole / "run"), str(tmp_path / "new"), "--average"], 4, "has no moving average of its policy"),
        (["export", str(whole / "run"), str(tmp_path / "new"), "--wrong", "x"], 2, "unknown option --wrong"),
        (["export", str(whole / "run"), str(tmp_path / "new"), "--role"], 2, "--role takes a value"),
    ):
        assert main(words) == code
        assert said in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_run_cannot_begin_among_checkpoints_of_another_line(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((whole / "ckpt").iterdir())
    place = ["--ckpt.path", str(whole / "ckpt"), "--run.dir", str(tmp_path / "run")]
    assert main([*ASKED, *place]) == 4
    assert "has checkpoints of another line (step_3, step_6)" in capsys.readouterr().err
    assert main([*ASKED, *place, "--ckpt.resume", str(whole / "ckpt" / "step_3")]) == 4
    assert "another line (step_6), which would be taken for those of this run, which goes on after step 3" in capsys.readouterr().err
    assert sorted((whole / "ckpt").iterdir()) == before and not (tmp_path / "run").exists()


def test_a_run_cannot_go_on_after_its_own_end(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*ASKED, "--ckpt.resume", str(whole / "ckpt"), "--run.dir", str(tmp_path / "run"), "--train.max-steps", "2"]
    assert main(asked) == 4
    assert "step_6 is of step 6, and the run ends after step 2; --train.max-steps 6 or more" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
