"""What a model holds: operators, sizes, zeros, dead channels, quantization.

Weights are streamed one after the other, so a model of any size can be looked at.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from onnx import TensorProto, TypeProto, ValueInfoProto

from onnxopt import cost, zeros
from onnxopt._version import __version__
from onnxopt.data.inputs import dims_of
from onnxopt.graph import GraphView
from onnxopt.inspection.dead import (
    DeadChannels,
    LayerChannels,
    dead_channels,
    layer_channels,
)
from onnxopt.inspection.layers import Layer, layer
from onnxopt.inspection.quantization import Quantization, quantization
from onnxopt.model import Model, Source
from onnxopt.quantization.kernels import Kernels, integer_kernels
from onnxopt.quantization.layers import dtype_name
from onnxopt.report import Pair
from onnxopt.weights import elements, tensor_bytes


class Value(msgspec.Struct, frozen=True):
    """An input or output: its type in words (`float32`, `map(int64, ...)`), its dims."""

    name: str
    type: str
    shape: list[int | str | None] | None


class Storage(msgspec.Struct, frozen=True):
    """The constants of one dtype: how many, their elements and bytes."""

    tensors: int
    elements: int
    bytes: int


class Weight(msgspec.Struct, frozen=True):
    """One constant; `zeros` is None where its dtype is not counted.

    In an integer weight of a layer, a zero is what equals the zero point.
    """

    name: str
    scope: str
    dtype: str
    shape: list[int]
    bytes: int
    zeros: int | None

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        size = int(np.prod(self.shape, dtype=object))
        return (self.zeros or 0) / size if size else 0.0


class Channels(msgspec.Struct, frozen=True):
    """A layer's channels, and how many of them have only zeros for weights.

    None where an axis cannot be told: the input channels of a grouped convolution, a
    zero point that differs by channel.
    """

    node: str
    scope: str
    op: str
    weight: str
    outputs: int | None
    zero_outputs: int | None
    inputs: int | None
    zero_inputs: int | None


class Sparsity(msgspec.Struct, frozen=True):
    """Zeros among the elements of the weights (constants that layers multiply by)."""

    elements: int
    zeros: int
    fraction: float


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of one model.

    `dead`: the layers with channels that make no difference; `layers`: all of them, None
    where that was not asked for.
    """

    schema: int = 1
    onnxopt: str = __version__
    ir_version: int
    opset: dict[str, int]
    producer: str
    version: int
    domain: str
    metadata: dict[str, str]
    bytes: Pair
    external_data: dict[str, int]
    inputs: list[Value]
    outputs: list[Value]
    nodes: int
    parameters: int
    macs: int | None
    ops: dict[str, dict[str, int]]
    functions: list[str]
    storage: dict[str, Storage]
    sparsity: Sparsity
    weights: list[Weight]
    channels: list[Channels]
    dead: list[DeadChannels]
    layers: list[LayerChannels] | None = None
    quantization: Quantization
    notes: list[str]


def inspect(
    model: Source,
    *,
    channels: bool = False,
    kernels: Sequence[str] = (),
    base_dir: str | os.PathLike[str] | None = None,
) -> Inspection:
    """Look at a model: a path, a ModelProto or a gs.Graph.

    `channels`: say of every layer, not only of those with dead channels, which channels
    it has and what keeps them. `kernels`: providers ("cpu") whose ONNX Runtime is asked
    which layers it runs in integers, and why not the others. `base_dir`: the folder of
    its external data, for models in memory. Raises InvalidModelError where it is
    malformed, UsageError where it cannot be read or a provider's name is unknown.
    """
    opened = Model.open(model, base_dir)
    try:
        found = _inspect(opened, model, channels)
    finally:
        opened.weights.close()
    asked = [integer_kernels(model, name, base_dir=base_dir) for name in kernels]
    found.quantization.kernels.extend(asked)
    return found


def _inspect(model: Model, source: Source, channels: bool) -> Inspection:
    proto = model.proto
    layers = layer_channels(model, channels)
    found = _scan(model)
    external = _external_data(model)
    path = source if isinstance(source, str | os.PathLike) else None
    size = os.path.getsize(path) if path is not None else model.bytes()
    return Inspection(
        ir_version=proto.ir_version,
        opset={entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        producer=f"{proto.producer_name} {proto.producer_version}".strip(),
        version=proto.model_version,
        domain=proto.domain,
        metadata={entry.key: entry.value for entry in proto.metadata_props},
        bytes=Pair(size, sum(external.values())),
        external_data=external,
        inputs=[value_of(info) for info in proto.graph.input],
        outputs=[value_of(info) for info in proto.graph.output],
        nodes=cost.nodes(model),
        parameters=cost.parameters(model),
        macs=cost.macs(model),
        ops={view.scope: _operators(view) for view in model.views()},
        functions=[_function(function) for function in proto.functions],
        storage=_storage(tensor for _, _, tensor in cost.constants(model)),
        sparsity=found.sparsity(),
        weights=found.weights,
        channels=found.channels,
        dead=dead_channels(layers),
        layers=layers if channels else None,
        quantization=quantization(model),
        notes=list(model.notes),
    )


def _external_data(model: Model) -> dict[str, int]:
    files = model.weights.data_files()
    return {_location(model, path): os.path.getsize(path) for path in files}


def _location(model: Model, path: Path) -> str:
    base = model.weights.base_dir
    return str(path if base is None else path.relative_to(base))


def _operators(view: GraphView) -> dict[str, int]:
    counts = Counter(view.op(node) for node in view.proto.node)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _function(function: object) -> str:
    domain, name = function.domain, function.name  # type: ignore[attr-defined]
    overload = getattr(function, "overload", "")
    return f"{domain}::{name}" + (f":{overload}" if overload else "")


def value_of(info: ValueInfoProto) -> Value:
    """An input, an output or a value in between, in words."""
    words, tensor = _type(info.type)
    shape = dims_of(tensor) if tensor is not None else None
    return Value(info.name, words, list(shape) if shape is not None else None)


def _type(kind: TypeProto) -> tuple[str, TypeProto.Tensor | None]:
    """A type in words, and the tensor type in it that has a shape."""
    match kind.WhichOneof("value"):
        case "tensor_type":
            return dtype_name(kind.tensor_type.elem_type), kind.tensor_type
        case "sparse_tensor_type":
            words = dtype_name(kind.sparse_tensor_type.elem_type)
            return f"sparse({words})", kind.sparse_tensor_type
        case "sequence_type":
            return f"sequence({_type(kind.sequence_type.elem_type)[0]})", None
        case "optional_type":
            return f"optional({_type(kind.optional_type.elem_type)[0]})", None
        case "map_type":
            key = dtype_name(kind.map_type.key_type)
            return f"map({key}, {_type(kind.map_type.value_type)[0]})", None
    return "unknown", None


def _storage(tensors: Iterable[TensorProto]) -> dict[str, Storage]:
    sums: dict[str, list[int]] = {}
    for tensor in tensors:
        row = sums.setdefault(dtype_name(tensor.data_type), [0, 0, 0])
        for index, value in enumerate((1, elements(tensor), tensor_bytes(tensor))):
            row[index] += value
    order = sorted(sums.items(), key=lambda item: (-item[1][2], item[0]))
    return {name: Storage(*row) for name, row in order}


# ---- zeros ----


class _Scan(msgspec.Struct):
    """What was found while every constant was read once."""

    weights: list[Weight] = []
    channels: list[Channels] = []
    elements: int = 0
    zeros: int = 0

    def sparsity(self) -> Sparsity:
        fraction = self.zeros / self.elements if self.elements else 0.0
        return Sparsity(self.elements, self.zeros, round(fraction, 6))


def _scan(model: Model) -> _Scan:
    layers: dict[tuple[int, str], list[Layer]] = {}
    for view in model.views():
        for node in view.proto.node:
            found = layer(view, node)
            if found is not None:
                layers.setdefault((id(found.home), found.name), []).append(found)
    scan = _Scan()
    for view, name, tensor in cost.constants(model):
        _scan_one(scan, model, view, name, tensor, layers.get((id(view), name), []))
    return scan


def _scan_one(
    scan: _Scan,
    model: Model,
    view: GraphView,
    name: str,
    tensor: TensorProto,
    layers: list[Layer],
) -> None:
    """Count one constant's zeros, and those of the channels of `layers`, its readers."""
    axes = {axis for item in layers for axis in (item.outputs, item.inputs)}
    zero = _zero(layers[0]) if layers else 0
    found = None
    if zero is not None:
        known = sorted(axis for axis in axes if axis is not None)
        found = zeros.count(model.weights, tensor, known, zero)
    if layers and found is not None:
        scan.elements += found.elements
        scan.zeros += found.zeros
    scan.weights.append(
        Weight(
            name=name,
            scope=view.scope,
            dtype=dtype_name(tensor.data_type),
            shape=list(tensor.dims),
            bytes=tensor_bytes(tensor),
            zeros=found.zeros if found is not None else None,
        )
    )
    scan.channels += [_channels(item, found) for item in layers]


def _zero(item: Layer) -> int | None:
    """The integer that stands for zero; None where it is unknown or not one."""
    if item.zero_point is None:
        return 0
    values = item.view.array(item.zero_point)
    if values is None or values.dtype.kind not in "iu":
        return 0 if values is not None else None
    distinct = set(values.reshape(-1).tolist())
    return int(distinct.pop()) if len(distinct) == 1 else None


def _channels(item: Layer, found: zeros.Zeros | None) -> Channels:
    outputs, zero_outputs = _axis(item, item.outputs, found)
    inputs, zero_inputs = _axis(item, item.inputs, found)
    return Channels(
        node=item.reader.label(item.node),
        scope=item.reader.scope,
        op=item.reader.op(item.node),
        weight=item.name,
        outputs=outputs,
        zero_outputs=zero_outputs,
        inputs=inputs,
        zero_inputs=zero_inputs,
    )


def _axis(
    item: Layer, axis: int | None, found: zeros.Zeros | None
) -> tuple[int | None, int | None]:
    if axis is None:
        return None, None
    size = item.tensor.dims[axis]
    if found is None or axis not in found.channels:
        return size, None
    return size, int(found.channels[axis].sum())


__all__ = [
    "Channels",
    "DeadChannels",
    "Inspection",
    "Kernels",
    "LayerChannels",
    "Sparsity",
    "Storage",
    "Value",
    "Weight",
    "inspect",
    "value_of",
]
