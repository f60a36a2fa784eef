"""What a model must satisfy before any pass may look at it.

The index (`onnxopt.graph`) finds duplicate, dangling and circular values by itself;
here are the checks on the protobuf alone. What ONNX Runtime loads in spite of
onnx.checker passes; what it cannot load, or what is not safe to read, does not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import onnx
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
)

from onnxopt import attributes, schemas
from onnxopt.errors import InvalidModelError
from onnxopt.weights import PACKED_BITS, elements, payload_bytes, place

MAX_BYTES = 1 << 46
"""No tensor is larger than this (64 TiB): dims beyond are garbage, or a bomb."""
MAX_INLINED = 1_000_000
"""No more nodes may come of all calls of local functions: ONNX Runtime inlines them."""

_TYPED_FIELD: dict[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float_data", 1),
    TensorProto.COMPLEX64: ("float_data", 2),
    TensorProto.DOUBLE: ("double_data", 1),
    TensorProto.COMPLEX128: ("double_data", 2),
    TensorProto.INT64: ("int64_data", 1),
    TensorProto.UINT64: ("uint64_data", 1),
    TensorProto.UINT32: ("uint64_data", 1),
    TensorProto.STRING: ("string_data", 1),
}
_TEXT = frozenset([str])
_KNOWN_TYPES = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}


def check_proto(proto: ModelProto) -> None:
    """Raise InvalidModelError, one line, at the first thing that is wrong."""
    _check_versions(proto)
    _check_functions(proto)
    for graph in _graphs(proto.graph):
        _check_graph(graph)
    calls = {(function.domain, function.name) for function in proto.functions}
    for nodes, imports in (
        (proto.graph.node, proto.opset_import),
        *((function.node, function.opset_import) for function in proto.functions),
    ):
        versions = {entry.domain: entry.version for entry in imports}
        version = versions.get("", versions.get("ai.onnx", 0))
        for node in attributes.nodes_in(nodes):
            _check_node(node, version, calls)


def drop_duplicates(proto: ModelProto) -> list[str]:
    """Keep the last of several initializers of one name, as ONNX Runtime does.

    What is returned says so, for each.
    """
    notes = []
    for graph in _graphs(proto.graph):
        seen: set[str] = set()
        for index in range(len(graph.initializer) - 1, -1, -1):
            name = graph.initializer[index].name
            if name in seen:
                notes.append(f"initializer {name!r} was there twice; the last one counts")
                del graph.initializer[index]
            seen.add(name)
    return notes


def trained_names(proto: ModelProto) -> set[str]:
    """The values that training information refers to by name."""
    return {
        name
        for info in proto.training_info
        for binding in (*info.initialization_binding, *info.update_binding)
        for name in (binding.key, binding.value)
    }


def _check_versions(proto: ModelProto) -> None:
    if not 1 <= proto.ir_version <= onnx.IR_VERSION:
        raise InvalidModelError(
            f"IR version {proto.ir_version} is not one that onnx {onnx.__version__} "
            f"knows (1 to {onnx.IR_VERSION})"
        )
    newest = onnx.defs.onnx_opset_version()
    own = [entry for function in proto.functions for entry in function.opset_import]
    for entry in (*proto.opset_import, *own):
        standard = entry.domain in ("", "ai.onnx")
        if entry.version < 1 or (standard and entry.version > newest):
            raise InvalidModelError(
                f"opset {entry.version} of domain {entry.domain or 'ai.onnx'!r} is not "
                f"one that onnx {onnx.__version__} knows (1 to {newest})"
            )
    if not proto.opset_import and proto.ir_version >= 3:
        raise InvalidModelError("the model imports no operator set")


def _check_functions(proto: ModelProto) -> None:
    """No two functions share a name, none calls itself, and they do not explode."""
    functions: dict[tuple[str, str, str], FunctionProto] = {}
    _check_text((entry.domain for entry in proto.opset_import), "opset imports")
    for function in proto.functions:
        key = (function.domain, function.name, function.overload)
        where = f"function {key[0]}::{key[1]}"
        _check_text((*key, *function.input, *function.output, *function.attribute), where)
        if key in functions:
            raise InvalidModelError(f"function {key[0]}::{key[1]} is defined twice")
        functions[key] = function
    calls = {
        key: Counter(
            (node.domain, node.op_type, node.overload)
            for node in attributes.nodes_in(function.node)
        )
        for key, function in functions.items()
    }
    sizes: dict[tuple[str, str, str], int] = {}
    while ready := [
        key for key in calls.keys() - sizes if calls[key].keys() & calls <= sizes.keys()
    ]:
        for key in ready:
            sizes[key] = _inlined(calls[key], sizes)
    if not functions:
        return
    if circular := [key for key in calls if key not in sizes]:
        raise InvalidModelError(
            f"function {circular[0][0]}::{circular[0][1]} calls itself, or one that does"
        )
    called = Counter(
        (node.domain, node.op_type, node.overload)
        for node in attributes.nodes_in(proto.graph.node)
    )
    if (total := _inlined(called, sizes)) > max(MAX_INLINED, called.total()):
        raise InvalidModelError(
            f"the model's local functions call each other so often that {total:,} nodes "
            f"come of it (at most {MAX_INLINED:,})"
        )


def _inlined(
    calls: Counter[tuple[str, str, str]], sizes: dict[tuple[str, str, str], int]
) -> int:
    """How many nodes come of nodes, counted by what they call."""
    return sum(count * sizes.get(key, 1) for key, count in calls.items())


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for _, inner in attributes.subgraphs(node) if node.attribute else ():
            yield from _graphs(inner)


def _check_text(names: Iterable[object], where: str) -> None:
    """Protobuf hands out as bytes what is not UTF-8; no name may be so."""
    for name in names:
        if not isinstance(name, str):
            raise InvalidModelError(f"{where}: the name {name!r} is not UTF-8")


def _check_graph(graph: GraphProto) -> None:
    values = (*graph.input, *graph.output, *graph.value_info)
    _check_text((value.name for value in values), f"graph {graph.name!r}")
    _check_text((tensor.name for tensor in graph.initializer), f"graph {graph.name!r}")
    for names, what in (
        ([value.name for value in graph.input], "input"),
        ([tensor.name for tensor in graph.initializer], "initializer"),
    ):
        seen: set[str] = set()
        for name in names:
            if not name:
                raise InvalidModelError(f"graph {graph.name!r}: an {what} has no name")
            if name in seen:
                raise InvalidModelError(f"graph {graph.name!r}: two {what}s {name!r}")
            seen.add(name)
    for tensor in graph.initializer:
        _check_tensor(tensor, f"initializer {tensor.name!r}")
    for sparse in graph.sparse_initializer:
        _check_sparse(sparse, f"sparse initializer {sparse.values.name!r}")


def _check_tensor(tensor: TensorProto, what: str) -> None:
    """The dtype is known and the payload has the bytes that dtype and dims need."""
    if tensor.data_type not in _KNOWN_TYPES:
        raise InvalidModelError(f"{what} has unknown data type {tensor.data_type}")
    if tensor.HasField("segment"):
        raise InvalidModelError(f"{what} is a segment of a tensor: onnx cannot read it")
    if any(dim < 0 for dim in tensor.dims):
        raise InvalidModelError(f"{what} has negative dims {list(tensor.dims)}")
    count = elements(tensor)
    wanted = payload_bytes(tensor.data_type, count)
    if wanted > MAX_BYTES or math.prod(dim for dim in tensor.dims if dim) > MAX_BYTES:
        raise InvalidModelError(f"{what} has absurd dims {list(tensor.dims)}")
    if place(tensor) is not None:
        if tensor.data_type == TensorProto.STRING:
            raise InvalidModelError(f"{what}: strings cannot be external data")
        return
    if tensor.HasField("raw_data"):
        found: int = len(tensor.raw_data)
        if tensor.data_type == TensorProto.STRING:
            raise InvalidModelError(f"{what}: strings cannot be raw data")
    else:
        field, per_element = _TYPED_FIELD.get(tensor.data_type, ("int32_data", 1))
        found, wanted = len(getattr(tensor, field)), count * per_element
        if field == "int32_data":
            wanted = _int32_items(tensor.data_type, count)
    if found != wanted:
        raise InvalidModelError(
            f"{what}: dims {list(tensor.dims)} of type "
            f"{TensorProto.DataType.Name(tensor.data_type)} need {wanted} "
            f"{'bytes' if tensor.HasField('raw_data') else 'items'}, it has {found}"
        )


def _check_sparse(sparse: SparseTensorProto, what: str) -> None:
    if any(dim < 0 for dim in sparse.dims):
        raise InvalidModelError(f"{what} has negative dims {list(sparse.dims)}")
    _check_tensor(sparse.values, f"{what}, its values")
    _check_tensor(sparse.indices, f"{what}, its indices")


def _int32_items(data_type: int, count: int) -> int:
    """Entries of int32_data for `count` elements: 4- and 2-bit types pack bytes."""
    packs = PACKED_BITS.get(data_type) in (2, 4)
    return payload_bytes(data_type, count) if packs else count


def _check_node(node: NodeProto, version: int, calls: set[tuple[str, str]]) -> None:
    """Texts for messages are made where they are needed: this runs for every node."""
    op_type, domain = node.op_type, node.domain
    names = (node.name, op_type, domain, *node.input, *node.output)
    if not _TEXT.issuperset(map(type, names)):
        _check_text(names, f"node {_label(node)!r}")
    if not op_type:
        raise InvalidModelError(f"node {_label(node)!r} has no operator type")
    standard = domain in ("", "ai.onnx") and (domain, op_type) not in calls
    form = schemas.form(op_type, version) if standard else None
    if form is not None:
        _check_arity(node, form)
    if node.attribute:
        _check_attributes(node, form.attributes if form is not None else {})


def _label(node: NodeProto) -> str:
    return node.name or next(iter(node.output), "")


def _check_attributes(node: NodeProto, kinds: dict[str, int]) -> None:
    seen: set[str] = set()
    for attribute in node.attribute:
        name, kind = attribute.name, attribute.type
        refers = attribute.ref_attr_name
        if not (isinstance(name, str) and isinstance(refers, str)):
            _check_text((name, refers), _where(node, name))
        if not name or name in seen:
            raise InvalidModelError(f"{_where(node, name)} has no name or is there twice")
        seen.add(name)
        wanted = kinds.get(name, kind)
        if kind != wanted:
            raise InvalidModelError(
                f"{_where(node, name)} is of type {_type_name(kind)}, "
                f"not {_type_name(wanted)}"
            )
        if not refers:
            _check_payloads(node, attribute)


def _where(node: NodeProto, attribute: str) -> str:
    return f"node {_label(node)!r} ({node.op_type}): attribute {attribute!r}"


def _check_payloads(node: NodeProto, attribute: AttributeProto) -> None:
    if attribute.type == AttributeProto.TENSOR or attribute.HasField("t"):
        _check_tensor(attribute.t, _where(node, attribute.name))
    elif attribute.HasField("sparse_tensor"):
        _check_sparse(attribute.sparse_tensor, _where(node, attribute.name))
    for tensor in attribute.tensors:
        _check_tensor(tensor, _where(node, attribute.name))
    for sparse in attribute.sparse_tensors:
        _check_sparse(sparse, _where(node, attribute.name))


def _check_arity(node: NodeProto, form: schemas.Form) -> None:
    where = f"node {_label(node)!r} ({node.op_type})"
    for names, (least, most), what in (
        (node.input, form.inputs, "inputs"),
        (node.output, form.outputs, "outputs"),
    ):
        if not least <= len(names) <= most:
            count = f"{least}" if least == most else f"{least} to {most}"
            count = f"{least} or more" if most > 1000 else count
            raise InvalidModelError(f"{where}: it has {len(names)} {what}, not {count}")
    if "" not in node.input:
        return
    for index, (name, required) in enumerate(
        zip(node.input, form.required, strict=False)
    ):
        if required and not name:
            raise InvalidModelError(f"{where}: input {index} is not optional")


def _type_name(kind: int) -> str:
    return str(AttributeProto.AttributeType.Name(kind))
