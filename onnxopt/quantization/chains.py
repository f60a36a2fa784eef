"""Chains of operators around one that rounds, each a step of a staircase.

    v = Div(x, s); r = Round(v); c = Clip(r, -128, 127); y = Mul(c, s)

Links are Add, Sub, Mul and Div by constants, Clip, Relu, Min and Max with constants,
Round, Floor and Ceil, and Casts to integers and back, all of float32. A link keeps the
shape of what it reads, and does not fall: factors are positive.

Of what torch writes for a straight-through estimator, v + (Round(v) - v), the value is
Round(v): the difference is a multiple of the last digit of v, and so is exact, as is
the sum, wherever v is finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnxopt import attributes, axes
from onnxopt.affine import AFFINE, MAX_BYTES, Affine
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.operands import clip_bounds
from onnxopt.quantization.staircase import LARGEST, Floats32, Step
from onnxopt.weights import Array, tensor_bytes

ROUNDING = ("Round", "Floor", "Ceil")
MAX_LINKS = 6
"""Links before, and behind, the one that rounds."""

_INTEGERS = (
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT16,
    TensorProto.UINT16,
    TensorProto.INT32,
)


class Link(msgspec.Struct, frozen=True, eq=False):
    """Operators that make `output` of `value`, with constants that broadcast to it."""

    nodes: tuple[NodeProto, ...]
    value: str
    output: str
    constants: tuple[Array, ...]
    kind: str

    @property
    def is_scale(self) -> bool:
        """Whether it multiplies or divides."""
        return self.kind in ("Mul", "Div")

    @property
    def rounds(self) -> bool:
        """Whether it makes whole numbers of any."""
        return self.kind in (*ROUNDING, "Estimator")

    def step(self) -> Step:
        """What it computes, of [channels, values]."""
        operands = [_aligned(array) for array in self.constants]
        return _step(self.kind, operands)


class Chain(msgspec.Struct, frozen=True, eq=False):
    """Links one behind the other."""

    links: tuple[Link, ...]

    @property
    def value(self) -> str:
        """What it starts from."""
        return self.links[0].value

    @property
    def end(self) -> NodeProto:
        """The node that makes its output."""
        return self.links[-1].nodes[-1]

    def steps(self) -> list[Step]:
        """What it computes."""
        return [link.step() for link in self.links]

    def is_closed(self, graph: GraphView) -> bool:
        """Whether only its own nodes read its inner values."""
        own = {id(node) for link in self.links for node in link.nodes}
        for link in self.links:
            for name in (node.output[0] for node in link.nodes if node is not self.end):
                if graph.is_output(name) or graph.is_pinned(name):
                    return False
                if any(id(use.node) not in own for use in graph.uses(name)):
                    return False
        return True

    def channel_axis(self, graph: GraphView) -> int | None:
        """The axis along which its constants vary, from the front; None: along none.

        Raises DeclinedError where they vary along several, or broadcast the value.
        """
        arrays = [array for link in self.links for array in link.constants]
        shape = graph.shape(self.value)
        if not all(axes.leaves_shape(array.shape, shape) for array in arrays):
            raise DeclinedError("its constants may broadcast it")
        behind = {
            array.ndim - axis
            for array in arrays
            for axis, size in enumerate(array.shape)
            if size != 1
        }
        if len(behind) > 1:
            raise DeclinedError("its constants vary along several axes")
        return None if not behind or shape is None else len(shape) - behind.pop()


def links_around(
    graph: GraphView, node: NodeProto
) -> tuple[list[Link], Link, list[Link]]:
    """Those before `node`, one of ROUNDING, its own, and those behind."""
    middle = _rounding(graph, node)
    before: list[Link] = []
    value = middle.value
    while len(before) < MAX_LINKS:
        maker = graph.producer(value)
        link = None if maker is None else _ending_at(graph, maker)
        if link is None or link.output != value:
            break
        before.insert(0, link)
        value = link.value
    after: list[Link] = []
    value = middle.output
    while len(after) < MAX_LINKS:
        link = _following(graph, value)
        if link is None:
            break
        after.append(link)
        value = link.output
    return before, middle, after


def _rounding(graph: GraphView, node: NodeProto) -> Link:
    """With the operators of a straight-through estimator, where there are some."""
    value, rounded = node.input[0], node.output[0]
    plain = Link((node,), value, rounded, (), node.op_type)
    use = graph.only_use(rounded)
    if use is None or graph.op(use.node) != "Sub" or node.op_type != "Round":
        return plain
    difference = use.node
    if list(difference.input) != [rounded, value]:
        return plain
    use = graph.only_use(difference.output[0])
    if use is None or graph.op(use.node) != "Add" or value not in use.node.input:
        return plain
    total = use.node
    return Link((node, difference, total), value, total.output[0], (), "Estimator")


def _ending_at(graph: GraphView, node: NodeProto) -> Link | None:
    if graph.op(node) == "Cast":
        first = graph.producer(node.input[0])
        if first is None or graph.op(first) != "Cast":
            return None
        return _casts(graph, first, node)
    return _link(graph, node)


def _following(graph: GraphView, value: str) -> Link | None:
    """The first link that reads `value`; `Chain.is_closed` tells of other readers."""
    for use in graph.uses(value):
        link = _starting_at(graph, use.node) if use.view is graph else None
        if link is not None and link.value == value:
            return link
    return None


def _starting_at(graph: GraphView, node: NodeProto) -> Link | None:
    if graph.op(node) == "Cast":
        use = graph.only_use(node.output[0])
        if use is None or graph.op(use.node) != "Cast":
            return None
        return _casts(graph, node, use.node)
    return _link(graph, node)


def _casts(graph: GraphView, first: NodeProto, second: NodeProto) -> Link | None:
    """To an integer and back."""
    kind = attributes.get(first, "to")
    if kind not in _INTEGERS or attributes.get(second, "to") != TensorProto.FLOAT:
        return None
    if graph.dtype(first.input[0]) != TensorProto.FLOAT:
        return None
    limits = np.iinfo(helper.tensor_dtype_to_np_dtype(kind))
    bounds = tuple(np.array(bound, np.float64) for bound in (limits.min, limits.max))
    return Link((first, second), first.input[0], second.output[0], bounds, "Cast")


def _link(graph: GraphView, node: NodeProto) -> Link | None:
    if (
        attributes.has_references(node)
        or graph.dtype(node.output[0]) != TensorProto.FLOAT
    ):
        return None
    op = graph.op(node)
    if op in AFFINE:
        return _affine(graph, node)
    if op in ("Min", "Max"):
        return _extreme(graph, node)
    if op not in ("Clip", "Relu", *ROUNDING):
        return None
    constants: tuple[Array, ...] = ()
    if op == "Clip":
        bounds = clip_bounds(graph, node)
        if bounds is None:
            return None
        low, high = bounds
        pair = (-LARGEST if low is None else low, LARGEST if high is None else high)
        constants = tuple(np.array(bound, np.float32) for bound in pair)
    return Link((node,), node.input[0], node.output[0], constants, op)


def _affine(graph: GraphView, node: NodeProto) -> Link | None:
    found = Affine.of(graph, node)
    if found is None or (node.op_type == "Sub" and found.slot == 0):
        return None
    array = graph.array(found.constant)
    if array is None or not np.isfinite(array).all() or not array.size:
        return None
    if found.is_scale and not (array > 0).all():
        return None
    return Link((node,), found.value, node.output[0], (array,), node.op_type)


def _extreme(graph: GraphView, node: NodeProto) -> Link | None:
    if len(node.input) != 2 or graph.opset() < 8:
        return None
    for slot in (1, 0):
        tensor = graph.weight(node.input[slot])
        if tensor is None or not 0 < tensor_bytes(tensor) <= MAX_BYTES:
            continue
        array = graph.array(node.input[slot])
        other = node.input[1 - slot]
        if array is None or np.isnan(array).any() or graph.weight(other) is not None:
            return None
        return Link((node,), other, node.output[0], (array,), node.op_type)
    return None


def _aligned(array: Array) -> Array:
    """A constant as [channels, 1]; at most one of its dims is not 1."""
    return array.reshape(-1, 1)


def _step(kind: str, operands: Sequence[Array]) -> Step:
    def run(values: Floats32) -> Floats32:
        made: Array
        match kind:
            case "Add":
                made = values + operands[0]
            case "Sub":
                made = values - operands[0]
            case "Mul":
                made = values * operands[0]
            case "Div":
                made = values / operands[0]
            case "Max":
                made = np.maximum(values, operands[0])
            case "Min":
                made = np.minimum(values, operands[0])
            case "Clip":
                made = np.minimum(np.maximum(values, operands[0]), operands[1])
            case "Relu":
                made = np.maximum(values, np.float32(0))
            case "Round":
                made = np.rint(values)
            case "Estimator":
                made = np.where(np.isfinite(values), np.rint(values), np.float32(np.nan))
            case "Floor":
                made = np.floor(values)
            case "Ceil":
                made = np.ceil(values)
            case "Cast":  # outside of the type the result is undefined
                whole = np.trunc(values)
                fits = (whole >= operands[0]) & (whole <= operands[1])
                made = np.where(fits, whole, np.float32(np.nan))
            case _:
                raise AssertionError(kind)
        return np.asarray(made, np.float32)

    return run
