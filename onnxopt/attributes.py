"""Reading and making node attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, helper


def find(node: NodeProto, name: str) -> AttributeProto | None:
    """The attribute called `name`, None where the node has none."""
    for attribute in node.attribute:
        if attribute.name == name:
            found: AttributeProto = attribute
            return found
    return None


def get(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of attribute `name` (str for strings), `default` where absent.

    A reference to a function's attribute has no value here: `has_references` tells.
    """
    attribute = find(node, name)
    return default if attribute is None else value_of(attribute)


def value_of(attribute: AttributeProto) -> Any:
    """What an attribute says: str for strings, a list for many."""
    kind = attribute.type
    if attribute.ref_attr_name:
        raise ValueError(f"attribute {attribute.name!r} is a reference")
    if kind == AttributeProto.UNDEFINED:
        return None
    field = _FIELDS.get(kind)
    if field is None:
        raise ValueError(f"attribute {attribute.name!r} is of unknown type {kind}")
    value = getattr(attribute, field)
    if kind == AttributeProto.STRING:
        return value.decode(errors="surrogateescape")
    if kind == AttributeProto.STRINGS:
        return [item.decode(errors="surrogateescape") for item in value]
    return list(value) if field in _REPEATED else value


_FIELDS: dict[int, str] = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors",
    AttributeProto.GRAPHS: "graphs",
    AttributeProto.SPARSE_TENSORS: "sparse_tensors",
    AttributeProto.TYPE_PROTOS: "type_protos",
}
_REPEATED = frozenset(
    ["floats", "ints", "strings", "tensors", "graphs", "sparse_tensors", "type_protos"]
)


def has_references(node: NodeProto) -> bool:
    """Whether an attribute stands for one of the enclosing function's attributes."""
    for attribute in node.attribute:  # noqa: SIM110 - any() costs as much again
        if attribute.ref_attr_name:
            return True
    return False


def of_call(function: FunctionProto, node: NodeProto) -> dict[str, AttributeProto | None]:
    """What the attributes of a local function are for one call; None: not set."""
    given: dict[str, AttributeProto | None] = dict.fromkeys(function.attribute)
    given.update({item.name: item for item in function.attribute_proto})
    given.update({item.name: item for item in node.attribute})
    return given


def bind(node: NodeProto, given: Mapping[str, AttributeProto | None]) -> None:
    """Put values in the place of references to a function's attributes.

    A reference to an attribute that is not given means that there is none.
    """
    for index in range(len(node.attribute) - 1, -1, -1):
        attribute = node.attribute[index]
        if not attribute.ref_attr_name:
            continue
        value, name = given.get(attribute.ref_attr_name), attribute.name
        if value is None:
            del node.attribute[index]
        else:
            attribute.CopyFrom(value)
            attribute.name = name


def bound(node: NodeProto, given: Mapping[str, AttributeProto | None]) -> NodeProto:
    """`node` itself where it refers to none; else a copy, bound."""
    if not has_references(node):
        return node
    copy = NodeProto()
    copy.CopyFrom(node)
    bind(copy, given)
    return copy


def make(name: str, value: Any) -> AttributeProto:
    """An attribute of the type that `value` has (an empty list is a list of ints)."""
    kind = AttributeProto.INTS if isinstance(value, list) and not value else None
    return helper.make_attribute(name, value, attr_type=kind)


def nodes_in(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Nodes, each followed by those of its subgraphs."""
    for node in nodes:
        yield node
        for _, graph in subgraphs(node) if node.attribute else ():
            yield from nodes_in(graph.node)


def reads(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, in its subgraphs too, as inputs and as their outputs."""
    yield from node.input
    for _, graph in subgraphs(node) if node.attribute else ():
        for inner in graph.node:
            yield from reads(inner)
        for output in graph.output:
            yield output.name


def subgraphs(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    """The graphs in a node's attributes, each with a label such as `then_branch`."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            for index, graph in enumerate(attribute.graphs):
                yield f"{attribute.name}[{index}]", graph
