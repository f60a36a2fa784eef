"""Payloads from file to file, by the system and without it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from onnxopt import copying

SIZE = 3 * copying._WINDOW + 12345


@pytest.fixture(scope="module", name="source")
def _source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("copying") / "source"
    path.write_bytes(os.urandom(SIZE))
    return path


def refuse(*_: Any) -> int:
    raise OSError(18, "Invalid cross-device link")


def some(*given: int) -> int:
    """One that copies a little at a time, and then no more."""
    source, target, length, offset, start = given
    if offset > 1 << 20:
        return 0
    return os.pwrite(target, os.pread(source, min(length, 70_000), offset), start)


@pytest.mark.parametrize("system", [None, refuse, some])
@pytest.mark.parametrize(
    ("offset", "start", "length"),
    [(0, 0, SIZE), (7, 4096, SIZE - 7), (4096, 3, 5), (1, 1, 0), (99, 5, 2 << 20)],
)
def test_bytes_arrive_at_their_place(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    system: Any,
    offset: int,
    start: int,
    length: int,
) -> None:
    if system is not None:
        monkeypatch.setattr(os, "copy_file_range", system, raising=False)
    target = tmp_path / "target"
    target.write_bytes(b"x" * start)
    with open(source, "rb") as one, open(target, "r+b") as two:
        copying.copy(one.fileno(), offset, two.fileno(), start, length)
        seen = b"".join(map(bytes, copying.windows(two.fileno(), start, length)))
    expected = source.read_bytes()[offset : offset + length]
    assert target.read_bytes() == b"x" * start + expected
    assert seen == expected


def test_a_full_disk_is_an_error(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        open(source, "rb") as one,
        open("/dev/full", "r+b", buffering=0) as two,
        pytest.raises(OSError, match="No space left"),
    ):
        copying.copy(one.fileno(), 0, two.fileno(), 0, 100)
