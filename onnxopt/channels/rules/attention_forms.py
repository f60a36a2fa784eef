"""What the inputs of fused attentions look like, where several operators agree on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnx import NodeProto

from onnxopt.channels.groups import Side
from onnxopt.channels.rules.attention import HEADS
from onnxopt.channels.rules.views import Part, axes_of

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


def is_given(node: NodeProto, slots: Sequence[int]) -> bool:
    """Whether any of these inputs is there."""
    return any(slot < len(node.input) and bool(node.input[slot]) for slot in slots)


def is_made(node: NodeProto, slots: Sequence[int]) -> bool:
    """Whether any of these outputs is there."""
    return any(slot < len(node.output) and bool(node.output[slot]) for slot in slots)


def flat(a: Analysis, node: NodeProto, role: str, side: Side, index: int) -> Part | None:
    """[batch, sequence, heads * dims]; None where the last size is not known."""
    name = (node.input if side == "in" else node.output)[index]
    sizes = axes_of(a, name, (2,)) if a.rank(name) == 3 else None
    return None if sizes is None else Part(role, side, index, (2,), sizes)


def apart(a: Analysis, node: NodeProto, role: str, side: Side, index: int) -> Part | None:
    """[batch, heads, sequence, dims]; None where heads or dims are not known."""
    name = (node.input if side == "in" else node.output)[index]
    sizes = axes_of(a, name, (1, 3)) if a.rank(name) == 4 else None
    return None if sizes is None else Part(role, side, index, (1, 3), sizes)


def heads_and_dims(part: Part, heads: int) -> tuple[int, int] | None:
    """Both sizes of a part; `heads` are those of a flat one. None where that is wrong."""
    if len(part.dims) == 2:
        return part.dims
    size = part.dims[0]
    return (heads, size // heads) if heads > 0 and size % heads == 0 else None


def masks_beside(
    a: Analysis, node: NodeProto, slots: Sequence[tuple[int, int]], heads: int
) -> tuple[Part, ...] | str:
    """The parts of masks and the like that have heads of their own.

    `slots`: inputs, and the axis of heads, counted from the back; one of size 1 serves
    all. A reason where that is not known.
    """
    found = []
    for index, axis in slots:
        if not is_given(node, [index]):
            continue
        rank = a.rank(node.input[index])
        if rank is None:
            return "the rank of its mask is not known"
        size = a.size(node.input[index], axis) if rank >= -axis else 1
        if size is None or size not in (1, heads):
            return "how many heads its mask has is not known"
        if size > 1:
            found.append(Part(HEADS, "in", index, (rank + axis,), (size,)))
    return tuple(found)


def caches(
    node: NodeProto, side: Side, roles: Sequence[tuple[int, str, int, int]]
) -> tuple[Part, ...]:
    """Those of keys and values that are there: [batch, heads, sequence, dims].

    `roles`: input or output, what it holds, and its heads and dims.
    """
    there = is_given if side == "in" else is_made
    return tuple(
        Part(role, side, index, (1, 3), (heads, dims))
        for index, role, heads, dims in roles
        if there(node, [index])
    )


def weights_made(node: NodeProto, index: int, heads: int) -> tuple[Part, ...]:
    """The output [batch, heads, sequence, keys], if it is there."""
    is_there = is_made(node, [index])
    return (Part(HEADS, "out", index, (1,), (heads,)),) if is_there else ()
