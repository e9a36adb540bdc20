"""What is left of a save that was cut off, and what is made of a directory somebody has damaged.

Every operation a save makes on the disk goes through `Files`; here it fails at each of them in turn, as a killed process, a full disk or
a machine without power would have it.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hone.learner.checkpoint import directory as checkpoints
from hone.learner.checkpoint import snapshot
from hone.learner.checkpoint.files import Files
from hone.learner.checkpoint.pieces import Piece
from hone.learner.checkpoint.shard_file import RoleReader, file_name, lay_out
from hone.learner.checkpoint.snapshot import Writer
from hone.learner.errors import CheckpointError

RANKS = 2
ROLES = ("policy", "critic")


class Cut(BaseException):
    """The process is gone: nothing after it runs, and nobody may catch it."""


class CutOff(Files):
    """Stops at operation number `at`: a killed process, with half of a write done; `unflushed` files lose their bytes, as without power."""

    def __init__(self, at: int, *, power: bool = True, error: OSError | None = None) -> None:
        self.at, self.power, self.error, self.count = at, power, error, 0
        self.names: list[str] = []
        self.open: dict[int, Path] = {}
        self.unflushed: set[Path] = set()

    def _operation(self, name: str, half: Callable[[], object] = lambda: None) -> None:
        self.names.append(name)
        self.count += 1
        if self.count - 1 == self.at:
            half()
            if self.error is not None:
                raise self.error
            if not self.power:
                for path in self.unflushed:
                    if path.exists():
                        os.truncate(path, path.stat().st_size // 2)
            raise Cut

    def make_directory(self, path: Path) -> None:
        self._operation("make_directory")
        super().make_directory(path)

    def create(self, path: Path) -> int:
        self._operation("create")
        descriptor = super().create(path)
        self.open[descriptor] = path
        self.unflushed.add(path)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> None:
        self._operation("write", lambda: super(CutOff, self).write(descriptor, data[: len(data) // 2]))
        super().write(descriptor, data)

    def flush(self, descriptor: int) -> None:
        self._operation("flush")
        super().flush(descriptor)
        self.unflushed.discard(self.open[descriptor])

    def flush_directory(self, path: Path) -> None:
        self._operation("flush_directory")
        super().flush_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self._operation("rename")
        super().rename(source, target)

    def remove(self, directory: Path) -> None:
        self._operation("remove", lambda: next(iter(sorted(directory.iterdir()))).unlink())
        super().remove(directory)


def values(role: str, step: int) -> torch.Tensor:
    return torch.arange(10, dtype=torch.float32) + 100 * step + (50 if role == "critic" else 0)


def layout(role: str, rank: int, step: int):
    """Half of a vector of ten on each rank, and a count on the first."""
    start = (0, 4)[rank]
    pieces = [Piece(section="master", name="w", shape=(10,), start=start, values=values(role, step)[start : (4, 10)[rank]])]
    if rank == 0:
        pieces.append(Piece(section="optimiser.step", name="w", shape=(), start=0, values=torch.tensor([step])))
    about = {"role": role, "rank": rank, "world_size": RANKS, "counters": {"steps": step}, "layout": [("w", [10])], "random_state": {}}
    return lay_out(pieces, about)


def write_with(files: Files, path: Path, layouts) -> Sequence[snapshot.Written]:
    """What the writer's thread does, in this one, so that where it stops is certain."""
    written = []
    for name, one in layouts.items():
        writer = Writer(files, pinned=False)
        body = torch.cat([piece.values.view(torch.uint8) for piece in one.pieces])
        written.append(writer._write(path / name, one, body))
    return written


def save(files: Files, root: Path, step: int, *, keep: int = 2) -> Path:
    """A checkpoint of two roles by two ranks, from the first operation to the removal of the oldest."""
    partial = checkpoints.begin(files, root, step)
    written = []
    for rank in range(RANKS):
        written += write_with(files, partial, {file_name(role, rank=rank, world_size=RANKS): layout(role, rank, step) for role in ROLES})
    path = checkpoints.complete(files, partial, written, {"run.json": json.dumps({"step": step})})
    checkpoints.prune(files, root, keep=keep, newest=step)
    return path


def content(path: Path) -> set[int]:
    """The step of every part of a checkpoint: one, if its roles belong together."""
    steps = {json.loads((path / "run.json").read_text())["step"]}
    for role in ROLES:
        reader = RoleReader(path, role)
        steps |= {reader.counters["steps"], int(reader.read("optimiser.step", "w", start=0, numel=1))}
        steps |= {int(one) for one in ((reader.whole("master", "w") - values(role, 0)) / 100).tolist()}
    return steps


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    kept = []
    for step in range(1, 6):
        save(Files(), tmp_path, step, keep=3)
        kept.append(sorted(path.name for path in tmp_path.iterdir()))
    assert kept == [[f"step_{step}" for step in range(max(1, last - 2), last + 1)] for last in range(1, 6)]


@pytest.mark.parametrize("power", [True, False])
def test_a_save_cut_off_anywhere_leaves_the_newest_complete_one(tmp_path: Path, power: bool) -> None:
    for step in (1, 2):
        save(Files(), tmp_path / "start", step)
    counting = CutOff(-1)
    save(counting, shutil.copytree(tmp_path / "start", tmp_path / "count"), 3)
    assert {"make_directory", "create", "write", "flush", "rename", "flush_directory", "remove"} == set(counting.names)
    renamed = next(index for index, name in enumerate(counting.names) if name == "rename")
    for at in range(counting.count):
        root = shutil.copytree(tmp_path / "start", tmp_path / f"cut{at}")
        with pytest.raises(Cut):
            save(CutOff(at, power=power), root, 3)
        found = checkpoints.find(root)
        assert found.step == (3 if at > renamed else 2) and content(found.path) == {found.step}, counting.names[at]
        # and the next save is none the worse for what was left behind
        save(Files(), root, 3)
        assert content(checkpoints.find(root).path) == {3}
        assert sorted(path.name for path in root.iterdir()) == ["step_2", "step_3"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_checkpoint_byte_for_byte(tmp_path: Path, code: int) -> None:
    save(Files(), tmp_path / "start", 1)
    before = {file.name: file.read_bytes() for file in (tmp_path / "start" / "step_1").iterdir()}
    counting = CutOff(-1)
    save(counting, shutil.copytree(tmp_path / "start", tmp_path / "count"), 2)
    for at in range(counting.names.index("rename") + 1):
        root = shutil.copytree(tmp_path / "start", tmp_path / f"full{at}")
        with pytest.raises(OSError, match=os.strerror(code)):
            save(CutOff(at, error=OSError(code, os.strerror(code))), root, 2)
        assert checkpoints.find(root).step == 1
        assert {file.name: file.read_bytes() for file in (root / "step_1").iterdir()} == before


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_found(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        save(Files(), tmp_path / "good", step)
    names = sorted(file.name for file in (tmp_path / "good" / "step_2").iterdir())
    assert len(names) == 2 * RANKS + 2
    for name in names:
        root = shutil.copytree(tmp_path / "good", tmp_path / f"{damage}-{name}")
        file = root / "step_2" / name
        if damage == "flipped":
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        elif damage == "truncated":
            os.truncate(file, file.stat().st_size - 1)
        else:
            file.unlink()
        found = checkpoints.find(root)
        assert found.step == 1 and len(found.passed_over) == 1 and name in found.passed_over[0]
        with pytest.raises(CheckpointError, match=f"no complete checkpoint of step 2 .*{name}.* --ckpt.path"):
            checkpoints.find(root, step=2)


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*it holds none.*--ckpt\.path or --resume, or start anew"):
        checkpoints.find(tmp_path / "nowhere")
    checkpoints.begin(Files(), tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"only half-written ones: step_4\.partial"):
        checkpoints.find(tmp_path)
    path = save(Files(), tmp_path, 5)
    manifest = checkpoints.read_manifest(path)

    def rewritten(**change: object) -> None:
        body = {**manifest, **change}
        (path / "manifest.json").write_text(json.dumps({**body, "manifest_sha256": checkpoints._digest(body)}))

    rewritten(format=7)
    with pytest.raises(CheckpointError, match="of checkpoint format 7, this version reads 1"):
        checkpoints.verify(path)
    rewritten(files={"../../etc/passwd": {"size": 1, "sha256": ""}})
    with pytest.raises(CheckpointError, match=r"names files outside its directory \('\.\./\.\./etc/passwd'\)"):
        checkpoints.verify(path)
    (path / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be trusted"):
        checkpoints.verify(path)
    (tmp_path / "policy-00000-of-00001.safetensors").write_bytes(b"\x80\x04 pickled")
    with pytest.raises(CheckpointError, match=r"policy-00000-of-00001\.safetensors is not a file of a checkpoint"):
        RoleReader(tmp_path, "policy")


def test_a_file_is_what_safetensors_reads_and_what_training_does_next_is_not_in_it(tmp_path: Path) -> None:
    live = {torch.float32: torch.arange(6.0), torch.bfloat16: torch.arange(3.0).bfloat16(), torch.int64: torch.tensor([2**40])}
    pieces = [Piece(section=str(dtype), name="a.b", shape=(9, 2), start=5, values=tensor) for dtype, tensor in live.items()]
    expected = {piece.key: piece.values.clone() for piece in pieces}
    writer = Writer(Files(), pinned=False)
    writer.save({tmp_path / "x.safetensors": lay_out(pieces, {"role": "policy"})})
    for tensor in live.values():
        tensor.zero_()
    outcome = writer.outcome(wait=True)
    assert outcome is not None and writer.outcome(wait=True) is None
    assert [(file.name, file.size) for file in outcome.files] == [("x.safetensors", (tmp_path / "x.safetensors").stat().st_size)]
    assert oct((tmp_path / "x.safetensors").stat().st_mode)[-3:] == "600"
    with safe_open(tmp_path / "x.safetensors", framework="pt") as tensors:
        assert set(tensors.keys()) == set(expected)
        assert all(torch.equal(tensors.get_tensor(key), value) for key, value in expected.items())


def test_any_range_is_put_together_from_any_cut(tmp_path: Path) -> None:
    path = save(Files(), tmp_path, 3)
    reader = RoleReader(path, "policy")
    for start in range(10):
        for numel in range(1, 11 - start):
            assert torch.equal(reader.read("master", "w", start=start, numel=numel), values("policy", 3)[start : start + numel])
    with pytest.raises(CheckpointError, match="policy has master of w up to element 10, not 11"):
        reader.read("master", "w", start=2, numel=9)
    with pytest.raises(CheckpointError, match="policy has ema of w up to element 0, not 1"):
        reader.read("ema", "w", start=0, numel=1)
    (path / file_name("policy", rank=1, world_size=RANKS)).unlink()
    with pytest.raises(CheckpointError, match=r"1 files of role 'policy', of runs of \[2\] ranks"):
        RoleReader(path, "policy")


def test_an_error_of_the_writer_is_never_lost(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    one = {"policy-00000-of-00001.safetensors": layout("policy", 0, 1)}
    writer = Writer(CutOff(1, error=full), pinned=False)
    writer.save({tmp_path / name: each for name, each in one.items()})
    outcome = writer.outcome(wait=True)
    assert outcome is not None and "No space left on device" in outcome.error and outcome.files == ()
    again = Writer(CutOff(1, error=full), pinned=False)
    again.save({tmp_path / "second": layout("policy", 0, 1)})
    with pytest.raises(CheckpointError, match=r"the last checkpoint was not written: .*No space left"):
        again.save({tmp_path / "third": layout("policy", 0, 1)})
    again.save({tmp_path / "fourth": layout("policy", 0, 1)})  # room was made
    again.raise_unseen()
    assert (tmp_path / "fourth").exists() and not (tmp_path / "third").exists()


def test_a_run_removes_its_own_older_checkpoints_and_none_of_a_later_step(tmp_path: Path) -> None:
    for step in (20, 30, 40):
        save(Files(), tmp_path, step, keep=3)
    branch = save(Files(), tmp_path, 10, keep=1)
    assert branch.is_dir() and sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_20", "step_30", "step_40"]
    save(Files(), tmp_path, 25, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_25", "step_30", "step_40"]
    assert [path.name for path in checkpoints.later(tmp_path, than=25)] == ["step_30", "step_40"]


def test_one_that_was_being_replaced_when_the_process_ended_is_still_found(tmp_path: Path) -> None:
    kept = save(Files(), tmp_path, 7)
    kept.rename(kept.with_name(f"step_7.replaced{checkpoints.PARTIAL}"))
    found = checkpoints.find(tmp_path)
    assert found.step == 7 and content(found.path) == {7}
    again = save(Files(), tmp_path, 7)  # complete once more: the other goes
    assert checkpoints.find(tmp_path).path == again and [path.name for path in tmp_path.iterdir()] == ["step_7"]
