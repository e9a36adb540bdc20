"""The user's cache: files that can be made again, and are named after everything they were made from."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

LARGEST_BYTES = 20 * 2**30
"""Made files are kept up to this size in all, the least recently used going first."""


def directory() -> Path:
    """HONE_CACHE, else the user's cache directory; `datasets` in it."""
    configured = os.environ.get("HONE_CACHE")
    root = Path(configured) if configured else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hone"
    return root / "datasets"


def made(name: str, make: Callable[[Path], None]) -> Path:
    """The file `name` of the cache; where it is not there, `make` writes it under another name and it is renamed when whole.

    So a second process sees all of it or none, and one that dies half-way leaves nothing that could be taken for it.
    """
    target = directory() / name
    if target.is_file():
        os.utime(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
        partial = Path(scratch) / target.name
        make(partial)
        partial.replace(target)
    _prune(target)
    return target


def _prune(newest: Path) -> None:
    files = sorted((path for path in newest.parent.glob("*.arrow") if path != newest), key=lambda path: path.stat().st_mtime)
    size = newest.stat().st_size + sum(path.stat().st_size for path in files)
    for path in files:
        if size <= LARGEST_BYTES:
            break
        size -= path.stat().st_size
        path.unlink(missing_ok=True)


def free_bytes() -> int:
    """Room on the disk of the cache [bytes]."""
    ground = next(one for one in (directory(), *directory().absolute().parents) if one.is_dir())
    return shutil.disk_usage(ground).free
