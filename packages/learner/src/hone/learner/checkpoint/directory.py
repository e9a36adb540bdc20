"""The directory of checkpoints: how one becomes complete, which is the newest, and which go.

step_N.partial/   being written; never read            step_N/manifest.json   step, sizes and SHA-256 of every file
step_N/           complete: it was renamed to that name after every file, the manifest and the names were flushed
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone.learner.checkpoint.files import Files
from hone.learner.checkpoint.snapshot import Written, check_file, write_file
from hone.learner.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial"
_REPLACED = f".replaced{PARTIAL}"
_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A complete checkpoint, and the newer ones that were passed over: why each cannot be used."""

    path: Path
    step: int
    passed_over: tuple[str, ...] = ()


def begin(files: Files, root: Path, step: int) -> Path:
    """A fresh place to write step `step` to; what an earlier attempt left there is removed. Raises OSError."""
    path = root / f"step_{step}{PARTIAL}"
    if path.exists():
        files.remove(path)
    files.make_directory(path)
    return path


def complete(files: Files, partial: Path, written: Sequence[Written], texts: Mapping[str, str | bytes]) -> Path:
    """Adds `texts` (file name -> content) and the manifest, flushes everything, and gives the directory its name.

    Raises OSError, a file that is not there in full included: ranks that write to another machine's disk.
    """
    for file in written:
        size = (partial / file.name).stat().st_size
        if size != file.size:
            raise OSError(f"{partial / file.name} has {size} bytes, {file.size} were written; checkpoints need a disk all ranks share")
    contents = {name: text.encode() if isinstance(text, str) else text for name, text in texts.items()}
    added = [write_file(files, partial / name, [memoryview(content)]) for name, content in contents.items()]
    target = partial.with_name(partial.name.removesuffix(PARTIAL))
    body = {
        "format": FORMAT,
        "step": step_of(target),
        "files": {file.name: {"size": file.size, "sha256": file.sha256} for file in (*written, *added)},
    }
    text = json.dumps({**body, "manifest_sha256": _digest(body)}, indent=1)
    write_file(files, partial / MANIFEST, [memoryview(text.encode())])
    files.flush_directory(partial)
    if target.exists():  # of a run that was taken up again before it
        replaced = target.with_name(f"{target.name}{_REPLACED}")
        if replaced.exists():
            files.remove(replaced)
        files.rename(target, replaced)
    files.rename(partial, target)
    files.flush_directory(target.parent)
    return target


def prune(files: Files, root: Path, *, keep: int, newest: int) -> list[Path]:
    """Removes what is half written, and of the checkpoints up to step `newest`, just complete, all but the last `keep`.

    One of a later step is of another line of training, and not this run's to remove.
    """
    steps = sorted((number, path) for path in _entries(root) if (number := step_of(path)) is not None and number <= newest)
    doomed = [path for path in _entries(root) if path.name.endswith(PARTIAL)] + [path for _, path in steps[: max(0, len(steps) - keep)]]
    for path in doomed:
        gone = path
        if not path.name.endswith(PARTIAL):
            # Out of sight first: a removal that is cut off must not leave half a checkpoint under a good name.
            gone = path.with_name(f"{path.name}.removed{PARTIAL}")
            files.rename(path, gone)
        files.remove(gone)
    return doomed


def later(root: Path, *, than: int) -> list[Path]:
    """Checkpoints under `root` of steps after `than`, in order, whole or not."""
    return [path for number, path in sorted((step_of(path) or 0, path) for path in _entries(root)) if number > than]


def find(root: Path, *, step: int | None = None) -> Found:
    """The newest checkpoint under `root` whose every byte is as its manifest says, or that of `step`.

    One that was on its way to be replaced by another of its step, when the process ended, counts behind that.

    Raises CheckpointError where there is none, naming all that was looked at.
    """
    named = {path: step_of(Path(path.name.removesuffix(_REPLACED))) for path in _entries(root)}
    steps = sorted(((number, path) for path, number in named.items() if number is not None), key=lambda one: (-one[0], one[1].name))
    if step is not None:
        steps = [(number, path) for number, path in steps if number == step]
    reasons: list[str] = []
    for number, path in steps:
        try:
            verify(path)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        return Found(path=path, step=number, passed_over=tuple(reasons))
    half = [path.name for path in _entries(root) if path.name.endswith(PARTIAL)]
    what = f"no complete checkpoint{'' if step is None else f' of step {step}'} in {root}"
    looked = "; ".join(reasons) or (f"only half-written ones: {', '.join(half)}" if half else "it holds none")
    raise CheckpointError(f"{what} ({looked}); name another with --ckpt.path or --resume, or start anew without them")


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as it says. Raises CheckpointError naming the file that is not."""
    manifest = read_manifest(path)
    expected = [Written(name=name, size=entry["size"], sha256=entry["sha256"]) for name, entry in manifest["files"].items()]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for error in pool.map(lambda file: _fault(path / file.name, file), expected):
            if error:
                raise CheckpointError(f"{error}; restore it from a copy, or remove {path} to go on from the checkpoint before")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, whole and of this format. Raises CheckpointError."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        digest = manifest.pop("manifest_sha256")
        if digest != _digest(manifest):
            raise ValueError("its SHA-256 is another")
        version, names = manifest["format"], list(manifest["files"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} has no {MANIFEST}, so it is no complete checkpoint; name another, or remove it") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be trusted ({error}); restore it from a copy, or remove {path}") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} is of checkpoint format {version}, this version reads {FORMAT}; use the version that wrote it")
    if odd := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{file} names files outside its directory ({odd[0]!r}); do not use this checkpoint")
    return manifest


def step_of(path: Path) -> int | None:
    """N of a directory called step_N."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def _entries(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name.startswith("step_")) if root.is_dir() else []


def _fault(path: Path, expected: Written) -> str:
    try:
        check_file(path, expected)
    except OSError as error:
        return str(error)
    return ""


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
