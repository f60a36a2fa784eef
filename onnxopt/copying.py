"""Moving payloads from file to file without a detour through this process.

Where the system copies between files itself, a gigabyte takes a fifth of the processor
time that reading and writing it takes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

from onnxopt.weights import pieces

_WINDOW = 4 << 20


def copy(source: int, offset: int, target: int, start: int, length: int) -> None:
    """`length` bytes of one open file into another, each from its place on.

    Raises OSError, as where the disk is full.
    """
    done = _by_system(source, offset, target, start, length)
    for piece in pieces(source, offset + done, length - done):
        rest = piece
        while rest:
            written = os.pwrite(target, rest, start + done)
            rest, done = rest[written:], done + written


def _by_system(source: int, offset: int, target: int, start: int, length: int) -> int:
    """How much the system copied: less than all where it cannot between these files."""
    done = 0
    while hasattr(os, "copy_file_range") and done < length:
        try:
            count = os.copy_file_range(
                source, target, length - done, offset + done, start + done
            )
        except OSError:  # between file systems, or no space: writing will tell
            break
        if not count:
            break
        done += count
    return done


def windows(file: int, start: int, length: int) -> Iterator[memoryview]:
    """`length` bytes of an open file that nobody shortens, a few megabytes at a time.

    Mapped, not read: each piece holds until the next is asked for.
    """
    end = start + length
    while start < end:
        base = start - start % mmap.ALLOCATIONGRANULARITY
        size = min(base + _WINDOW, end) - base
        with (
            mmap.mmap(file, size, offset=base, prot=mmap.PROT_READ) as window,
            memoryview(window) as view,
            view[start - base :] as piece,
        ):
            yield piece
        start = base + size
