"""What values a model's inner values take on given data, and the scales that follow."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onnxopt.data.inputs import Feeds
from onnxopt.graph import GraphView
from onnxopt.model import Model
from onnxopt.quantization.parameters import Parameters, code_limits
from onnxopt.runtime import SessionSpec, Worker
from onnxopt.save import stage
from onnxopt.validation.taps import TapModel

_BYTES = 256 << 20
"""No more than this of inner values is kept at a time."""


class Range(NamedTuple):
    """The least and the largest value; infinite or NaN where some value was."""

    low: float
    high: float

    @property
    def is_finite(self) -> bool:
        """Whether all values were finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)


def ranges(
    model: Model, names: Sequence[str], feeds: Feeds, timeout: float = 600.0
) -> dict[str, Range]:
    """The range over all feeds of values of the main graph, each without what is empty.

    Computed in a worker at ORT_DISABLE_ALL; only minima and maxima are kept. Raises
    WorkerError where the model cannot run, ProviderError without onnxruntime.
    """
    found: dict[str, Range] = {}
    with (
        tempfile.TemporaryDirectory(prefix="onnxopt-") as folder,
        Worker(timeout=timeout) as worker,
    ):
        path = Path(folder) / "model.onnx"
        stage(model, path, hashes=False).commit()
        taps = TapModel(path)
        try:
            first = next(iter(feeds))
            for number, chunk in enumerate(taps.chunks(names, first, _BYTES)):
                file = taps.write(chunk, Path(folder) / f"{number}.onnx")
                session = worker.load(file, SessionSpec())
                for feed in feeds:
                    values = session.run(feed, chunk)
                    _widen(found, ((name, values[name]) for name in chunk))
                session.close()
        finally:
            taps.close()
    return found


def _widen(found: dict[str, Range], values: Iterable[tuple[str, object]]) -> None:
    for name, value in values:
        if not isinstance(value, np.ndarray) or value.size == 0:
            continue
        low, high = float(value.min()), float(value.max())
        known = found.get(name, Range(low, high))
        # numpy's minimum, unlike Python's, lets a NaN through
        found[name] = Range(
            float(np.minimum(known.low, low)), float(np.maximum(known.high, high))
        )


def affine(range_: Range, data_type: int, symmetric: bool = False) -> Parameters:
    """Scale and zero point, per tensor, whose codes reach from end to end of a range.

    The range is widened to hold zero, which has a code of its own then. Of one that holds
    nothing else, the scale is 1. `symmetric`: zero point 0, codes from -max to max.
    """
    least, most = code_limits(data_type)
    low, high = min(range_.low, 0.0), max(range_.high, 0.0)
    if symmetric:
        least, reach = -most, max(-low, high)
        low, high = -reach, reach
    width = (high - low) / (most - least)
    scale = np.float32(max(width, float(np.finfo(np.float32).tiny)) if width else 1.0)
    zero = 0 if symmetric else round(least - low / float(scale))
    dtype = np.int8 if least < 0 else np.uint8
    return Parameters(
        np.asarray(scale), np.asarray(min(max(zero, least), most)).astype(dtype)
    )


def is_main(graph: GraphView) -> bool:
    """Whether a scope is the one whose values feeds can show."""
    return graph.parent is None and not graph.is_function
