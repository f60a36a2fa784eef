"""Text that a command writes besides its model: a report, timings, an inspection.

It appears whole or not at all; `-` is stdout. The place is checked before any work.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from onnxopt import files
from onnxopt.errors import UsageError


class Document:
    """One text on its way to `path`: `stage` it, then `commit`.

    As a context manager it leaves nothing behind where it was not committed. A path of
    None takes nothing. Raises UsageError where the place cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self.to_stdout = path == "-"
        self.path = None if path is None or self.to_stdout else Path(path)
        self._temporary: Path | None = None
        self._text = ""
        if self.path is not None:
            files.check_target(self.path)

    def __enter__(self) -> Document:
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    def _discard(self) -> None:
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None

    def stage(self, text: str) -> None:
        """Write the text out, under a temporary name. Raises UsageError."""
        self._text = text
        if self.path is None:
            return
        self._discard()
        self._temporary = files.beside(self.path)
        try:
            with open(self._temporary, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise files.cannot_write(self.path, error) from None

    def commit(self) -> None:
        """Let the staged text appear. Raises UsageError."""
        if self.to_stdout:
            _to_stdout(self._text)
        if self.path is not None and self._temporary is not None:
            try:
                os.replace(self._temporary, self.path)
            except OSError as error:
                raise files.cannot_write(self.path, error) from None
            self._temporary = None

    def write(self, text: str) -> None:
        """Stage and commit at once."""
        self.stage(text)
        self.commit()


def _to_stdout(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise UsageError(f"cannot write to stdout: {error.strerror}") from None
