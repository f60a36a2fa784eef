"""Taking channels out: make up for them, slice every constant, correct what is written.

One edit for each component, built when the edits before it are done, so that it reads
the constants as they are by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto

from onnxopt.channels import blocks
from onnxopt.channels.decision import Decision
from onnxopt.channels.facts import Mask
from onnxopt.channels.groups import Component, Groups, Slot
from onnxopt.data.inputs import dims_of
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.weights import Array

Change = Callable[[Array], Array]

WHY = "channels that change nothing"
MAX_GROWTH = 256
"""Bytes that a removal may add: a bias, where there was none, but no copies of weights
that several layers share and slice differently."""


class CannotRemove(Exception):  # noqa: N818 - a signal inside this package, not an error
    """This component has to stay as it is; the text is the reason."""


@dataclass
class Declared:
    """What the model declares of inner values: shapes change from edit to edit."""

    shapes: dict[str, list[int | str | None]] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Groups) -> Declared:
        """The declared ones of the values that have slots."""
        made = cls()
        graph = groups.graph
        written = {value.name: value for value in graph.proto.value_info}
        for slot in groups.slots.values():
            value = written.get(slot.name)
            if slot.reader is not None or slot.is_view or value is None:
                continue
            tensor = value.type.tensor_type
            if tensor.HasField("shape"):  # else nothing is said that could be wrong
                made.shapes[slot.name] = list(dims_of(tensor) or ())
                made.types[slot.name] = tensor.elem_type
        return made


class Removal:
    """The edit of one component, while rules add to it."""

    def __init__(
        self, decision: Decision, component: Component, subject: NodeProto
    ) -> None:
        self.groups = decision.groups
        self.graph: GraphView = self.groups.graph
        self.removed = decision.removed
        self.component = component
        self.edit = Edit(self.graph, subject, max_growth=MAX_GROWTH)
        self._changes: dict[tuple[int, int], tuple[NodeProto, list[Change]]] = {}
        self._added: dict[tuple[int, int], tuple[Array, str]] = {}
        self._shifts: dict[int, tuple[NodeProto, Array, int]] = {}

    # ---- for rules ----

    def kept(self, slot: Slot) -> Mask:
        """Which atoms of a slot stay."""
        return np.asarray(~slot.of(self.removed))

    def kept_along(self, slot: Slot, axis: int) -> Mask:
        """Which indices of one axis of a slot keep anything."""
        place = slot.axes.index(axis)
        others = tuple(o for o in range(len(slot.axes)) if o != place)
        return np.asarray(self.kept(slot).reshape(slot.dims).any(axis=others))

    def sizes(self, slot: Slot) -> dict[int, int]:
        """By axis of a slot, what is left of its size."""
        kept = self.kept(slot).reshape(slot.dims)
        return dict(zip(slot.axes, blocks.extents(kept), strict=True))

    def kept_of(self, name: str, axis: int) -> Mask | None:
        """Which indices of an axis of a value stay; None where it has no such slot."""
        slot = self.groups.slots.get((name, (axis,)))
        return None if slot is None else self.kept(slot)

    def change(self, node: NodeProto, index: int, change: Change) -> None:
        """Let the constant that `node` reads at `index` become `change` of it."""
        key = (id(node), index)
        self._changes.setdefault(key, (node, []))[1].append(change)

    def add_input(self, node: NodeProto, index: int, array: Array, hint: str) -> None:
        """Let `node` read a new constant at `index`, where it reads nothing so far."""
        self._added[id(node), index] = array, hint
        self.change(node, index, lambda given: given)

    def peek(self, node: NodeProto, index: int) -> Array | None:
        """The constant that `node` is going to read at `index`; None where it is none."""
        key = (id(node), index)
        if key in self._added:
            array: Array | None = self._added[key][0]
        else:
            name = node.input[index] if index < len(node.input) else ""
            array = self.graph.array(name) if name else None
        if array is not None and key in self._changes:
            array = self._changed(node, index, array)
        return array

    def shift_after(
        self, node: NodeProto, by: Array, axis: int, anchor: NodeProto | None = None
    ) -> None:
        """Add `by` to what `node` makes: right behind it, or behind `anchor`.

        Its channels lie along `axis` of `by`.
        """
        self._shifts[id(node)] = anchor or node, by, axis

    def slice_after(self, node: NodeProto, kept: Mask) -> None:
        """Slice what was added to what `node` makes, in this edit or an earlier one."""
        if id(node) in self._shifts:
            anchor, by, axis = self._shifts[id(node)]
            self._shifts[id(node)] = anchor, np.compress(kept, by, axis), axis
        elif id(node) in self.groups.shifts:
            name, axis = self.groups.shifts[id(node)]
            array = self.graph.array(name)
            if array is not None:
                self.edit.set_weight(name, np.compress(kept, array, axis))

    # ---- building ----

    def apply(self, declared: Declared) -> bool:
        """Build the edit and carry it out; False where it was refused."""
        try:
            self._build(declared)
        except CannotRemove as reason:
            self.graph.skip(self.edit.node, str(reason))
            return False
        if self.edit.is_empty or not self.graph.apply(self.edit, WHY):
            return False
        declared.shapes.update(self._shapes)
        return True

    def _build(self, declared: Declared) -> None:
        for sink in self.component.sinks:
            gone = sink.slot.of(self.removed)
            if gone.any() and not gone.all():
                sink.compensate(self, gone)
        for slot in self.component.slots:
            if slot.reader is not None:
                self._slice(slot)
        for patch in self.component.patches:
            patch(self)
        self._shapes = self._new_shapes(declared)
        if not self.edit.is_empty or self._changes:
            self.edit.forget_shapes()
        for name, dims in self._shapes.items():
            self.edit.set_shape(name, declared.types[name], dims)
        self._write()

    def _slice(self, slot: Slot) -> None:
        gone = slot.of(self.removed)
        if slot.reader is None or not gone.any() or gone.all():
            return  # where all go, what reads it goes, too
        kept = (~gone).reshape(slot.dims)
        self.change(*slot.reader, lambda array: blocks.compress(array, slot.axes, kept))

    def _new_shapes(self, declared: Declared) -> dict[str, list[int | str | None]]:
        made: dict[str, list[int | str | None]] = {}
        for slot in self.component.slots:
            if slot.reader is not None or slot.is_view:
                continue
            if slot.name not in declared.shapes:
                continue
            kept = self.kept(slot)
            if kept.all() or not kept.any():
                continue
            dims = made.get(slot.name, list(declared.shapes[slot.name]))
            for axis, size in self.sizes(slot).items():
                dims[axis] = size
            made[slot.name] = dims
        return made

    # ---- writing constants ----

    def _write(self) -> None:
        by_name: dict[str, list[tuple[NodeProto, int]]] = {}
        for (_, index), (node, _) in self._changes.items():
            if (id(node), index) in self._added:
                array, hint = self._added[id(node), index]
                made = self.edit.add_weight(self._changed(node, index, array), hint)
                self.edit.set_input(node, index, made)
            else:
                by_name.setdefault(node.input[index], []).append((node, index))
        for name, readers in by_name.items():
            self._write_constant(name, readers)
        for key, (anchor, by, axis) in self._shifts.items():
            self.groups.shifts[key] = self._insert_shift(anchor, by), axis

    def _insert_shift(self, anchor: NodeProto, by: Array) -> str:
        """Let all that read the output of `anchor` read it with `by` added."""
        name = anchor.output[0]
        bias = self.edit.add_weight(by, f"{name}_shift")
        plain = self.graph.fresh(name)
        self.edit.divert(anchor, 0, plain)
        self.edit.insert("Add", [plain, bias], [name])
        return bias

    def _changed(self, node: NodeProto, index: int, array: Array) -> Array:
        for change in self._changes[id(node), index][1]:
            array = change(array)
        return array

    def _write_constant(self, name: str, readers: list[tuple[NodeProto, int]]) -> None:
        """One new value where all readers agree on it, else one for each that differs."""
        array = self.graph.array(name)
        assert array is not None, f"{name!r} is not a constant"
        made = [self._changed(node, index, array) for node, index in readers]
        home = self.graph.home(name)
        uses = self.graph.home_uses(name)
        are_all = home is self.graph and len(uses) == len(readers)
        if self.graph.is_output(name) or self.graph.is_pinned(name):
            are_all = False
        if are_all and all(_same(made[0], other) for other in made[1:]):
            self.edit.set_weight(name, made[0])
            return
        done: list[tuple[Array, str]] = []
        for (node, index), value in zip(readers, made, strict=True):
            known = next((n for other, n in done if _same(other, value)), None)
            if known is None:
                known = self.edit.add_weight(value, name)
                done.append((value, known))
            self.edit.set_input(node, index, known)


def check_fits(array: Array, dtype: Any) -> None:
    """Raise CannotRemove where rounding to `dtype` would overflow."""
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype).astype(np.float64)
    if not np.isfinite(rounded).all():
        raise CannotRemove(f"what a constant channel adds does not fit into {dtype}")


def _same(one: Array, two: Array) -> bool:
    return one is two or (
        one.dtype == two.dtype
        and one.shape == two.shape
        and one.tobytes() == two.tobytes()
    )


def remove(decision: Decision) -> int:
    """Take out all that `decision` says may go; the number of edits that were made."""
    groups = decision.groups
    declared = Declared.of(groups)
    edits = 0
    for component in groups.components():
        if any(slot.of(decision.removed).any() for slot in component.slots):
            subject = _subject(groups, component, decision.removed)
            edits += Removal(decision, component, subject).apply(declared)
    return edits


def _subject(groups: Groups, component: Component, removed: Mask) -> NodeProto:
    """The node that the report names: the first that makes fewer channels."""
    for slot in component.slots:
        maker = groups.graph.producer(slot.name)
        if slot.reader is None and maker is not None and slot.of(removed).any():
            return maker
    sliced = [slot.reader for slot in component.slots if slot.reader is not None]
    return sliced[0][0]
