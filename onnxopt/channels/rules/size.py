"""Shape: reading the size of an axis keeps all of it, reading that of others does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.demand import NOTHING, Demand
from onnxopt.channels.groups import Link
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules.rule import Rule
from onnxopt.weights import Array

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
        """Who reads the size reads a constant from then on; a bar where that cannot be.

        So 1 / sqrt(d) stays what it was. Where a shape is made from the size, the one
        who uses that shape has a patch of its own, or a bar.
        """
        a, node = link.analysis, link.node
        rank = a.rank(node.input[0])
        if rank is not None and not set(link.axes) & _read(a, node, rank):
            return
        found = None if rank is None else _readers(a, node, rank, set(link.axes))
        if found is None:
            link.bar("its size is read")
        else:
            link.patch(_Freeze(found), link.axes)


class _Freeze:
    """Puts constants in the place of values that are made from sizes alone."""

    def __init__(self, values: Mapping[str, Array]) -> None:
        self.values = values

    def __call__(self, removal: Removal) -> None:
        for name, array in self.values.items():
            if removal.graph.producer(name) is not None:
                made = removal.edit.add_weight(array, name)
                removal.edit.redirect(name, made)


def _readers(
    a: Analysis, node: NodeProto, rank: int, axes: set[int]
) -> dict[str, Array] | None:
    """What is picked of the sizes of `axes`, and its value; None where that is open."""
    graph, name = a.graph, node.output[0]
    sizes = [a.size(node.input[0], axis) for axis in range(rank)]
    first = attributes.get(node, "start", 0)
    window = list(range(rank))[slice(first, attributes.get(node, "end"))]
    if graph.is_output(name) or graph.is_pinned(name):
        return None
    found: dict[str, Array] = {}
    for use in graph.uses(name):
        made = use.node.output[0]
        if use.view is not graph or use.index != 0 or graph.is_output(made):
            return None
        places = _picked(a, use.node, len(window))
        if places is None or graph.is_pinned(made):
            return None
        picked = [sizes[window[place]] for place in places]
        if axes & {window[place] for place in places}:
            dims = a.shape(made)
            known = [size for size in picked if size is not None]
            if dims is None or len(known) < len(picked):
                return None
            shape = [size for size in dims if isinstance(size, int)]
            found[made] = np.array(known, np.int64).reshape(shape)
    return found


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
            span = ranges.get(0, range(size))
            return None if span is None else list(span)
    return None
