"""Operators that move elements and compute nothing: Reshape and its kin, Transpose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Mask, fact
from onnxopt.channels.groups import Ints, Link, Restriction, Slot
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules.rule import Rule
from onnxopt.graph import Shape
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""Axes of the input and of the output that hold the same elements in the same order."""


def blocks(before: Shape, after: Shape) -> list[Block] | None:
    """How a change of shape pairs axes: the finest blocks; None where that is open.

    An axis of unknown size pairs with one of unknown size when the known sizes on both
    sides of it leave no other choice.
    """
    left = [axis for axis, size in enumerate(before) if not isinstance(size, int)]
    right = [axis for axis, size in enumerate(after) if not isinstance(size, int)]
    if len(left) != len(right):
        return None
    if len(left) > 1 and [before[axis] for axis in left] != [
        after[axis] for axis in right
    ]:
        return None
    found: list[Block] = []
    start = (0, 0)
    for ends in zip([*left, len(before)], [*right, len(after)], strict=True):
        part = _known_blocks(before, after, start, ends)
        if part is None:
            return None
        found += part
        if ends != (len(before), len(after)):
            found.append(((ends[0],), (ends[1],)))
        start = (ends[0] + 1, ends[1] + 1)
    return found


def _known_blocks(
    before: Shape, after: Shape, start: tuple[int, int], ends: tuple[int, int]
) -> list[Block] | None:
    """The same between two axes of unknown size."""
    sizes = [int(size or 0) for size in before[start[0] : ends[0]]]
    others = [int(size or 0) for size in after[start[1] : ends[1]]]
    if math.prod(sizes) != math.prod(others) or 0 in (*sizes, *others):
        return None
    found: list[Block] = []
    one = two = 0
    while one < len(sizes) or two < len(others):
        first, second = one, two
        mine = theirs = 1
        if one < len(sizes):
            mine, one = sizes[one], one + 1
        if two < len(others):
            theirs, two = others[two], two + 1
        while mine != theirs:
            if mine < theirs:
                mine, one = mine * sizes[one], one + 1
            else:
                theirs, two = theirs * others[two], two + 1
        found.append(
            (
                tuple(range(start[0] + first, start[0] + one)),
                tuple(range(start[1] + second, start[1] + two)),
            )
        )
    return found


def _turned(array: Array, before: Shape, after: Shape, parts: Sequence[Block]) -> Array:
    """An array in the form of a fact about `before`, as one about `after`."""
    shape = list(array.shape)
    for mine, _ in parts:
        if any(shape[axis] > 1 for axis in mine):
            for axis in mine:
                size = before[axis]
                shape[axis] = size if isinstance(size, int) else shape[axis]
    spread = np.broadcast_to(array, shape)
    made = [1] * len(after)
    for mine, theirs in parts:
        if any(shape[axis] > 1 for axis in mine):
            for axis in theirs:
                size = after[axis]
                made[axis] = size if isinstance(size, int) else shape[mine[0]]
    return spread.reshape(made)


class Reshape(Rule):
    """Reshape, Flatten, Squeeze and Unsqueeze, as what they do to the shape."""

    def _shapes(self, a: Analysis, node: NodeProto) -> tuple[Shape, Shape] | None:
        before, after = a.shape(node.input[0]), a.shape(node.output[0])
        return None if before is None or after is None else (before, after)

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The fact in its new shape."""
        given, shapes = a.fact(node.input[0]), self._shapes(a, node)
        if given is None or shapes is None or (parts := blocks(*shapes)) is None:
            return [None]
        return [
            fact(
                _turned(given.kinds, *shapes, parts),
                _turned(given.values, *shapes, parts),
            )
        ]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """The demand in the old shape."""
        wanted: list[Demand] = [None] * len(node.input)
        shapes, need = self._shapes(a, node), needs[0]
        if need is None or not need.ndim or shapes is None:
            return wanted
        parts = blocks(*shapes)
        if parts is None:
            return wanted
        swapped = [(theirs, mine) for mine, theirs in parts]
        wanted[0] = _turned(need, shapes[1], shapes[0], swapped)
        return wanted

    def keeps_rows(self, link: Link) -> bool:
        """Elements stay in their order, whatever is left of each row."""
        return True

    def link(self, link: Link) -> None:
        """Pair the atoms of the block that the slot lies in; correct literal sizes."""
        node = link.node
        shapes = self._shapes(link.analysis, node)
        parts = blocks(*shapes) if shapes is not None else None
        if shapes is None or parts is None or (link.side == "in" and link.index > 0):
            link.bar("how it pairs the axes is not known")
            return
        flip = link.side == "out"
        before, after = shapes[::-1] if flip else shapes
        for mine, theirs in ((b, a) if flip else (a, b) for a, b in parts):
            if set(link.axes) <= set(mine):
                self._tie(link, before, after, mine, theirs)
                break
        else:
            link.bar("it regroups the axes")
            return
        if node.op_type == "Reshape":
            patch = ShapePatch(link)
            if patch.reason:
                link.bar(patch.reason)
            else:
                link.patch(patch)
        elif node.op_type == "Squeeze" and not _names_axes(node):
            link.restrict(_two_left(link.slot), "a Squeeze would take an axis of one")

    def _tie(
        self,
        link: Link,
        before: Shape,
        after: Shape,
        mine: Sequence[int],
        theirs: Sequence[int],
    ) -> None:
        """Element k of the block is an atom here and an atom there."""
        side = link.opposite
        known = link.groups.slots_of(link.name(side, 0))
        axes = [axis for axis in theirs if after[axis] != 1]
        covered = [s for s in known if set(s.axes) <= set(theirs)]
        if covered:  # it came from there: by an axis that spans the block or a part
            axes = [axis for slot in covered for axis in slot.axes]
        elif len(axes) > 1 and link.groups.defer(link):
            return  # a layer may tell which of these axes holds the channels
        axes = axes or list(theirs[:1])
        if not axes:
            link.bar("nothing is left of the axis")
            return
        sizes = [int(before[axis] or 1) for axis in mine]
        others = [int(after[axis] or 1) for axis in theirs]
        count = math.prod(sizes)
        here = _atoms(np.arange(count), sizes, [mine.index(axis) for axis in link.axes])
        there = _atoms(np.arange(count), others, [theirs.index(a) for a in sorted(axes)])
        pairs = np.unique(np.stack([here, there]), axis=1)
        link.tie(side, 0, sorted(axes), here=pairs[0], there=pairs[1])


def _names_axes(node: NodeProto) -> bool:
    given = len(node.input) > 1 and bool(node.input[1])
    return given or attributes.find(node, "axes") is not None


def _two_left(slot: Slot) -> Restriction:
    """Hold one more back where a single channel would be left."""

    def check(removed: Mask) -> Ints:
        gone = slot.of(removed)
        if len(gone) < 2 or (~gone).sum() != 1:
            return np.zeros(0, np.int64)
        return slot.atoms[gone][:1]

    return check


def _atoms(flat: Array, sizes: Sequence[int], places: Sequence[int]) -> Array:
    """The atom of each element of a block, for a slot of some of the block's axes."""
    index = np.unravel_index(flat, sizes)
    chosen = [index[place] for place in places]
    return np.ravel_multi_index(chosen, [sizes[place] for place in places])


class ShapePatch:
    """Corrects the literal sizes in the shape that a Reshape is given.

    `reason` says why it cannot, where it cannot.
    """

    def __init__(self, link: Link) -> None:
        self.node, self.link = link.node, link
        self.reason = ""
        a = link.analysis
        self._parts: list[tuple[NodeProto, int, int]] = []
        self._literals = self._read(a, self.node, 1)
        after, before = a.shape(self.node.output[0]), a.shape(self.node.input[0])
        assert after is not None
        assert before is not None
        if self._literals is None or len(self._literals) != len(after):
            self.reason = "its shape is computed"
            return
        for axis, literal in enumerate(self._literals):
            size = after[axis]
            if literal is None and isinstance(size, int) and size != 1:
                self.reason = "a size in its shape is computed"
            if literal == 0 and attributes.get(self.node, "allowzero", 0):
                self.reason = "its shape has a zero"
            if literal == 0 and axis < len(before) and before[axis] != size:
                self.reason = "it copies a size from another axis"

    def _read(self, a: Analysis, node: NodeProto, slot: int) -> list[int | None] | None:
        """The sizes, None for each that is computed; where each literal stands."""
        name = node.input[slot]
        array = a.graph.array(name)
        if array is not None:
            self._parts += [(node, slot, place) for place in range(array.size)]
            return [int(size) for size in array.reshape(-1).tolist()]
        maker = a.graph.producer(name)
        if maker is None or a.graph.op(maker) != "Concat":
            return None
        found: list[int | None] = []
        for index, part in enumerate(maker.input):
            if a.graph.weight(part) is not None:
                found += self._read(a, maker, index) or []
            elif a.size(part, 0) == 1:
                self._parts.append((maker, index, -1))
                found.append(None)
            else:
                return None
        return found

    def __call__(self, removal: Removal) -> None:
        """Write the new sizes of the axes of the slots of the output."""
        name = self.node.output[0]
        assert self._literals is not None
        for slot in removal.groups.slots_of(name):
            kept = removal.kept(slot)
            if kept.all() or not kept.any():
                continue
            for axis, size in removal.sizes(slot).items():
                if (self._literals[axis] or 0) > 0:
                    self._write(removal, axis, size)

    def _write(self, removal: Removal, axis: int, size: int) -> None:
        node, index, place = self._parts[axis]

        def change(array: Array) -> Array:
            made = array.copy()
            made.reshape(-1)[place] = size
            return made

        removal.change(node, index, change)


class Transpose(Rule):
    """A permutation of the axes."""

    def _perm(self, a: Analysis, node: NodeProto) -> list[int] | None:
        rank = a.rank(node.input[0])
        if rank is None:
            return None
        perm: list[int] = attributes.get(node, "perm", list(reversed(range(rank))))
        return perm

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The fact, permuted."""
        given, perm = a.fact(node.input[0]), self._perm(a, node)
        if given is None or perm is None:
            return [None]
        return [fact(given.kinds.transpose(perm), given.values.transpose(perm))]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """The demand, permuted back."""
        perm, need = self._perm(a, node), needs[0]
        if perm is None or need is None or not need.ndim:
            return [need if need is None or perm is not None else None]
        return [need.transpose(np.argsort(perm).tolist())]

    def keeps_rows(self, link: Link) -> bool:
        """Where the rows are still the rows."""
        perm = self._perm(link.analysis, link.node) or []
        turn = perm.index if link.side == "in" else perm.__getitem__
        return turn(link.axes[0]) < turn(link.axes[1])

    def link(self, link: Link) -> None:
        """Each axis at its new place."""
        perm = self._perm(link.analysis, link.node)
        if perm is None:
            link.bar("its rank is not known")
        elif link.side == "in":
            link.tie("out", 0, [perm.index(axis) for axis in link.axes])
        else:
            link.tie("in", 0, [perm[axis] for axis in link.axes])
