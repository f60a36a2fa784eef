"""sink-transpose: let operators work on the layout before a Transpose, so that it goes.

    t = Transpose <perm = [0, 2, 3, 1]> (x)
    a = Mul(t, c)                               a' = Mul(x, c')
    y = Transpose <perm = [0, 3, 1, 2]> (a)  -> (readers of y read a')

1. From a Transpose, a region grows along the readers: elementwise operators, Concat,
   Split, Slice, Pad, Reduce, Softmax, Squeeze and so on, with their axes renamed
   (`onnxopt.layouts`). Other inputs of the region are constants, transposed in the file,
   scalars, the same Transpose of other values, or get a Transpose of their own.
2. A Transpose goes where all its readers are in the region, or where it undoes the
   layout of a value of the region. A value with other readers needs a new one.
3. It is one edit, and done only where fewer nodes remain. So there is an end to it.
4. Values inside the region have another layout, and so they get new names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import msgspec
import numpy as np
from onnx import NodeProto

from onnxopt import attributes, axes, layouts
from onnxopt.axes import Perm
from onnxopt.edit import Edit
from onnxopt.graph import GraphView, Use
from onnxopt.layouts import Moved
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee

MAX_NODES = 64
"""A region grows no further."""

MAX_COPIED = 1024
"""Bytes of a constant that others read, too, and that is stored once more."""


class SinkTransposes(Pass):
    """Move Transposes through what does not care about the layout, until they meet."""

    name: ClassVar[str] = "sink-transpose"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Grow a region from every Transpose."""
        for node in graph.visit(self, ("Transpose",)):
            if not any(use.view is graph for use in graph.uses(node.output[0])):
                continue
            region = _Region(graph)
            region.grow(node)
            if region.may_gain():
                region.shrink()
                if region.gain() > 0:
                    edit = Edit(graph, node)
                    _carry_out(graph, region, edit)
                    graph.apply(edit, "what is between Transposes can do without them")


class _Member(NamedTuple):
    """A node of a region, how it works there, and the layout of its data."""

    node: NodeProto
    moved: Moved
    perm: Perm


class _Region(msgspec.Struct):
    """Nodes that could work on another layout, and the Transposes that lead into them."""

    graph: GraphView
    nodes: dict[int, _Member] = msgspec.field(default_factory=dict)
    layout: dict[str, Perm] = msgspec.field(default_factory=dict)
    """The layout of the values that the nodes make, and of the Transposes' outputs."""

    # ---- growing ----

    def grow(self, start: NodeProto) -> None:
        """Take in what reads `start`, and what reads that, in topological order."""
        if self.graph.is_unordered:
            self.graph.settle()
        if not self._enter(start):
            return
        order = functools.cmp_to_key(self._order)
        for node in sorted(self._candidates(start), key=order):
            self._absorb(node)

    def _order(self, first: NodeProto, second: NodeProto) -> int:
        return -1 if self.graph.precedes(first, second) else 1

    def _candidates(self, start: NodeProto) -> list[NodeProto]:
        """The movable nodes that can be reached, up to a number."""
        found: dict[int, NodeProto] = {}
        stack = [start]
        while stack and len(found) < MAX_NODES:
            for reader in self._readers(stack.pop()):
                if id(reader) in found or not layouts.is_movable(self.graph, reader):
                    continue
                found[id(reader)] = reader
                stack.append(reader)
                stack.extend(filter(None, map(self._transpose, reader.input)))
        return list(found.values())

    def _readers(self, node: NodeProto) -> Iterator[NodeProto]:
        for name in node.output:
            for use in self.graph.uses(name):
                if use.view is self.graph:
                    yield use.node

    def _transpose(self, name: str) -> NodeProto | None:
        """The Transpose that makes `name`."""
        node = self.graph.producer(name)
        if node is None or self.graph.op(node) != "Transpose":
            return None
        return None if attributes.has_references(node) else node

    def _enter(self, node: NodeProto) -> bool:
        perm = axes.perm_of(self.graph, node)
        if perm is None or axes.is_identity(perm):
            return False
        self.layout[node.output[0]] = perm
        return True

    def _absorb(self, node: NodeProto) -> None:
        """Take `node` in where all that it reads can be had in one layout."""
        known = [self.layout[name] for name in node.input if name in self.layout]
        if not known:
            makers = filter(None, map(self._transpose, node.input))
            known = [axes.perm_of(self.graph, maker) or () for maker in makers]
        perm = known[0] if known else ()
        if axes.is_identity(perm):
            return
        moved = layouts.moved(self.graph, node, perm)
        if moved is None or not self._is_aligned(node, moved, perm):
            return
        for slot in moved.data:
            if self._is_entry(node.input[slot], perm):
                self.layout[node.input[slot]] = perm
        self.nodes[id(node)] = _Member(node, moved, perm)
        if not axes.is_identity(moved.output):
            self.layout.update((name, moved.output) for name in node.output if name)

    def _is_aligned(self, node: NodeProto, moved: Moved, perm: Perm) -> bool:
        for slot, name in enumerate(node.input):
            if slot not in moved.data:
                if name in self.layout:
                    return False
            elif not name or not self._fits(name, moved, perm):
                return False
        names = [node.input[slot] for slot in moved.data]
        return any(self._is_moved(name, perm) for name in names)

    def _is_moved(self, name: str, perm: Perm) -> bool:
        return self.layout.get(name) == perm or self._is_entry(name, perm)

    def _is_entry(self, name: str, perm: Perm) -> bool:
        """Whether `name` is made in the layout `perm` by a Transpose of another value."""
        maker = self._transpose(name)
        if maker is None or maker.input[0] in self.layout:
            return False
        return axes.perm_of(self.graph, maker) == perm

    def _fits(self, name: str, moved: Moved, perm: Perm) -> bool:
        if self._is_moved(name, perm):
            return True
        if name in self.layout and self._transpose(name) is None:
            return False  # it will be there in another layout only
        shape = self.graph.shape(name)
        if shape is None or len(shape) > len(perm):
            return False
        if _is_copied(self.graph, name):
            return moved.broadcasts or len(shape) == len(perm)
        return _is_one(self.graph, name, moved) or len(shape) == len(perm)

    # ---- counting ----

    def made(self) -> Iterator[str]:
        """The values of the region that are in another layout."""
        for member in self.nodes.values():
            yield from (name for name in member.node.output if name in self.layout)

    def entries(self) -> dict[str, NodeProto]:
        """The Transposes that the region reads through, by what they make."""
        makers = {
            name: self.graph.producer(name)
            for member, name in self.slots()
            if self.layout.get(name) == member.perm
        }
        return {
            name: maker
            for name, maker in makers.items()
            if maker is not None and id(maker) not in self.nodes
        }

    def slots(self) -> Iterator[tuple[_Member, str]]:
        """The data that the region's nodes read."""
        for member in self.nodes.values():
            for slot in member.moved.data:
                yield member, member.node.input[slot]

    def reads(self, use: Use, name: str) -> bool:
        """Whether it is a node of the region that reads `name`, in its layout."""
        member = self.nodes.get(id(use.node))
        if member is None or use.index not in member.moved.data:
            return False
        return self.layout.get(name) == member.perm

    def undone(self, name: str) -> list[NodeProto]:
        """The Transposes that undo the layout of `name`."""
        return [node for node, perm in self.turned(name) if axes.is_identity(perm)]

    def turned(self, name: str) -> Iterator[tuple[NodeProto, Perm]]:
        """The Transposes that read `name`, and what they would be to the new value."""
        for use in self.graph.uses(name):
            perm = self._perm_of_reader(use)
            if perm is not None and len(perm) == len(self.layout[name]):
                yield use.node, axes.compose(self.layout[name], perm)

    def _perm_of_reader(self, use: Use) -> Perm | None:
        is_own = use.view is self.graph and self.graph.op(use.node) == "Transpose"
        if not is_own or attributes.has_references(use.node):
            return None
        return axes.perm_of(self.graph, use.node)

    def is_needed(self, name: str) -> bool:
        """Whether something outside needs the value `name` in the layout that it has."""
        if self.graph.is_output(name) or self.graph.is_pinned(name):
            return True
        turned = {id(node) for node, _ in self.turned(name)}
        return any(
            id(use.node) not in turned and not self.reads(use, name)
            for use in self.graph.uses(name)
        )

    def foreign(self) -> set[tuple[str, Perm]]:
        """Values from outside that the region needs in a layout: one Transpose each."""
        return {
            (name, member.perm)
            for member, name in self.slots()
            if self.layout.get(name) != member.perm
            and not _is_one(self.graph, name, member.moved)
            and not _is_copied(self.graph, name)
        }

    def may_gain(self) -> bool:
        """Whether two Transposes could go, for one that may have to come."""
        if not self.nodes:
            return False
        undone = sum(len(self.undone(name)) for name in self.made())
        plain = any(axes.is_identity(moved.output) for _, moved, _ in self.nodes.values())
        return len(self.entries()) + undone + plain > 1

    def gain(self) -> int:
        """How many nodes fewer the model has without the Transposes."""
        gone = sum(
            not self.graph.is_output(name)
            and not self.graph.is_pinned(name)
            and all(self.reads(use, name) for use in self.graph.uses(name))
            for name in self.entries()
        )
        for name in self.made():
            undone = self.undone(name)
            if sum(self.graph.is_output(node.output[0]) for node in undone) > 1:
                return 0  # one value cannot have the names of two outputs
            gone += len(undone) - self.is_needed(name)
        return gone - len(self.foreign())

    def shrink(self) -> None:
        """Leave out what does not help: the nodes from some point on, and last ones."""
        whole = dict(self.nodes)
        best, kept = 0, dict[int, _Member]()
        while self.nodes:
            gain = self.gain()
            if gain >= best and gain > 0:
                best, kept = gain, dict(self.nodes)
            self.nodes.popitem()
        self.nodes = kept or whole
        best = self.gain()
        for key, member in reversed(list(self.nodes.items())):
            if self._feeds_region(member.node):
                continue
            del self.nodes[key]
            gain = self.gain()
            if gain >= best:
                best = gain
            else:
                self.nodes[key] = member

    def _feeds_region(self, node: NodeProto) -> bool:
        names = [name for name in node.output if name in self.layout]
        return any(
            self.reads(use, name) for name in names for use in self.graph.uses(name)
        )


def _is_one(graph: GraphView, name: str, moved: Moved) -> bool:
    """Whether `name` has one element, which is broadcast in any layout."""
    shape = graph.shape(name)
    return moved.broadcasts and shape is not None and all(dim == 1 for dim in shape)


def _is_copied(graph: GraphView, name: str) -> bool:
    """Whether constant `name` may be stored in another layout, for one reader more."""
    tensor = graph.weight(name)
    if tensor is None or graph.only_use_everywhere(name) is not None:
        return tensor is not None
    return int(np.prod(tensor.dims)) * 8 <= MAX_COPIED


def _carry_out(graph: GraphView, region: _Region, edit: Edit) -> None:
    """Rename what is made in another layout, move the nodes, and see to the borders."""
    made = list(region.made())
    fresh = {name: graph.fresh(f"{name}_moved") for name in made}
    sources = {name: node.input[0] for name, node in region.entries().items()} | fresh
    borders = [(name, region.is_needed(name), list(region.turned(name))) for name in made]
    feeds = _Feeds(region, edit, sources)
    for node, moved, perm in region.nodes.values():
        for slot in moved.data:
            edit.set_input(node, slot, feeds.get(node.input[slot], perm, moved))
        for slot, array in moved.constants.items():
            edit.set_input(node, slot, edit.add_weight(array, f"{node.output[0]}_axes"))
        for key, value in moved.attrs.items():
            edit.set_attribute(node, key, value)
        for index, name in enumerate(node.output):
            if name in fresh:
                edit.divert(node, index, fresh[name])
    for name, is_needed, _ in borders:
        if is_needed:
            back = {"perm": list(region.layout[name])}
            edit.insert("Transpose", [fresh[name]], [name], back)
    for name, _, turned in borders:
        _join(graph, edit, fresh[name], turned)


def _join(
    graph: GraphView, edit: Edit, name: str, turned: list[tuple[NodeProto, Perm]]
) -> None:
    """Let Transposes behind the region read the value as it comes out.

    Last the one whose output is the scope's: the value takes that name over.
    """

    def takes_name(pair: tuple[NodeProto, Perm]) -> bool:
        return axes.is_identity(pair[1]) and graph.is_output(pair[0].output[0])

    for node, perm in sorted(turned, key=takes_name):
        if axes.is_identity(perm):
            edit.bypass(node, {node.output[0]: name})
        else:
            edit.set_input(node, 0, name)
            edit.set_attribute(node, "perm", list(perm))


class _Feeds(msgspec.Struct):
    """What the nodes of a region read in place of what they read now."""

    region: _Region
    edit: Edit
    sources: dict[str, str]
    made: dict[tuple[str, Perm], str] = msgspec.field(default_factory=dict)

    def get(self, name: str, perm: Perm, moved: Moved) -> str:
        """The name of `name` in the layout `perm`."""
        if self.region.layout.get(name) == perm:
            return self.sources[name]
        if _is_one(self.region.graph, name, moved):
            return name
        if (name, perm) not in self.made:
            self.made[name, perm] = self._make(name, perm)
        return self.made[name, perm]

    def _make(self, name: str, perm: Perm) -> str:
        graph, back = self.region.graph, axes.inverse(perm)
        array = graph.array(name) if _is_copied(graph, name) else None
        if array is None:
            return self.edit.insert("Transpose", [name], 1, {"perm": list(back)})[0]
        whole = array.reshape((1,) * (len(perm) - array.ndim) + array.shape)
        return self.edit.add_weight(np.ascontiguousarray(whole.transpose(back)), name)
