"""What is certain of shapes that ONNX's inference leaves open.

A Reshape to computed sizes: exporters write Concat of a size that was read and literals,
through casts that inference does not follow. The rank is certain all the same, and so
are the literals above 0. Where a single size is left, the number of elements gives it.

A pool or ConvTranspose whose extent is in doubt (see `onnxopt.doubt`): the batch and the
channels are not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onnx import (
    GraphProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from onnxopt import attributes
from onnxopt.graph import constant_value
from onnxopt.weights import elements, place

Dims = list[int | str | None]
IsReliable = Callable[[str], bool]
MAX_RANK = 16


def declare(bare: GraphProto, inferred: GraphProto, is_reliable: IsReliable) -> bool:
    """Declare what is certain in `bare`, a copy for inference; whether that is news.

    `inferred` is what inference made of `bare`; `is_reliable` says whether equal symbols
    mean equal sizes.
    """
    graph = _Graph.of(bare, inferred, is_reliable)
    found = False
    for node in bare.node:
        rule = _RULES.get(node.op_type)
        dims = rule(graph, node) if rule is not None else None
        kind = graph.kinds.get(node.input[0]) if node.input else None
        if dims is None or not kind or dims == graph.dims(node.output[0]):
            continue
        if not _says_more(dims, graph.dims(node.output[0])):
            continue
        made = helper.make_tensor_value_info(node.output[0], kind, dims)
        if node.output[0] in graph.declared:
            graph.declared[node.output[0]].CopyFrom(made)
        else:
            bare.value_info.append(made)
        found = True
    for ours, theirs in _inner(bare, inferred):
        found |= declare(ours, theirs, is_reliable)
    return found


def _says_more(dims: Dims, known: Dims | None) -> bool:
    if known is None:
        return True
    return any(
        isinstance(new, int) and not isinstance(old, int)
        for new, old in zip(dims, known, strict=True)
    )


def _inner(
    bare: GraphProto, inferred: GraphProto
) -> Iterator[tuple[GraphProto, GraphProto]]:
    for ours, theirs in zip(bare.node, inferred.node, strict=True):
        if ours.attribute:
            pairs = (attributes.subgraphs(ours), attributes.subgraphs(theirs))
            for (_, one), (_, two) in zip(*pairs, strict=True):
                yield one, two


@dataclass(frozen=True)
class _Graph:
    """One graph of a copy for inference, and what inference found in it."""

    makers: dict[str, NodeProto]
    constants: dict[str, TensorProto]
    values: dict[str, ValueInfoProto]
    kinds: dict[str, int]
    declared: dict[str, ValueInfoProto]
    is_reliable: IsReliable

    @classmethod
    def of(
        cls, bare: GraphProto, inferred: GraphProto, is_reliable: IsReliable
    ) -> _Graph:
        """The indices of both."""
        values = [*inferred.value_info, *inferred.output, *inferred.input]
        return cls(
            makers={name: node for node in bare.node for name in node.output if name},
            constants={tensor.name: tensor for tensor in bare.initializer},
            values={value.name: value for value in values},
            kinds={v.name: v.type.tensor_type.elem_type for v in values},
            declared={value.name: value for value in bare.value_info},
            is_reliable=is_reliable,
        )

    def dims(self, name: str) -> Dims | None:
        """What inference found; None where it found no rank."""
        if name in self.constants:
            return list(self.constants[name].dims)
        value = self.values.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        return [
            dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
            for dim in value.type.tensor_type.shape.dim
        ]

    def literal(self, name: str) -> list[int] | None:
        """A small constant vector of int64."""
        tensor = self.constants.get(name)
        if tensor is None and name in self.makers:
            tensor = constant_value(self.makers[name])
        if tensor is None or tensor.data_type != TensorProto.INT64:
            return None
        if place(tensor) is not None or elements(tensor) > MAX_RANK:
            return None
        return [int(size) for size in numpy_helper.to_array(tensor).reshape(-1)]


def _reshape(graph: _Graph, node: NodeProto) -> Dims | None:
    dims = graph.dims(node.output[0]) or _by_literals(graph, node)
    before = graph.dims(node.input[0])
    return dims if dims is None or before is None else _solved(graph, before, dims)


def _by_literals(graph: _Graph, node: NodeProto) -> Dims | None:
    maker = graph.makers.get(node.input[1]) if len(node.input) > 1 else None
    if maker is None or maker.op_type != "Concat" or maker.domain not in ("", "ai.onnx"):
        return None
    dims: Dims = []
    for name in maker.input:
        literal = graph.literal(name)
        if literal is not None:
            dims += [size if size > 0 else None for size in literal]
        elif graph.dims(name) == [1]:
            dims.append(None)
        else:
            return None
    return dims


def _solved(graph: _Graph, before: Dims, after: Dims) -> Dims:
    """`after`, with the one size that is not known from the number of elements."""
    symbols = Counter(size for size in before if isinstance(size, str))
    known = [s for s in after if isinstance(s, int) or (s is not None and s in symbols)]
    if None in before or len(known) != len(after) - 1:
        return after
    if Counter(size for size in known if isinstance(size, str)) != symbols:
        return after
    if not all(graph.is_reliable(symbol) for symbol in symbols):
        return after
    total = math.prod(size for size in before if isinstance(size, int))
    part = math.prod(size for size in known if isinstance(size, int))
    if not part or total % part:
        return after
    return [
        size if isinstance(size, int) or size in symbols else total // part
        for size in after
    ]


def _pool(graph: _Graph, node: NodeProto) -> Dims | None:
    before = graph.dims(node.input[0])
    return None if before is None else [*before[:2], *[None] * len(before[2:])]


def _conv_transpose(graph: _Graph, node: NodeProto) -> Dims | None:
    before, weight = graph.dims(node.input[0]), graph.dims(node.input[1])
    if before is None or weight is None or not isinstance(weight[1], int):
        return None
    channels = weight[1] * int(attributes.get(node, "group", 1))
    return [before[0], channels, *[None] * len(before[2:])]


_RULES: dict[str, Callable[[_Graph, NodeProto], Dims | None]] = {
    "Reshape": _reshape,
    "DoubtfulAveragePool": _pool,
    "DoubtfulConvTranspose": _conv_transpose,
    "DoubtfulLpPool": _pool,
    "DoubtfulMaxPool": _pool,
}
