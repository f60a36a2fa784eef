"""Comparing two nodes that were taken for one: operator, inputs, attributes, names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from onnx import AttributeProto, NodeProto, TensorProto, helper

from onnxopt.differences import found, payloads
from onnxopt.differences.facts import differing_fields
from onnxopt.differences.found import NodeChange
from onnxopt.differences.matching import Pair
from onnxopt.graph import GraphView, constant_value
from onnxopt.quantization.layers import dtype_name
from onnxopt.weights import WeightStore

_COMPARED = ("input", "output", "name", "op_type", "domain", "overload", "attribute")
_PAYLOADS = ("t", "tensors", "sparse_tensor", "sparse_tensors", "g", "graphs")
_LONG = 60
"""Characters of an attribute's value that are shown."""

Stores = tuple[WeightStore, WeightStore]


def compare(
    a: GraphView, b: GraphView, pair: Pair, names: Mapping[str, str]
) -> NodeChange | None:
    """How the nodes of `pair` differ (subgraphs aside), None where in nothing.

    `names`: what values of A are called in B.
    """
    details = [
        *_operator(a, b, pair),
        *_inputs(pair.a, pair.b, names),
        *_attributes(pair.a, pair.b, (a.model.weights, b.model.weights)),
        *_fields(pair.a, pair.b),
    ]
    if len(pair.a.output) != len(pair.b.output):
        details.append(f"outputs: {len(pair.a.output)} -> {len(pair.b.output)}")
    renamed = list(_names(pair.a, pair.b))
    if not details and not renamed:
        return None
    return NodeChange(
        scope=a.scope,
        node=a.label(pair.a),
        other=b.label(pair.b),
        op=a.op(pair.a),
        change="changed" if details else "renamed",
        matched=pair.matched,
        details=details + renamed,
    )


def _operator(a: GraphView, b: GraphView, pair: Pair) -> Iterator[str]:
    if a.op(pair.a) != b.op(pair.b):
        yield f"operator: {a.op(pair.a)} -> {b.op(pair.b)}"
    if pair.a.overload != pair.b.overload:
        yield f"overload: {pair.a.overload!r} -> {pair.b.overload!r}"


def _inputs(a: NodeProto, b: NodeProto, names: Mapping[str, str]) -> Iterator[str]:
    for index in range(max(len(a.input), len(b.input))):
        one, two = (_at(node.input, index) for node in (a, b))
        if (names.get(one, one) if one else one) != two:
            yield f"input {index}: {_named(one)} -> {_named(two)}"


def _at(names: Sequence[str], index: int) -> str | None:
    return names[index] if index < len(names) else None


def _named(name: str | None) -> str:
    return "none" if name is None else name or "left out"


def _names(a: NodeProto, b: NodeProto) -> Iterator[str]:
    if a.name != b.name:
        yield f"name: {a.name!r} -> {b.name!r}"
    for index, (one, two) in enumerate(zip(a.output, b.output, strict=False)):
        if one != two:
            yield f"output {index}: {_named(one)} -> {_named(two)}"


def _fields(a: NodeProto, b: NodeProto) -> Iterator[str]:
    for fact in differing_fields("", a, b, _COMPARED):
        one, two = ("none" if text is None else text or "''" for text in (fact.a, fact.b))
        yield f"{fact.what}: {one} -> {two}"


# ---- attributes ----


def _attributes(a: NodeProto, b: NodeProto, stores: Stores) -> Iterator[str]:
    if constant_value(a) is not None and constant_value(b) is not None:
        return  # weights, and compared as such
    ours = {attribute.name: attribute for attribute in a.attribute}
    theirs = {attribute.name: attribute for attribute in b.attribute}
    for name in dict.fromkeys([*ours, *theirs]):
        one, two = ours.get(name), theirs.get(name)
        if one is None or two is None:
            yield f"attribute {name}: {_told(one)} -> {_told(two)}"
        else:
            yield from _attribute(one, two, stores)


def _told(attribute: AttributeProto | None) -> str:
    """A value in words."""
    if attribute is None:
        return "none"
    if attribute.ref_attr_name:
        return f"@{attribute.ref_attr_name}"
    value = helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        return f"{dtype_name(value.data_type)}{list(value.dims)}"
    kind = attribute.type
    plain = (AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.STRING)
    lists = (AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS)
    if kind not in (*plain, *lists):
        return str(AttributeProto.AttributeType.Name(kind)).lower()
    text = repr(value if kind in plain else list(value))
    return text if len(text) <= _LONG else text[: _LONG - 3] + "..."


def _attribute(a: AttributeProto, b: AttributeProto, stores: Stores) -> Iterator[str]:
    """How two attributes of one name differ; subgraphs are scopes of their own."""
    small = list(differing_fields("", a, b, (*_PAYLOADS, "doc_string")))
    if small:
        one, two = _told(a), _told(b)
        where = "" if one != two else f" ({', '.join(fact.what for fact in small)})"
        yield f"attribute {a.name}: {one} -> {two}{where}"
        return
    if a.doc_string != b.doc_string:
        yield f"attribute {a.name}: doc_string"
    mine, other = _tensors(a), _tensors(b)
    if _kinds(mine) != _kinds(other):
        yield f"attribute {a.name}: {_listed(mine)} -> {_listed(other)}"
        return
    for one, two in zip(mine, other, strict=True):
        values = payloads.compare((stores[0], one), (stores[1], two))
        if values is not None:
            yield f"attribute {a.name}: {found.words(values)}"


def _kinds(tensors: Sequence[TensorProto]) -> list[tuple[int, list[int]]]:
    return [(tensor.data_type, list(tensor.dims)) for tensor in tensors]


def _listed(tensors: Sequence[TensorProto]) -> str:
    return (
        ", ".join(f"{dtype_name(t.data_type)}{list(t.dims)}" for t in tensors) or "none"
    )


def _tensors(attribute: AttributeProto) -> list[TensorProto]:
    """The tensors of an attribute; sparse ones as values, indices and dims."""
    dense = [attribute.t] if attribute.HasField("t") else []
    sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    tensors = [*dense, *attribute.tensors]
    for item in [*sparse, *attribute.sparse_tensors]:
        tensors += [item.values, item.indices, payloads.sparse_dims(item)]
    return tensors
