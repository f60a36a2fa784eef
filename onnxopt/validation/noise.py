"""The noise floor: how far a model moves when nothing but rounding changes.

No constant says how far apart two correct evaluations of a model may be: measured on
real networks it runs from 1e-8 to 1e-3 of the largest output, and to a tenth where
codes flip. So the reference is run against itself: with its float inputs and weights
moved by one unit in the last place, up or down at random, and with another number of
threads. Weights are moved too since many models take integers only, and since that
puts rounding noise into every layer, as a rewrite does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnxopt import attributes
from onnxopt.data.inputs import Feed
from onnxopt.linear import FLOATS
from onnxopt.model import Model
from onnxopt.save import stage
from onnxopt.validation.single_steps import rounding
from onnxopt.weights import tensor_bytes, tensors

# Above this, models are not copied to move their weights; their inputs still are.
WEIGHT_LIMIT = 1 << 30
# Tensors smaller than this are settings (scales of Resize, thresholds), not weights.
_SMALLEST_WEIGHT = 16
# Nodes whose further inputs are sizes, scales or zero points: a moved one is another
# model. A weight behind Cast is stored in less precision than it computes in.
_SETTINGS = {"DequantizeLinear", "QuantizeLinear", "Resize", "Upsample", "Range", "Cast"}
_QUANTIZED = {
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QuantizeLinear",
    "ConvInteger",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
}
# Nodes that move values and do not compute in their type.
_CARRIERS = {"Cast", "Constant", "DequantizeLinear", "Identity", "QuantizeLinear"}

# Largest error, relative to the largest magnitude, that needs no measuring: a few
# units in the last place of the type that the model computes in.
BOUNDS = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
# The same where the reference's own noise could not be measured.
UNMEASURED_BOUNDS = BOUNDS | {"float32": 1e-5, "float64": 1e-12}
_COARSE = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}


@dataclass(frozen=True)
class Facts:
    """What the judgement needs to know of a model."""

    quantized: bool
    precision: str
    float_inputs: bool
    size: int
    written_out: bool = False  # its quantizers are single steps, which run as floats


def facts(model: onnx.ModelProto, path: Path) -> Facts:
    """Facts of a model that was read without its external data."""
    nodes = list(all_nodes(model))
    kinds = {"float32", *(_computes_in(model, nodes))}
    written_out = bool(rounding(model.graph.node))
    precision = next((p for p in ("bfloat16", "float16") if p in kinds), "float32")
    return Facts(
        quantized=written_out or any(node.op_type in _QUANTIZED for node in nodes),
        precision=precision,
        float_inputs=any(
            info.type.tensor_type.elem_type in FLOATS for info in model.graph.input
        ),
        size=path.stat().st_size + external_bytes(model),
        written_out=written_out,
    )


def external_bytes(model: onnx.ModelProto) -> int:
    """Bytes of external data that the model refers to."""
    return sum(
        tensor_bytes(tensor)
        for tensor in tensors(model)
        if tensor.data_location == TensorProto.EXTERNAL
    )


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Nodes of all scopes: main graph, subgraphs, functions."""
    yield from attributes.nodes_in(model.graph.node)
    for function in model.functions:
        yield from attributes.nodes_in(function.node)


def _computes_in(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> set[str]:
    """Types coarser than float32 that nodes compute in, not merely store."""
    coarse = dict(_typed_names(model, nodes))
    return {
        coarse[name]
        for node in nodes
        if node.op_type not in _CARRIERS
        for name in node.input
        if name in coarse
    }


def _typed_names(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto]
) -> Iterator[tuple[str, str]]:
    for tensor in model.graph.initializer:
        if tensor.data_type in _COARSE:
            yield tensor.name, _COARSE[tensor.data_type]
    for info in (*model.graph.input, *model.graph.value_info):
        if info.type.tensor_type.elem_type in _COARSE:
            yield info.name, _COARSE[info.type.tensor_type.elem_type]
    for node in nodes:
        for attribute in node.attribute:
            if (
                node.op_type == "Cast"
                and attribute.name == "to"
                and attribute.i in _COARSE
            ):
                yield node.output[0], _COARSE[attribute.i]


def moved_feed(feed: Feed, ulps: int, seed: int) -> Feed:
    """The feed with every float moved by `ulps` units in the last place, or so."""
    return {name: _moved(value, ulps, f"{seed}:{name}") for name, value in feed.items()}


def _moved(value: Any, ulps: int, seed: str) -> Any:
    if isinstance(value, list):
        return [_moved(item, ulps, f"{seed}:{i}") for i, item in enumerate(value)]
    if not isinstance(value, np.ndarray) or not _is_float(value.dtype):
        return value
    return move(value, ulps, seed)


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def move(array: np.ndarray, ulps: int, seed: str) -> np.ndarray:
    """Float elements up or down by `ulps` units in the last place; zeros stay zeros."""
    digest = hashlib.sha256(seed.encode()).digest()
    random = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    codes = array.reshape(-1).view(f"i{array.itemsize}")
    # Neighbouring codes are neighbouring floats of the same sign.
    signs = random.integers(0, 2, size=codes.shape, dtype=np.int8) * 2 - 1
    moved = (codes + signs.astype(codes.dtype) * ulps).astype(codes.dtype)
    floats = moved.view(array.dtype).reshape(array.shape)
    keep = (array == 0) | ~np.isfinite(array) | ~np.isfinite(floats)
    keep |= (floats < 0) != (array < 0)
    return np.asarray(np.where(keep, array, floats), dtype=array.dtype)


def write_moved(path: Path, ulps: int, seed: int, target: Path) -> bool:
    """Write the model with its float weights moved, one at a time in memory.

    False, and nothing written, where it has none.
    """
    model = Model.open(path)
    try:
        weights = list(_weights(model.proto))
        for index, tensor in enumerate(weights):
            array = model.weights.array(tensor)
            array = move(array, ulps, f"{seed}:weight:{index}")
            tensor.CopyFrom(model.weights.tensor(array, tensor.name))
        if weights:
            stage(model, target, hashes=False).commit()
    finally:
        model.weights.close()
    return bool(weights)


def _weights(model: onnx.ModelProto) -> Iterator[TensorProto]:
    nodes = list(all_nodes(model))
    settings = {
        name
        for node in nodes
        if node.op_type in _SETTINGS
        for position, name in enumerate(node.input)
        if position > 0 or node.op_type == "Cast"
    }
    for name, tensor in _constants(model, nodes):
        size = np.prod(tensor.dims, dtype=np.int64)
        if (
            tensor.data_type in FLOATS
            and size >= _SMALLEST_WEIGHT
            and name not in settings
        ):
            yield tensor


def _constants(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]
) -> Iterator[tuple[str, TensorProto]]:
    yield from ((tensor.name, tensor) for tensor in model.graph.initializer)
    for node in nodes:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], attribute.t
            for graph in (attribute.g, *attribute.graphs):
                yield from ((tensor.name, tensor) for tensor in graph.initializer)
