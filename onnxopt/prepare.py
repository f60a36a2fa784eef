"""Changes to a model that the user asked for, before any pass runs.

Each is a change of the interface or of the operator set, so each leaves a note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    ValueInfoProto,
    defs,
    helper,
    version_converter,
)

from onnxopt.errors import InvalidModelError, UsageError
from onnxopt.model import Model


def freeze_inputs(model: Model) -> Model:
    """Take initializers out of the graph's inputs: they can no longer be overridden."""
    graph = model.proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    frozen = [value.name for value in graph.input if value.name in weights]
    if not frozen or model.proto.ir_version < 4:
        return model  # before IR 4 they are inputs by format, and nobody can feed them
    for index in range(len(graph.input) - 1, -1, -1):
        if graph.input[index].name in weights:
            del graph.input[index]
    return _again(model, f"inputs with defaults are constants now: {', '.join(frozen)}")


def fix_shapes(model: Model, shapes: Mapping[str, Sequence[int]]) -> Model:
    """Fix dims of inputs in the file, and of what shares their symbols.

    Raises UsageError where an input is unknown or its rank or fixed dims differ.
    """
    graph = model.proto.graph
    inputs = {value.name: value for value in graph.input}
    symbols: dict[str, int] = {}
    for name, dims in shapes.items():
        if name not in inputs:
            raise UsageError(f"no input {name!r}; there are {', '.join(inputs)}")
        _fix(inputs[name], dims, symbols)
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_value = symbols[dim.dim_param]
    fixed = ", ".join(f"{name}:{list(dims)}" for name, dims in shapes.items())
    return _again(model, f"input shapes are fixed in the file: {fixed}")


def _fix(value: ValueInfoProto, dims: Sequence[int], symbols: dict[str, int]) -> None:
    declared = value.type.tensor_type.shape.dim
    if not value.type.tensor_type.HasField("shape") or len(declared) != len(dims):
        raise UsageError(f"input {value.name!r} does not have {len(dims)} dims")
    for dim, size in zip(declared, dims, strict=True):
        is_fixed = dim.HasField("dim_value") and dim.dim_value >= 0  # -1: any, as in ORT
        if is_fixed and dim.dim_value != size:
            raise UsageError(
                f"input {value.name!r}: a dim is {dim.dim_value} in the model, not {size}"
            )
        if dim.dim_param and symbols.setdefault(dim.dim_param, size) != size:
            raise UsageError(f"dim {dim.dim_param!r} cannot be two sizes at once")
        dim.dim_value = size


def raise_opset(model: Model, version: int) -> Model:
    """Convert to a newer opset of the standard domain, by onnx's version converter.

    Raises UsageError where the converter cannot, or the version is not newer.
    """
    current = model.opset(model.main)
    if version == current:
        return model
    if version < current:
        raise UsageError(f"the model has opset {current}; --opset can only raise it")
    _check_functions(model, version)
    try:
        converted = version_converter.convert_version(_convertible(model), version)
    except (version_converter.ConvertError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"onnx cannot convert opset {current} to {version}: {reason}"
        ) from None
    try:
        made = Model(_raised(model.proto, converted, version), model.weights)
    except InvalidModelError as error:
        raise UsageError(
            f"onnx's conversion to opset {version} is broken: {error}"
        ) from None
    made.notes += [*model.notes, f"opset {current} became {version}"]
    return made


def _check_functions(model: Model, version: int) -> None:
    """The converter leaves function bodies alone: the versions must not matter there."""
    views = list(model.functions)
    while views:
        view = views.pop()
        views += view.children()
        for node in view.proto.node:
            if _changes(node, model.opset(view), version):
                raise UsageError(
                    f"{node.op_type} in {view.scope} is another operator in opset "
                    f"{version}: inline the local functions before raising the opset"
                )


def _changes(node: NodeProto, current: int, version: int) -> bool:
    if node.domain not in ("", "ai.onnx") or not defs.has(node.op_type):
        return False
    try:
        schemas = [defs.get_schema(node.op_type, opset) for opset in (current, version)]
    except defs.SchemaError:
        return True
    return _form(schemas[0]) != _form(schemas[1])


def _form(schema: defs.OpSchema) -> tuple[object, ...]:
    """What a version of an operator takes; types aside, which only become more."""
    attributes: Any = schema.attributes
    return (
        [(formal.name, formal.option) for formal in (*schema.inputs, *schema.outputs)],
        {
            name: (item.type, item.required, str(item.default_value))
            for name, item in attributes.items()
        },
    )


def _convertible(model: Model) -> ModelProto:
    """A copy whose payloads outside are stand-ins: the converter knows only names."""
    copy = ModelProto()
    copy.CopyFrom(model.proto)
    return copy


def _raised(old: ModelProto, converted: ModelProto, version: int) -> ModelProto:
    """The old model with the nodes that the converter changed, and only these, changed.

    Its own representation of a model carries far less than the format does.
    """
    made = ModelProto()
    made.CopyFrom(old)
    made.ir_version = max(old.ir_version, converted.ir_version)
    for holder in (made, *made.functions):
        for entry in holder.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = version
    _take_over(made.graph, converted.graph, listed=made.ir_version < 4)
    return made


def _take_over(graph: GraphProto, converted: GraphProto, listed: bool) -> None:
    """Give `graph` the nodes of the converted one, and the weights that are new."""
    makers = {name: node for node in graph.node for name in node.output if name}
    taken = {node.name for node in graph.node if node.name}
    nodes = []
    for after in converted.node:
        before = makers.get(next(filter(None, after.output), ""))
        if before is None:
            _name_apart(after, taken)
        nodes.append(after if before is None else _updated(before, after, listed))
    del graph.node[:]
    graph.node.extend(nodes)
    known = {tensor.name for tensor in graph.initializer}
    for tensor in converted.initializer:
        if tensor.name not in known:
            graph.initializer.append(tensor)
            if listed:
                graph.input.append(
                    helper.make_tensor_value_info(
                        tensor.name, tensor.data_type, tensor.dims
                    )
                )


def _name_apart(node: NodeProto, taken: set[str]) -> None:
    """Another name where it is taken: the converter gives that of what it replaces.

    ONNX Runtime refuses a model in which two nodes have one name.
    """
    name, number = node.name, 0
    while node.name and node.name in taken:
        number += 1
        node.name = f"{name}_{node.op_type}_{number}"
    taken.add(node.name)


def _updated(before: NodeProto, after: NodeProto, listed: bool) -> NodeProto:
    """`before` with what the converter changed of it."""
    made = NodeProto()
    made.CopyFrom(before)
    made.op_type = after.op_type
    for field in ("input", "output"):
        if list(getattr(before, field)) != list(getattr(after, field)):
            del getattr(made, field)[:]
            getattr(made, field).extend(getattr(after, field))
    attributes = {attribute.name: attribute for attribute in before.attribute}
    kept = [_attribute(attributes.get(new.name), new, listed) for new in after.attribute]
    order = list(attributes)  # the converter has one of its own
    kept.sort(
        key=lambda item: order.index(item.name) if item.name in order else len(order)
    )
    del made.attribute[:]
    made.attribute.extend(kept)
    return made


def _attribute(
    before: AttributeProto | None, after: AttributeProto, listed: bool
) -> AttributeProto:
    if before is None:
        return after
    made = AttributeProto()
    made.CopyFrom(before)
    if after.type == before.type == AttributeProto.GRAPH:
        _take_over(made.g, after.g, listed)
    elif after.type == before.type == AttributeProto.GRAPHS:
        for ours, theirs in zip(made.graphs, after.graphs, strict=True):
            _take_over(ours, theirs, listed)
    elif not _is_same(_bare(before), _bare(after)):
        return after
    return made


def _is_same(one: AttributeProto, other: AttributeProto) -> bool:
    """Equal to the byte, or as text, for which one NaN is like another."""
    if one.SerializeToString() == other.SerializeToString():
        return True
    return one.ByteSize() == other.ByteSize() and str(one) == str(other)


def _bare(attribute: AttributeProto) -> AttributeProto:
    """What an attribute says, without what is told about it."""
    bare = AttributeProto()
    bare.CopyFrom(attribute)
    bare.ClearField("doc_string")
    for tensor in (bare.t, *bare.tensors) if not bare.ref_attr_name else ():
        for field in ("name", "doc_string", "metadata_props"):
            tensor.ClearField(field)
    bare.DiscardUnknownFields()
    return bare


def _again(model: Model, note: str) -> Model:
    """The model with its index rebuilt after a change of the interface."""
    made = Model(model.proto, model.weights)
    made.notes += [*model.notes, note]
    return made
