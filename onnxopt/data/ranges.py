"""What an input may hold, and what it should: traced from the input to its uses.

    ids -> Cast -> Gather(table[30522, 384], axis=0)     ids are in 0..30521
    rate -> Equal(16000) -> If                           rate is 16000, and 16001

Indices out of range make the reference itself fail, so feeds made without this would
prove nothing about a language model. Values that all fall on one side of a comparison
prove nothing about what the other side computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import onnx
from onnx import numpy_helper

from onnxopt.data.inputs import Dim, dims_of
from onnxopt.graph import constant_value

# An exclusive upper bound: a number, or the symbol of a dim that a feed binds.
Bound: TypeAlias = int | str

# Operators whose output holds elements of input 0, all or some, and nothing else.
_CARRY = {
    "Cast",
    "Expand",
    "Flatten",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}
# Operators that change neither shape nor the length of any axis of input 0.
_SAME_SHAPE = {"Cast", "DequantizeLinear", "Identity", "QuantizeLinear"}
# Where com.microsoft's fused embedding takes ids, and where their tables.
_EMBEDDING_TABLES = {0: 2, 1: 4}
# Operators that tell values below a constant from values above it.
_ORDERS = {"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Clip", "Max", "Min"}
# Of a table of constants that a value is compared with, so many are kept.
_MOST_CONSTANTS = 512
# A constant as large as this stands for "no limit".
_NO_LIMIT = 2**31 - 1
# Inference parses a whole copy of the model: not worth it for big ones.
_INFERENCE_LIMIT = 1 << 28


def index_bounds(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, list[Bound]]:
    """Exclusive upper bounds of the named integer inputs; no entry where unknown."""
    facts = _Facts(model)
    found = {name: sorted(set(_bounds(facts, name)), key=str) for name in names}
    return {name: bounds for name, bounds in found.items() if bounds}


def telling_values(
    model: onnx.ModelProto, whole: Sequence[str], floats: Sequence[str] = ()
) -> dict[str, list[float]]:
    """Values on every side of the constants that the named inputs are compared with.

    `whole` are inputs of integers, `floats` of floats: those stay clear of the constant
    itself, where rounding alone takes the other side. No entry where nothing is compared.
    """
    facts = _Facts(model)
    sides: list[tuple[Sequence[str], _Sides]] = [
        (whole, _whole_sides),
        (floats, _float_sides),
    ]
    found = {
        name: sorted({v for each in _compared(facts, name) for v in beside(*each)})
        for names, beside in sides
        for name in names
    }
    return {name: values for name, values in found.items() if values}


_Sides: TypeAlias = Callable[[str, float], Iterable[float]]


def _whole_sides(op_type: str, constant: float) -> Iterable[int]:
    low, high = math.floor(constant), math.ceil(constant)
    if op_type == "Equal":
        return (low, low + 1) if low == high else ()
    return high - 1, low, high, low + 1


def _float_sides(op_type: str, constant: float) -> Iterable[float]:
    step = max(1.0, abs(constant)) / 2
    return constant - step, constant + step


def _compared(facts: _Facts, name: str) -> Iterator[tuple[str, float]]:
    """Comparing operators that elements of an input reach, each with a constant."""
    for node, position in _reached(facts, name):
        if node.op_type == "Cast" and _attribute(node, "to", 0) == onnx.TensorProto.BOOL:
            yield "Equal", 0.0
        if node.op_type == "Equal" or node.op_type in _ORDERS:
            others = [n for i, n in enumerate(node.input) if i != position]
            values = {v for n in others for v in facts.values(n) if abs(v) < _NO_LIMIT}
            yield from ((node.op_type, value) for value in _thinned(sorted(values)))


def _thinned(values: list[float]) -> list[float]:
    step = max(1, -(-len(values) // _MOST_CONSTANTS))
    return sorted({*values[::step], *values[-1:]})


def _bounds(facts: _Facts, name: str) -> Iterator[Bound]:
    for node, position in _reached(facts, name):
        bound = _bound_at(facts, node, position)
        if bound is not None:
            yield bound


def _reached(facts: _Facts, name: str) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Uses of a tensor, and of what holds its elements."""
    seen, queue = {name}, [name]
    while queue:
        for node, position in facts.uses.get(queue.pop(), ()):
            yield node, position
            if node.op_type in _CARRY and position == 0:
                queue += [out for out in node.output if out not in seen]
                seen.update(node.output)


def _bound_at(facts: _Facts, node: onnx.NodeProto, position: int) -> Bound | None:
    """What the use of a tensor at this input of this node says about its values."""
    match node.op_type, position:
        case "Gather" | "GatherElements" | "ScatterElements" | "GatherBlockQuantized", 1:
            axis = _attribute(node, "gather_axis", _attribute(node, "axis", 0))
            return _dim_at(facts.shape(node.input[0]), axis)
        case ("GatherND", 1) | ("ScatterND", 1):
            first = _attribute(node, "batch_dims", 0)
            length = _dim_at(facts.shape(node.input[1]), -1)
            last = first + length if isinstance(length, int) else None
            return _smallest(facts.shape(node.input[0]), first, last)
        case "OneHot", 0:
            return facts.scalar(node.input[1])
        case "EmbedLayerNormalization", 0 | 1:
            table = _EMBEDDING_TABLES[position]
            name = node.input[table] if table < len(node.input) else ""
            return _dim_at(facts.shape(name), 0)
    return None


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _dim_at(shape: Sequence[Dim] | None, axis: int) -> Bound | None:
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    return shape[axis]


def _smallest(shape: Sequence[Dim] | None, first: int, last: int | None) -> int | None:
    static = [dim for dim in (shape or ())[first:last] if isinstance(dim, int)]
    return min(static, default=None)


class _Facts:
    """Uses, shapes and constants of every scope of a model, by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.uses: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        self.producers: dict[str, onnx.NodeProto] = {}
        self.constants: dict[str, onnx.TensorProto] = {}
        self.shapes: dict[str, tuple[Dim, ...] | None] = {}
        self.inferred = False
        self._add_graph(model.graph)

    def _add_graph(self, graph: onnx.GraphProto) -> None:
        self.constants.update((tensor.name, tensor) for tensor in graph.initializer)
        self._add_shapes(graph)
        for node in graph.node:
            self._add_node(node)

    def _add_shapes(self, graph: onnx.GraphProto) -> None:
        for info in (*graph.input, *graph.value_info, *graph.output):
            if info.type.HasField("tensor_type"):
                self.shapes.setdefault(info.name, dims_of(info.type.tensor_type))

    def _add_node(self, node: onnx.NodeProto) -> None:
        for position, name in enumerate(node.input):
            self.uses.setdefault(name, []).append((node, position))
        for name in node.output:
            self.producers[name] = node
        constant = constant_value(node)
        if constant is not None:
            self.constants[node.output[0]] = constant
        for attribute in node.attribute:
            for graph in (*attribute.graphs, attribute.g):
                self._add_graph(graph)

    def shape(self, name: str) -> tuple[Dim, ...] | None:
        """Shape of a tensor as far as it is known."""
        known = self._declared(name)
        if known is None and not self.inferred:
            self._infer()
            known = self._declared(name)
        return known

    def _declared(self, name: str) -> tuple[Dim, ...] | None:
        while name not in self.constants and self.shapes.get(name) is None:
            node = self.producers.get(name)
            if node is None or node.op_type not in _SAME_SHAPE:
                return None
            name = node.input[0]
        if name in self.constants:
            return tuple(self.constants[name].dims)
        return self.shapes[name]

    def _infer(self) -> None:
        self.inferred = True
        if self.model.ByteSize() > _INFERENCE_LIMIT:
            return
        try:
            inferred = onnx.shape_inference.infer_shapes(self.model)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            return  # only a hint is lost
        for info in inferred.graph.value_info:
            if self.shapes.get(info.name) is None:
                self.shapes[info.name] = dims_of(info.type.tensor_type)

    def scalar(self, name: str) -> int | None:
        """The value of a one-element integer constant."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        if np.prod(tensor.dims, dtype=np.int64) != 1:
            return None
        return int(numpy_helper.to_array(tensor).reshape(-1)[0])

    def values(self, name: str) -> list[float]:
        """The finite numbers of a constant, also behind nodes that carry them."""
        while name not in self.constants:
            node = self.producers.get(name)
            if node is None or node.op_type not in _CARRY:
                return []
            name = node.input[0]
        tensor = self.constants[name]
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return []
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind not in "biuf":
            return []
        return [value for value in np.unique(array).tolist() if math.isfinite(value)]
