"""Axes and permutations: the arithmetic of passes that move data.

A permutation is what Transpose calls `perm`: axis i of the output is axis perm[i] of the
input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from onnx import NodeProto

from onnxopt import attributes

if TYPE_CHECKING:
    from onnxopt.graph import GraphView, Shape

Perm = tuple[int, ...]


def normalize(axes: Iterable[int], rank: int) -> list[int] | None:
    """The axes counted from the front; None where one is out of range or comes twice."""
    found = [axis + rank if axis < 0 else axis for axis in axes]
    if len(set(found)) != len(found) or any(not 0 <= axis < rank for axis in found):
        return None
    return found


def is_permutation(perm: Sequence[int]) -> bool:
    """Whether it names every axis once."""
    return sorted(perm) == list(range(len(perm)))


def is_identity(perm: Sequence[int]) -> bool:
    """Whether it leaves every axis in its place."""
    return list(perm) == list(range(len(perm)))


def inverse(perm: Sequence[int]) -> Perm:
    """What undoes `perm`."""
    return tuple(perm.index(axis) for axis in range(len(perm)))


def compose(first: Sequence[int], second: Sequence[int]) -> Perm:
    """One permutation for `first` and then `second`."""
    return tuple(first[axis] for axis in second)


def permuted(items: Sequence[int], perm: Sequence[int]) -> list[int]:
    """What belongs to each axis, in the order that `perm` makes of it."""
    return [items[axis] for axis in perm]


def without(perm: Sequence[int], axes: Iterable[int]) -> Perm:
    """What is left of `perm` where these axes of its output are taken out."""
    gone = set(axes)
    kept = [source for axis, source in enumerate(perm) if axis not in gone]
    return tuple(sorted(kept).index(source) for source in kept)


def perm_of(graph: GraphView, node: NodeProto) -> Perm | None:
    """The permutation of a Transpose; None where it is not known.

    Without the attribute all axes are reversed, and their number has to be known.
    """
    perm = attributes.get(node, "perm")
    if perm is None:
        shape = graph.shape(node.input[0])
        return None if shape is None else tuple(reversed(range(len(shape))))
    return tuple(perm) if is_permutation(perm) else None


def axes_of(graph: GraphView, node: NodeProto, slot: int = 1) -> list[int] | None:
    """The constant axes of a node, an attribute or input `slot`; None where not given."""
    axes = attributes.get(node, "axes")
    if axes is None and len(node.input) > slot and node.input[slot]:
        array = graph.array(node.input[slot])
        axes = None if array is None else array.reshape(-1).tolist()
    return None if axes is None else [int(axis) for axis in axes]


def leaves_shape(dims: Shape | None, shape: Shape | None) -> bool:
    """Whether what has `dims` is sure not to broadcast what has `shape`."""
    if dims == ():
        return True
    if dims is None or shape is None or len(dims) > len(shape):
        return False
    aligned = shape[len(shape) - len(dims) :]
    return all(dim in (1, size) for dim, size in zip(dims, aligned, strict=True))


def moves_only_ones(perm: Sequence[int], shape: Shape) -> bool:
    """Whether elements keep their order: all axes that change theirs have size 1."""
    kept = [axis for axis in perm if shape[axis] != 1]
    return kept == sorted(kept)


def perm_between(source: Shape, target: Shape) -> Perm | None:
    """The Transpose that does what a Reshape from `source` to `target` does.

    None where there is none: it may only move axes of size 1. One pair of dims may be
    open: as the number of elements stays, they are equal.
    """
    if len(source) != len(target):
        return None
    ours = [axis for axis, dim in enumerate(source) if dim != 1]
    theirs = [axis for axis, dim in enumerate(target) if dim != 1]
    if len(ours) != len(theirs):
        return None
    pairs = [(source[a], target[b]) for a, b in zip(ours, theirs, strict=True)]
    open_pairs = [(a, b) for a, b in pairs if a != b]
    if any(isinstance(a, int) and isinstance(b, int) for a, b in open_pairs):
        return None
    sizes = [a for a, b in pairs if a == b]
    if len(open_pairs) > 1 or (open_pairs and not all_positive(sizes)):
        return None
    ones = iter(axis for axis, dim in enumerate(source) if dim == 1)
    rest = iter(ours)
    return tuple(next(ones) if dim == 1 else next(rest) for dim in target)


def all_positive(dims: Iterable[int | str | None]) -> bool:
    """Whether all dims are known and none is 0."""
    return all(isinstance(dim, int) and dim > 0 for dim in dims)
