"""Arithmetic with a constant: y = factor * x + shift, written as Mul, Div, Add or Sub."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from onnx import NodeProto, helper

from onnxopt import axes
from onnxopt.graph import GraphView
from onnxopt.linear import FLOATS, Floats
from onnxopt.weights import tensor_bytes

AFFINE = ("Add", "Sub", "Mul", "Div")
MAX_BYTES = 1 << 20
"""Larger constants are data and not factors."""


class Affine(msgspec.Struct, frozen=True):
    """A node that combines a value with a constant of floats."""

    node: NodeProto
    value: str
    constant: str
    dims: tuple[int, ...]
    data_type: int

    @classmethod
    def of(cls, graph: GraphView, node: NodeProto) -> Affine | None:
        """What `node`, one of AFFINE, does with a constant; None where it does not.

        x / constant is, and constant / x is not.
        """
        if graph.opset() < 7 or len(node.input) != 2:
            return None  # older ones broadcast by attribute
        for slot in (1,) if node.op_type == "Div" else (1, 0):
            tensor = graph.weight(node.input[slot])
            if tensor is None:
                continue
            other = node.input[1 - slot]
            if tensor.data_type not in FLOATS or tensor_bytes(tensor) > MAX_BYTES:
                return None
            if graph.weight(other) is not None:
                return None  # a constant itself, which others fold
            dims = tuple(tensor.dims)
            return cls(node, other, node.input[slot], dims, tensor.data_type)
        return None

    @property
    def slot(self) -> int:
        """Which input of the node is the constant."""
        return 1 if self.node.input[1] == self.constant else 0

    @property
    def size(self) -> int:
        """The number of elements of the constant."""
        return math.prod(self.dims)

    @property
    def is_scale(self) -> bool:
        """Whether it multiplies, and adds nothing."""
        return self.node.op_type in ("Mul", "Div")

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the constant, of the value and of the result."""
        return helper.tensor_dtype_to_np_dtype(self.data_type)

    def terms(self, graph: GraphView) -> tuple[Floats, Floats]:
        """Factor and shift, in float64, as the constant broadcasts; not all is finite."""
        array = graph.array(self.constant)
        assert array is not None
        values: npt.NDArray[np.float64] = array.astype(np.float64)
        one, zero = np.ones_like(values), np.zeros_like(values)
        with np.errstate(all="ignore"):
            match self.node.op_type:
                case "Mul":
                    return values, zero
                case "Div":
                    divisors = np.where(np.isfinite(values), values, np.nan)
                    return one / divisors, zero  # x / inf is no multiple of x
                case "Add":
                    return one, values
        return (one, -values) if self.slot == 1 else (-one, values)

    def keeps_shape(self, graph: GraphView) -> bool:
        """Whether the constant is sure not to broadcast the value."""
        return axes.leaves_shape(self.dims, graph.shape(self.value))
