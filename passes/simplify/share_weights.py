"""share-weights: keep one of several equal constants.

    W, V = equal initializers
    y = MatMul(x, W)                y = MatMul(x, W)
    z = MatMul(y, V)          ->    z = MatMul(y, W)

1. Equal dtype, dims and payload, to the byte; initializers and Constant nodes alike.
2. In one scope the first stays; a constant of an inner scope gives way to an outer one.
3. Never given up: what the caller may replace, outputs, and what an annotation is about
   or names.
4. Shared: scalars, integers of shapes, and what takes at least `min_bytes`. Smaller
   parameters (two biases that are zero) would tie layers that have nothing in common.
5. Payloads are read only where dtype and dims agree, and whole only where they begin
   alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

from onnx import GraphProto, TensorProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView, constant_value
from onnxopt.manager import Context, Pass
from onnxopt.model import Model
from onnxopt.report import Guarantee
from onnxopt.weights import WeightStore, elements, place, tensor_bytes

_SHAPE_TYPES = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}
_HEAD = 4096


class ShareWeights(Pass):
    """Let equal constants be one."""

    name: ClassVar[str] = "share-weights"
    guarantee: ClassVar[Guarantee] = "bitwise"

    min_bytes: int = 16384

    def run_model(self, model: Model, context: Context) -> None:
        """Outer scopes first: what they have serves the inner ones."""
        changed = [
            bool(list(view.visit(self, references=True))) for view in model.views()
        ]
        if any(changed):
            for root in (model.main, *model.functions):
                self._share(root, [], _Payloads(model.weights, self._kinds(root)))

    def _kinds(self, root: GraphView) -> Counter[Kind]:
        views = [root]
        for view in views:
            views += view.children()
        return Counter(_kind(t) for view in views for _, t in self._constants(view))

    def _share(self, graph: GraphView, outer: list[_Seen], payloads: _Payloads) -> None:
        told = _told(graph)
        seen: _Seen = {}
        for name, tensor in list(self._constants(graph)):
            key = payloads.key(tensor)
            if key is None or graph.weight(name) is None:
                continue
            same = (
                other
                for scope in (*outer, seen)
                for other, theirs in scope.get(key, ())
                if payloads.are_equal(tensor, theirs)
            )
            other = next(same, None)
            if other is None:
                seen.setdefault(key, []).append((name, tensor))
            elif not (graph.is_output(name) or graph.is_pinned(name) or name in told):
                _merge(graph, name, other)
        for child in list(graph.children()):
            self._share(child, [*outer, seen], payloads)

    def _constants(self, graph: GraphView) -> Iterator[tuple[str, TensorProto]]:
        for tensor in graph.initializers():
            if self._is_worthwhile(tensor):
                yield tensor.name, tensor
        for node in graph.nodes():
            value = constant_value(node) if node.op_type == "Constant" else None
            if value is not None and self._is_worthwhile(value):
                yield node.output[0], value

    def _is_worthwhile(self, tensor: TensorProto) -> bool:
        if tensor.data_type in _SHAPE_TYPES or elements(tensor) == 1:
            return True
        return tensor_bytes(tensor) >= self.min_bytes


Kind = tuple[int, ...]
_Key = tuple[Kind, bytes]
_Seen = dict[_Key, list[tuple[str, TensorProto]]]


def _kind(tensor: TensorProto) -> Kind:
    return (tensor.data_type, *tensor.dims)


class _Payloads:
    """Reads of payloads what is needed to tell them apart."""

    def __init__(self, weights: WeightStore, kinds: Counter[Kind]) -> None:
        self._weights = weights
        self._kinds = kinds
        self._digests: dict[int, tuple[TensorProto, bytes]] = {}

    def key(self, tensor: TensorProto) -> _Key | None:
        """What equal constants have in common; None where there is no other."""
        kind = _kind(tensor)
        if self._kinds[kind] < 2:
            return None
        if tensor.data_type == TensorProto.STRING:
            items = (len(item).to_bytes(8) + item for item in tensor.string_data)
            return kind, b"".join(items)
        return kind, self._weights.head(tensor, _HEAD)

    def are_equal(self, one: TensorProto, other: TensorProto) -> bool:
        """Whether two constants with equal keys are equal."""
        if tensor_bytes(one) <= _HEAD or one.data_type == TensorProto.STRING:
            return True
        if place(one) is not None and place(one) == place(other):
            return True
        return self._digest(one) == self._digest(other)

    def _digest(self, tensor: TensorProto) -> bytes:
        if id(tensor) not in self._digests:
            import hashlib  # slow, and seldom needed

            digest = hashlib.sha256()
            for chunk in self._weights.chunks(tensor):
                digest.update(chunk)
            self._digests[id(tensor)] = tensor, digest.digest()
        return self._digests[id(tensor)][1]


def _told(graph: GraphView) -> set[str]:
    """Values that an annotation is about."""
    if not isinstance(graph.proto, GraphProto):
        return set()
    return {item.tensor_name for item in graph.proto.quantization_annotation}


def _merge(graph: GraphView, name: str, other: str) -> None:
    maker = graph.producer(name)
    edit = Edit(graph, maker)
    if maker is not None:
        edit.bypass(maker, {name: other})
    else:
        edit.redirect(name, other)
        edit.drop_weight(name)
    graph.apply(edit, f"{name} equals {other}")
