"""Running a program that nobody trusts: one call, one cell, ended with everything in it.

The cell is bubblewrap's where that is installed (and this is not root, whom no limit of processes binds), else one of the
same kind made by `confine`: no network, no file system but the interpreter's read-only and a scratch directory in memory,
no other processes, no further privileges, limits of memory, time, processes and disk, Landlock on top. A system that
offers neither is refused with the reason; there is no weaker form. It protects from what a policy comes up with, not from
an exploit of the kernel.
"""

import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from hone.rollout.errors import RewardError
from hone.rollout.rewards import confine

Tier = Literal["bubblewrap", "namespaces"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use. Memory is each process's; output beyond `output_bytes` ends the program."""

    wall_s: float = 10.0
    cpu_s: int = 8
    memory_bytes: int = 512 * 2**20
    processes: int = 16
    open_files: int = 64
    disk_bytes: int = 32 * 2**20
    output_bytes: int = 2**20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended: `exit` (128 + signal where one ended it), or why it `was_stopped`: "time" or "output"."""

    exit: int
    stdout: bytes
    stderr: bytes
    seconds: float
    was_stopped: Literal["", "time", "output"] = ""


def run(
    command: Sequence[str], *, files: Mapping[str, str], stdin: bytes = b"", limits: Limits | None = None, tier: Tier | None = None
) -> Outcome:
    """Run `command` in a cell, in a scratch directory that holds `files` (plain names); RewardError if it cannot be confined."""
    limits, tier = limits or Limits(), tier or available()
    if any("/" in name or name in ("", ".", "..") for name in files):
        raise ValueError(f"files of a sandbox have plain names, not {sorted(files)}")
    readable, links = _visible()
    spec = {
        "tier": "inner" if tier == "bubblewrap" else "namespaces",
        "command": list(command),
        "files": dict(files),
        "readable": readable,
        "links": links,
        **{name: getattr(limits, name) for name in ("cpu_s", "memory_bytes", "processes", "open_files", "disk_bytes")},
    }
    status_read, status_write = os.pipe()
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as given:
        told.write(json.dumps(spec).encode())
        told.seek(0)
        given.write(stdin)
        given.seek(0)
        inner = [interpreter(), "-I", "-S", "-c", _source(), str(told.fileno()), str(status_write)]
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                [*_bubblewrap(spec), *inner] if tier == "bubblewrap" else inner,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[told.fileno(), status_write],
                cwd="/",
                env={},
            )
        except BaseException:
            os.close(status_read)
            raise
        finally:
            os.close(status_write)
        with os.fdopen(status_read, "rb") as status:
            outcome, said = _watched(process, status, limits, started)
    if said or (tier == "bubblewrap" and outcome.stderr.startswith(b"bwrap: ")):
        raise RewardError(f"the sandbox ({tier}) could not be set up: {(said or outcome.stderr).decode(errors='replace')[:500].strip()}")
    return outcome


def _watched(process: subprocess.Popen[bytes], status: IO[bytes], limits: Limits, started: float) -> tuple[Outcome, bytes]:
    """Read what comes out until it ends or a limit is met; then nothing of it is left."""
    assert process.stdout is not None and process.stderr is not None
    kept = {process.stdout: bytearray(), process.stderr: bytearray(), status: bytearray()}
    stopped: Literal["", "time", "output"] = ""
    with selectors.DefaultSelector() as selector:
        for stream in kept:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            remaining_s = started + limits.wall_s - time.monotonic()
            if remaining_s <= 0:
                stopped = "time"
                break
            for key, _ in selector.select(remaining_s):
                stream = next(one for one in kept if one is key.fileobj)
                chunk = os.read(stream.fileno(), 1 << 16)
                kept[stream] += chunk
                if not chunk:
                    selector.unregister(stream)
            if len(kept[process.stdout]) + len(kept[process.stderr]) > limits.output_bytes:
                stopped = "output"
                break
    if not stopped:
        try:
            process.wait(max(0.0, started + limits.wall_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            stopped = "time"
    process.send_signal(signal.SIGKILL)  # its cell dies with it (PDEATHSIG, process 1 of its namespace)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    outcome = Outcome(
        exit=process.returncode if process.returncode >= 0 else 128 - process.returncode,
        stdout=bytes(kept[process.stdout][: limits.output_bytes]),
        stderr=bytes(kept[process.stderr][: limits.output_bytes]),
        seconds=time.monotonic() - started,
        was_stopped=stopped,
    )
    return outcome, bytes(kept[status])


@functools.cache
def available() -> Tier:
    """The kind of cell this system offers, tried out once; RewardError with the reasons if there is none."""
    if sys.platform != "linux":
        raise RewardError(f"code is judged in a sandbox of Linux (namespaces and Landlock), and this is {sys.platform}; judge it elsewhere")
    reasons: list[str] = []
    tiers: list[Tier] = ["namespaces"]
    if os.geteuid() != 0 and shutil.which("bwrap"):
        tiers.insert(0, "bubblewrap")
    for tier in tiers:
        try:
            outcome = run([interpreter(), "-I", "-S", "-c", "print(6 * 7)"], files={}, tier=tier, limits=Limits(wall_s=30.0))
        except (RewardError, OSError) as error:
            reasons.append(f"{tier}: {error}")
            continue
        if outcome.stdout == b"42\n":
            return tier
        reasons.append(f"{tier}: a program in it ended with {outcome.exit} {outcome.was_stopped} {outcome.stderr[-300:]!r}")
    raise RewardError(
        f"no sandbox for untrusted code works here, and none is run without: {' | '.join(reasons)}. Allow user namespaces "
        "(and Landlock, Linux 5.13), install bubblewrap, or judge code on another machine through --reward.remote-url http://..."
    )


def interpreter() -> str:
    """The Python that programs run with: this one's, without its virtual environment."""
    return os.path.realpath(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


@functools.cache
def _source() -> str:
    return Path(confine.__file__).read_text()


@functools.cache
def _visible() -> tuple[list[str], dict[str, str]]:
    """Directories and files a program can read, and links of the root directory."""
    readable, links = ["/usr"], {}
    prefix = os.path.realpath(sys.base_prefix)
    if not prefix.startswith("/usr"):
        readable.append(prefix)
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            links[name] = os.readlink(name)
        elif os.path.isdir(name):
            readable.append(name)
    if os.path.isfile("/etc/ld.so.cache"):
        readable.append("/etc/ld.so.cache")
    return readable, links


def _bubblewrap(spec: Mapping[str, object]) -> list[str]:
    """The command that builds the cell; rlimits and Landlock follow inside. `--disable-userns` wants its own `--unshare-user`."""
    readable, links = _visible()
    words = ["bwrap", "--unshare-user", "--unshare-all", "--disable-userns", "--die-with-parent", "--new-session", "--clearenv"]
    words[0] = shutil.which("bwrap") or "bwrap"
    words += ["--uid", str(confine.NOBODY), "--gid", str(confine.NOBODY), "--hostname", "sandbox", "--cap-drop", "ALL"]
    for path in readable:
        words += ["--ro-bind", path, path]
    for path, target in links.items():
        words += ["--symlink", target, path]
    words += ["--proc", "/proc", "--dev", "/dev"]
    for place in ("/box", "/tmp"):
        words += ["--size", str(spec["disk_bytes"]), "--tmpfs", place]
    return [*words, "--chdir", "/box", "--"]
