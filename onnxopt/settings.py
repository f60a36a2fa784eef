"""The keyword arguments of the verbs, apart: the command line reads their names.

Importing this module needs nothing; the types are for the type checker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from onnxopt.manager import Observer, Pass
    from onnxopt.validation.placement import TimeObserver


class ValidationOptions(TypedDict, total=False):
    """How a candidate is judged.

    Execution providers ("cpu", "cuda", ...) in `require_providers` must be there. Feeds:
    `seed`, `batch_size` (of an .npz), `input_shapes` (name to dims) for generated ones.
    Budget: `min_sqnr` (dB), `rtol` and `atol` (in place of the noise floor), `metric`
    ("script.py:function") with `max_drop`. `timeout` (seconds) and `memory_limit`
    (bytes) hold for each session's worker. `time_observer` is told which provider took
    how much of the time (see `onnxopt.validation.placement.ProviderTime`), of a
    transform only for the result.
    """

    base_dir: str | os.PathLike[str] | None
    require_providers: Sequence[str]
    seed: int
    batch_size: int | None
    input_shapes: Mapping[str, Sequence[int]] | None
    min_sqnr: float | None
    rtol: float | None
    atol: float | None
    metric: str | None
    max_drop: float | None
    custom_op_libraries: Sequence[str]
    timeout: float
    memory_limit: int | None
    time_observer: TimeObserver | None


class Options(ValidationOptions, total=False):
    """What every transform takes beyond the model, besides `ValidationOptions`.

    The result is judged on `providers`, "cpu" without any. `passes` (a textual pipeline,
    or passes) replaces the recipe. With `tolerance`, channels whose weights are at most
    that in magnitude are taken as zero before channels are removed, which is lossy (see
    the pass round-to-zero). `fix_shapes` and `freeze_inputs` change the
    interface, `opset` raises the standard opset. `validate` False leaves the result
    unproven; `require_validation` makes a model that cannot run an error.
    `bisect_limit` stops after that many edits; `verify_each` checks the graph, and the
    result in ONNX Runtime, after every pass; `observer` is told of each.
    """

    providers: Sequence[str]
    passes: str | Sequence[Pass] | None
    tolerance: float
    fix_shapes: Mapping[str, Sequence[int]] | None
    freeze_inputs: bool
    opset: int | None
    validate: bool
    require_validation: bool
    bisect_limit: int | None
    verify_each: bool
    observer: Observer | None
