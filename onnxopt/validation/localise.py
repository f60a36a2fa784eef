"""Where a wrong result begins: the first node that drifts, in topological order.

Values that both models have, by name and shape, are compared between them, in chunks
that keep to a bound of memory, on one feed. A value drifts where it differs by more than
a few times what rounding alone does to it: the reference is run beside itself with
inputs and weights moved by one unit in the last place.

The error at the first drifting value is told twice: as it comes out of the whole model
(cumulative), and with its node, or the nodes since the last common values, run on the
reference's own values (local). Where the local one is small, the error came from before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from onnxopt.data.inputs import Feed
from onnxopt.errors import WorkerError
from onnxopt.runtime import SessionSpec, Worker
from onnxopt.validation import noise
from onnxopt.validation.taps import TapModel, write_part

CHUNK_BYTES = 32 << 20
"""Values that are held at once, of each model."""
UNKNOWN_BYTES = 1 << 20
"""What a value is taken to need where its size is not known."""
FACTOR = 8.0
"""So many times its own spread a value may differ, as in the verdict."""
_ULPS, _ULPS_QUANTIZED = 1, 256


class Drift(msgspec.Struct, frozen=True):
    """The first value that differs by more than rounding explains.

    `node` makes `value` in the candidate, in scope `scope`; errors are relative to the
    largest magnitude in the reference (infinite, and null in JSON, where NaN, Inf or the
    element type differ). `local` is None where the node could not be run alone.
    `after`: the common values before it that do not drift. `compared` of `common` values
    were looked at.
    """

    node: str
    op: str
    scope: str
    value: str
    cumulative: float
    local: float | None
    bound: float
    after: list[str]
    compared: int
    common: int


@dataclass
class _Found:
    """One value that drifts, with its error and what was allowed."""

    name: str
    error: float
    bound: float


def localise(
    reference: Path,
    candidate: Path,
    feed: Feed,
    spec: SessionSpec,
    *,
    timeout: float = 600.0,
    memory_limit: int | None = None,
    seed: int = 0,
) -> Drift | None:
    """The first value of the candidate's main graph that drifts on `feed`.

    None where none does that both models have. Raises WorkerError where a model with
    inner values as outputs cannot be run.
    """
    search = _Search(reference, candidate, feed, spec, seed)
    with (
        tempfile.TemporaryDirectory(prefix="onnxopt-") as folder,
        Worker(timeout=timeout, memory_limit=memory_limit) as worker,
    ):
        try:
            return search.run(worker, Path(folder))
        finally:
            search.close()


class _Search:
    def __init__(
        self, reference: Path, candidate: Path, feed: Feed, spec: SessionSpec, seed: int
    ) -> None:
        self.feed, self.spec, self.seed = feed, spec, seed
        self.paths = (reference, candidate)
        self.one, self.two = TapModel(reference), TapModel(candidate)
        known = self.one.order.keys() & self.two.order.keys()
        self.common = sorted(known, key=self.two.order.__getitem__)
        self.compared = 0
        self.good: list[str] = []

    def close(self) -> None:
        self.one.close()
        self.two.close()

    def run(self, worker: Worker, folder: Path) -> Drift | None:
        for names in self._chunks():
            found = self._compare(worker, folder, names)
            if found is not None:
                return self._drift(worker, folder, found)
        return None

    # ---- chunks ----

    def _chunks(self) -> Iterator[list[str]]:
        """Common values in the candidate's order, as many as fit into the bound."""
        symbols = self.one.symbols(self.feed)
        chunk: list[str] = []
        size = 0
        for name in self.common:
            more = self.one.bytes_of(name, symbols)
            more = UNKNOWN_BYTES if more is None else more
            if chunk and size + more > CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
            chunk.append(name)
            size += more
        if chunk:
            yield chunk

    def _compare(
        self, worker: Worker, folder: Path, names: Sequence[str]
    ) -> _Found | None:
        """The first of `names` that drifts: one model at a time, freed in between."""
        expected = self._values(worker, folder, self.one, names, self.feed)
        found = self._values(worker, folder, self.two, names, self.feed)
        suspects = {
            name: error
            for name in names
            for error in [_error(expected[name], found[name])]
            if error is not None and error > 0
        }
        self.compared += len(names)
        del found
        if suspects:
            moved = self._moved(worker, folder, list(suspects), expected)
            for name in names:
                if name not in suspects:
                    self.good.append(name)
                    continue
                bound = max(_floor(expected[name]), FACTOR * moved.get(name, 0.0))
                if suspects[name] > bound:
                    return _Found(name, suspects[name], bound)
                self.good.append(name)
        else:
            self.good += names
        return None

    def _values(
        self,
        worker: Worker,
        folder: Path,
        taps: TapModel,
        names: Sequence[str],
        feed: Feed,
    ) -> dict[str, object]:
        path = taps.write(names, folder / "taps.onnx")
        return _run(worker, path, self.spec, feed, names)

    def _moved(
        self,
        worker: Worker,
        folder: Path,
        names: Sequence[str],
        expected: dict[str, object],
    ) -> dict[str, float]:
        """How far each of `names` moves in the reference by rounding alone."""
        facts = noise.facts(self.one.model.proto, self.paths[0])
        ulps = _ULPS_QUANTIZED if facts.quantized else _ULPS
        feed = noise.moved_feed(self.feed, ulps, self.seed + 1)
        path = self.one.write(names, folder / "taps.onnx")
        if facts.size <= noise.WEIGHT_LIMIT:
            model = noise.moved_model(path, ulps, self.seed + 1)
            if model is not None:
                path.write_bytes(model)
        try:
            moved = _run(worker, path, self.spec, feed, names)
        except WorkerError:
            return {}
        errors = {name: _error(expected[name], moved[name]) for name in names}
        return {name: error for name, error in errors.items() if error is not None}

    # ---- what was found ----

    def _drift(self, worker: Worker, folder: Path, found: _Found) -> Drift:
        node = self.two.maker(found.name)
        _, before = self.two.cut(self.good, found.name)
        return Drift(
            node=self.two.graph.label(node),
            op=self.two.graph.op(node),
            scope=self.two.graph.scope,
            value=found.name,
            cumulative=found.error,
            local=self._local(worker, folder, found, before),
            bound=found.bound,
            after=sorted(before, key=self.two.order.__getitem__),
            compared=self.compared,
            common=len(self.common),
        )

    def _local(
        self, worker: Worker, folder: Path, found: _Found, before: set[str]
    ) -> float | None:
        """The error where the candidate's part runs on the reference's own values."""
        names = [*sorted(before), found.name]
        try:
            expected = self._values(worker, folder, self.one, names, self.feed)
            target = expected.pop(found.name)
            start = {**self.feed, **expected}
            path = write_part(self.paths[1], start, found.name, folder / "part.onnx")
            if path is None:
                return None
            session = worker.load(path, self.spec)
            feed = {value.name: start[value.name] for value in session.inputs}
            made = session.run(feed, [found.name])[found.name]
            session.close()
        except (WorkerError, TypeError, KeyError):
            return None
        return _error(target, made)


def _run(
    worker: Worker, path: Path, spec: SessionSpec, feed: Feed, names: Sequence[str]
) -> dict[str, object]:
    session = worker.load(path, spec)
    try:
        wanted = {value.name for value in session.inputs}
        given = {name: value for name, value in feed.items() if name in wanted}
        return session.run(given, list(names))
    finally:
        session.close()


def _error(one: object, two: object) -> float | None:
    """The largest difference, relative to the largest magnitude of `one`.

    None where the two cannot be compared: other shapes (channels that went), values
    that are no tensors. Infinite where NaN, Inf or strings differ.
    """
    if not isinstance(one, np.ndarray) or not isinstance(two, np.ndarray):
        return None
    if one.shape != two.shape or one.dtype != two.dtype:
        return None
    if one.dtype == object or one.dtype == bool:
        return float(np.inf) if (one != two).any() else 0.0
    with np.errstate(all="ignore"):
        left, right = one.astype(np.float64), two.astype(np.float64)
        finite = np.isfinite(left)
        if (finite != np.isfinite(right)).any():
            return float(np.inf)
        scale = float(np.abs(left[finite]).max(initial=0.0))
        gap = float(np.abs(left[finite] - right[finite]).max(initial=0.0))
    return gap / scale if scale else gap


def _floor(value: object) -> float:
    """What needs no measuring: a few units in the last place of the value's own type."""
    if not isinstance(value, np.ndarray):
        return 0.0
    return noise.BOUNDS.get(value.dtype.name, 0.0)
