"""unroll-loop: put the rounds of a Loop whose number is known in its place.

    y = Loop(2, true, x) {
        body(i, go, s):               t = Neg(x)
            s2 = Neg(s)         ->    y = Neg(t)
            return go, s2
    }

1. No round: the readers of what is carried read the initial values (nothing is stacked).
2. One round, whatever the body says of going on; or up to `max_rounds`, where the body
   always goes on.
3. Only where that makes no more nodes, over all depths, than there were, and, with
   several rounds, hardly more bytes; and not with what is random in several rounds.
4. What is stacked over the rounds becomes Unsqueeze, and Concat where there are several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import msgspec
import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.inlining import Inliner
from onnxopt.manager import Context, Pass
from onnxopt.model import Model
from onnxopt.operators import RANDOM
from onnxopt.report import Guarantee

_MAX_GROWTH = 1024


class UnrollLoop(Pass):
    """Replace a Loop of few rounds by the rounds."""

    name: ClassVar[str] = "unroll-loop"
    guarantee: ClassVar[Guarantee] = "bitwise"

    max_rounds: int = 8

    def run_model(self, model: Model, context: Context) -> None:
        """Scope by scope, outer ones first, so that what moves outwards comes again."""
        inliner = Inliner()
        for view in model.views():
            if view.is_attached:
                for node in view.visit(self, ("Loop",)):
                    self._unroll(view, node, inliner)

    def _unroll(self, graph: GraphView, node: NodeProto, inliner: Inliner) -> None:
        if len(graph.children_of(node)) != 1:
            return
        loop = _Loop(graph, node, graph.children_of(node)[0])
        rounds = loop.rounds()
        if rounds is None or rounds > self.max_rounds or not loop.is_plain():
            return
        stacked = [name for name in loop.stacked() if name and graph.is_used(name)]
        if rounds == 0 and stacked:
            graph.skip(node, "what it stacks is empty, of a shape that is not known")
        elif rounds > 1 and loop.is_random():
            graph.skip(node, "its rounds draw random numbers one after another")
        elif rounds and loop.growth(rounds, len(stacked)) > 0:
            graph.skip(node, f"{_count(rounds)} would take more nodes")
        elif graph.apply(loop.unrolled(rounds, inliner), f"it has {_count(rounds)}"):
            inliner.forget(graph, node)


class _Loop(msgspec.Struct, frozen=True):
    graph: GraphView
    node: NodeProto
    body: GraphView

    def rounds(self) -> int | None:
        """How many rounds there are; None where that is not known."""
        trips, start = self._input(0), self._input(1)
        most = _scalar(self.graph, trips) if trips else None
        go = _scalar(self.graph, start) if start else True
        if go is not None and not go:
            return 0
        if trips and most is not None and most <= 0:
            return 0
        if go is None or (trips and most is None):
            return None
        goes_on = self._goes_on()
        if goes_on is False or (most is not None and int(most) == 1):
            return 1
        return int(most) if most is not None and goes_on else None

    def _input(self, index: int) -> str:
        return self.node.input[index] if len(self.node.input) > index else ""

    def _start(self) -> str:
        """The condition to begin, a constant, where it can stand for those of rounds."""
        tensor = self.graph.weight(self._input(1)) if self._input(1) else None
        return "" if tensor is None or tensor.dims else self._input(1)

    def _goes_on(self) -> bool | None:
        """What the body says of another round, always; None where it depends."""
        name = self.body.outputs()[0]
        given = self._formals()[1]
        maker = self.body.producer(name)
        while maker is not None and self.body.op(maker) == "Identity":
            name = maker.input[0]
            maker = self.body.producer(name)
        if name == given and self.body.home(name) is self.body:
            return True  # it was true when the round began
        value = _scalar(self.body, name)
        return None if value is None else bool(value)

    def _formals(self) -> list[str]:
        return [value.name for value in self.body.proto.input]

    def is_plain(self) -> bool:
        """Whether inputs match, and the body has the round and the condition as scalars.

        ONNX Runtime gives them the rank that the body declares.
        """
        if len(self.node.input) != len(self._formals()) or not self.body.outputs():
            return False
        if any(not name for name in self.node.input[2:]):
            return False
        formals = self.body.proto.input[:2]
        return not any(value.type.tensor_type.shape.dim for value in formals)

    def is_random(self) -> bool:
        """Whether what a round computes depends on those before by more than values."""
        nodes = attributes.nodes_in(self.body.nodes())
        return any(node.op_type in RANDOM for node in nodes)

    def stacked(self) -> list[str]:
        """The outputs that hold a value of every round."""
        return list(self.node.output)[len(self._formals()) - 2 :]

    def growth(self, rounds: int, stacked: int) -> int:
        """How many nodes more there would be at most."""
        held = sum(1 for _ in attributes.nodes_in(self.body.nodes()))
        condition = self.body.producer(self.body.outputs()[0])
        own = held - (condition is not None)  # nothing reads whether to go on
        spent = rounds * own + stacked * (rounds + (rounds > 1))
        if not self.graph.holds_initializers:  # constants are nodes
            index, go = map(self._is_read, self._formals()[:2])
            spent += rounds * (index + (go and not self._start()))
            spent += rounds * stacked
        kept = sum(
            self.graph.is_output(name) or self.graph.is_pinned(name)
            for name in self.node.output
        )  # each may need an Identity
        return spent + (kept if self._hands_on() else 0) - (held + 1)

    def _hands_on(self) -> bool:
        """Whether an output of the body is not made by a node of its own, once."""
        names = self.body.outputs()[1:]
        own = all(self.body.producer(name) is not None for name in names)
        return not own or len(set(names)) < len(names)

    def unrolled(self, rounds: int, inliner: Inliner) -> Edit:
        """The edit that puts the rounds in the place of the Loop."""
        most = None if rounds < 2 else _MAX_GROWTH
        edit = Edit(self.graph, self.node, max_growth=most)
        edit.erase(self.node)
        formals = self._formals()
        carried = len(formals) - 2
        values: Sequence[str] = list(self.node.input)[2:]
        slices: list[Sequence[str]] = []
        for number in range(rounds):
            given = dict(zip(formals[2:], values, strict=True))
            if self._is_read(formals[0]):
                count = np.array(number, np.int64)
                given[formals[0]] = edit.add_weight(count, formals[0])
            if self._is_read(formals[1]):
                start = self._start()
                given[formals[1]] = start or edit.add_weight(np.array(True), formals[1])
            last = number == rounds - 1
            names = ["", *self.node.output[:carried]] if last else []
            prefix = f"{self.node.name}/{number}" if self.node.name else ""
            content = inliner.content(
                self.graph, self.node, self.body, given, names, None, prefix
            )
            edit.adopt(content)
            values = content.values[1 : carried + 1]
            slices.append(content.values[carried + 1 :])
        for index, name in enumerate(self.stacked()):
            if name and self.graph.is_used(name):
                self._stack(edit, [values[index] for values in slices], name)
        edit.hand_on(self.node.output[:carried], values)
        return edit

    def _is_read(self, name: str) -> bool:
        return self.body.is_used(name)

    def _stack(self, edit: Edit, values: list[str], output: str) -> None:
        """Let `output` be the values of all rounds along a new first axis."""
        parts = []
        for value in values:
            names: int | list[str] = [output] if len(values) == 1 else 1
            if self.graph.opset() >= 13:
                axes = edit.add_weight(np.array([0]), f"{output}_axes")
                parts += edit.insert("Unsqueeze", [value, axes], names)
            else:
                parts += edit.insert("Unsqueeze", [value], names, {"axes": [0]})
        if len(parts) > 1:
            edit.insert("Concat", parts, [output], {"axis": 0})


def _count(rounds: int) -> str:
    return f"{rounds} round" if rounds == 1 else f"{rounds} rounds"


def _scalar(graph: GraphView, name: str) -> int | None:
    tensor = graph.weight(name)
    if tensor is None or any(dim != 1 for dim in tensor.dims):
        return None
    array = graph.array(name)
    return None if array is None else int(array.reshape(-1)[0])
