"""Which edit made the result wrong, at which node it shows, and a small model of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Unpack

import msgspec
import numpy as np

from onnxopt.api import Attempts, Job, why
from onnxopt.data.inputs import Feed
from onnxopt.errors import OnnxoptError, UsageError
from onnxopt.model import Source
from onnxopt.runtime import SessionSpec, Worker
from onnxopt.settings import Options
from onnxopt.validation.localise import Drift, localise
from onnxopt.validation.samples import numbered
from onnxopt.validation.taps import TapModel, write_part

MAX_FEEDS = 8
"""Feeds on which the drift is looked for."""


class Culprit(msgspec.Struct, frozen=True):
    """The first edit after which the result is wrong: the `edit`-th of the run."""

    edit: int
    name: str
    scope: str
    node: str
    why: str


class Bisection(msgspec.Struct, frozen=True, kw_only=True):
    """What was found: nothing where the whole pipeline is right.

    `reason`: what the verdict on the whole result was. `drift`: where the models before
    and after the edit begin to differ. `repro`: files of the reduced models and their
    inputs, where a folder was given.
    """

    schema: int = 1
    edits: int
    reason: str | None = None
    culprit: Culprit | None = None
    drift: Drift | None = None
    repro: list[str] = []


def bisect(
    model: Source,
    recipe: str = "default",
    data: Any = None,
    target: str = "onnx",
    repro: str | os.PathLike[str] | None = None,
    **options: Unpack[Options],
) -> Bisection:
    """Find the first wrong edit of a pipeline by halving, and the node where it shows.

    Takes what `onnxopt.optimize` takes; `repro`: a folder for `before.onnx` and
    `after.onnx`, the parts of the model around the edit, with `feed.npz`. Raises as
    `optimize` does, but not for a wrong result.
    """
    if options.get("validate") is False:
        raise UsageError("bisect has to validate")
    job = Job.create(model, recipe, data, target, options)
    with job.attempts() as run:
        run.attempt(options.get("bisect_limit"))[1].discard()
        edits = len(run.history)
        if not run.has_failed:
            return Bisection(edits=edits)
        reason = why(run.report.validation)
        bad = run.first_wrong_edit()
        if not bad:
            return Bisection(edits=edits, reason=reason)
        entry = run.history[bad - 1]
        with tempfile.TemporaryDirectory(prefix="onnxopt-") as name:
            pair = _before_and_after(run, bad, Path(name))
            drift, feed = _drift(run, pair, options)
            files = []
            if repro is not None and drift is not None and feed is not None:
                files = _write_repro(pair, drift, feed, Path(repro), options)
        culprit = Culprit(bad, entry.name, entry.scope, entry.node, entry.why)
        return Bisection(
            edits=edits, reason=reason, culprit=culprit, drift=drift, repro=files
        )


def _before_and_after(run: Attempts, bad: int, folder: Path) -> tuple[Path, Path]:
    """The results of all edits but the wrong one, and of all with it."""
    paths = []
    for name, limit in (("before", bad - 1), ("after", bad)):
        result, staged = run.attempt(limit)
        staged.discard()
        paths.append(folder / f"{name}.onnx")
        result.save(paths[-1])
    return paths[0], paths[1]


def _spec(options: Options) -> SessionSpec:
    libraries = tuple(options.get("custom_op_libraries") or ())
    return SessionSpec(level="disable_all", custom_op_libraries=libraries)


def _drift(
    run: Attempts, pair: tuple[Path, Path], options: Options
) -> tuple[Drift | None, Feed | None]:
    """Where the two begin to differ, and on which feed; None where nothing shows it."""
    feeds = run.feeds
    assert feeds is not None
    for at, _ in zip(numbered(feeds, hard=True), range(MAX_FEEDS + 4), strict=False):
        try:
            found = localise(
                *pair,
                at.feed,
                _spec(options),
                timeout=options.get("timeout", 600.0),
                memory_limit=options.get("memory_limit"),
                seed=options.get("seed", 0),
            )
        except OnnxoptError:
            continue  # a feed that one of them rejects
        if found is not None:
            return found, at.feed
    return None, None


def _write_repro(
    pair: tuple[Path, Path], drift: Drift, feed: Feed, folder: Path, options: Options
) -> list[str]:
    """The parts that make the first wrong value from the values before it."""
    folder.mkdir(parents=True, exist_ok=True)
    start = _values(pair[0], drift.after, feed, options)
    start.update(feed)
    made = []
    for path in pair:
        target = folder / path.name
        if write_part(path, start, drift.value, target) is None:
            shutil.copy(path, target)
        made.append(str(target))
    arrays = {
        name: value for name, value in start.items() if isinstance(value, np.ndarray)
    }
    np.savez(folder / "feed.npz", **arrays)  # type: ignore[arg-type]
    return [*made, str(folder / "feed.npz")]


def _values(path: Path, names: list[str], feed: Feed, options: Options) -> dict[str, Any]:
    if not names:
        return {}
    taps = TapModel(path)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="onnxopt-") as folder,
            Worker(timeout=options.get("timeout", 600.0)) as worker,
        ):
            shown = taps.write(names, Path(folder) / "taps.onnx")
            session = worker.load(shown, _spec(options))
            return dict(session.run(feed, names))
    finally:
        taps.close()
