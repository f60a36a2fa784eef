"""Which edit made the result wrong, at which node it shows, and a small model of it."""

from __future__ import annotations

import itertools
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import msgspec
import numpy as np
from onnx import helper

from onnxopt.api import Attempts, Job, why
from onnxopt.data.inputs import Feed
from onnxopt.errors import UsageError, WorkerError
from onnxopt.model import Source
from onnxopt.settings import Options
from onnxopt.validation.judge import settle
from onnxopt.validation.localise import Drift, Found, localise
from onnxopt.validation.samples import numbered, run_once
from onnxopt.validation.taps import TapModel, write_part
from onnxopt.validation.verdict import Question, Verdict

MAX_FEEDS = 64
"""Feeds, hard cases after them, on which the drift is looked for."""


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
    # Each edit is judged anyway, and the first wrong one must not end it.
    options["verify_each"] = False
    job = Job.create(model, recipe, data, target, options)
    with job.attempts() as run:
        run.tolerant = True
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
            question = _question(*_before_and_after(run, bad, Path(name)), options)
            found = _find(run, question, Path(name))
            files = []
            if repro is not None and found is not None:
                files = _write_repro(*found, question, Path(repro))
        return Bisection(
            edits=edits,
            reason=reason,
            culprit=Culprit(bad, entry.name, entry.scope, entry.node, entry.why),
            drift=None if found is None else found[0].drift,
            repro=files,
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


def _question(before: Path, after: Path, options: Options) -> Question:
    return Question(
        before,
        after,
        timeout=options.get("timeout", 600.0),
        memory_limit=options.get("memory_limit"),
        custom_op_libraries=tuple(options.get("custom_op_libraries") or ()),
        seed=options.get("seed", 0),
    )


def _find(run: Attempts, question: Question, folder: Path) -> tuple[Found, Feed] | None:
    """Where the two begin to differ, and on which feed; None where nothing shows it."""
    feeds = run.feeds
    assert feeds is not None
    with question.worker() as worker:
        feeds = settle(Verdict(question), worker, "cpu", feeds)
    for at in itertools.islice(numbered(feeds, hard=True), MAX_FEEDS):
        try:
            found = localise(question, at.feed, folder)
        except WorkerError:
            continue  # a feed that one of them rejects, or does not survive
        if found is not None:
            return found, at.feed
    return None


def _write_repro(found: Found, feed: Feed, question: Question, folder: Path) -> list[str]:
    """The parts that make the first wrong value from the right values before it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"before": found.reference, "after": found.candidate}
    drift = found.drift
    given = _given(found, feed, question)
    kinds = {
        name: helper.np_dtype_to_tensor_dtype(value.dtype)
        for name, value in given.items()
        if isinstance(value, np.ndarray)
    }
    made = []
    for name, path in paths.items():
        target = folder / f"{name}.onnx"
        shapes = {name: given[name].shape for name in kinds}
        write_part(path, {drift.value: drift.value}, kinds, target, shapes)
        made.append(str(target))
    target = folder / "feed.npz"
    _save_arrays(target, {name: given[name] for name in kinds})
    return [*made, str(target)]


def _save_arrays(target: Path, arrays: Mapping[str, Any]) -> None:
    """An .npz, as np.savez writes it, under any names ("file" is one)."""
    with zipfile.ZipFile(target, "w") as file:
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array))


def _given(found: Found, feed: Feed, question: Question) -> dict[str, Any]:
    """What both parts begin with: inner values of the reference, and inputs."""
    one, two = TapModel(found.reference), TapModel(found.candidate)
    try:
        start = {*found.drift.after, *feed}
        parts = [taps.cut(start, [found.drift.value])[1] for taps in (one, two)]
        needed = parts[0] | parts[1]
        inner = sorted(needed & set(found.drift.after))
        if not inner:
            return {name: feed[name] for name in feed if name in needed}
        with (
            tempfile.TemporaryDirectory(prefix="onnxopt-") as folder,
            question.worker() as worker,
        ):
            shown = one.write(inner, Path(folder) / "taps.onnx")
            spec = question.spec("cpu", "disable_all")
            values = run_once(worker, shown, spec, feed, inner)
        return {n: feed[n] for n in feed if n in needed} | values
    finally:
        one.close()
        two.close()
