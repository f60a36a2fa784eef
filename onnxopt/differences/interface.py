"""Comparing the inputs and outputs of two scopes: names, types, shapes, order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from onnx import ValueInfoProto

from onnxopt.data.inputs import shape_text
from onnxopt.differences.facts import differing_fields
from onnxopt.differences.found import InterfaceChange
from onnxopt.graph import GraphView
from onnxopt.inspection.survey import Value, value_of

Kind = Literal["input", "output"]
_COMPARED = ("name", "type")


class Interface:
    """The inputs (or outputs) of one scope of each model, and which are the same."""

    def __init__(self, a: GraphView, b: GraphView, kind: Kind) -> None:
        self.scope, self.kind = a.scope, kind
        self.a, self.b = _infos(a, kind), _infos(b, kind)
        both = self.a.keys() & self.b.keys()
        pairs = list(zip(self.a, self.b, strict=False))
        self.renamed = {x: y for x, y in pairs if x not in both and y not in both}
        """Of those that one model alone has: what stands in the same place of B."""

    def changes(self) -> Iterator[InterfaceChange]:
        """What is not the same."""
        for name, info in self.a.items():
            other = self.renamed.get(name, name)
            if other not in self.b:
                yield self._change(name, "only in A", _words(info), None)
                continue
            if other != name:
                yield self._change(name, "name", name, other)
            yield from self._compare(name, info, self.b[other])
        known = {*self.a, *self.renamed.values()}
        for name, info in self.b.items():
            if name not in known:
                yield self._change(name, "only in B", None, _words(info))
        yield from self._order()

    def _compare(
        self, name: str, a: ValueInfoProto, b: ValueInfoProto
    ) -> Iterator[InterfaceChange]:
        one, two = value_of(a), value_of(b)
        if one.type != two.type:
            yield self._change(name, "type", one.type, two.type)
        if one.shape != two.shape:
            yield self._change(name, "shape", _shape(one), _shape(two))
        if one == two and a.type != b.type:
            yield self._change(name, "details of its type", None, None)
        for fact in differing_fields("", a, b, _COMPARED):
            yield self._change(name, fact.what, fact.a, fact.b)

    def _order(self) -> Iterator[InterfaceChange]:
        a = [name for name in self.a if name in self.b]
        b = [name for name in self.b if name in self.a]
        if a != b:
            yield self._change("", "order", ", ".join(a), ", ".join(b))

    def _change(
        self, name: str, what: str, a: str | None, b: str | None
    ) -> InterfaceChange:
        return InterfaceChange(self.scope, self.kind, name, what, a, b)


def _infos(view: GraphView, kind: Kind) -> dict[str, ValueInfoProto]:
    """By name; a function's values have no type, and a name may come out twice."""
    items: Any = getattr(view.proto, kind)
    if view.is_function:
        items = [ValueInfoProto(name=name) for name in items]
    found: dict[str, ValueInfoProto] = {}
    for info in items:
        name, number = info.name, 1
        while name in found:
            number += 1
            name = f"{info.name} ({number})"
        found[name] = info
    return found


def _shape(value: Value) -> str:
    return "any" if value.shape is None else shape_text(value.shape)


def _words(info: ValueInfoProto) -> str:
    value = value_of(info)
    return f"{value.type} {_shape(value)}"
