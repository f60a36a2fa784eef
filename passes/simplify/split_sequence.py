"""split-sequence: a sequence that is only made to be taken apart is a Split.

    s = SplitToSequence(x, [2, 3])
    a = SequenceAt(s, 0)
    b = SequenceAt(s, 1)        ->    a, b = Split(x, [2, 3])

1. All readers are SequenceAt with constant indices, and nothing else depends on the
   sequence.
2. How many parts there are is known: by the lengths that are given, or by the size of the
   axis and the length of all parts.
3. `keepdims` counts only where no lengths are given: parts of length 1 without the axis
   are left as they are.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee


class SplitSequence(Pass):
    """Let SplitToSequence and SequenceAt be a Split."""

    name: ClassVar[str] = "split-sequence"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at every SplitToSequence."""
        for node in graph.visit(self, ("SplitToSequence",)):
            lengths = _lengths(graph, node)
            if lengths is None or graph.opset() < 13:
                graph.skip(node, "how many parts it makes is not known")
                continue
            readers = _readers(graph, node, len(lengths))
            if readers is None:
                graph.skip(node, "its sequence is not only taken apart")
                continue
            _rewrite(graph, node, lengths, readers)


def _lengths(graph: GraphView, node: NodeProto) -> list[int] | None:
    """The length of each part, which must fill the axis; None where not known."""
    shape = graph.shape(node.input[0])
    if shape is None or len(node.input) < 2 or not node.input[1]:
        return None
    size = shape[int(attributes.get(node, "axis", 0))]
    given = graph.array(node.input[1])
    if given is None or (given <= 0).any():
        return None
    if given.ndim == 1:
        return [int(length) for length in given]
    if not isinstance(size, int) or size == 0:
        return None
    length = int(given)
    whole, rest = divmod(size, length)
    return [length] * whole + ([rest] if rest else [])


def _readers(
    graph: GraphView, node: NodeProto, count: int
) -> list[tuple[NodeProto, int]] | None:
    """Each SequenceAt with the part that it takes; None where there are other readers."""
    name = node.output[0]
    if graph.is_output(name) or graph.is_pinned(name):
        return None
    found = []
    for use in graph.uses(name):
        if use.view is not graph or graph.op(use.node) != "SequenceAt" or use.index:
            return None
        index = graph.array(use.node.input[1])
        if index is None or index.size != 1 or not -count <= index.item() < count:
            return None
        found.append((use.node, int(index.item()) % count))
    return found


def _rewrite(
    graph: GraphView,
    node: NodeProto,
    lengths: list[int],
    readers: list[tuple[NodeProto, int]],
) -> None:
    edit = Edit(graph, node, max_growth=256)
    parts = edit.add_weight(np.array(lengths, np.int64), f"{node.output[0]}_lengths")
    axis = int(attributes.get(node, "axis", 0))
    made = edit.insert("Split", [node.input[0], parts], len(lengths), {"axis": axis})
    for reader, part in readers:
        edit.bypass(reader, {reader.output[0]: made[part]})
    edit.erase(node)
    graph.apply(edit, "the sequence is only made to be taken apart")
