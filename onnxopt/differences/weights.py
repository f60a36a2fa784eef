"""Comparing the constants of two scopes, by name; where they are stored does not matter.

One tensor of each model is read at a time, in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import FunctionProto, SparseTensorProto, TensorProto

from onnxopt.differences import payloads
from onnxopt.differences.facts import differing_fields
from onnxopt.differences.found import FactChange, Values, WeightChange
from onnxopt.graph import GraphView, constant_value
from onnxopt.quantization.layers import dtype_name
from onnxopt.weights import PAYLOAD_FIELDS

_COMPARED = frozenset({*PAYLOAD_FIELDS, "string_data", "dims", "data_type", "name"})


class Weights:
    """The constants of one scope of each model, A and B, by name."""

    def __init__(self, a: GraphView, b: GraphView) -> None:
        self.scope = a.scope
        self.a, self.b = constants(a), constants(b)
        self.stores = a.model.weights, b.model.weights
        self.only_a = [name for name in self.a if name not in self.b]
        self.only_b = [name for name in self.b if name not in self.a]

    def renamed(self) -> dict[str, str]:
        """Of what one model alone has: names in A and in B of equal constants.

        They leave `only_a` and `only_b`. Several that are equal go in order.
        """
        kinds = {_kind(self.a[name]) for name in self.only_a}
        waiting: dict[object, list[str]] = {}
        for name in self.only_b:
            if _kind(self.b[name]) in kinds:
                waiting.setdefault(self._key(1, name), []).append(name)
        found: dict[str, str] = {}
        kinds = {_kind(self.b[name]) for names in waiting.values() for name in names}
        for name in self.only_a:
            same = waiting.get(self._key(0, name)) if _kind(self.a[name]) in kinds else []
            if same:
                found[name] = same.pop(0)
        gone = set(found.values())
        self.only_a = [name for name in self.only_a if name not in found]
        self.only_b = [name for name in self.only_b if name not in gone]
        return found

    def _key(self, side: int, name: str) -> object:
        tensor = (self.a, self.b)[side][name]
        return _kind(tensor), payloads.digest((self.stores[side], tensor))

    def changes(self, renamed: dict[str, str]) -> Iterator[WeightChange]:
        """What is not the same, in the order of A, then what only B has."""
        for name, tensor in self.a.items():
            if name in renamed:
                yield self._change(name, renamed[name], "renamed")
            elif name not in self.b:
                yield self._change(name, None, "only in A")
            elif _kind(tensor) != _kind(self.b[name]):
                yield self._change(name, name, "changed")
            else:
                sides = (self.stores[0], tensor), (self.stores[1], self.b[name])
                values = payloads.compare(*sides)
                if values is not None:
                    yield self._change(name, name, "changed", values)
        for name in self.only_b:
            yield self._change(None, name, "only in B")

    def facts(self) -> Iterator[FactChange]:
        """Doc strings and the like of what both models have."""
        for name in self.a.keys() & self.b.keys():
            what = f"{self.scope}: weight {name}"
            yield from differing_fields(what, self.a[name], self.b[name], _COMPARED)

    def _change(
        self,
        name: str | None,
        other: str | None,
        change: str,
        values: Values | None = None,
    ) -> WeightChange:
        a = self.a[name] if name is not None else None
        b = self.b[other] if other is not None else None
        return WeightChange(
            scope=self.scope,
            name=name if name is not None else str(other),
            other=other,
            change=change,  # type: ignore[arg-type]
            dtype=(_dtype(a), _dtype(b)),
            shape=(_shape(a), _shape(b)),
            values=values,
        )


def constants(view: GraphView) -> dict[str, TensorProto]:
    """The constants that `view` defines; of a sparse one its values and its indices."""
    found = {tensor.name: tensor for tensor in view.initializers()}
    for node in view.proto.node:
        value = constant_value(node)
        if value is not None:
            found[node.output[0]] = value
    if not isinstance(view.proto, FunctionProto):
        for sparse in view.proto.sparse_initializer:
            found |= _sparse(sparse)
    return found


def _sparse(sparse: SparseTensorProto) -> dict[str, TensorProto]:
    name = sparse.values.name
    return {
        f"{name} (values)": sparse.values,
        f"{name} (indices)": sparse.indices,
        f"{name} (dims)": payloads.sparse_dims(sparse),
    }


def _kind(tensor: TensorProto) -> tuple[int, tuple[int, ...]]:
    return tensor.data_type, tuple(tensor.dims)


def _dtype(tensor: TensorProto | None) -> str | None:
    return None if tensor is None else dtype_name(tensor.data_type)


def _shape(tensor: TensorProto | None) -> list[int] | None:
    return None if tensor is None else list(tensor.dims)
