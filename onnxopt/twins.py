"""Whether two subgraphs compute the same from the same outer values."""

from __future__ import annotations

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from onnxopt.weights import WeightStore, place, tensor_bytes

MAX_COMPARED = 1 << 20
"""Weights larger than this (bytes) are not read: equal only where they are one place."""


def are_twins(one: GraphProto, other: GraphProto, weights: WeightStore) -> bool:
    """Whether the graphs have equal nodes in equal order, whatever their names."""
    return _Comparison(weights).graphs(one, other, {})


class _Comparison:
    def __init__(self, weights: WeightStore) -> None:
        self._weights = weights

    def graphs(self, one: GraphProto, other: GraphProto, outer: dict[str, str]) -> bool:
        """`outer` maps names of inner values of the other's surroundings to ours."""
        for field in ("node", "input", "output", "initializer"):
            if len(getattr(one, field)) != len(getattr(other, field)):
                return False
        if one.sparse_initializer or other.sparse_initializer:
            return False
        names = dict(outer)
        for mine, theirs in zip(one.input, other.input, strict=True):
            if mine.type != theirs.type:
                return False
            names[theirs.name] = mine.name
        for ours, tensor in zip(one.initializer, other.initializer, strict=True):
            if not self._tensors(ours, tensor):
                return False
            names[tensor.name] = ours.name
        for left, right in zip(one.node, other.node, strict=True):
            if not self._nodes(left, right, names):
                return False
            names.update(zip(right.output, left.output, strict=True))
        return all(
            names.get(theirs.name, theirs.name) == mine.name
            for mine, theirs in zip(one.output, other.output, strict=True)
        )

    def _nodes(self, one: NodeProto, other: NodeProto, names: dict[str, str]) -> bool:
        kinds = [(n.op_type, n.domain, getattr(n, "overload", "")) for n in (one, other)]
        if kinds[0] != kinds[1] or len(one.attribute) != len(other.attribute):
            return False
        if [bool(name) for name in one.output] != [bool(name) for name in other.output]:
            return False
        if list(one.input) != [names.get(name, name) for name in other.input]:
            return False
        ours, theirs = ({a.name: a for a in n.attribute} for n in (one, other))
        return ours.keys() == theirs.keys() and all(
            self._attributes(ours[name], theirs[name], names) for name in ours
        )

    def _attributes(
        self, one: AttributeProto, other: AttributeProto, names: dict[str, str]
    ) -> bool:
        if one.type != other.type or one.ref_attr_name != other.ref_attr_name:
            return False
        if one.type == AttributeProto.GRAPH:
            return self.graphs(one.g, other.g, names)
        if one.type == AttributeProto.TENSOR:
            return self._tensors(one.t, other.t)
        kept = one.SerializeToString(deterministic=True)
        return bool(kept == other.SerializeToString(deterministic=True))

    def _tensors(self, one: TensorProto, other: TensorProto) -> bool:
        if (one.data_type, *one.dims) != (other.data_type, *other.dims):
            return False
        if place(one) is not None and place(one) == place(other):
            return True
        if max(tensor_bytes(one), tensor_bytes(other)) > MAX_COMPARED:
            return False
        if one.data_type == TensorProto.STRING:
            return list(one.string_data) == list(other.string_data)
        return self._weights.read(one) == self._weights.read(other)
