"""The value of what does not depend on the inputs, but varies over space."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from onnxopt.channels.analysis import Analysis
from onnxopt.channels.facts import MAX_ELEMENTS, Kind
from onnxopt.evaluate import EvaluationError
from onnxopt.weights import Array


class MapError(Exception):
    """The value cannot be told; the text is the reason."""


def evaluate_map(a: Analysis, name: str) -> Array:
    """The value of `name`, all of it at least MAP: [1, ...] where axis 0 is uniform.

    The nodes that make it run on known values; elements that are not known have no
    part in it, and are zero there. Raises MapError.
    """
    model = ModelProto(ir_version=8)
    model.opset_import.append(helper.make_opsetid("", a.graph.opset()))
    model.graph.name = "map"
    nodes: dict[int, NodeProto] = {}
    given: dict[str, Array] = {}
    _collect(a, name, nodes, given)
    model.graph.node.extend(nodes.values())
    for value, array in given.items():
        model.graph.initializer.append(numpy_helper.from_array(array, value))
    model.graph.output.append(ValueInfoProto(name=name))
    try:
        made = a.evaluator.evaluate(model)[name]
    except EvaluationError as error:
        raise MapError(f"it could not be computed: {error}") from None
    if made.shape != tuple(_dims(a, name)) or not np.isfinite(made).all():
        raise MapError("it is not of the shape that was inferred, or not finite")
    if made.ndim and (made == made[:1]).all():
        return made[:1]
    raise MapError("it differs from sample to sample")


def _dims(a: Analysis, name: str) -> list[int]:
    """The dims of a value, with one sample where their number is open."""
    shape = a.shape(name)
    if not shape:
        raise MapError(f"the shape of {name!r} is not known")
    first = shape[0] if isinstance(shape[0], int) else 1
    dims = [first, *(size if isinstance(size, int) else -1 for size in shape[1:])]
    if -1 in dims:
        raise MapError(f"the size of {name!r} depends on the input")
    if math.prod(dims) > MAX_ELEMENTS:
        raise MapError(f"{name!r} is too large")
    return dims


def _dtype(a: Analysis, name: str) -> Any:
    kind = a.graph.dtype(name)
    if kind is None:
        raise MapError(f"the type of {name!r} is not known")
    return helper.tensor_dtype_to_np_dtype(kind)


def _collect(
    a: Analysis, name: str, nodes: dict[int, NodeProto], given: dict[str, Array]
) -> None:
    """The nodes that make `name`, sources first, and the known values they start from."""
    waiting = [(name, False)]
    while waiting:
        name, are_sources_there = waiting.pop()
        node = a.graph.producer(name)
        if are_sources_there and node is not None:
            nodes[id(node)] = node
        elif name not in given and (node is None or id(node) not in nodes):
            array = _start(a, name)
            if array is not None:
                given[name] = array
            elif node is None:
                raise MapError(f"it is made from {name!r}")
            else:
                waiting.append((name, True))
                waiting += [(source, False) for source in reversed(node.input) if source]


def _start(a: Analysis, name: str) -> Array | None:
    """What to compute a value's readers from; None where it has to be computed."""
    if a.is_constant(name):
        array = a.array(name)
        if array is None:
            raise MapError(f"{name!r} could not be computed")
        return array
    found = a.fact(name)
    if found is None:
        return np.zeros(_dims(a, name), _dtype(a, name))
    if (found.kinds == Kind.MAP).any():
        return None
    if found.is_wild.any():
        raise MapError(f"{name!r} is not finite")
    values = np.where(found.is_const, found.values, np.zeros_like(found.values))
    return np.ascontiguousarray(np.broadcast_to(values, _dims(a, name)))
