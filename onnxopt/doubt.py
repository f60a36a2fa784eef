"""Nodes whose inferred shape may not be the one that ONNX Runtime computes.

ONNX's shape inference rounds, pads and clamps differently from ONNX Runtime in corners of
some operators. A rewrite must not rest on such a shape, so these nodes are hidden before
inference: as operators that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from onnxopt import attributes
from onnxopt.graph import constant_value
from onnxopt.weights import place

Constants = Mapping[str, TensorProto]
_EXACT_TO = {
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.DOUBLE,
    TensorProto.FLOAT,
}


def hide(nodes: Iterable[NodeProto], initializers: Constants) -> None:
    """Make the doubtful ones among `nodes`, which are a copy's, opaque to inference."""
    constants = dict(initializers)
    for node in nodes:
        value = constant_value(node)
        if value is not None:
            constants[node.output[0]] = value
        if is_doubtful(node, constants):
            node.op_type = f"Doubtful{node.op_type}"
        elif node.op_type == "Cast":
            _hide_value(node)


def is_doubtful(node: NodeProto, constants: Constants) -> bool:
    """Whether the shape that ONNX infers for a node may be wrong."""
    rule = _DOUBTS.get(node.op_type)
    if rule is None:
        return False
    return attributes.has_references(node) or rule(node, constants)


def _hide_value(node: NodeProto) -> None:
    """Inference follows the value of a shape through any Cast as if it did not narrow.

    RandomNormalLike has the same type and shape rules, and no value.
    """
    to = attributes.find(node, "to")
    if to is not None and not to.ref_attr_name and to.i not in _EXACT_TO:
        node.op_type, to.name = "RandomNormalLike", "dtype"


def _array(node: NodeProto, slot: int, constants: Constants) -> np.ndarray | None:
    name = node.input[slot] if slot < len(node.input) else ""
    tensor = constants.get(name)
    if tensor is None or place(tensor) is not None:
        return None
    return numpy_helper.to_array(tensor)


def _squeeze(node: NodeProto, constants: Constants) -> bool:
    """By an empty list of axes: inference keeps all dims, ORT squeezes all it can."""
    axes = _array(node, 1, constants)
    return axes is not None and axes.size == 0


def _slice(node: NodeProto, constants: Constants) -> bool:
    """Backwards from an end past all ends: ONNX Runtime reads it as the other end."""
    ends, steps = _array(node, 2, constants), _array(node, 4, constants)
    if ends is None or steps is None:
        return steps is not None and bool((steps < 0).any())
    return bool((steps < 0).any()) and bool((ends >= np.iinfo(np.int32).max).any())


def _pool(node: NodeProto, constants: Constants) -> bool:
    """Rounded up, the last window may lie in the padding; dilated ones under SAME_*."""
    dilated = any(size != 1 for size in attributes.get(node, "dilations", []))
    same = str(attributes.get(node, "auto_pad", "")).startswith("SAME")
    return bool(attributes.get(node, "ceil_mode", 0)) or (same and dilated)


def _conv_transpose(node: NodeProto, constants: Constants) -> bool:
    """Under SAME_*, where the output is padded or strides leave gaps between kernels."""
    if not str(attributes.get(node, "auto_pad", "")).startswith("SAME"):
        return False
    kernel = attributes.get(node, "kernel_shape", [])
    strides = attributes.get(node, "strides", []) or [1] * len(kernel)
    gaps = any(width < step for width, step in zip(kernel, strides, strict=False))
    return not kernel or gaps or any(attributes.get(node, "output_padding", []))


def _resize(node: NodeProto, constants: Constants) -> bool:
    """The size is a product in float32, rounded down: sure for multiples of 1/8 only."""
    if attributes.get(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
        return True
    if attributes.get(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return True
    given = attributes.get(node, "scales")  # an attribute before opset 9
    slots = (1, 2) if node.op_type == "Resize" else (1,)  # slot 2 from opset 11 on
    scales = [np.array(given)] if given else [_array(node, s, constants) for s in slots]
    known = [array for array in scales if array is not None and array.dtype.kind == "f"]
    return any(bool((array * 8 != np.rint(array * 8)).any()) for array in known)


_DOUBTS: dict[str, Callable[[NodeProto, Constants], bool]] = {
    "AveragePool": _pool,
    "ConvTranspose": _conv_transpose,
    "LpPool": _pool,
    "MaxPool": _pool,
    "Resize": _resize,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Upsample": _resize,
}
