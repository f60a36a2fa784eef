"""Operators that move elements and compute nothing: Reshape and its kin, Transpose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from onnxopt.symbolic.dim import Dim, arguments_of, product
from onnxopt.symbolic.fact import Dims
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
        if (sizes[one:] or [0])[0] == 1 != (others[two:] or [0])[0]:
            one += 1  # an axis of one element, that is not there on the other side
            found.append(((start[0] + first,), ()))
            continue
        if (others[two:] or [0])[0] == 1 != (sizes[one:] or [0])[0]:
            two += 1
            found.append(((), (start[1] + second,)))
            continue
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


def symbolic_blocks(before: Dims, after: Dims) -> list[Block]:
    """The same where sizes are open: a block ends where what is before it, or what is
    behind it, has the same product on both sides, as polynomials."""
    ends = _equal_products(before, after)
    for one, two in _equal_products(before[::-1], after[::-1]):
        ends.add((len(before) - one, len(after) - two))
    found: list[Block] = []
    one = two = 0
    for first, second in sorted({*ends, (len(before), len(after))}):
        if (first, second) != (one, two) and first >= one and second >= two:
            found.append((tuple(range(one, first)), tuple(range(two, second))))
            one, two = first, second
    return found


def _settled(before: Dims, after: Dims) -> Dims:
    """`before`, where the sizes that broadcast are known to be those of `after`.

    A size that others broadcast to is at least each of them; since both shapes have
    equally many elements, none is larger.
    """
    left = [axis for axis, size in enumerate(before) if not isinstance(size, int)]
    right = [size for size in after if not isinstance(size, int)]
    if len(left) != len(right):
        return before
    numbers = [product(d for d in dims if isinstance(d, int)) for dims in (before, after)]
    made = list(before)
    for axis, size in zip(left, right, strict=True):
        if before[axis] != size and size not in (
            arguments_of(before[axis], "bcast") or ()
        ):
            return before
        made[axis] = size
    return tuple(made) if numbers[0] == numbers[1] else before


def _equal_products(before: Dims, after: Dims) -> set[tuple[int, int]]:
    """How many of the first dims of both have the same product."""
    places: dict[Dim, list[int]] = {}
    for count in range(len(after) + 1):
        places.setdefault(product(after[:count]), []).append(count)
    return {
        (count, other)
        for count in range(len(before) + 1)
        for other in places.get(product(before[:count]), [])
    }


def _turned(
    array: Array, before: Shape, after: Shape, parts: Sequence[Block]
) -> Array | None:
    """An array in the form of a fact about `before`, as one about `after`.

    None where it differs along an axis that is merged with one of open size.
    """
    shape = list(array.shape)
    for mine, theirs in parts:
        if any(shape[axis] > 1 for axis in mine):
            if not theirs or not _is_known(before, mine) or not _is_known(after, theirs):
                return None
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


def _touched(parts: Sequence[Block], axes: Sequence[int]) -> list[Block]:
    """The blocks that hold `axes`; an axis of one element, with the block behind it."""
    found = [part for part in parts if set(part[0]) & set(axes)]
    rest = parts[parts.index(found[-1]) + 1 :] if found else []
    while rest and not any(theirs for _, theirs in found):
        found.append(rest[0])
        rest = rest[1:]
    return found


def _in_front(axes: Sequence[int], ones: Sequence[int]) -> list[int]:
    """The axes of one element that stand directly in front of `axes`."""
    first = min(axes, default=0)
    while first - 1 in ones:
        first -= 1
    return [*range(first, min(axes, default=0))]


def _is_known(sizes: Shape, axes: Sequence[int]) -> bool:
    return all(isinstance(sizes[axis], int) for axis in axes)


class Reshape(Rule):
    """Reshape, Flatten, Squeeze and Unsqueeze, as what they do to the shape."""

    def _blocks(
        self, a: Analysis, node: NodeProto
    ) -> tuple[Shape, Shape, list[Block]] | None:
        """The shapes before and after, and how their axes pair."""
        names = node.input[0], node.output[0]
        before, after = a.shape(names[0]), a.shape(names[1])
        if before is None or after is None:
            return None
        parts = blocks(before, after)
        if parts is None:
            dims = [a.graph.fact(name).dims for name in names]
            assert dims[0] is not None
            assert dims[1] is not None
            parts = symbolic_blocks(_settled(dims[0], dims[1]), dims[1])
        return before, after, parts

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The fact in its new shape."""
        given = a.fact(node.input[0])
        found = self._blocks(a, node) if given is not None else None
        if given is None or found is None:
            return [None]
        kinds, values = _turned(given.kinds, *found), _turned(given.values, *found)
        return [None if kinds is None or values is None else fact(kinds, values)]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """The demand in the old shape."""
        wanted: list[Demand] = [None] * len(node.input)
        need = needs[0]
        found = self._blocks(a, node) if need is not None and need.ndim else None
        if need is None or found is None:
            return wanted
        before, after, parts = found
        swapped = [(theirs, mine) for mine, theirs in parts]
        wanted[0] = _turned(need, after, before, swapped)
        return wanted

    def keeps_rows(self, link: Link) -> bool:
        """Elements stay in their order, whatever is left of each row."""
        return True

    def link(self, link: Link) -> None:
        """Pair the atoms of the blocks that the slot lies in; correct literal sizes."""
        found = self._blocks(link.analysis, link.node)
        if found is None or (link.side == "in" and link.index > 0):
            link.bar("how it pairs the axes is not known")
            return
        before, after, parts = found
        if link.side == "out":
            before, after = after, before
            parts = [(theirs, mine) for mine, theirs in parts]
        touched = _touched(parts, link.axes)
        mine = [axis for part in touched for axis in part[0]]
        theirs = [axis for part in touched for axis in part[1]]
        if not _is_known(before, mine) or not _is_known(after, theirs):
            link.bar("it regroups the axes")
        elif self._tie(link, before, after, mine, theirs):
            self._correct(link)

    def _correct(self, link: Link) -> None:
        """Let what is written of the sizes of the result follow."""
        node = link.node
        if node.op_type == "Reshape":
            correct_shape(link)
        elif node.op_type == "Squeeze" and not _names_axes(node):
            link.restrict(_two_left(link.slot), "a Squeeze would take an axis of one")

    def _tie(
        self,
        link: Link,
        before: Shape,
        after: Shape,
        mine: Sequence[int],
        theirs: Sequence[int],
    ) -> bool:
        """Element k of the block is an atom here and an atom there; False if not yet."""
        side = link.opposite
        known = link.groups.slots_of(link.name(side, 0))
        axes = [axis for axis in theirs if after[axis] != 1]
        axes = axes or list(theirs[:1])
        ones = [o for o, size in enumerate(after) if size == 1 and o not in theirs]
        reached = {*theirs, *ones}
        wanted = {*theirs, *_in_front(theirs, ones)}
        covered = [s for s in known if set(s.axes) <= reached and set(s.axes) & wanted]
        theirs = [*theirs, *ones]
        if covered:  # it came from there: by an axis that spans the block or a part
            axes = sorted({axis for slot in covered for axis in slot.axes})
        elif len(axes) > 1 and link.groups.defer(link):
            return False  # a layer may tell which of these axes holds the channels
        if not axes:
            link.bar("nothing is left of the axis")
            return False
        sizes = [int(before[axis] or 1) for axis in mine]
        others = [int(after[axis] or 1) for axis in theirs]
        count = math.prod(sizes)
        here = _atoms(np.arange(count), sizes, [mine.index(axis) for axis in link.axes])
        there = _atoms(np.arange(count), others, [theirs.index(axis) for axis in axes])
        pairs = np.unique(np.stack([here, there]), axis=1)
        return link.tie(side, 0, axes, here=pairs[0], there=pairs[1]) is not None


def correct_shape(link: Link) -> None:
    """Let the shape that a Reshape or Expand is given follow what goes of its result."""
    node = link.node
    for slot in link.groups.slots_of(node.output[0]):
        patch = ShapePatch(link.analysis, node, slot)
        if patch.reason:
            link.bar(patch.reason)
        else:
            link.groups.patch((id(node), slot.axes), slot, patch)


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


Literal = tuple[NodeProto, int, int]
"""Where a size is written: a node, the input that is the constant, a place in that."""


class ShapePatch:
    """Writes the sizes of a slot of the result into the shape that a node is given.

    Where the shape is a constant, or a Concat with constants among its parts, those
    change. Where a size is computed, a constant takes its place, by a Concat or a Where.
    `reason` says why it cannot, where it cannot.
    """

    def __init__(self, a: Analysis, node: NodeProto, slot: Slot) -> None:
        self.node, self.slot, self.reason = node, slot, ""
        found, before = _literals(a, node), a.shape(node.input[0]) or ()
        if found is None:
            value = a.graph.fact(node.input[1]).value
            if value is None or any(size is None or size == 0 for size in value.flat):
                self.reason = "its shape is computed"
            self._count = 0 if value is None else value.size
            return
        for axis, size in zip(slot.axes, slot.dims, strict=True):
            place = axis - self._missing(a, found)
            literal = found[place][0] if place >= 0 else None
            if literal == 0 and attributes.get(node, "allowzero", 0):
                self.reason = "its shape has a zero"
            if literal == 0 and axis < len(before) and before[axis] != size:
                self.reason = "it copies a size from another axis"

    def _missing(self, a: Analysis, found: Sequence[object]) -> int:
        """How many axes of the result stand before those that the shape speaks of."""
        return (a.rank(self.node.output[0]) or len(found)) - len(found)

    def __call__(self, removal: Removal) -> None:
        """Write what is left of each axis of the slot."""
        a = removal.groups.analysis
        if removal.kept(self.slot).all() or not removal.kept(self.slot).any():
            return
        found = _literals(a, self.node)
        if found is None:
            self._write_over(removal)
            return
        shift = self._missing(a, found)
        sizes: dict[int, int] = {}
        for axis, size in removal.sizes(self.slot).items():
            literal = found[axis - shift][0] if axis >= shift else -1
            if literal is None or literal > 0:  # else it follows from the others
                sizes[axis - shift] = size
        maker = found[0][1][0]
        if maker is not self.node and len(a.graph.uses(maker.output[0])) > 1:
            self._write_apart(removal, maker, found, sizes)
            return
        for place, size in sizes.items():
            literal, (node, index, where) = found[place]
            if literal is None:
                made = removal.edit.add_weight(np.array([size], np.int64), "size")
                removal.edit.set_input(node, index, made)
            else:
                removal.change(node, index, _Put(where, size))

    def _write_over(self, removal: Removal) -> None:
        """Let a Where put the new sizes in the place of computed ones."""
        sizes = np.zeros(self._count, np.int64)
        for axis, size in removal.sizes(self.slot).items():
            place = axis - (removal.groups.analysis.rank(self.node.output[0]) or 0)
            if place >= -self._count:
                sizes[place] = size
        names = [
            removal.edit.add_weight(sizes > 0, "is_known"),
            removal.edit.add_weight(sizes, "sizes"),
            self.node.input[1],
        ]
        removal.edit.set_input(self.node, 1, removal.edit.insert("Where", names)[0])

    def _write_apart(
        self,
        removal: Removal,
        maker: NodeProto,
        found: Sequence[tuple[int | None, Literal]],
        sizes: Mapping[int, int],
    ) -> None:
        """Through a Concat of its own: others read the shape as it is."""
        parts = list(maker.input)
        arrays: dict[int, Array] = {}
        for where, size in sizes.items():
            literal, (_, index, place) = found[where]
            given = removal.graph.array(parts[index]) if literal is not None else None
            array = arrays.setdefault(
                index, np.ones(1, np.int64) if given is None else given.copy()
            )
            array.reshape(-1)[place] = size
        for index, array in arrays.items():
            parts[index] = removal.edit.add_weight(array, parts[index])
        made = removal.edit.insert("Concat", parts, attrs={"axis": 0})
        removal.edit.set_input(self.node, 1, made[0])


def _literals(a: Analysis, node: NodeProto) -> list[tuple[int | None, Literal]] | None:
    """Each size of the shape, None for one that is computed, and where it stands."""
    name = node.input[1]
    array = a.graph.array(name)
    if array is not None:
        return _written(array, node, 1)
    maker = a.graph.producer(name)
    if maker is None or a.graph.op(maker) != "Concat" or a.rank(name) != 1:
        return None
    found: list[tuple[int | None, Literal]] = []
    for index, part in enumerate(maker.input):
        array = a.graph.array(part)
        if array is not None:
            found += _written(array, maker, index)
        elif a.size(part, 0) == 1:
            found.append((None, (maker, index, 0)))
        else:
            return None
    return found


def _written(
    array: Array, node: NodeProto, index: int
) -> list[tuple[int | None, Literal]]:
    return [
        (int(size), (node, index, place))
        for place, size in enumerate(array.reshape(-1).tolist())
    ]


class _Put:
    """Puts a value into a vector."""

    def __init__(self, place: int, value: int) -> None:
        self.place, self.value = place, value

    def __call__(self, array: Array) -> Array:
        made = array.copy()
        made.reshape(-1)[self.place] = self.value
        return made


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
