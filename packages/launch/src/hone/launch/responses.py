"""The file of `launch generate`: rows appended in the order of the prompts, gone on with after a stop, whole at every moment but its end.

Beside FILE stands FILE.settings.json: what decided the rows, so that no run goes on with rows of another. Parquet cannot be
appended to: its rows grow in FILE.part as JSON lines and become the file when all are there.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone.launch.errors import Problem, UsageError
from hone.launch.observe.files import replace_text
from hone.launch.observe.redact import redact
from hone.launch.observe.rollout_table import write_rollouts
from hone.launch.schema import settings, value_of
from hone.launch.using_config import GenerateConfig

WITHOUT_EFFECT = frozenset(
    (
        *("out", "run.threads", "run.debug", "rollout.timeout_s", "reward.timeout_s", "reward.num_workers", "reward.retry_s"),
        *("reward.rows_per_request", "reward.max_in_flight", "reward.allowed_hosts"),
    )
)
"""Settings that change how rows are made, and no row; and so do all of the engine's."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an earlier run has left at a place: nothing, rows to go on with (`begun`), or something that is not to be touched."""

    begun: bool = False
    refusal: Problem | None = None


def outcome_of(path: Path, config: GenerateConfig) -> Outcome:
    """What is at `path`, told without reading any row."""
    beside, work = _beside(path), _work(path)
    if not beside.exists():
        found = next((one for one in (path, work) if one.exists()), None)
        if found is None:
            return Outcome()
        what = f"{found} is there already and was not written by `launch generate` (it has no {beside.name})"
        return Outcome(refusal=Problem(what=what, mend="choose another --out, or move it away"))
    if not beside.is_file() or not (path.is_file() or work.is_file()):
        return Outcome(
            refusal=Problem(what=f"{beside} is there and its responses are not", mend=f"delete {beside}, or choose another --out")
        )
    try:
        known: object = json.loads(beside.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Outcome(refusal=Problem(what=f"{beside} cannot be read: {error}", mend=f"delete {path} and it, or choose another --out"))
    wanted = deciding(config)
    if known == wanted:
        return Outcome(begun=True)
    before = known if isinstance(known, dict) else {}
    other = sorted(name for name in before.keys() | wanted.keys() if before.get(name) != wanted.get(name))
    shown = ", ".join(f"{name} {before.get(name)} (now {wanted.get(name)})" for name in other[:4]) + (", ..." if len(other) > 4 else "")
    what = f"{path} was begun with other settings: {shown}"
    return Outcome(refusal=Problem(what=what, mend="give the same settings to go on, or choose another --out"))


def deciding(config: GenerateConfig) -> dict[str, object]:
    """The settings that decide the rows, as JSON has them; secrets struck out."""
    names = [name for name in settings(config) if name not in WITHOUT_EFFECT and not name.startswith("vllm.")]
    values = {name: value_of(config, name) for name in names}
    return {name: redact(value) if isinstance(value, str) else value for name, value in values.items()}


class Responses:
    """The file, open: `done` prompts have all their rows in it, the first ones."""

    def __init__(self, path: Path, descriptor: int, *, done: int) -> None:
        self.path, self.done = path, done
        self._descriptor = descriptor

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """All rows of the next prompt, in one write."""
        data = b"".join(json.dumps(row, allow_nan=False, default=str).encode() + b"\n" for row in rows)
        written = os.write(self._descriptor, data)
        if written != len(data):  # the disk is full; what is half there is mended by the next run
            raise OSError(f"only {written} of {len(data)} bytes could be written to {self.path}")
        self.done += 1

    def finish(self) -> None:
        """Every prompt has its rows: make the Parquet file of them, where that was asked for."""
        work = _work(self.path)
        if work != self.path and not self.path.exists():
            with work.open(encoding="utf-8") as lines:
                write_rollouts(self.path, [json.loads(line) for line in lines])
            work.unlink()


@contextmanager
def opened(path: Path, config: GenerateConfig, prompt_ids: Sequence[str], *, rows_per_prompt: int) -> Iterator[Responses]:
    """The file to write to, mended where a run was killed in the middle of a prompt; UsageError where its rows are not of these prompts."""
    digest = hashlib.blake2b("\n".join(prompt_ids).encode(), digest_size=16).hexdigest()
    beside, work = _beside(path), _work(path)
    if not beside.exists():
        replace_text(beside, json.dumps({"settings": deciding(config), "prompts": digest}, indent=2) + "\n")
    elif json.loads(beside.read_text(encoding="utf-8"))["prompts"] != digest:
        what = f"{path} was begun with other prompts: the data, its template or the tokenizer has changed since"
        raise UsageError([Problem(what=what, mend="bring back the data as it was, or choose another --out", where="--out")])
    if work != path and path.exists():
        yield Responses(path, -1, done=len(prompt_ids))
        return
    descriptor = os.open(work, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = f"another process is writing to {path}"
            raise UsageError([Problem(what=what, mend="wait for it, or choose another --out", where="--out")]) from error
        done, end = _whole(work, prompt_ids, rows_per_prompt=rows_per_prompt)
        os.ftruncate(descriptor, end)
        yield Responses(path, descriptor, done=done)
    finally:
        os.close(descriptor)


def _whole(work: Path, prompt_ids: Sequence[str], *, rows_per_prompt: int) -> tuple[int, int]:
    """How many prompts have all their rows, and where the last of them ends [bytes]."""
    done = end = place = count = 0
    with work.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            expected = prompt_ids[done] if done < len(prompt_ids) else None
            try:
                row = json.loads(line)
                found = (row["prompt_id"], row["sample"] if rows_per_prompt > 1 else count)
            except (ValueError, KeyError, TypeError):
                found = None
            if found != (expected, count):
                what = f"row {done * rows_per_prompt + count + 1} of {work} is not the one that was written there"
                raise UsageError([Problem(what=what, mend="choose another --out", where="--out")])
            place, count = place + len(line), count + 1
            if count == rows_per_prompt:
                done, end, count = done + 1, place, 0
    return done, end


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def _work(path: Path) -> Path:
    return path if path.suffix == ".jsonl" else path.with_name(f"{path.name}.part")
