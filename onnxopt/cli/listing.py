"""What there is: the passes with their parameters, and the pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import msgspec

from onnxopt.cli.terminal import Block, Table
from onnxopt.manager import Pass
from onnxopt.passes import PIPELINES
from onnxopt.recipe import pass_table
from onnxopt.report import Guarantee


class Parameter(msgspec.Struct, frozen=True):
    """A parameter of a pass; a default of None may also mean that it has none."""

    name: str
    type: str
    default: Any
    required: bool


class Entry(msgspec.Struct, frozen=True):
    """One pass."""

    name: str
    guarantee: Guarantee
    doc: str
    parameters: list[Parameter]


class Listing(msgspec.Struct, frozen=True):
    """Every pass, and the pipelines by name."""

    passes: list[Entry]
    pipelines: dict[str, list[str]]


def listing() -> Listing:
    """The passes that can be named in a pipeline, ours and third parties'."""
    return Listing(
        passes=[_entry(name, kind) for name, kind in pass_table().items()],
        pipelines={name: list(steps) for name, steps in PIPELINES.items()},
    )


def lines(found: Listing) -> Iterator[Block]:
    """The listing as text."""
    table = Table(("pass", "guarantee", "parameters", "what it does"), left=4)
    for entry in found.passes:
        table.add(entry.name, entry.guarantee, _signature(entry), entry.doc)
    yield table
    yield ""
    pipelines = Table(("pipeline", "passes"), left=2)
    for name, steps in found.pipelines.items():
        pipelines.add(name, ",".join(steps))
    yield pipelines


def _signature(entry: Entry) -> str:
    return ", ".join(
        item.name if item.required else f"{item.name}={item.default}"
        for item in entry.parameters
    )


def _entry(name: str, kind: type[Pass]) -> Entry:
    doc = inspect.cleandoc(kind.__doc__ or "").splitlines()
    return Entry(
        name=name,
        guarantee=kind.guarantee,
        doc=doc[0] if doc else "",
        parameters=[_parameter(item) for item in msgspec.structs.fields(kind)],
    )


def _parameter(item: msgspec.structs.FieldInfo) -> Parameter:
    default = item.default
    if item.default_factory is not msgspec.NODEFAULT:
        default = item.default_factory()
    return Parameter(
        name=item.name,
        type=getattr(item.type, "__name__", str(item.type)),
        default=None if item.required else default,
        required=item.required,
    )
