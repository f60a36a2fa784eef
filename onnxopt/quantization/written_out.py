"""Integer weights written out: constants that become whole floats, times a scale.

    w = Mul(Sub(Cast(q), z), s)         q: integers, or the Round of floats

`scaling` finds the Mul (or Div) for the operator that makes the whole floats. Everything
that it reads is constant, by way of any operators.
"""

from __future__ import annotations

import msgspec
from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.graph import GraphView
from onnxopt.operators import RANDOM
from onnxopt.weights import PACKED_BITS, elements

MAX_STEPS = 8
"""Operators between a quantizer and what reads its values."""
MAX_NODES = 64
"""Operators that a constant may be made by."""
NARROW = frozenset(
    {
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.INT16,
        TensorProto.UINT16,
        TensorProto.FLOAT8E4M3FN,
        TensorProto.FLOAT8E4M3FNUZ,
        TensorProto.FLOAT8E5M2,
        TensorProto.FLOAT8E5M2FNUZ,
        *PACKED_BITS,
    }
)
"""Types that weights are stored in when they are quantized."""
_SCALED = (TensorProto.FLOAT, TensorProto.FLOAT16)
"""Types in which weights are written out."""
MOVES = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")

_ON_THE_WAY = frozenset({"Add", "Sub", "Cast", "Clip", "Min", "Max", "Relu", *MOVES})
_QUANTIZERS = ("DequantizeLinear", "Round", "Floor", "Ceil")
_UNKNOWN = RANDOM | {"DequantizeLinear", "QuantizeLinear"}


class Scaling(msgspec.Struct, frozen=True, eq=False):
    """A Mul or Div of whole floats, input `slot`, by their scale."""

    node: NodeProto
    slot: int

    @property
    def whole(self) -> str:
        """The whole floats."""
        return str(self.node.input[self.slot])

    @property
    def scale(self) -> str:
        """What they are multiplied by, or divided."""
        return str(self.node.input[1 - self.slot])


def scaling(graph: GraphView, node: NodeProto) -> Scaling | None:
    """What scales the floats that `node`, a Cast or Round, makes; None where nothing.

    Not where `node` makes what is subtracted on the way, a zero point.
    """
    value = node.output[0]
    while True:
        use = graph.only_use(value)
        if use is None or use.view is not graph:
            return None
        op = graph.op(use.node)
        if op in ("Mul", "Div"):
            break
        if op not in _ON_THE_WAY or (op == "Sub" and use.index == 1):
            return None
        value = use.node.output[0]
    if op == "Div" and use.index == 1:
        return None
    found = Scaling(use.node, use.index)
    if graph.dtype(found.whole) not in (*_SCALED, None):  # None: in a function
        return None
    return None if cone(graph, [found.whole, found.scale]) is None else found


def float_product(graph: GraphView, name: str) -> NodeProto | None:
    """A MatMul or Gemm that reads weight `name`, and activations that are not quantized.

    ONNX Runtime makes MatMulNBits of it and of a DequantizeLinear before it, which
    rounds the activations to 8 bits, by its default settings.
    """
    for use in graph.uses(name):
        op = graph.op(use.node)
        if op in MOVES:
            found = float_product(graph, use.node.output[0])
            if found is not None:
                return found
        elif op in ("MatMul", "Gemm") and use.index == 1:
            if attributes.get(use.node, "transB", 0):
                continue
            if not _is_quantized(graph, use.node.input[0], MAX_STEPS):
                return use.node
    return None


def _is_quantized(graph: GraphView, name: str, steps: int) -> bool:
    """Whether a quantizer, of whatever form, makes `name`."""
    node = graph.producer(name)
    if node is None or not steps:
        return False
    if node.op_type in _QUANTIZERS or "Quant" in node.op_type:
        return True
    if node.op_type not in (*_ON_THE_WAY, "Mul", "Div", "MaxPool"):
        return False
    return any(_is_quantized(graph, item, steps - 1) for item in node.input if item)


def is_narrow_weight(graph: GraphView, cast: NodeProto) -> bool:
    """Whether `cast` makes floats of a stored quantized weight, which is then scaled."""
    tensor = graph.weight(cast.input[0])
    kind = graph.dtype(cast.input[0]) if tensor is None else tensor.data_type
    if kind not in NARROW or (tensor is not None and elements(tensor) < 2):
        return False
    return scaling(graph, cast) is not None


def cone(graph: GraphView, names: list[str]) -> list[NodeProto] | None:
    """The operators here that constants are made by, in order.

    None where they depend on something else, or there are too many.
    """
    found: dict[int, NodeProto] = {}
    for name in names:
        if not _collect(graph, name, found, MAX_NODES):
            return None
    return list(found.values())


def _collect(
    graph: GraphView, name: str, found: dict[int, NodeProto], depth: int
) -> bool:
    """Add what `name` is made by, makers first; False where it is no such constant."""
    if not name or graph.weight(name) is not None:
        return True
    node = graph.producer(name)
    if node is None or depth == 0 or not _is_computable(graph, node):
        return False
    if id(node) in found:
        return True
    if not all(_collect(graph, item, found, depth - 1) for item in node.input):
        return False
    found[id(node)] = node
    return len(found) <= MAX_NODES


def _is_computable(graph: GraphView, node: NodeProto) -> bool:
    return (
        graph.op(node) == node.op_type
        and node.op_type not in _UNKNOWN
        and not attributes.has_references(node)
        and not any(True for _ in attributes.subgraphs(node))
    )


def sources(graph: GraphView, nodes: list[NodeProto]) -> list[TensorProto]:
    """The constants of more than one element that `nodes` read."""
    names = {name: None for node in nodes for name in node.input if name}
    found = [graph.weight(name) for name in names]
    return [item for item in found if item is not None and elements(item) > 1]
