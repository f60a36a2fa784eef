"""A lid on the memory that one call into native code may take."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def at_most(extra: int) -> Iterator[None]:
    """Let allocations fail that would map more than `extra` bytes besides what is mapped.

    They raise MemoryError. It holds for the whole process while it lasts, so it is for
    short calls that are known to run away. On Linux only; elsewhere there is no lid.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = _mapped() + extra
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _mapped() -> int:
    """Bytes of address space that this process has mapped."""
    import resource

    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
