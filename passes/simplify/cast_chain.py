"""cast-chain: one Cast, or none, for two in a row, where the first loses nothing.

    t = Cast <to = DOUBLE> (x)          (x is float)
    y = Cast <to = FLOAT> (t)     ->    (readers of y read x)

1. The type in the middle holds every value of the type before it.
2. Back to the first type: both go. To another: the second Cast reads the first value.
3. Not from floats to integers: what becomes of values that do not fit is left to the
   processor, and depends on the type before. For integers by way of floats the last type
   has to hold all of them.
"""

from __future__ import annotations

from typing import ClassVar

from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee

_INTEGERS: dict[int, tuple[int, int]] = {
    TensorProto.BOOL: (0, 1),
    TensorProto.UINT8: (0, 8),
    TensorProto.INT8: (1, 7),
    TensorProto.UINT16: (0, 16),
    TensorProto.INT16: (1, 15),
    TensorProto.UINT32: (0, 32),
    TensorProto.INT32: (1, 31),
    TensorProto.UINT64: (0, 64),
    TensorProto.INT64: (1, 63),
}
"""Sign bits and bits."""

_FLOATS: dict[int, tuple[int, int]] = {
    TensorProto.BFLOAT16: (8, 8),
    TensorProto.FLOAT16: (11, 5),
    TensorProto.FLOAT: (24, 8),
    TensorProto.DOUBLE: (53, 11),
}
"""Bits of the significand and of the exponent."""


class MergeCasts(Pass):
    """Merge Casts where the first is to a wider type."""

    name: ClassVar[str] = "cast-chain"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the second of each pair."""
        for node in graph.visit(self, ("Cast",)):
            first = graph.producer(node.input[0])
            if first is None or graph.op(first) != "Cast" or graph.opset() < 6:
                continue
            if not attributes.has_references(first):
                _merge(graph, first, node)


def _merge(graph: GraphView, first: NodeProto, second: NodeProto) -> None:
    source = graph.dtype(first.input[0])
    middle, target = attributes.get(first, "to"), attributes.get(second, "to")
    if source is None or not is_lossless(source, middle, target):
        return
    edit = Edit(graph, second)
    if source == target:
        edit.bypass(second, {second.output[0]: first.input[0]})
    elif graph.only_use(first.output[0]) is not None:
        edit.set_input(second, 0, first.input[0])
    else:
        return  # both nodes would stay
    graph.apply(edit, "the first Cast loses nothing")


def is_lossless(source: int, middle: int, target: int) -> bool:
    """Whether Cast to `middle` and then to `target` is the Cast to `target`."""
    if not holds(middle, source):
        return False
    if source == target or target == TensorProto.BOOL:
        return True
    if target in _INTEGERS:
        if source in _FLOATS:
            return False
        return middle in _INTEGERS or holds(target, source)
    if target not in _FLOATS:
        return False
    # wide integers reach the short floats by way of float32, and are rounded twice
    return source in _FLOATS or _INTEGERS[source][1] <= 16 or holds(target, source)


def holds(wide: int, narrow: int) -> bool:
    """Whether type `wide` has every value of type `narrow`."""
    if wide == narrow:
        return wide in _INTEGERS or wide in _FLOATS
    if narrow in _INTEGERS and wide in _INTEGERS:
        sign, bits = _INTEGERS[narrow]
        return sign <= _INTEGERS[wide][0] and bits <= _INTEGERS[wide][1]
    if narrow in _INTEGERS and wide in _FLOATS:
        return _INTEGERS[narrow][1] <= _FLOATS[wide][0]
    if narrow in _FLOATS and wide in _FLOATS:
        return all(a <= b for a, b in zip(_FLOATS[narrow], _FLOATS[wide], strict=True))
    return False
