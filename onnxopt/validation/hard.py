"""Hard cases: feeds that ordinary data never holds, and an exact rewrite has to bear.

zeros      float inputs all zero
large      float inputs 10,000 times as large (100 times in half precision)
denormal   float inputs of the size of the smallest numbers
nan        one NaN in every float input
constant   every input the same value throughout, masks aside: a variance of zero
lowest     integer inputs all at the lowest value that is known to mean something
highest    integer inputs all at the highest such value: the last row of a table
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxopt.data.generate import is_mask
from onnxopt.data.inputs import Feed

UNIFORM_CASES = ("constant", "lowest", "highest")
HARD_CASES = ("zeros", "large", "denormal", "nan", *UNIFORM_CASES)

Ranges = Mapping[str, tuple[int, int]]
"""Lowest and highest integer of inputs, where they are known."""


def hard_feed(kind: str, feed: Feed, ranges: Ranges | None = None) -> Feed | None:
    """A feed made hard; None where it holds nothing that the case is about."""
    match kind:
        case "constant":
            changed = {n: _constant(feed[n]) for n in feed if _may_vary(n, feed[n])}
        case "lowest" | "highest":
            at = 0 if kind == "lowest" else 1
            changed = {
                name: np.full_like(feed[name], both[at])
                for name, both in (ranges or {}).items()
                if isinstance(feed.get(name), np.ndarray)
            }
        case _:
            changed = {n: _hard(kind, feed[n]) for n in feed if _is_float(feed[n])}
    return feed | changed if changed else None


def _is_float(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def _may_vary(name: str, value: object) -> bool:
    return isinstance(value, np.ndarray) and value.size > 1 and not is_mask(name)


def _constant(array: np.ndarray) -> np.ndarray:
    """Its first value throughout: one that the model is known to take."""
    return np.full_like(array, array.reshape(-1)[0])


def _hard(kind: str, array: np.ndarray) -> np.ndarray:
    half = array.dtype == np.float16
    match kind:
        case "zeros":
            return np.zeros_like(array)
        case "large":
            return np.asarray(array * (100 if half else 10_000), dtype=array.dtype)
        case "denormal":
            tiny = np.finfo(array.dtype).smallest_normal
            return np.asarray(array * tiny / 16, dtype=array.dtype)
    hard = array.copy()
    hard.reshape(-1)[:1] = np.nan
    return hard
