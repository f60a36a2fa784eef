"""What every writer of a file needs: a fit place, a name to write under, and peace.

Two runs that write to one place at a time must not mix. A run holds a shared lock on the
data file that its model will refer to, from before it has its name until the model is
there; nobody removes a data file that is locked so. Renames of models in a folder, with
the removal of what they replace, happen one after the other.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from onnxopt.errors import UsageError

if sys.platform != "win32":
    import fcntl


def check_target(path: Path) -> None:
    """Raise UsageError where a file at `path` could not be written or replaced.

    A link is replaced itself, never what it leads to.
    """
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {folder}")
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot write {path}: it is there and is not a regular file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write {path}: folder {folder} is not writable")


def beside(target: Path) -> Path:
    """A new name in the folder of `target`, from where a rename is atomic."""
    return target.with_name(f".{target.name[:200]}.{os.urandom(6).hex()}.tmp")


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder last, where its file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cannot_write(target: Path, error: OSError) -> UsageError:
    """The error for a file that could not be written, with the system's reason."""
    return UsageError(f"cannot write {target}: {error.strerror or error}")


class Claim:
    """A data file that a model which is not there yet refers to.

    Made of an open file at `temporary`, which takes the name `path` here; whatever had
    that name has the same content, since the name says it.
    """

    def __init__(self, file: BinaryIO, temporary: Path, path: Path) -> None:
        self.path = path
        self._descriptor = os.dup(file.fileno())
        self._identity = _identity(os.fstat(self._descriptor))
        _lock(self._descriptor, shared=True)
        self._is_new = not path.exists()
        try:
            os.replace(temporary, path)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """The model is there: its data file needs no protection any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def withdraw(self) -> None:
        """Remove the file, unless it was there before or another run has claimed it."""
        self.release()
        with contextlib.suppress(OSError):
            if self._is_new and _identity(self.path.stat()) == self._identity:
                remove_unclaimed(self.path)


def remove_unclaimed(path: Path) -> None:
    """Remove a data file, unless a run that is under way needs it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if _lock(descriptor, shared=False):
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time replace models in `folder`."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, shared: bool) -> bool:
    """Lock a file without waiting; False where another process's lock forbids it."""
    if sys.platform != "win32":
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system without locks: alone, as far as we can know
    return True


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
