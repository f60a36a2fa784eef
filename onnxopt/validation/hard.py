"""Hard cases: feeds that ordinary data never holds, and an exact rewrite has to bear.

zeros      float inputs all zero
large      float inputs 10,000 times as large (100 times in half precision)
denormal   float inputs of the size of the smallest numbers
nan        one NaN in every float input
"""

from __future__ import annotations

import numpy as np

from onnxopt.data.inputs import Feed

HARD_CASES = ("zeros", "large", "denormal", "nan")


def hard_feed(kind: str, feed: Feed) -> Feed | None:
    """A feed made hard; None where it has no float input."""
    names = [
        name
        for name, value in feed.items()
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
    ]
    if not names:
        return None
    return feed | {name: _hard(kind, feed[name]) for name in names}


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
