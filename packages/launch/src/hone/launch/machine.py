"""What this machine has, found without importing torch."""

import os
import shutil
import subprocess
from pathlib import Path


def visible_gpus() -> int:
    """GPUs a process started here would see: CUDA_VISIBLE_DEVICES where it is set, else device files, else nvidia-smi."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = _present()
    if chosen is None:
        return present
    names = [name.strip() for name in chosen.split(",")]
    # CUDA ignores every name from the first invalid one on.
    valid = next((count for count, name in enumerate(names) if name in ("", "-1", "NoDevFiles")), len(names))
    return min(valid, present)


def _present() -> int:
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*")) or _listed_gpus()


def _listed_gpus() -> int:
    """GPUs named by nvidia-smi, where they have no device files of their own (WSL)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines()) if listing.returncode == 0 else 0
