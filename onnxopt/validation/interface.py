"""What callers of a model rely on: its inputs and outputs, in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from onnx import ModelProto, ValueInfoProto

Ends = tuple[ValueInfoProto, ...]


class Interface(msgspec.Struct, frozen=True):
    """Inputs that must be fed, inputs that have a default, and outputs."""

    inputs: Ends
    defaults: frozenset[str]
    outputs: Ends


def of(proto: ModelProto) -> Interface:
    """The interface of a model. Before IR 4 nobody can feed an initializer."""
    given = {tensor.name for tensor in proto.graph.initializer}
    given |= {sparse.values.name for sparse in proto.graph.sparse_initializer}
    names = frozenset(value.name for value in proto.graph.input)
    return Interface(
        _copies(value for value in proto.graph.input if value.name not in given),
        names & given if proto.ir_version >= 4 else frozenset(),
        _copies(proto.graph.output),
    )


def _copies(values: Iterable[ValueInfoProto]) -> Ends:
    """Copies, since the model they come from may be rewritten."""
    return tuple(ValueInfoProto.FromString(value.SerializeToString()) for value in values)


def difference(
    reference: Interface, candidate: Interface, *, frozen: bool = False
) -> str | None:
    """How the candidate's interface differs, None where it does not.

    Sizes of dims may differ (they are for the run to judge), ranks and types may not.
    `frozen`: defaults may have become constants.
    """
    for what, ours, theirs in (
        ("input", reference.inputs, candidate.inputs),
        ("output", reference.outputs, candidate.outputs),
    ):
        problem = _ends(what, ours, theirs)
        if problem is not None:
            return problem
    if reference.defaults != candidate.defaults and not frozen:
        odd = ", ".join(sorted(reference.defaults ^ candidate.defaults))
        return f"inputs with defaults differ: {odd}"
    return None


def _ends(what: str, ours: Sequence[ValueInfoProto], theirs: Ends) -> str | None:
    before, after = ([value.name for value in ends] for ends in (ours, theirs))
    if before != after:
        return f"its {what}s are {', '.join(after)}, not {', '.join(before)}"
    for one, other in zip(ours, theirs, strict=True):
        if _kind(one) and _kind(other) and _kind(one) != _kind(other):
            return f"{what} {one.name!r} has another type"
        ranks = [_rank(value) for value in (one, other)]
        if None not in ranks and ranks[0] != ranks[1]:
            return f"{what} {one.name!r} has {ranks[1]} dims, not {ranks[0]}"
    return None


def _kind(value: ValueInfoProto) -> tuple[str, int] | None:
    form = value.type.WhichOneof("value")
    return (form, value.type.tensor_type.elem_type) if form else None


def _rank(value: ValueInfoProto) -> int | None:
    tensor = value.type.tensor_type
    return len(tensor.shape.dim) if tensor.HasField("shape") else None
