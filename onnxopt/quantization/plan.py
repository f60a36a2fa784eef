"""Which values and weights of a graph a static int8 layout quantizes, before any range.

A *layer* is a Conv, Gemm or MatMul that ONNX Runtime runs on integers once what it reads
and, where it needs that, what it makes are quantized. Layers are chosen first. What lies
between them follows where all that it reads is quantized anyway and its result is, too:
an elementwise operator then runs on codes, and one that only moves data shares the
parameters of what it moves.

Nothing is quantized for its own sake: a pair of QuantizeLinear and DequantizeLinear
around an operator that has no integer kernel costs time and accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import msgspec
from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.graph import GraphView
from onnxopt.operands import clip_bounds

LAYERS = ("Conv", "Gemm", "MatMul")
FOLLOWERS = ("Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid")
"""Elementwise and pooling operators with an integer kernel."""
MOVES = (
    *("Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose"),
    *("Unsqueeze", "DepthToSpace", "SpaceToDepth"),
)
"""Operators whose result has no value that their first input lacks."""


class Exclusion(msgspec.Struct, frozen=True):
    """What a user keeps in float: `name`, `re:expression` or `type:Operator`."""

    patterns: tuple[str, ...] = ()

    def covers(self, graph: GraphView, node: NodeProto) -> bool:
        """Whether one of the patterns fits the node's name, its type or an output."""
        names = (graph.label(node), *node.output)
        for pattern in self.patterns:
            kind, colon, text = pattern.partition(":")
            if colon and kind == "type":
                if graph.op(node) == text:
                    return True
            elif colon and kind == "re":
                if any(re.fullmatch(text, name) for name in names):
                    return True
            elif pattern in names:
                return True
        return False


class Layer(msgspec.Struct, frozen=True, eq=False):
    """A layer to be quantized.

    Its first input is computed, and its second the weight, whose output channels lie
    along `axis`. `end`: the value that is quantized after it, its activation included;
    None where the layer gives floats.
    """

    node: NodeProto
    axis: int
    end: str | None


class Plan(msgspec.Struct):
    """The layers, and the values of the main graph that get a Q-DQ pair.

    `root` maps each value to the one whose parameters it shares, itself in most cases.
    """

    layers: list[Layer]
    root: dict[str, str]
    skipped: list[tuple[NodeProto, str]]

    @property
    def roots(self) -> list[str]:
        """The values that have parameters of their own."""
        return list(dict.fromkeys(self.root.values()))


def plan(graph: GraphView, keep: Exclusion | None = None) -> Plan:
    """The plan for `graph`, its constants folded; what `keep` covers stays float."""
    made = Plan([], {}, [])
    keep = keep or Exclusion()
    for node in graph.nodes(LAYERS):
        if keep.covers(graph, node):
            made.skipped.append((node, "it is excluded"))
            continue
        found = _layer(graph, node)
        if isinstance(found, str):
            made.skipped.append((node, found))
        else:
            made.layers.append(found)
    wanted = dict.fromkeys(_ends(made.layers))
    _follow(graph, wanted, keep)
    made.root = _shared(graph, wanted)
    return made


def _ends(layers: Iterable[Layer]) -> Iterator[str]:
    for layer in layers:
        yield layer.node.input[0]
        if layer.end is not None:
            yield layer.end


def _layer(graph: GraphView, node: NodeProto) -> Layer | str:
    """The node as a layer, or why it is none."""
    if attributes.has_references(node):
        return "it differs from call to call"
    if graph.dtype(node.output[0]) != TensorProto.FLOAT:
        return "it is not of float32"
    match node.op_type:
        case "Conv":
            return _conv(graph, node)
        case "Gemm":
            return _gemm(graph, node)
    return _matmul(graph, node)


def _conv(graph: GraphView, node: NodeProto) -> Layer | str:
    weight = graph.weight(node.input[1])
    if weight is None:
        return "its weight is computed"
    if len(node.input) > 2 and node.input[2] and graph.weight(node.input[2]) is None:
        return "its bias is computed"
    return Layer(node, 0, activated(graph, node))


def _gemm(graph: GraphView, node: NodeProto) -> Layer | str:
    weight = graph.weight(node.input[1])
    if weight is None:
        return "its weight is computed"
    if attributes.get(node, "transA", 0):
        return "its input is transposed"
    plain = attributes.get(node, "alpha", 1.0) == 1.0
    if not plain or attributes.get(node, "beta", 1.0) != 1.0:
        return "its alpha or beta is not 1"
    axis = 0 if attributes.get(node, "transB", 0) else 1
    if len(node.input) > 2 and node.input[2]:
        bias = graph.weight(node.input[2])
        if bias is None:
            return "its bias is computed"
        if list(bias.dims) != [weight.dims[axis]]:
            return "its bias is not one per output channel"
    # with a bias of int32 it gives floats, where nothing behind it wants codes
    return Layer(node, axis, None)


def _matmul(graph: GraphView, node: NodeProto) -> Layer | str:
    right = graph.weight(node.input[1])
    if right is None:
        if graph.weight(node.input[0]) is not None:
            return "its weight is on the left"
        return "both of its operands are computed"
    if len(right.dims) != 2:
        return f"its weight is of rank {len(right.dims)}"
    # without a QuantizeLinear behind it, the kernel gives floats and adds the bias
    return Layer(node, 1, None)


def activated(graph: GraphView, node: NodeProto) -> str:
    """The value behind `node` and the Relu or Clip that its kernel can do, if any."""
    made = str(node.output[0])
    use = graph.only_use(made)
    if use is None or use.view is not graph or use.index != 0:
        return made
    bounds = clip_bounds(graph, use.node) if graph.op(use.node) == "Clip" else None
    absorbed = graph.op(use.node) == "Relu" or (bounds is not None and bounds[0] == 0)
    return str(use.node.output[0]) if absorbed else made


def _follow(graph: GraphView, wanted: dict[str, None], keep: Exclusion) -> None:
    """Add what lies between quantized values and can run on codes.

    A follower is taken where all that it reads is quantized, and its result then is: it
    may be read by a layer, or by another follower.
    """
    for node in graph.nodes((*FOLLOWERS, *MOVES)):
        end = activated(graph, node) if graph.op(node) == "Add" else node.output[0]
        if keep.covers(graph, node) or not _reads_codes(graph, node, wanted):
            continue
        if graph.op(node) in MOVES or _leads_back(graph, end, wanted):
            wanted[end] = None
            for name in _operands(graph, node):
                wanted.setdefault(name, None)


def _operands(graph: GraphView, node: NodeProto) -> Sequence[str]:
    """The values that are data to the node, constants of arithmetic included."""
    if graph.op(node) in ("Add", "Mul"):
        return list(node.input)
    return list(node.input[:1])


def _reads_codes(graph: GraphView, node: NodeProto, wanted: dict[str, None]) -> bool:
    names = _operands(graph, node)
    computed = [name for name in names if graph.weight(name) is None]
    return bool(computed) and all(name in wanted for name in computed)


def _leads_back(graph: GraphView, name: str, wanted: dict[str, None]) -> bool:
    """Whether who reads a value works on codes: a layer, a follower or a move."""
    if name in wanted:
        return True
    uses = [use for use in graph.uses(name) if use.view is graph]
    return bool(uses) and all(
        graph.op(use.node) in (*FOLLOWERS, *MOVES, "Relu") for use in uses
    )


def _shared(graph: GraphView, wanted: dict[str, None]) -> dict[str, str]:
    """Each value with the one whose parameters it takes over."""
    root: dict[str, str] = {}
    for name in wanted:
        found = name
        maker = graph.producer(found)
        while maker is not None and graph.op(maker) in MOVES and maker.input[0] in wanted:
            found = maker.input[0]
            maker = graph.producer(found)
        root[name] = found
    return root
