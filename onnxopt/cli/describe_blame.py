"""What `bisect` found, as text."""

from __future__ import annotations

from collections.abc import Iterator

from onnxopt.blame import Bisection, Culprit
from onnxopt.validation.localise import Drift


def bisection(found: Bisection, verbose: int) -> list[str]:
    """Lines for the terminal."""
    return list(_lines(found, verbose))


def _lines(found: Bisection, verbose: int) -> Iterator[str]:
    edits = f"{found.edits} edit{'' if found.edits == 1 else 's'}"
    if found.reason is None:
        yield f"nothing wrong: the result of all {edits} passed"
        return
    yield f"wrong after {edits}: {found.reason}"
    if found.culprit is None:
        yield "no edit is to blame: the model is wrong before the first one"
        return
    yield from _culprit(found.culprit)
    if found.drift is None:
        yield "no single node shows it: what both models have in common is right"
    else:
        yield from _drift(found.drift, verbose)
    yield from (f"written: {path}" for path in found.repro)


def _culprit(culprit: Culprit) -> Iterator[str]:
    yield f"pass     {culprit.name}"
    yield f"edit     #{culprit.edit} at {culprit.node} ({culprit.scope}): {culprit.why}"


def _drift(drift: Drift, verbose: int) -> Iterator[str]:
    yield f"node     {drift.node} ({drift.op}, {drift.scope})"
    yield f"value    {drift.value!r} {drift.reason}"
    errors = {"by itself": drift.local, "in the whole model": drift.cumulative}
    told = [
        f"{error:.3g} {where}" for where, error in errors.items() if error is not None
    ]
    if told:
        yield f"error    {', '.join(told)}, of the largest value"
    if verbose:
        yield f"after    {', '.join(drift.after) or 'the inputs'}"
        yield f"compared {drift.compared} of {drift.common} values of both models"
