"""The report: what changed, what was skipped and why, and the verdict (schema 1).

Every number in it comes from a file or a run, never from a pass's claim. Timings
are kept out, so that the same input and options give the same bytes.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from onnxopt._version import __version__

Guarantee = Literal["bitwise", "equivalent", "lossy"]
Status = Literal["passed", "failed", "not_run"]


def as_json(value: msgspec.Struct) -> str:
    """A structure as indented JSON text, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


class Pair(msgspec.Struct, frozen=True):
    """Sizes (bytes) of the model file and of its external data."""

    model: int
    data: int


class Digest(msgspec.Struct, frozen=True):
    """sha256 of the model file, and of its external data where it has any."""

    model: str
    data: str | None


class Side(msgspec.Struct, frozen=True):
    """Measured facts of one model file.

    `nodes` counts every scope; `parameters` counts elements of initializers and
    Constants, less scales and zero points; `macs` is per run at batch 1, null where
    a shape is unknown.
    """

    sha256: Digest
    bytes: Pair
    nodes: int
    parameters: int
    macs: int | None
    opset: dict[str, int]


class Skip(msgspec.Struct, frozen=True):
    """A node that a pass looked at and left alone, with the reason."""

    node: str
    scope: str
    reason: str


class PassReport(msgspec.Struct):
    """What one pass did: edits, and the change in nodes and weight bytes."""

    name: str
    guarantee: Guarantee
    edits: int = 0
    nodes: int = 0
    bytes: int = 0
    skipped: list[Skip] = []


class Metric(msgspec.Struct, frozen=True):
    """One measure over all feeds; null where it is not defined or nothing differs."""

    worst: float | None
    mean: float | None


class Counts(msgspec.Struct, frozen=True):
    """Elements that are no finite numbers, over all feeds."""

    nan: int = 0
    inf: int = 0


class NotFinite(msgspec.Struct, frozen=True):
    """What either model's output holds that is not finite."""

    reference: Counts = Counts()
    candidate: Counts = Counts()


class OutputCheck(msgspec.Struct, frozen=True):
    """How one output of the candidate compares with the reference's.

    Distances are over elements that are finite in both. `max_rel` is relative to the
    largest magnitude of the reference, `sqnr_db` is in dB, `kl` in nats, agreements are
    shares of rows (0 to 1). `kl` is null where the output is no distribution, agreements
    where its last axis may not be classes. `shapes` are the reference's, the first few
    different ones.
    """

    name: str
    dtype: str
    status: Status
    reason: str | None
    bound: float | None
    max_abs: Metric
    max_rel: Metric
    p99_abs: Metric
    cosine: Metric
    sqnr_db: Metric
    top1_agreement: Metric | None
    top5_agreement: Metric | None = None
    kl: Metric | None = None
    shapes: list[list[int]] = []
    not_finite: NotFinite = NotFinite()


class Check(msgspec.Struct, frozen=True):
    """The verdict on one execution provider at one optimization level of ORT."""

    provider: str
    level: Literal["disable_all", "enable_all"]
    status: Status
    reason: str | None
    outputs: list[OutputCheck]


class LevelDifference(msgspec.Struct, frozen=True):
    """How far ORT's own optimizations move a model's outputs; told, never judged."""

    provider: str
    model: Literal["reference", "candidate"]
    output: str
    sqnr_db: float | None
    max_abs: float | None


class Placement(msgspec.Struct, frozen=True):
    """What ran a model's nodes, by execution provider, at one level of ORT.

    `provider` is the one asked for. `nodes` and `operators` count the nodes that ORT
    assigned to each provider, all scopes; `memcpy` counts the copies between devices
    that it put in, null where that could not be seen.
    """

    provider: str
    level: Literal["disable_all", "enable_all"]
    model: Literal["reference", "candidate"]
    nodes: dict[str, int]
    operators: dict[str, dict[str, int]]
    memcpy: int | None


class Validation(msgspec.Struct, frozen=True):
    """The verdict on the whole: failed if any check failed, else passed if any passed."""

    status: Status
    reason: str | None
    judged_by: str
    feeds: int
    checks: list[Check]
    level_differences: list[LevelDifference]
    notes: list[str]
    placements: list[Placement] = []


def not_judged(reason: str) -> Validation:
    """A verdict that never came."""
    return Validation("not_run", reason, "", 0, [], [], [])


class Report(msgspec.Struct, kw_only=True):
    """One run of onnxopt, from the file that came in to the file that went out."""

    schema: int = 1
    onnxopt: str = __version__
    recipe: str
    target: str
    source: Side
    output: Side | None = None
    passes: list[PassReport] = []
    validation: Validation | None = None
    notes: list[str] = []

    def to_json(self) -> str:
        """The report as indented JSON text (schema 1), ending in a newline."""
        return as_json(self)
