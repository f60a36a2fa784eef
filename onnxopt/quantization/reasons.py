"""Why a layer that looks quantized runs in float on ONNX Runtime's CPU provider.

The facts were found with ONNX Runtime 1.32, each by a model of one layer; tests run these
models. docs/quantization.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from onnx import NodeProto, TensorProto

from onnxopt import attributes, processor
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.quantization.layers import Site, dequantizer, dtype_name, is_eight_bits
from onnxopt.quantization.parameters import Parameters, parameters
from onnxopt.weights import Array

CPU = "CPUExecutionProvider"
STATIC_KERNELS = frozenset(
    {
        *("Conv", "MatMul", "Gemm", "Add", "Mul", "AveragePool", "GlobalAveragePool"),
        *("Sigmoid", "Softmax", "LeakyRelu", "Where"),
    }
)
"""Operators that fuse with the DQ before and the Q behind them."""
WITHOUT_OUTPUT = frozenset({"MatMul", "Gemm"})
"""Those of them that need no Q behind them."""
BIAS_TOLERANCE = 0.01
"""By how much, as a fraction, Conv's bias scale may differ from x_scale * w_scale."""
_CLOSE = 1e-5
_LEAST_BLOCK = 16


class Because(NamedTuple):
    """Why it is float, and whether another layout of the same types would fuse."""

    reason: str
    fusable: bool


def why_float(site: Site, provider: str = CPU) -> Because:
    """The first fact that stands against an integer kernel for a layer that has none."""
    layer = site.layer
    if _is_float(site):
        return Because("it is not quantized", False)
    if provider != CPU:
        return Because(f"{provider} has no integer kernel for it", False)
    told = _no_kernel(site)
    if told:
        return Because(told, False)
    if layer.activation.mode == "none":
        told, fusable = _weight_only(site)
        return Because(told, fusable)
    told = _bad_weight(site) or _bad_bias(site) or _bad_output(site) or _shared(site)
    return Because(told or "for a reason that is not known", True)


def is_integer(site: Site) -> bool:
    """Whether nothing is known to stand against an integer kernel on the CPU."""
    layer = site.layer
    if _is_float(site) or _no_kernel(site) or layer.activation.mode != "static":
        return False
    if layer.activation.granularity != "per-tensor":
        return False
    return not (
        _bad_weight(site) or _bad_bias(site) or _bad_output(site) or _shared(site)
    )


def lacks_output(site: Site) -> bool:
    """Whether a layer would fuse if its result were quantized, and only then.

    No other Q reads the result, nor that of a Relu or Clip behind it.
    """
    layer, view = site.layer, site.view
    if _is_float(site) or _no_kernel(site) or layer.activation.mode != "static":
        return False
    if layer.activation.granularity != "per-tensor" or layer.output is not None:
        return False
    if _bad_weight(site) or _bad_bias(site):
        return False
    others = [use for use in view.uses(site.node.output[0]) if use.view is view]
    if any(view.op(use.node) == "QuantizeLinear" for use in others):
        return False
    return _bad_output(site) is not None


def worth_knowing(site: Site) -> Iterator[str]:
    """What is wrong or slow about a layer that runs in integers."""
    layer = site.layer
    if layer.op in ("Conv", "Gemm") and _off_axis(site) is not None:
        yield (
            f"WRONG RESULTS: {_off_axis(site)}, and ONNX Runtime takes them for those of "
            "the output channels"
        )
    if layer.op in ("Gemm", "MatMul") and (_bias_error(site) or 0) > _CLOSE:
        yield (
            "WRONG RESULTS: ONNX Runtime reads its int32 bias at x_scale * w_scale, "
            "which is not the bias's scale"
        )
    if layer.activation.granularity == "per-channel":
        yield "FAILS: the kernel takes no scale per channel for activations"
    is_int8 = layer.activation.mode == "static" and layer.activation.dtype == "int8"
    if is_int8 and processor.is_x86():
        yield "int8 activations are slower than uint8 on x86"
    weight = layer.weight
    if weight is None or layer.activation.mode == "none":
        return
    if weight.dtype == "uint8":
        yield "uint8 weights are slower than int8"
    elif weight.zero_point != 0 and weight.scheme == "asymmetric":
        yield "a zero point of weights that is not 0 takes time"


# ---- what no layout changes ----


def _is_float(site: Site) -> bool:
    weight = site.layer.weight
    quantized = weight is not None and weight.state != "float"
    return not quantized and not any(site.inputs)


def _no_kernel(site: Site) -> str | None:
    """Operators, types and operands for which there is no integer kernel."""
    layer, weight = site.layer, site.layer.weight
    if weight is not None and weight.state == "integer" and not any(site.weights):
        return (
            f"its {weight.dtype} weight becomes float by arithmetic, at load or in each "
            "run: DequantizeLinear would keep it"
        )
    if layer.op not in STATIC_KERNELS:
        return f"ONNX Runtime has no integer kernel for {layer.op} with Q and DQ"
    if weight is not None and weight.state == "float":
        return "its weight is float"
    if weight is None and layer.activation.mode == "none":
        return "of what it reads, some is not quantized"
    if layer.activation.mode == "none":
        return None
    if not is_eight_bits(layer.activation.dtype):
        return (
            f"its activations are {layer.activation.dtype}: integer kernels take 8 bits"
        )
    if weight is not None and not is_eight_bits(weight.dtype):
        return (
            f"its weight is {weight.dtype}: with quantized activations only 8 bits fuse"
        )
    if layer.output is not None and not is_eight_bits(layer.output):
        return f"its result becomes {layer.output}: integer kernels give 8 bits"
    return _no_scale(site) or _float_operand(site)


def _no_scale(site: Site) -> str | None:
    """Scales of another type than float32."""
    for node in (*site.inputs, *site.weights):
        if node is None:
            continue
        kind = site.view.dtype(node.input[1])
        if kind not in (None, TensorProto.FLOAT):
            return f"its scales are {dtype_name(kind)}: integer kernels take float32"
    return None


def _float_operand(site: Site) -> str | None:
    """A constant float beside quantized values."""
    if site.layer.op not in _BINARY:
        return None
    for name in site.node.input[:2]:
        tensor = site.view.weight(name)
        if tensor is not None and tensor.data_type == TensorProto.FLOAT:
            return f"its operand {name!r} is a float constant"
    return None


_BINARY = ("Add", "Mul")


# ---- int8 ----


def _shared(site: Site) -> str | None:
    """int8 codes that have several readers, before the layer or behind it.

    ONNX Runtime makes uint8 of int8 on x86, and leaves those as they are.
    """
    slots = [slot for slot in site.slots.activations if slot < len(site.node.input)]
    values = [site.node.input[slot] for slot in slots]
    quantizer = _quantizer_behind(site)
    if quantizer is not None:
        values += [use.node.output[0] for use in site.view.uses(quantizer.output[0])]
    for name in values:
        if has_shared_codes(site.view, name):
            return f"the int8 codes of {name!r} have several readers: uint8 would fuse"
    return None


def has_shared_codes(view: GraphView, name: str) -> bool:
    """Whether the int8 codes that `name` is made of go to several places."""
    maker = dequantizer(view, name)
    if maker is None or view.dtype(maker.input[0]) != TensorProto.INT8:
        return False
    shared = 0
    for use in view.uses(maker.input[0]):
        made = use.node.output[0]
        shared += len(view.uses(made)) + view.is_output(made)
    return shared > 1 or len(view.uses(name)) > 1


# ---- weights alone ----


def _weight_only(site: Site) -> Because:
    """A quantized weight that meets float activations: MatMulNBits, or nothing."""
    layer, node = site.layer, site.node
    weight = _weight_parameters(site)
    if layer.op not in ("MatMul", "Gemm"):
        return Because("its activations are not quantized", False)
    if site.slots.weights != (1,):
        return Because("its weight is the first operand", False)
    if attributes.get(node, "transB", 0) or attributes.get(node, "transA", 0):
        return Because("its integer weight alone fuses where nothing is transposed", True)
    if _quantizer_behind(site) is not None:
        return Because("Q behind it, and no Q and DQ before its other operand", True)
    if weight is None:
        return Because("the scales of its weight are not constants", False)
    axis = weight.axis % 2
    if weight.is_blocked:
        size = weight.block_size
        if axis != 0:
            return Because("its blocks do not run along the inputs (axis 0)", True)
        if size < _LEAST_BLOCK or size & (size - 1):
            told = f"its blocks of {size} are no power of two from 16 on"
            return Because(told, True)
    elif not weight.is_per_tensor and axis != 1:
        return Because("its scales vary along the inputs (axis 0)", True)
    return Because("for a reason that is not known", True)


# ---- weights ----


def _bad_weight(site: Site) -> str | None:
    layer = site.layer
    if layer.weight is None:
        return None
    if layer.weight.granularity == "blocked":
        return "its weight is quantized in blocks: with quantized activations none fuse"
    if site.weights and site.weights[0] is None:
        return "its weight does not come from DequantizeLinear"
    off = _off_axis(site)
    if off is None:
        return None
    if layer.op == "MatMul" and len(site.view.shape(site.node.input[1]) or ()) > 2:
        return "its weight has rank 3 or more, and scales per channel"
    return f"{off}, not along its output channels"


def _off_axis(site: Site) -> str | None:
    """Along which other axis than that of the output channels the scales vary."""
    made = _weight_parameters(site)
    if made is None or made.is_per_tensor or made.is_blocked:
        return None
    name = site.node.input[site.slots.weights[0]]
    axis, rank = _axis(site.view, name, made), len(site.view.shape(name) or ())
    if axis is None or not rank or axis == _output_axis(site, rank):
        return None
    return f"the scales of its weight vary along axis {axis}"


def _output_axis(site: Site, rank: int) -> int | None:
    """The axis of the layer's weight that holds output channels."""
    match site.layer.op:
        case "Conv":
            return 0
        case "Gemm":
            return 0 if attributes.get(site.node, "transB", 0) else 1
    return 1 if rank == 2 else None


def _axis(view: GraphView, name: str, made: Parameters) -> int | None:
    """The axis of value `name` along which the scales of the DQ behind it vary."""
    perms: list[list[int]] = []
    while True:
        home = view.home(name)
        maker = home.producer(name) if home is not None else None
        if home is None or maker is None:
            return None
        if home.op(maker) == "DequantizeLinear":
            rank = len(home.shape(maker.input[0]) or ())
            break
        if home.op(maker) != "Transpose":
            return None
        perms.append(list(attributes.get(maker, "perm", [])))
        view, name = home, maker.input[0]
    if not rank:
        return None
    axis = made.axis % rank
    for perm in reversed(perms):
        axis = (perm or list(reversed(range(rank)))).index(axis)
    return axis


def _weight_parameters(site: Site) -> Parameters | None:
    node = site.weights[0] if site.weights else None
    return _parameters(site.view, node)


def _parameters(view: GraphView, node: NodeProto | None) -> Parameters | None:
    if node is None:
        return None
    try:
        return parameters(view.home(node.output[0]) or view, node)
    except DeclinedError:
        return None


# ---- bias ----


def _bad_bias(site: Site) -> str | None:
    slot = site.slots.bias
    if slot is None or slot >= len(site.node.input) or not site.node.input[slot]:
        return None
    if site.layer.op == "Gemm" and attributes.get(site.node, "beta", 1.0) != 1.0:
        return "its beta is not 1"
    name = site.node.input[slot]
    maker = dequantizer(site.view, name)
    if maker is None:
        if site.view.weight(name) is None:
            return "its bias is not a constant"
        return None
    kind = site.view.dtype(maker.input[0])
    if kind != TensorProto.INT32:
        return f"its bias is {dtype_name(kind or 0)}: int32 or float32 fuse"
    made = _parameters(site.view, maker)
    if made is not None and np.any(made.zero_point):
        return "the zero point of its bias is not 0"
    error = _bias_error(site)
    if site.layer.op == "Conv" and error is not None and error > BIAS_TOLERANCE:
        return "the scale of its bias is not x_scale * w_scale"
    return None


def _bias_error(site: Site) -> float | None:
    """By how much the bias's scale is off, as a fraction; None where none is known."""
    maker = _bias_dequantizer(site)
    bias, weight = _parameters(site.view, maker), _weight_parameters(site)
    inputs = _parameters(site.view, site.inputs[0] if site.inputs else None)
    if bias is None or weight is None or inputs is None:
        return None
    if weight.is_blocked or 1 < weight.scale.size != bias.scale.size > 1:
        return None
    wanted: Array = inputs.scale.astype(np.float64) * weight.scale.astype(np.float64)
    return float(np.max(np.abs(bias.scale.astype(np.float64) / wanted - 1)))


def _bias_dequantizer(site: Site) -> NodeProto | None:
    """What makes the bias: an input, or the other operand of an Add behind a MatMul."""
    slot = site.slots.bias
    if slot is not None and slot < len(site.node.input) and site.node.input[slot]:
        return dequantizer(site.view, site.node.input[slot])
    use = site.view.only_use(site.node.output[0])
    if site.layer.op != "MatMul" or use is None or site.view.op(use.node) != "Add":
        return None
    other = dequantizer(site.view, use.node.input[1 - use.index])
    if other is None or site.view.dtype(other.input[0]) != TensorProto.INT32:
        return None
    return other


# ---- what comes behind ----


def _bad_output(site: Site) -> str | None:
    """What stands between the layer and a Q, or that there is none."""
    view, name = site.view, site.node.output[0]
    only = view.only_use(name)
    if only is None:
        return _shared_output(site)
    if view.op(only.node) == "QuantizeLinear":
        return None
    what = view.label(only.node)
    behind = view.only_use(only.node.output[0]) if only.node.output else None
    is_quantized = behind is not None and view.op(behind.node) == "QuantizeLinear"
    if is_quantized and view.op(only.node) in ("Relu", "Clip"):
        return f"{what} stands before the Q, whose range does not imply it"
    if site.layer.op in WITHOUT_OUTPUT:
        return _float_bias(site)
    if is_quantized:
        return f"{what} stands between it and the Q"
    return f"no Q behind it ({what} reads its result)"


def _shared_output(site: Site) -> str | None:
    """What is wrong with a result that goes to several places, or out of the graph."""
    view, name = site.view, site.node.output[0]
    quantizes = any(view.op(use.node) == "QuantizeLinear" for use in view.uses(name))
    if not quantizes and site.layer.op in WITHOUT_OUTPUT:
        return _float_bias(site)
    if view.is_output(name):
        return "its result is an output of the graph, too"
    return "its result is read by several nodes, and not by one Q"


def _float_bias(site: Site) -> str | None:
    """A float bias of a layer without a Q behind it, that of an Add included."""
    view, slot = site.view, site.slots.bias
    if site.layer.op == "Gemm":
        given = slot is not None and slot < len(site.node.input) and site.node.input[slot]
        is_float = given and dequantizer(view, given) is None
        return "its bias is float, and no Q is behind it" if is_float else None
    only = view.only_use(site.node.output[0])
    if only is None or view.op(only.node) != "Add":
        return None
    return "it becomes a Gemm with the float bias of Add, and no Q is behind that"


def _quantizer_behind(site: Site) -> NodeProto | None:
    """The Q that alone reads the layer's result."""
    use = site.view.only_use(site.node.output[0])
    is_quantizer = use is not None and site.view.op(use.node) == "QuantizeLinear"
    return use.node if use is not None and is_quantizer else None
