"""Shape: reading the size of an axis keeps all of it, reading that of others does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.demand import NOTHING, Demand
from onnxopt.channels.groups import Link
from onnxopt.channels.rules.rule import Rule

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class Size(Rule):
    """Nothing of the values is read; the sizes of some axes are."""

    drops_inputs = True

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """No element is needed."""
        return [NOTHING]

    def link(self, link: Link) -> None:
        """A bar, unless every reader picks the sizes of other axes."""
        a, node = link.analysis, link.node
        rank = a.rank(node.input[0])
        if rank is None or any(axis in _read(a, node, rank) for axis in link.axes):
            link.bar("its size is read")


def _read(a: Analysis, node: NodeProto, rank: int) -> set[int]:
    """The axes whose sizes something reads."""
    first = attributes.get(node, "start", 0)
    axes = list(range(rank))[slice(first, attributes.get(node, "end"))]
    return {axes[place] for place in _places(a, node.output[0], len(axes))}


def _places(a: Analysis, name: str, size: int) -> set[int]:
    """Which elements of vector `name` something reads."""
    graph = a.graph
    if graph.is_output(name) or graph.is_pinned(name):
        return set(range(size))
    found: set[int] = set()
    for use in graph.uses(name):
        if use.view is not graph or use.index != 0:
            return set(range(size))
        if graph.op(use.node) in ("Cast", "Identity"):
            found |= _places(a, use.node.output[0], size)
            continue
        picked = _picked(a, use.node, size)
        found.update(range(size) if picked is None else picked)
    return found


def _picked(a: Analysis, node: NodeProto, size: int) -> list[int] | None:
    """Which elements of a vector of `size` a Gather or Slice reads."""
    from onnxopt.channels.rules.join import Slice  # the one way to read its inputs

    match a.graph.op(node):
        case "Gather":
            index = a.array(node.input[1])
            if index is None:
                return None
            return [int(item) % size for item in np.reshape(index, -1)]
        case "Slice":
            ranges = Slice().ranges(a, node)
            if ranges is None:
                return None
            low, high = ranges.get(0, (0, size))
            return None if high < 0 else list(range(low, high))
    return None
