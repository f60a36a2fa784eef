"""fake-quant: QuantizeLinear and DequantizeLinear for quantizers in single steps.

    v = Div(x, s)
    r = Round(v)
    a = Add(r, z)                    q = QuantizeLinear(x, s, z)
    c = Clip(a, 0, 255)         ->   y = DequantizeLinear(q, s, z)
    d = Sub(c, z)
    y = Mul(d, s)

1. Any chain in float32 of Add, Sub, Mul and Div by constants, Clip, Relu, Min, Max and
   Casts around one Round, Floor or Ceil, or a straight-through estimator of Round: the
   forms of torch, of LSQ, PACT and Keras. Per tensor, or per channel along one axis.
2. It is not the form that decides but the function: for every finite float32 the result
   is the same, which is proven level by level (see `onnxopt.quantization.staircase`).
   x * (1 / s) qualifies where s is a power of two; a zero point that is added before
   rounding moves ties, and does not. NaN becomes a code (the least, in ONNX Runtime).
3. Not before a Conv, ConvTranspose or Gemm whose weight is a constant of floats: it would
   remain a float layer, or worse: ONNX Runtime quantizes such weights on its own, per
   tensor, where a QuantizeLinear follows.
4. 256 levels are an 8-bit code; 65536 and 16 need opset 21; fewer than 256 become an
   8-bit code behind a Clip, per tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from onnx import NodeProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.quantization.chains import ROUNDING, Chain, Link, links_around
from onnxopt.quantization.recognition import Found, Proof, UnboundedError, find
from onnxopt.quantization.staircase import Floats32, composed, is_equal
from onnxopt.quantization.written_out import MOVES
from onnxopt.report import Guarantee

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
_PASSED = (*MOVES, "MaxPool", "Slice")


class FakeQuant(Pass):
    """Replace quantizers in single steps by QuantizeLinear and DequantizeLinear."""

    name: ClassVar[str] = "fake-quant"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at what surrounds each operator that rounds."""
        for node in graph.visit(self, ROUNDING):
            rewrite(graph, node, is_equal)


def rewrite(graph: GraphView, node: NodeProto, proof: Proof) -> None:
    """Write the quantizer around `node`, which rounds, if it is one by `proof`."""
    try:
        found = _recognize(graph, node, proof)
    except DeclinedError as declined:
        graph.skip(node, str(declined))
        return
    if found is not None:
        chain, nodes = found
        reader = float_layer(graph, chain.end.output[0])
        if reader is not None:
            label = graph.label(reader)
            graph.skip(node, f"ONNX Runtime might quantize the float weight of {label}")
            return
        edit = Edit(graph, chain.end)
        nodes.write(edit, chain.value)
        graph.apply(edit, "it computes what QuantizeLinear and DequantizeLinear do")


def float_layer(graph: GraphView, name: str) -> NodeProto | None:
    """A layer of constant float weights that reads `name`, maybe moved."""
    for use in graph.uses(name):
        op = graph.op(use.node)
        if op in _WEIGHTED and use.index == 0:
            if graph.weight(use.node.input[1]) is not None:
                return use.node
        elif op in _PASSED:
            found = float_layer(graph, use.node.output[0])
            if found is not None:
                return found
    return None


def _recognize(
    graph: GraphView, node: NodeProto, proof: Proof
) -> tuple[Chain, Found] | None:
    """The shortest chain around `node` that is a quantizer; None where none may be.

    Raises DeclinedError where one looks like it.
    """
    reason = None
    for chain in _candidates(*links_around(graph, node)):
        try:
            axis = chain.channel_axis(graph)
            divisors, factor = _scales(chain)
            _check_channels(chain, factor)
            found = find(graph, composed(chain.steps()), divisors, factor, axis, proof)
        except UnboundedError:
            continue
        except DeclinedError as declined:
            reason = str(declined)
            continue
        if chain.is_closed(graph):
            return chain, found
        reason = "its inner values have other readers"
    if reason:
        raise DeclinedError(reason)
    return None


def _candidates(before: list[Link], middle: Link, after: list[Link]) -> Iterator[Chain]:
    """What scales, rounds, and scales again, the shortest first."""
    ends = range(1, len(after) + 1)
    starts = range(len(before) - 1, -1, -1)
    pairs = sorted(
        ((start, end) for start in starts for end in ends),
        key=lambda pair: pair[1] - pair[0],
    )
    for start, end in pairs:
        scales = any(link.is_scale for link in before[start:])
        if scales and any(link.is_scale for link in after[:end]):
            yield Chain((*before[start:], middle, *after[:end]))


def _scales(chain: Chain) -> tuple[list[Floats32], Floats32]:
    """What the scales of QuantizeLinear may be, and that of DequantizeLinear."""
    links = list(chain.links)
    middle = next(i for i, link in enumerate(links) if link.rounds)
    factor = _product(links[middle:], "Mul")
    divisor = _product(links[:middle], "Div")
    if np.array_equal(divisor, factor):
        return [factor], factor
    return [factor, divisor], factor


def _check_channels(chain: Chain, factor: Floats32) -> None:
    """Raise DeclinedError where an offset or a bound varies and the scale does not."""
    sizes = {array.size for link in chain.links for array in link.constants}
    if factor.size == 1 and sizes - {1}:
        raise DeclinedError("its constants vary by channel, and its scale does not")


def _product(links: list[Link], kind: str) -> Floats32:
    """Of the constants of `kind`, divided by those of the opposite one."""
    scales = [link for link in links if link.is_scale]
    if len(scales) == 1 and scales[0].kind == kind:
        return np.asarray(scales[0].constants[0].reshape(-1, 1), np.float32)
    product = np.ones((1, 1))
    with np.errstate(all="ignore"):
        for link in scales:
            constant = link.constants[0].reshape(-1, 1).astype(np.float64)
            product = product * constant if link.kind == kind else product / constant
        rounded = product.astype(np.float32)
    if not (np.isfinite(rounded).all() and (rounded > 0).all()):
        raise DeclinedError("its scale is no number of float32")
    return np.asarray(rounded)
