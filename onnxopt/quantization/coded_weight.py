"""Constants of codes behind a DequantizeLinear, as the weight or bias of a layer."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt
from onnx import NodeProto, helper

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError, Floats, Layout, replace_constant
from onnxopt.quantization.parameters import (
    IntegerWeight,
    Parameters,
    insert,
    integer_weight,
    missing,
)
from onnxopt.quantization.scaling import scaled
from onnxopt.weights import Array


class CodedWeight(msgspec.Struct, frozen=True):
    """Input `slot` of `node`, which is made of integers and never expanded to floats."""

    graph: GraphView
    node: NodeProto
    slot: int
    coded: IntegerWeight

    @classmethod
    def of(cls, graph: GraphView, node: NodeProto, slot: int) -> CodedWeight:
        """Raises DeclinedError where that input is no such constant."""
        coded = integer_weight(graph, node.input[slot])
        if attributes.get(coded.node, "output_dtype", 0):
            raise DeclinedError("the values are of another type than the scale")
        return cls(graph, node, slot, coded)

    @property
    def dims(self) -> tuple[int, ...]:
        """Its shape."""
        return self.coded.shape

    @property
    def data_type(self) -> int:
        """The type of its values."""
        return int(helper.np_dtype_to_tensor_dtype(self.coded.parameters.scale.dtype))

    @property
    def is_shared(self) -> bool:
        """Never in the way: other scales are no copy, and other codes are checked."""
        return False

    def values(self) -> Array:
        """Its values, as DequantizeLinear computes them."""
        return self.coded.parameters.dequantized(self._codes())

    def scale(
        self, edit: Edit, factor: Floats, layout: Layout, *, may_move_zero: bool
    ) -> None:
        """Let it be `factor`, which broadcasts to the layout, times what it was."""
        if factor.shape[:2] != (1, 1):
            group_by_group = (*layout.shape[:2], *factor.shape[2:])
            factor = np.broadcast_to(factor, group_by_group)
        merged = (factor.shape[0] * factor.shape[1], *factor.shape[2:])
        self.scale_by(edit, factor.reshape(merged), may_move_zero=may_move_zero)

    def scale_by(
        self, edit: Edit, factor: Floats, *, may_move_zero: bool = False
    ) -> None:
        """Let it be `factor`, which broadcasts to it, times what it was."""
        made, codes = scaled(
            self.coded.parameters,
            self.dims,
            factor,
            self._codes,
            may_move_zero=may_move_zero,
        )
        self._write(edit, made, codes)

    def take(self, edit: Edit, indices: npt.NDArray[np.int64], axis: int) -> None:
        """Let it be these indices along `axis`, in this order."""
        made = self.coded.parameters
        own = None if made.is_per_tensor else made.axis % len(self.dims)
        if made.is_blocked and own == axis:
            raise DeclinedError("the blocks of the weight run along the axis")
        if made.is_blocked or own == axis:
            parts = (
                np.take(part, indices, axis if made.is_blocked else 0)
                for part in (made.scale, made.zero_point)
            )
            scale, zero = parts
            made = msgspec.structs.replace(made, scale=scale, zero_point=zero)
        self._write(edit, made, np.take(self._codes(), indices, axis))

    def _codes(self) -> Array:
        return self.graph.model.weights.array(self.coded.codes)

    # ---- writing ----

    def _write(self, edit: Edit, made: Parameters, codes: Array | None) -> None:
        reason = missing(self.graph, made)
        if reason is not None:
            raise DeclinedError(reason)
        node = self.coded.node
        is_own = self.graph.only_use(node.output[0]) is not None
        name = node.input[0]
        if codes is not None:
            if not is_own or self.graph.only_use_everywhere(name) is None:
                raise DeclinedError(f"others read the codes {name!r}, too")
            edit.set_weight(name, codes)
        if is_own:
            self._write_parameters(edit, made)
        else:
            value = insert(edit, "DequantizeLinear", name, made)
            edit.set_input(self.node, self.slot, value)

    def _write_parameters(self, edit: Edit, made: Parameters) -> None:
        """Give the DequantizeLinear, which nothing else reads, other parameters."""
        node, old = self.coded.node, self.coded.parameters
        scale = made.scale
        tensor = self.graph.weight(node.input[1])
        if tensor is not None and scale.size == math.prod(tensor.dims) == 1:
            scale = scale.reshape(tuple(tensor.dims))  # as that of the zero point
        replace_constant(self.graph, edit, node, 1, scale)
        has_zero = len(node.input) > 2 and node.input[2]
        if has_zero or made.zero_point.any():
            same = made.zero_point.shape == old.zero_point.shape
            if not (same and (made.zero_point == old.zero_point).all()):
                replace_constant(self.graph, edit, node, 2, made.zero_point)
        if made.is_per_tensor != old.is_per_tensor or made.axis != old.axis:
            edit.set_attribute(node, "axis", None if made.is_per_tensor else made.axis)


def dequantized_constant(graph: GraphView, name: str) -> Array:
    """The constant called `name`, made by DequantizeLinear; raises DeclinedError."""
    coded = integer_weight(graph, name)
    return coded.parameters.dequantized(graph.model.weights.array(coded.codes))
