"""The weight of a linear layer: a constant of floats, or of codes (`coded_weight.py`).

Its numbers are read only when they change; those of floats are then computed in float64
and rounded once to their type.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import (
    DeclinedError,
    Floats,
    Layout,
    constant,
    set_constant,
    smallest_normal,
)
from onnxopt.quantization.coded_weight import CodedWeight
from onnxopt.weights import Array


class Weight(Protocol):
    """What a layer multiplies by."""

    @property
    def dims(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def data_type(self) -> int:
        """The type of its values, a TensorProto.DataType."""

    @property
    def is_shared(self) -> bool:
        """Whether somebody else reads it, so that another one is a copy."""

    def values(self) -> Array:
        """Its values, as the layer reads them."""

    def scale(
        self, edit: Edit, factor: Floats, layout: Layout, *, may_move_zero: bool
    ) -> None:
        """Let it be `factor`, which broadcasts to the layout, times what it was.

        `may_move_zero`: codes may get another zero point for it.
        """

    def take(self, edit: Edit, indices: npt.NDArray[np.int64], axis: int) -> None:
        """Let it be these indices along `axis`, in this order."""


def layer_weight(graph: GraphView, node: NodeProto) -> Weight:
    """That of `node`; raises DeclinedError where it is no constant."""
    name = node.input[1]
    maker = graph.producer(name)
    if maker is not None and graph.op(maker) == "DequantizeLinear":
        return CodedWeight.of(graph, node, 1)
    return FloatWeight(graph, node, constant(graph, name))


class FloatWeight(msgspec.Struct, frozen=True):
    """A weight that is a constant of floats."""

    graph: GraphView
    node: NodeProto
    tensor: TensorProto

    @property
    def dims(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.dims)

    @property
    def data_type(self) -> int:
        """The type of its values."""
        return self.tensor.data_type

    @property
    def is_shared(self) -> bool:
        """Whether somebody else reads it."""
        return self.graph.only_use_everywhere(self.node.input[1]) is None

    def values(self) -> Array:
        """Its values."""
        return self.graph.model.weights.array(self.tensor)

    def scale(
        self, edit: Edit, factor: Floats, layout: Layout, *, may_move_zero: bool
    ) -> None:
        """Multiply, as exactly as its type can hold it."""
        weight = self.values().reshape(layout.shape)
        _check_precision(weight, factor, layout)
        made = np.empty_like(weight)
        narrow = factor.astype(weight.dtype)
        with np.errstate(all="ignore"):
            if (narrow == factor).all():
                np.multiply(weight, narrow, out=made)  # exact, and rounded once
            else:
                # in float64, rounded once; few elements at a time are that wide
                np.multiply(weight, factor, out=made, dtype=np.float64, casting="unsafe")
        set_constant(self.graph, edit, self.node, 1, made.reshape(self.dims))

    def take(self, edit: Edit, indices: npt.NDArray[np.int64], axis: int) -> None:
        """Select."""
        made = np.take(self.values(), indices, axis=axis)
        set_constant(self.graph, edit, self.node, 1, made)


def _check_precision(weight: Array, factor: Floats, layout: Layout) -> None:
    """Below the normal numbers of its type a channel would lose its last digits."""
    if not weight.size:
        return
    kept = {0, layout.outputs}
    if factor.shape[layout.inputs] > 1:
        kept.add(layout.inputs)
    axes = tuple(axis for axis in range(weight.ndim) if axis not in kept)
    with np.errstate(all="ignore"):
        high = weight.max(axis=axes, keepdims=True).astype(np.float64)
        low = weight.min(axis=axes, keepdims=True).astype(np.float64)
        peak = np.maximum(high, -low) * np.abs(factor)
        peak = peak.max(axis=layout.inputs)
    if ((peak > 0) & (peak < smallest_normal(weight.dtype))).any():
        raise DeclinedError(f"a channel would lose its precision in {weight.dtype}")
