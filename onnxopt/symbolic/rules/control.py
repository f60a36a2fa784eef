"""If, Loop and Scan: what their bodies are given, and what comes out of them.

A size that a body makes means nothing outside of it, and may change from round to round:
only numbers leave it.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto, ValueInfoProto

from onnxopt import attributes
from onnxopt.symbolic.dim import Dim
from onnxopt.symbolic.fact import UNKNOWN, Call, Dims, Fact, integers


def outputs(call: Call, results: Sequence[Sequence[Fact]]) -> list[Fact]:
    """Facts of the outputs; `results` are those of each body."""
    match call.node.op_type:
        case "If" if len(results) == 2:
            pairs = zip(results[0], results[1], strict=False)
            return [_either(call, i, pair) for i, pair in enumerate(pairs)]
        case "Loop" if len(results) == 1:
            return _loop(call, results[0])
        case "Scan" if len(results) == 1 and call.opset >= 9:
            return _scan(call, results[0])
    return []


def body_input(call: Call, index: int, formals: Sequence[ValueInfoProto]) -> Fact:
    """Of input `index` of a body whose inputs are `formals`."""
    match call.node.op_type:
        case "Loop" if index == 0:
            # ONNX Runtime counts in a tensor of the rank that the body declares: 0 or 1
            is_scalar = not formals[0].type.tensor_type.shape.dim
            return Fact(TensorProto.INT64, () if is_scalar else (1,))
        case "Loop" if index == 1:
            return Fact(TensorProto.BOOL)  # that of a later round is as the body made it
        case "Loop":
            return _type_only(call, index)
        case "Scan" if call.opset >= 9:
            scanned = int(attributes.get(call.node, "num_scan_inputs", 0))
            states = len(formals) - scanned
            if index < states:
                return _type_only(call, index)
            return _element(call, index, index - states)
    return UNKNOWN


def _type_only(call: Call, slot: int) -> Fact:
    """What is carried along keeps its type; its dims may change."""
    return Fact(call.inputs[slot].dtype) if call.has(slot) else UNKNOWN


def _element(call: Call, slot: int, number: int) -> Fact:
    """One round's slice of what is scanned."""
    given = call.inputs[slot]
    axes = attributes.get(call.node, "scan_input_axes") or []
    axis = int(axes[number]) if number < len(axes) else 0
    if given.dims is None or not -len(given.dims) <= axis < len(given.dims):
        return Fact(given.dtype)
    axis %= len(given.dims)
    return Fact(given.dtype, given.dims[:axis] + given.dims[axis + 1 :])


def _either(call: Call, slot: int, pair: tuple[Fact, Fact]) -> Fact:
    """What both branches agree on."""
    one, two = pair
    dtype = one.dtype if one.dtype == two.dtype else 0
    return Fact(dtype, _common(call, slot, one.dims, two.dims))


def _common(call: Call, slot: int, one: Dims | None, two: Dims | None) -> Dims | None:
    if one is None or two is None or len(one) != len(two):
        return None
    return tuple(
        left if isinstance(left, int) and left == right else call.fresh(axis, slot)
        for axis, (left, right) in enumerate(zip(one, two, strict=True))
    )


def _loop(call: Call, results: Sequence[Fact]) -> list[Fact]:
    """Carried values are those of the start, after no round, or of the body."""
    carried = len(call.node.input) - 2
    facts = []
    for index, result in enumerate(results[1:]):
        if index < carried:
            start = call.inputs[index + 2]
            dims = _common(call, index, start.dims, result.dims)
            facts.append(Fact(start.dtype or result.dtype, dims))
        else:
            facts.append(_stacked(call, index, _sure_of_loop(call, index, result), 0))
    return facts


def _sure_of_loop(call: Call, index: int, result: Fact) -> Fact:
    """What is sure of a result that is stacked: all of it where there is a round.

    Without one ONNX Runtime makes an empty tensor, of the rank and the numbers that it
    knew beforehand (else 0): those that the body declares.
    """
    if result.dims is None or _has_round(call):
        return result
    ((_, body),) = attributes.subgraphs(call.node)
    declared = body.output[index + 1].type.tensor_type
    if not declared.HasField("shape") or len(declared.shape.dim) != len(result.dims):
        return Fact(result.dtype)
    pairs = zip(result.dims, declared.shape.dim, strict=True)
    return Fact(
        result.dtype,
        tuple(size if size == told.dim_value else -1 for size, told in pairs),
    )


def _has_round(call: Call) -> bool:
    """Whether a Loop is sure to run its body."""
    trips, start = call.inputs[0].value, call.inputs[1].value
    limit = integers(trips) if call.has(0) else [1]
    goes = integers(start) if call.has(1) else [1]
    return bool(limit and limit[0] > 0 and goes and goes[0])


def _scan(call: Call, results: Sequence[Fact]) -> list[Fact]:
    scanned = int(attributes.get(call.node, "num_scan_inputs", 0))
    states = len(call.node.input) - scanned
    axes = attributes.get(call.node, "scan_output_axes") or []
    facts = []
    for index, result in enumerate(results):
        if index < states:
            dims = _common(call, index, call.inputs[index].dims, result.dims)
            facts.append(Fact(result.dtype, dims))
        else:
            number = index - states
            axis = int(axes[number]) if number < len(axes) else 0
            facts.append(_stacked(call, index, result, axis))
    return facts


def _stacked(call: Call, slot: int, result: Fact, axis: int) -> Fact:
    """One result of each round, along a new axis; after no round it may be empty."""
    if result.dims is None or slot >= len(call.node.output) or not _has(call, slot):
        return Fact(result.dtype)
    rank = len(result.dims) + 1
    if not -rank <= axis < rank:
        return Fact(result.dtype)
    made: list[Dim] = list(result.dims)
    made.insert(axis % rank, -1)
    dims = tuple(
        size if isinstance(size, int) and size >= 0 else call.fresh(place, slot)
        for place, size in enumerate(made)
    )
    return Fact(result.dtype, dims)


def _has(call: Call, slot: int) -> bool:
    return bool(call.node.output[slot])
