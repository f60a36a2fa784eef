"""dead-layers: take out layers and branches that contribute nothing, or a constant.

    t = Conv(x, 0, 0)                 t = Conv(x, 0, c)
    y = Add(s, t)    ->  y = s        y = Add(s, t)    ->  y = Add(s, c)

1. An operand that is zero throughout leaves a sum, one that is 1 a product; one that is
   constant becomes a constant, of one element for each channel. So does one that varies
   over space but not with the inputs, where that is smaller than what made it.
2. A Where whose condition is the same throughout hands one operand on; the condition of
   an If becomes a constant, for `inline-if` to take the branch.
3. An output of the graph that does not depend on the inputs becomes a constant, where
   its shape is known.
4. Layers that hand their input on: see `identity_layers`.
5. The shape of the result stays what it was: an operand that others broadcast to is
   declined. Activations are taken to be finite: 0 * x is 0.

What only the operand needed goes with it.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from onnx import NodeProto

from onnxopt.channels.analysis import Analysis
from onnxopt.channels.engine import analyse
from onnxopt.channels.facts import Fact, Kind, aligned
from onnxopt.channels.maps import MapError, evaluate_map
from onnxopt.channels.rules.elementwise import Elementwise
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.passes.shrink.identity_layers import identity_layer, permutation
from onnxopt.report import Guarantee
from onnxopt.weights import Array

_NEUTRAL = {
    # operator: the value that changes nothing, and the slots where it does not
    "Add": (0, (0, 1)),
    "Sub": (0, (1,)),
    "Mul": (1, (0, 1)),
    "Div": (1, (1,)),
}
OUTPUT_GROWTH = 256
"""Bytes that the constant in place of an output may take more than what made it."""


class DeadLayers(Pass):
    """Remove zero and constant branches, constant outputs, and layers that do nothing."""

    name: ClassVar[str] = "dead-layers"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Nodes in order; what an edit leaves is worth what it was before."""
        if graph.is_function:
            return  # no shapes are known there
        analysis, edits = analyse(graph, context.evaluator), graph.model.ledger.edits
        if self.name in analysis.settled:
            return
        for node in graph.nodes():
            if graph.holds(node):
                _look_at(analysis, node)
        for name in graph.outputs():
            _constant_output(analysis, name)
        if graph.model.ledger.edits == edits:
            analysis.settled.add(self.name)


def _look_at(a: Analysis, node: NodeProto) -> None:
    graph = a.graph
    if graph.op(node) == "If":
        _condition(a, node)
        return
    if graph.op(node) == "Where" and _choice(a, node):
        return
    if isinstance(a.rule(node), Elementwise) and len(node.input) > 1:
        for slot in range(len(node.input)):
            if graph.holds(node) and _operand(a, node, slot):
                return
    kept = identity_layer(a, node)
    if kept is not None:
        edit = Edit(graph, node)
        edit.bypass(node, {node.output[0]: kept})
        graph.apply(edit, f"this {node.op_type} hands its input on")
        return
    order = permutation(a, node)
    if order is not None:
        edit = Edit(graph, node)
        index = edit.add_weight(order, f"{node.output[0]}_order")
        edit.rewrite("Gather", [node.input[0], index], {"axis": 1})
        graph.apply(edit, "this Conv only moves channels")


# ---- operands ----


def _operand(a: Analysis, node: NodeProto, slot: int) -> bool:
    """Do without an operand that does not depend on the inputs; True where node went."""
    graph, name = a.graph, node.input[slot]
    found = a.fact(name)
    if found is None or not found.whole(Kind.MAP) or a.is_constant(name):
        return False
    result = a.fact(node.output[0])
    if result is not None and result.whole(Kind.MAP):
        return False  # the result is not needed either: whoever reads it is looked at
    if not _keeps_shape(a, node, slot):
        graph.skip(node, f"{name!r} is constant, but gives the result its shape")
        return False
    if _is_neutral(node, slot, found):
        return _hand_on(a, node, 1 - slot, "an operand that changes nothing")
    _replace(a, node, slot, found)
    return False


def _hand_on(a: Analysis, node: NodeProto, slot: int, why: str) -> bool:
    """Let who reads the result read one of the operands."""
    graph, kept = a.graph, node.input[slot]
    edit = Edit(graph, node)
    if graph.is_output(node.output[0]) and graph.producer(kept) is None:
        edit.rewrite("Identity", [kept])  # an output needs a node that makes it
    else:
        edit.bypass(node, {node.output[0]: kept})
    return graph.apply(edit, why)


def _keeps_shape(a: Analysis, node: NodeProto, slot: int) -> bool:
    """Whether the result has its shape from another operand alone."""
    others = [name for index, name in enumerate(node.input) if name and index != slot]
    return any(a.graph.same_shape(other, node.output[0]) for other in others)


def _is_neutral(node: NodeProto, slot: int, found: Fact) -> bool:
    value, slots = _NEUTRAL.get(node.op_type, (None, ()))
    if slot not in slots or not found.whole(Kind.CONST):
        return False
    return bool((found.values == value).all())


def _replace(a: Analysis, node: NodeProto, slot: int, found: Fact) -> None:
    graph, name = a.graph, node.input[slot]
    edit = Edit(graph, node, max_growth=0)
    maker = graph.producer(name)
    codes = a.fact(maker.input[0]) if maker is not None and maker.input else None
    if maker is not None and _is_quantized(a, maker) and _is_const(codes):
        assert codes is not None
        made = edit.add_weight(codes.values, maker.input[0])
        scale = [made, *maker.input[1:]]  # still an integer operator to the runtime
        (fresh,) = edit.insert("DequantizeLinear", scale)
        edit.set_input(node, slot, fresh)
        graph.apply(edit, "an operand whose codes are constant")
        return
    values = found.values if found.whole(Kind.CONST) else _map(a, node, name)
    if values is not None:
        edit.set_input(node, slot, edit.add_weight(values, name))
        graph.apply(edit, "an operand that does not depend on the inputs")


def _is_const(found: Fact | None) -> bool:
    return found is not None and found.whole(Kind.CONST)


def _is_quantized(a: Analysis, maker: NodeProto) -> bool:
    """Whether it is DequantizeLinear with one scale for the whole."""
    if a.graph.op(maker) != "DequantizeLinear" or a.is_constant(maker.output[0]):
        return False
    return a.shape(maker.input[1]) in ((), (1,))


def _map(a: Analysis, node: NodeProto, name: str) -> Array | None:
    try:
        return evaluate_map(a, name)
    except MapError as reason:
        a.graph.skip(node, f"{name!r} does not depend on the inputs, but {reason}")
        return None


# ---- choices ----


def _choice(a: Analysis, node: NodeProto) -> bool:
    """Do without the operand of a Where that is never taken; True where node went."""
    found = a.fact(node.input[0])
    if found is None or not found.whole(Kind.CONST) or not found.values.size:
        return False
    if not (found.values == found.values.reshape(-1)[0]).all():
        return False
    slot = 1 if found.values.reshape(-1)[0] else 2
    if not a.graph.same_shape(node.input[slot], node.output[0]):
        a.graph.skip(node, f"{node.input[slot]!r} is always taken, but has another shape")
        return False
    return _hand_on(a, node, slot, "a choice that is always the same")


def _condition(a: Analysis, node: NodeProto) -> None:
    """Let the condition of an If be a constant where it is known."""
    graph, name = a.graph, node.input[0]
    found = a.fact(name)
    if graph.weight(name) is not None or found is None or found.values.size != 1:
        return
    if found.whole(Kind.CONST):
        edit = Edit(graph, node, max_growth=OUTPUT_GROWTH)
        edit.set_input(node, 0, edit.add_weight(found.values.reshape(()), name))
        graph.apply(edit, "a condition that does not depend on the inputs")


# ---- outputs ----


def _constant_output(a: Analysis, name: str) -> None:
    """Let an output that is known be an initializer (from IR 4 on no input as well)."""
    graph, found = a.graph, a.fact(name)
    node, dims = graph.producer(name), graph.shape(name)
    if node is None or found is None or not found.whole(Kind.MAP) or dims is None:
        return
    if graph.parent is not None or graph.model.proto.ir_version < 4:
        return
    if len(node.output) != 1 or graph.op(node) == "Constant" or a.is_constant(name):
        return
    sizes = [size for size in dims if isinstance(size, int)]
    if len(sizes) != len(dims):
        graph.skip(node, "its output is constant, but of a size that is not")
        return
    values = found.values if found.whole(Kind.CONST) else _map(a, node, name)
    if values is None:
        return
    edit = Edit(graph, node, max_growth=OUTPUT_GROWTH)
    whole = np.broadcast_to(aligned(values, len(sizes)), sizes)
    edit.erase(node)
    edit.add_weight(np.ascontiguousarray(whole), name, name=name)
    graph.apply(edit, "an output that does not depend on the inputs")
