"""fold-constants: compute at once what does not depend on the inputs.

    W2 = Transpose(W)           W2: initializer
    y  = MatMul(x, W2)    ->    y  = MatMul(x, W2)

1. Constant nodes become initializers, where the scope can hold them.
2. What NumPy computes exactly is done there (`onnxopt.arithmetic`), and so is the Shape
   of a value whose dims are known.
3. The rest is evaluated by ONNX Runtime, nodes that share values in one session.
4. A fold may grow the model by at most `max_growth` bytes, or a quarter of what it is
   computed from, or, as far as the run has made the model smaller so far, a hundredth of
   it: a scale computed from a weight folds, while what expands a constant
   (ConstantOfShape, Expand, Tile, Cast of int8 weights...) stays as it is. Of a chain
   whose end is too large the beginning folds.
5. Never folded: DequantizeLinear (it would expand integer weights) and QuantizeLinear
   (`fold-qdq-weights` does that), whatever is random, and nodes with subgraphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

from onnx import NodeProto, TensorProto

from onnxopt import arithmetic, attributes
from onnxopt.edit import Edit
from onnxopt.evaluate import MAX_VALUE_BYTES, EvaluationError, constant_values
from onnxopt.graph import GraphView, constant_value
from onnxopt.manager import Context, Pass
from onnxopt.operators import RANDOM
from onnxopt.quantization.written_out import NARROW, is_narrow_weight
from onnxopt.report import Guarantee
from onnxopt.symbolic.fact import array_of
from onnxopt.weights import Array, payload_bytes, tensor_bytes

_NEVER = RANDOM | {"DequantizeLinear", "QuantizeLinear"}
_WIDE = {
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.UINT32,
    TensorProto.UINT64,
    TensorProto.BOOL,
    TensorProto.STRING,
}
"""Types that no quantizer stores weights in; all others stay behind their Cast."""
_SMALL_SOURCE = 256
_SHARE = 100
"""One fold may add this part of the model, if all edits together save as much."""


class FoldConstants(Pass):
    """Compute what does not depend on the inputs, within `max_growth` bytes."""

    name: ClassVar[str] = "fold-constants"
    guarantee: ClassVar[Guarantee] = "bitwise"

    max_growth: int = 256

    def run(self, graph: GraphView, context: Context) -> None:
        """First what NumPy does, to its end; then the rest in one session."""
        if graph.holds_initializers:
            _lift(graph)
        rest: dict[int, NodeProto] = {}
        for node in graph.visit(self):
            if (
                node.op_type != "Constant"
                and _is_foldable(graph, node)
                and not self._fold_small(graph, node)
            ):
                rest[id(node)] = node
        pending = _constant_closure(graph, [n for n in rest.values() if graph.holds(n)])
        if pending:
            self._fold_rest(graph, context, pending)

    def _fold_small(self, graph: GraphView, node: NodeProto) -> bool:
        value = _known_shape(graph, node)
        if value is None and all(_is_small(graph, name) for name in node.input):
            inputs = [graph.array(name) if name else None for name in node.input]
            value = arithmetic.evaluate(node, inputs, graph.opset())
        if value is None:
            return False
        sources = _sources(graph, [node])
        return self._replace(graph, [node], {node.output[0]: value}, sources)

    def _fold_rest(
        self, graph: GraphView, context: Context, pending: dict[int, NodeProto]
    ) -> None:
        for group in _groups(graph, pending):
            group, frontier = self._affordable(graph, group)
            if not frontier:
                continue  # nothing reads them, or they are too large
            sources = _sources(graph, group)
            try:
                read = _read(graph, frontier)
                values = constant_values(graph, context.evaluator, group, read)
            except EvaluationError as error:
                for node in frontier:
                    graph.skip(node, f"its value could not be computed: {error}")
            else:
                self._replace_all(graph, frontier, values, sources)

    def _replace_all(
        self,
        graph: GraphView,
        nodes: list[NodeProto],
        values: dict[str, Array],
        sources: int,
    ) -> None:
        """All at once, since they may share a source; else singly."""
        if self._replace(graph, nodes, values, sources) or len(nodes) == 1:
            return
        for node in nodes:
            own = {name: values[name] for name in node.output if name in values}
            self._replace(graph, [node], own, sources)

    def _replace(
        self,
        graph: GraphView,
        nodes: list[NodeProto],
        values: dict[str, Array],
        sources: int,
    ) -> bool:
        """Put weights in place of nodes that are computed from `sources` bytes."""
        if any(graph.is_output(name) for name in values) and not _may_output(graph):
            graph.skip(nodes[0], "a constant cannot be an output at this IR version")
            return False
        narrow = any(_is_narrow(graph, node) for node in nodes)
        allowed = self._allowed(graph, sources, narrow)
        edit = Edit(graph, nodes[0], max_growth=allowed)
        for node in nodes:
            edit.erase(node)
        for name, value in values.items():
            edit.add_weight(value, name, name=name)
        return graph.apply(edit, "it does not depend on the inputs")

    def _affordable(
        self, graph: GraphView, group: list[NodeProto]
    ) -> tuple[list[NodeProto], list[NodeProto]]:
        """What of a group may be folded, and of that the nodes that others read.

        Where the end of a chain is too large, its beginning may be small.
        """
        while group:
            pending = {id(node): node for node in group}
            frontier = [node for node in group if _is_frontier(graph, node, pending)]
            sources = _sources(graph, group)
            narrow = any(_is_narrow(graph, node) for node in frontier)
            growth = sum(_value_bytes(graph, node) for node in frontier) - sources
            if not frontier or growth <= self._allowed(graph, sources, narrow):
                return group, frontier
            for node in frontier:
                graph.skip(node, f"the model would grow by {growth:,} bytes")
            largest = max(frontier, key=lambda node: _value_bytes(graph, node))
            group = [node for node in group if node is not largest]
        return [], []

    def _allowed(self, graph: GraphView, sources: int, narrow: bool) -> int:
        """By how much a fold may grow the model; packed weights are not unpacked."""
        if narrow:
            return self.max_growth
        ledger = graph.model.ledger
        saved = max(ledger.start_bytes - ledger.bytes, 0)
        share = min(ledger.start_bytes // _SHARE, saved)
        return max(self.max_growth, sources // 4, share)


def _sources(graph: GraphView, nodes: list[NodeProto]) -> int:
    """Bytes of the constants that `nodes` read."""
    names = {name for node in nodes for name in node.input if name}
    weights = (graph.weight(name) for name in names)
    return sum(tensor_bytes(tensor) for tensor in weights if tensor is not None)


def _value_bytes(graph: GraphView, node: NodeProto) -> int:
    """Bytes of what a pending node makes, whose size is known."""
    return sum(_size(graph, name) or 0 for name in node.output if graph.is_used(name))


def _size(graph: GraphView, name: str) -> int | None:
    shape, dtype = graph.shape(name), graph.dtype(name)
    if shape is None or dtype is None or not all(isinstance(d, int) for d in shape):
        return None
    return payload_bytes(dtype, math.prod(int(dim or 0) for dim in shape))


def _lift(graph: GraphView) -> None:
    """Constant nodes become initializers of the same names, all in one edit."""
    found = [
        (node, value)
        for node in graph.nodes(("Constant",))
        if (value := constant_value(node)) is not None
        and not graph.is_output(node.output[0])
    ]
    if not found:
        return
    edit = Edit(graph, found[0][0])
    for node, value in found:
        edit.erase(node)
        edit.add_weight(_as_initializer(node, value), node.output[0], name=node.output[0])
    graph.apply(edit, "constants can be initializers")


def _as_initializer(node: NodeProto, value: TensorProto) -> TensorProto:
    """The value with what the node says of it."""
    if not (node.metadata_props or node.doc_string):
        return value
    tensor = TensorProto()
    tensor.CopyFrom(value)
    tensor.metadata_props.extend(node.metadata_props)
    tensor.doc_string = tensor.doc_string or node.doc_string
    return tensor


def _may_output(graph: GraphView) -> bool:
    return graph.is_function or graph.model.proto.ir_version >= 4


def _is_foldable(graph: GraphView, node: NodeProto) -> bool:
    """Whether the pass may compute this operator at all, its inputs aside."""
    if graph.op(node) != node.op_type or node.op_type in _NEVER or not node.output:
        return False
    if node.op_type == "Cast" and _expands_narrow(graph, node):
        graph.skip(node, "it would expand narrow weights")
        return False
    return not any(True for _ in attributes.subgraphs(node))


def _is_narrow(graph: GraphView, node: NodeProto) -> bool:
    """Whether a node makes what quantized weights are stored as."""
    return any(graph.dtype(name) in NARROW for name in node.output if name)


def _expands_narrow(graph: GraphView, cast: NodeProto) -> bool:
    """Whether narrow weights would no longer be, in however large a model.

    Zero points and scales, which are small and not scaled themselves, may fold.
    """
    if graph.dtype(cast.input[0]) in _WIDE:
        return False
    tensor = graph.weight(cast.input[0])
    if tensor is not None and math.prod(tensor.dims) > arithmetic.MAX_ELEMENTS:
        return True
    return is_narrow_weight(graph, cast)


def _is_small(graph: GraphView, name: str) -> bool:
    """Whether an input is absent, or a constant that the NumPy table may take."""
    if not name:
        return True
    tensor = graph.weight(name)
    return tensor is not None and math.prod(tensor.dims) <= arithmetic.MAX_ELEMENTS


def _known_shape(graph: GraphView, node: NodeProto) -> Array | None:
    """What Shape (or Size) gives where inference knows all the dims that it takes."""
    if node.op_type not in ("Shape", "Size"):
        return None
    return array_of(graph.fact(node.output[0]))


def _constant_closure(
    graph: GraphView, candidates: list[NodeProto]
) -> dict[int, NodeProto]:
    """Those candidates that depend on nothing but constants, by way of one another."""
    pending: dict[int, NodeProto] = {}
    names: set[str] = set()
    order = {id(node): index for index, node in enumerate(graph.nodes())}
    for node in sorted(candidates, key=lambda node: order[id(node)]):
        inputs = [name for name in node.input if name]
        # Constant nodes and operators without inputs are constants from the start
        if not all(n in names or graph.weight(n) is not None for n in inputs):
            continue
        reason = _too_large(graph, node)
        if reason is None:
            pending[id(node)] = node
            names.update(node.output)
        elif inputs:
            graph.skip(node, reason)
    return pending


def _too_large(graph: GraphView, node: NodeProto) -> str | None:
    """Why the values of a constant node must not be computed; None where they may."""
    for name in filter(None, node.output):
        size = _size(graph, name)
        if size is None:
            return "the size of its value is not known before it is computed"
        if size > MAX_VALUE_BYTES:
            return f"its value would take {size:,} bytes"
    return None


def _is_frontier(
    graph: GraphView, node: NodeProto, pending: dict[int, NodeProto]
) -> bool:
    """Whether something other than pending nodes reads what `node` makes."""
    return any(
        graph.is_output(name)
        or any(id(use.node) not in pending for use in graph.uses(name))
        for name in filter(None, node.output)
    )


def _groups(graph: GraphView, pending: dict[int, NodeProto]) -> Iterator[list[NodeProto]]:
    """Pending nodes that share values or large sources: what goes into one session.

    A large source goes when the last of its readers does, so these fold together; a
    small one, such as the 127 of every scale, may stay.
    """
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for node in pending.values():
        first, *others = filter(None, node.output)
        for name in (*others, *(n for n in node.input if n and _is_tie(graph, n))):
            leader[find(name)] = find(first)
    groups: dict[str, list[NodeProto]] = {}
    for node in pending.values():
        groups.setdefault(find(node.output[0]), []).append(node)
    yield from groups.values()


def _is_tie(graph: GraphView, name: str) -> bool:
    tensor = graph.weight(name)
    return tensor is None or tensor_bytes(tensor) > _SMALL_SOURCE


def _read(graph: GraphView, nodes: list[NodeProto]) -> list[str]:
    """The outputs of `nodes` that something reads."""
    names = [name for node in nodes for name in node.output if name]
    return [name for name in names if graph.is_used(name)]
