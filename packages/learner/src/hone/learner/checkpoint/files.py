"""Every file operation of a save, one method each, so that a test can cut a save off at any of them; all that is written is private."""

import os
import shutil
from pathlib import Path


class Files:
    """The operating system's own operations; each raises OSError as it does."""

    def make_directory(self, path: Path) -> None:
        """A new directory for its owner alone; the one above is made where it is missing."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700)

    def create(self, path: Path) -> int:
        """A new file, open for writing, for its owner alone; refuses a name that is taken, a link included."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, data: memoryview) -> None:
        """All of `data`."""
        while data:
            data = data[os.write(descriptor, data) :]

    def flush(self, descriptor: int) -> None:
        """What was written reaches the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Give the file back."""
        os.close(descriptor)

    def flush_directory(self, path: Path) -> None:
        """The names in a directory reach the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Another name, in one stroke."""
        os.rename(source, target)

    def remove(self, directory: Path) -> None:
        """A directory and all in it."""
        shutil.rmtree(directory)
