"""Changes to a model that the user asked for, before any pass runs.

Each is a change of the interface or of the operator set, so each leaves a note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import GraphProto, ModelProto, ValueInfoProto, version_converter

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
        if dim.HasField("dim_value") and dim.dim_value != size:
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
    try:
        converted = version_converter.convert_version(_convertible(model), version)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"onnx cannot convert opset {current} to {version}: {reason}"
        ) from None
    _restore_metadata(model.proto, converted)
    try:
        made = Model(converted, model.weights)
    except InvalidModelError as error:
        raise UsageError(
            f"onnx's conversion to opset {version} is broken: {error}"
        ) from None
    made.notes += [*model.notes, f"opset {current} became {version}"]
    return made


def _convertible(model: Model) -> ModelProto:
    """A copy whose payloads outside are stand-ins: the converter knows only names."""
    copy = ModelProto()
    copy.CopyFrom(model.proto)
    return copy


def _restore_metadata(old: ModelProto, new: ModelProto) -> None:
    """Put back what the converter's own representation does not carry."""
    new.ir_version = max(old.ir_version, new.ir_version)
    weights = {tensor.name: tensor for tensor in old.graph.initializer}
    for index, tensor in enumerate(new.graph.initializer):
        if tensor.name in weights:
            new.graph.initializer[index].CopyFrom(weights[tensor.name])
    for field in ("producer_name", "producer_version", "domain", "model_version"):
        setattr(new, field, getattr(old, field))
    for target, source in ((new, old), (new.graph, old.graph)):
        target.doc_string = source.doc_string
        del target.metadata_props[:]
        target.metadata_props.extend(source.metadata_props)
    _restore_nodes(old.graph, new.graph)


def _restore_nodes(old: GraphProto, new: GraphProto) -> None:
    makers = {name: node for node in old.node for name in node.output if name}
    for node in new.node:
        before = makers.get(next(iter(node.output), ""))
        if before is not None and before.op_type == node.op_type:
            node.name, node.doc_string = before.name, before.doc_string
            del node.metadata_props[:]
            node.metadata_props.extend(before.metadata_props)


def _again(model: Model, note: str) -> Model:
    """The model with its index rebuilt after a change of the interface."""
    made = Model(model.proto, model.weights)
    made.notes += [*model.notes, note]
    return made
