"""Calibration: what the values of a model are on the user's data, in bounded memory.

The model runs in a worker with the values asked for as outputs; the worker counts their
elements (`histogram.py`) and throws them away, so memory grows neither with the number of
samples nor, beyond a limit, with that of values: they are looked at in lots.

With a cache file, what was counted is kept from lot to lot and every few samples, and a
run that finds it goes on from there. The cache is of one model and one set of feeds; of
others it is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np

from onnxopt import facts
from onnxopt.data.inputs import Feed, Feeds
from onnxopt.errors import UsageError
from onnxopt.model import Model
from onnxopt.processor import PRECISE
from onnxopt.quantization.histogram import Histogram
from onnxopt.runtime import Session, SessionSpec, Worker, provider_name
from onnxopt.save import stage
from onnxopt.validation.taps import TapModel

log = logging.getLogger("onnxopt.quantization")

LOT_BYTES = 1 << 28
"""Values of about that size, together, are looked at in one run of the model."""
SAVE_EVERY = 64
"""Samples between two writes of the cache."""

Seen = dict[str, Histogram]
Progress = Callable[[int, int], None]
"""Told after each sample: how many are done in this lot, and the number of the lot."""


class Calibration(msgspec.Struct):
    """How to calibrate: the feeds, and how the model is run on them.

    `cache`: a file that keeps what was counted. `timeout` (seconds) and `memory_limit`
    (bytes) hold for the worker.
    """

    feeds: Feeds
    provider: str = "cpu"
    threads: int = 1
    timeout: float = 600.0
    memory_limit: int | None = None
    custom_op_libraries: tuple[str, ...] = ()
    cache: Path | None = None
    progress: Progress | None = None

    def run(self, model: Path, names: Sequence[str]) -> Seen:
        """What each value of `names`, of the main graph of the file, was seen to be.

        Raises UsageError where the feeds are none or do not fit, the cache cannot be
        written, or the model makes no finite number of a value; SessionError or another
        WorkerError where the model does not run.
        """
        taps = TapModel(model)
        try:
            first = next(iter(self.feeds), None)
            if first is None:
                raise UsageError(f"{self.feeds.source} holds no feeds to calibrate with")
            lots = list(taps.chunks(names, first, LOT_BYTES))
            store = _Cache(self.cache, _digest(model)) if self.cache else None
            found: Seen = {}
            with (
                TemporaryDirectory(prefix="onnxopt-") as folder,
                Worker(timeout=self.timeout, memory_limit=self.memory_limit) as worker,
            ):
                for number, lot in enumerate(lots):
                    part = taps.write(lot, Path(folder) / "taps.onnx")
                    session = worker.load(part, self.spec())
                    found |= self._lot(session, lot, number, store)
                    session.close()
        finally:
            taps.close()
        return found

    def of_model(self, model: Model, names: Sequence[str]) -> Seen:
        """The same of a model that passes are at work on."""
        with TemporaryDirectory(prefix="onnxopt-") as folder:
            path = Path(folder) / "model.onnx"
            stage(model, path, hashes=False).commit()
            return self.run(path, names)

    def spec(self) -> SessionSpec:
        """How the model is loaded."""
        return SessionSpec(
            self.provider,
            "enable_all",
            self.threads,
            (PRECISE,) if provider_name(self.provider) == provider_name("cpu") else (),
            custom_op_libraries=self.custom_op_libraries,
        )

    def _lot(
        self, session: Session, names: Sequence[str], number: int, store: _Cache | None
    ) -> Seen:
        """Run all feeds on one lot of values, but those that the cache has seen."""
        taken = {value.name for value in session.inputs}
        cached = store.lot(names) if store else None
        chain = hashlib.sha256()
        skipping = cached is not None
        done = 0
        base: Seen = {}
        for index, feed in enumerate(self.feeds):
            _add_feed(chain, feed)
            done = index + 1
            if skipping and cached is not None:
                if done < cached.samples:
                    continue
                skipping = False
                if chain.hexdigest() != cached.chain:
                    raise UsageError(
                        f"{self.cache} was made with other feeds: remove it, or name "
                        "another cache"
                    )
                base = cached.seen
                continue
            session.observe({name: feed[name] for name in feed if name in taken})
            if self.progress is not None:
                self.progress(done, number)
            if store is not None and done % SAVE_EVERY == 0:
                store.save(names, done, chain.hexdigest(), _sum(base, session))
        if skipping and cached is not None:
            raise UsageError(
                f"{self.cache} has seen {cached.samples} samples, and there are {done}: "
                "remove it, or name another cache"
            )
        seen = _sum(base, session)
        if store is not None:
            store.save(names, done, chain.hexdigest(), seen)
        return seen


def _sum(base: Seen, session: Session) -> Seen:
    """What was cached and what this session has seen, together."""
    found = session.observed()
    for name, seen in base.items():
        if name in found:
            found[name].merge(seen)
        else:
            found[name] = seen
    return found


class _Cached(msgspec.Struct):
    samples: int
    chain: str
    seen: Seen


class _Cache:
    """The cache file: an .npz of counts with a JSON head, replaced atomically."""

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.model = path, model
        self.lots: dict[str, _Cached] = self._read()

    def lot(self, names: Sequence[str]) -> _Cached | None:
        """What is known of these values."""
        return self.lots.get(_key(names))

    def save(self, names: Sequence[str], samples: int, chain: str, seen: Seen) -> None:
        """Write the file anew, with this lot in it. Raises UsageError."""
        self.lots[_key(names)] = _Cached(samples, chain, seen)
        heads: dict[str, Any] = {}
        arrays: dict[str, Any] = {}
        for key, lot in self.lots.items():
            entries = {}
            for name, histogram in lot.seen.items():
                head, counts = histogram.to_parts()
                entries[name] = [head, f"c{len(arrays)}"]
                arrays[f"c{len(arrays)}"] = counts
            heads[key] = {"samples": lot.samples, "chain": lot.chain, "seen": entries}
        text = json.dumps({"format": 1, "model": self.model, "lots": heads})
        spare = self.path.with_name(f".{self.path.name}.{os.getpid()}.npz")
        try:
            np.savez_compressed(spare, head=np.array(text), **arrays)
            spare.replace(self.path)
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror}") from None
        finally:
            spare.unlink(missing_ok=True)

    def _read(self) -> dict[str, _Cached]:
        if not self.path.exists():
            return {}
        try:
            with np.load(self.path, allow_pickle=False) as file:
                head = json.loads(str(file["head"]))
                if head["format"] != 1 or head["model"] != self.model:
                    log.info("%s is of another model: not used", self.path)
                    return {}
                return {key: _lot_of(lot, file) for key, lot in head["lots"].items()}
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(
                f"cannot read the calibration cache {self.path}: {error}; remove it"
            ) from None


def _lot_of(lot: dict[str, Any], file: Any) -> _Cached:
    seen = {
        name: Histogram.from_parts(head, file[array])
        for name, (head, array) in lot["seen"].items()
    }
    return _Cached(lot["samples"], lot["chain"], seen)


def _key(names: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    """Of the model file and what it refers to: the weights decide what is seen."""
    model = Model.open(path)
    try:
        digest = facts.digest_of_source(model)
    finally:
        model.weights.close()
    return f"{digest.model}-{digest.data or ''}"


def _add_feed(chain: Any, feed: Feed) -> None:
    for name in sorted(feed):
        array = np.ascontiguousarray(feed[name])
        chain.update(f"{name}{array.dtype}{array.shape}".encode())
        chain.update(array.tobytes() if array.dtype == object else array.data)
