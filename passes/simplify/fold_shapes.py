"""fold-shapes: shapes that are computed from shapes, under sizes that are no numbers.

    s = Shape(x)                    x: [batch, seq, 768]
    b = Gather(s, 0)
    d = Concat(b, [-1, 12, 64])
    y = Reshape(x, d)         ->    y = Reshape(x, [0, -1, 12, 64])

1. The shape of a Reshape whose entries are known as polynomials: numbers stay, the size
   that the input has at the same place is 0 (copied), and what one entry is left is -1.
2. A small value of integers that is computed, and of which every element is known to be
   a number, is a constant.
3. Values of shapes that are equal as polynomials are computed once: readers of the later
   one read the earlier.

Sizes that are no numbers are taken to be 1 or more where rule 1 writes a -1 beside a 0: a
Reshape cannot tell a -1 of a tensor without elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee
from onnxopt.symbolic.dim import Dim
from onnxopt.symbolic.fact import Dims, Fact, array_of, is_symbolic
from onnxopt.weights import Array

_SIZE_MAKERS = """Add And Cast Concat ConstantOfShape Div Equal Expand Gather Greater
    GreaterOrEqual Identity Less LessOrEqual Max Min Mod Mul Neg Not Or Range ReduceProd
    Reshape Shape Size Slice Split Squeeze Sub Sum Transpose Unsqueeze Where"""
_MAKES_SIZES = frozenset(_SIZE_MAKERS.split())
_COPY, _REST = 0, -1


class FoldShapes(Pass):
    """Fold what is computed from shapes, also where sizes are symbols."""

    name: ClassVar[str] = "fold-shapes"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Consumers first: what they no longer read is gone with them."""
        looked_at = 0
        for node in graph.visit(self, _MAKES_SIZES):
            looked_at += 1
            if node.op_type == "Reshape":
                _fold_reshape(graph, node)
        if looked_at:
            _share(graph)


def _fold_reshape(graph: GraphView, node: NodeProto) -> None:
    if len(node.input) < 2 or graph.opset() < 5 or graph.array(node.input[1]) is not None:
        return
    target = graph.fact(node.input[1]).value
    if target is None or target.ndim != 1:
        return
    before = graph.fact(node.input[0]).dims
    literal = reshape_literal(list(target), before, keeps_zero=_keeps_zero(node))
    if literal is None:
        if is_symbolic(target):
            graph.skip(node, "more than one of its sizes is computed")
        return
    graph.fact(node.output[0])  # a literal would tell less of its dims
    edit = Edit(graph, node)
    name = edit.add_weight(literal, f"{node.input[1]}_folded")
    edit.set_input(node, 1, name)
    if _keeps_zero(node) and 0 in literal:
        edit.set_attribute(node, "allowzero", None)
    graph.apply(edit, "its shape follows from that of its input")


def _keeps_zero(node: NodeProto) -> bool:
    return bool(attributes.get(node, "allowzero", 0))


def reshape_literal(
    target: Sequence[Dim | None], before: Dims | None, *, keeps_zero: bool
) -> Array | None:
    """The shape as a constant, int64 [rank]; None where more than one size is open.

    `target` are the entries, None where one is not known, `before` the dims of what is
    reshaped, and `keeps_zero` whether an entry 0 means 0 (allowzero).
    """
    if keeps_zero and 0 in target:
        return None
    entries: list[int | None] = []
    for axis, size in enumerate(target):
        if isinstance(size, int):
            entries.append(size)
        elif size is not None and before and axis < len(before) and before[axis] == size:
            entries.append(_COPY)
        else:
            entries.append(None)
    if entries.count(None) > 1 or (None in entries and _REST in entries):
        return None
    return np.array([_REST if e is None else e for e in entries], dtype=np.int64)


# ---- values ----


def _share(graph: GraphView) -> None:
    """Numbers become constants; equal values are computed once."""
    firsts: dict[tuple[object, ...], str] = {}
    for node in graph.nodes(_MAKES_SIZES):
        if not graph.holds(node) or attributes.has_references(node):
            continue
        for name in filter(None, node.output):
            fact = graph.fact(name)
            if fact.value is None or not graph.is_used(name):
                continue
            if _fold_number(graph, node, name, fact):
                break
            if not is_symbolic(fact.value):
                continue
            first = firsts.setdefault(_key(fact), name)
            if graph.producer(first) is None:  # it went with its last reader
                firsts[_key(fact)] = first = name
            if first != name and len(node.output) == 1:
                edit = Edit(graph, node)
                edit.bypass(node, {name: first})
                if graph.apply(edit, f"{first} has the same value"):
                    break


def _key(fact: Fact) -> tuple[object, ...]:
    assert fact.value is not None
    return fact.dtype, fact.value.shape, tuple(fact.value.flat)


def _fold_number(graph: GraphView, node: NodeProto, name: str, fact: Fact) -> bool:
    value = array_of(fact)
    if value is None or len(node.output) != 1:
        return False
    if graph.is_output(name) and graph.model.proto.ir_version < 4:
        return False
    edit = Edit(graph, node, max_growth=256)
    edit.erase(node)
    edit.add_weight(value, name, name=name)
    return graph.apply(edit, "its value is known")
