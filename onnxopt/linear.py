"""What passes over linear layers share: constants of floats, and why a rewrite declines.

The layers themselves are in `layer.py`.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.weights import Array

Floats = npt.NDArray[np.float64]
FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}
"""The types that are computed in, and how NumPy names them."""
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class DeclinedError(Exception):
    """The rewrite does not apply; the text is the reason."""


class Layout(msgspec.Struct, frozen=True):
    """A weight as [group, ...]: which axes of that are output and input channels."""

    shape: tuple[int, ...]
    outputs: int
    inputs: int


def constant(graph: GraphView, name: str) -> TensorProto:
    """The constant of floats called `name`, unread."""
    tensor = graph.weight(name)
    if tensor is None:
        raise DeclinedError(f"{name!r} is not a constant")
    if tensor.data_type not in FLOATS:
        kind = TensorProto.DataType.Name(tensor.data_type).lower()
        raise DeclinedError(f"{name!r} is of type {kind}")
    return tensor


def floats(graph: GraphView, name: str) -> Floats:
    """The constant called `name`, in float64."""
    return graph.model.weights.array(constant(graph, name)).astype(np.float64)


def is_padded(conv: NodeProto) -> bool:
    """Whether a Conv may read anything besides its input."""
    auto = str(attributes.get(conv, "auto_pad", "NOTSET"))
    if auto not in ("NOTSET", "VALID"):
        return True
    return auto == "NOTSET" and any(attributes.get(conv, "pads", ()))


def smallest_normal(dtype: Any) -> float:
    """The least positive number of a float type that has all its digits."""
    finfo: Any = ml_dtypes.finfo
    return float(finfo(dtype).smallest_normal)


def is_finite(array: Array) -> bool:
    """Without an array of truths beside it: NaN and infinity reach the extremes."""
    with np.errstate(all="ignore"):
        return not array.size or bool(np.isfinite([array.min(), array.max()]).all())


def set_constant(
    graph: GraphView, edit: Edit, node: NodeProto, slot: int, array: Array
) -> None:
    """Give input `slot` of a node a new value; raises DeclinedError where not finite."""
    if not is_finite(array):
        raise DeclinedError(f"a folded weight does not fit into {array.dtype}")
    replace_constant(graph, edit, node, slot, array)


def replace_constant(
    graph: GraphView, edit: Edit, node: NodeProto, slot: int, array: Array
) -> None:
    """Give input `slot` of a node a new value, under its old name if it can."""
    name = node.input[slot] if slot < len(node.input) else ""
    is_own = name and graph.only_use_everywhere(name) is not None
    if is_own and graph.weight(name) is not None:
        edit.set_weight(name, array)
    else:
        hint = name or f"{node.input[1]}_bias"
        edit.set_input(node, slot, edit.add_weight(array, hint))


def per_channel(values: Floats, channels: int, axis: int, rank: int) -> Floats | None:
    """`values` as one per channel, if they vary along that axis at most.

    `axis` and `rank` are those of what they are combined with, whose shape stays.
    """
    if values.ndim > rank or values.size not in (1, channels):
        return None
    along = values.ndim - (rank - axis)
    if values.size > 1 and (along < 0 or values.shape[along] != channels):
        return None
    return np.broadcast_to(values.reshape(-1), (channels,)).astype(np.float64)
