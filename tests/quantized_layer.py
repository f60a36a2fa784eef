"""Models of one quantized layer, `L`, for tests of what ONNX Runtime makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxopt.weights import Array

X_SCALE, W_SCALE = 0.05, 0.01
DTYPES: dict[str, Any] = {
    "uint8": np.uint8,
    "int8": np.int8,
    "uint16": np.uint16,
    "int16": np.int16,
    "int4": ml_dtypes.int4,
    "uint4": ml_dtypes.uint4,
}
MIDDLE = {"uint8": 128, "uint16": 32768}


class Builder:
    """Nodes and constants of a graph that grows from its inputs."""

    def __init__(self, opset: int = 17) -> None:
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.random = np.random.default_rng(0)

    def constant(self, array: Array) -> str:
        """The name of a new initializer."""
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op: str, inputs: Sequence[str], name: str = "", **given: Any) -> str:
        """The first output of a new node; `outputs` is how many it has."""
        count = given.pop("outputs", 1)
        outputs = [f"{op.lower()}{len(self.nodes)}_{index}" for index in range(count)]
        kept = {key: value for key, value in given.items() if value is not None}
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **kept))
        return outputs[0]

    def qdq(
        self, value: str, dtype: str, scale: float = X_SCALE, zero: int | None = None
    ) -> str:
        """Q and DQ of a value, per tensor, at the middle of the codes unless told."""
        zero = MIDDLE.get(dtype, 0) if zero is None else zero
        both = [
            self.constant(np.float32(scale)),
            self.constant(np.array(zero, DTYPES[dtype])),
        ]
        codes = self.node("QuantizeLinear", [value, *both])
        return self.node("DequantizeLinear", [codes, *both])

    def weight(
        self,
        shape: Sequence[int],
        dtype: str = "int8",
        axis: int | None = None,
        zero: int = 0,
        block: int = 0,
    ) -> str:
        """DQ of integers: per tensor without `axis`, else along it, in blocks perhaps."""
        low, high = (0, 15) if dtype == "uint4" else (-8, 8)
        if dtype in ("int8", "uint8"):
            low, high = (-100, 100) if dtype == "int8" else (0, 200)
        codes = self.random.integers(low, high, shape).astype(DTYPES[dtype])
        dims: list[int] = []
        if axis is not None:
            dims = [shape[axis]] if not block else list(shape)
        if block and axis is not None:
            dims[axis] = -(-shape[axis] // block)
        scale = np.full(dims, W_SCALE, np.float32)
        inputs = [codes, scale, np.full(dims, zero, DTYPES[dtype])]
        return self.node(
            "DequantizeLinear",
            [self.constant(array) for array in inputs],
            axis=axis,
            block_size=block or None,
        )

    def bias(self, kind: str, size: int, per_channel: bool) -> str:
        """A bias: `float`, int32 at the `right` or a `wrong` scale, or `int8`."""
        values = self.random.integers(-99, 99, size)
        if kind == "float":
            return self.constant(values.astype(np.float32) * np.float32(0.01))
        scale = np.float32(X_SCALE) * np.float32(W_SCALE)
        scale = scale * 3 if kind == "wrong" else scale
        codes = values.astype(np.int8 if kind == "int8" else np.int32)
        scales = np.full(size, scale) if per_channel else scale
        inputs = [self.constant(codes), self.constant(scales.astype(np.float32))]
        axis = 0 if per_channel else None
        return self.node("DequantizeLinear", inputs, axis=axis)

    def model(self, output: str, **inputs: Sequence[int]) -> ModelProto:
        """The graph from these inputs (name to dims) to one output of any shape."""
        takes = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
            for name, dims in inputs.items()
        ]
        gives = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "main", takes, [gives], self.tensors)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def conv(
    act: str = "uint8",
    *,
    op: str = "Conv",
    weight: str = "int8",
    axis: int | None = 0,
    zero: int = 0,
    bias: str | None = None,
    between: Sequence[Any] = (),
    out: str | None = "same",
    out_zero: int | None = None,
    group: int = 1,
    opset: int = 17,
) -> ModelProto:
    """Conv of 4 to 4 channels; `act` and `out` "" are float, `out` None is the output."""
    b = Builder(opset)
    x = b.qdq("x", act) if act else "x"
    inputs = [x, b.weight([4, 4 // group, 3, 3], weight, axis, zero)]
    if bias:
        inputs.append(b.bias(bias, 4, axis is not None))
    y = b.node(op, inputs, "L", pads=[1] * 4, group=group)
    return _ended(b, y, between, act if out == "same" else out, out_zero, [1, 4, 8, 8])


def product(
    op: str = "MatMul",
    act: str = "uint8",
    *,
    shape: Sequence[int] = (32, 8),
    weight: str = "int8",
    axis: int | None = None,
    zero: int = 0,
    block: int = 0,
    bias: str | None = None,
    add: str | None = None,
    transposed: bool = False,
    between: Sequence[Any] = (),
    out: str | None = "same",
    out_zero: int | None = None,
    opset: int = 21,
    **attributes: Any,
) -> ModelProto:
    """MatMul or Gemm of [2, 32] by a weight; `add` is the bias of an Add behind it."""
    b = Builder(opset)
    x = b.qdq("x", act) if act else "x"
    w = b.weight(shape, weight, axis, zero, block)
    w = b.node("Transpose", [w], perm=[1, 0]) if transposed else w
    size = shape[0] if attributes.get("transB") or transposed else shape[1]
    inputs = [x, w, *([b.bias(bias, size, axis is not None)] if bias else [])]
    y = b.node(op, inputs, "L", **attributes)
    if add:
        y = b.node("Add", [y, b.bias(add, size, axis is not None)])
    width = shape[1] if attributes.get("transB") or transposed else shape[-2]
    rows = [*shape[:-2], 2]
    return _ended(b, y, between, act if out == "same" else out, out_zero, [*rows, width])


def elementwise(
    op: str,
    act: str = "uint8",
    *,
    inputs: int = 1,
    constants: Sequence[Array] = (),
    out: str | None = "same",
    opset: int = 17,
    **attributes: Any,
) -> ModelProto:
    """An operator on quantized values of [1, 4, 8, 8]."""
    b = Builder(opset)
    names = [f"x{index}" for index in range(inputs)]
    read = [b.qdq(name, act) for name in names]
    read += [b.constant(array) for array in constants]
    y = b.node(op, read, "L", **attributes)
    y = _ended_value(b, y, (), act if out == "same" else out, None)
    return b.model(y, **{name: [1, 4, 8, 8] for name in names})


def _ended(
    b: Builder,
    value: str,
    between: Sequence[Any],
    out: str | None,
    zero: int | None,
    dims: list[int],
) -> ModelProto:
    return b.model(_ended_value(b, value, between, out, zero), x=dims)


def _ended_value(
    b: Builder, value: str, between: Sequence[Any], out: str | None, zero: int | None
) -> str:
    """Operators by name, clamps as (lo, hi), then Q and DQ where `out` is a type."""
    for item in between:
        if isinstance(item, str):
            value = b.node(item, [value])
        else:
            limits = [b.constant(np.float32(limit)) for limit in item]
            value = b.node("Clip", [value, *limits])
    return b.qdq(value, out, zero=zero) if out else value
