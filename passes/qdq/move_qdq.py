"""move-qdq: let what only moves elements move codes.

    x = DequantizeLinear(q, s, z)        t = Transpose(q)
    y = Transpose(x)                ->   y = DequantizeLinear(t, s, z)

    y = Flatten(x)                       r = QuantizeLinear(x, s, z)
    q = QuantizeLinear(y, s, z)     ->   q = Flatten(r)

1. Operators that move or select elements (`onnxopt.quantization.carriers`): the results
   are the same to the bit. ONNX and ONNX Runtime's CPU provider must have them for codes.
2. Scales along an axis follow it through Transpose, through Reshape and the like where
   the axis survives, and through a Gather along another axis; else it is declined.
3. For every target: codes that are constant are transposed and reshaped in the file,
   where nothing else reads them; so the weight stands beside its DequantizeLinear.
4. For `onnx` and `ort-cpu`: a Gather from constant codes takes codes (an embedding); and
   DequantizeLinear, operator, QuantizeLinear with equal parameters do without the two
   (`requantize` takes the rest away).
5. For `ort-cpu` also where ONNX Runtime fuses more then: DequantizeLinear goes down to
   what it fuses with, QuantizeLinear up to what it fuses with. For `tensorrt`, which
   wants its pairs, and for `ort-cuda`, which has no integer kernels, they stay.
6. int8 activations stay between their pairs, but for `ort-cpu-arm`: on x86 ONNX Runtime
   makes uint8 of a pair, and runs nothing on integers where the two are apart.
7. QuantizeLinear does not go up through MaxPool: of NaN beside numbers the largest is not
   the one whose code is the largest.

Each edit turns an operator on floats into one on codes, and no pass does the reverse. So
there is an end to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import msgspec
import numpy as np
from onnx import NodeProto, TensorProto

from onnxopt import attributes, axes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.quantization.carriers import (
    Carried,
    carried,
    grows,
    is_carrier,
    operators,
    reshapes,
    takes,
)
from onnxopt.quantization.parameters import Parameters, are_alike, parameters
from onnxopt.quantization.reasons import STATIC_KERNELS
from onnxopt.quantization.roundtrip import RoundTrips
from onnxopt.report import Guarantee
from onnxopt.weights import Array

MAX_GROWTH = 256
"""Bytes that a transposed weight may add: names and shapes, no second weight."""


class MoveQdq(Pass):
    """Move QuantizeLinear and DequantizeLinear past what only moves elements."""

    name: ClassVar[str] = "move-qdq"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Operator by operator: past those before it, then past those behind it."""
        work = _Work(graph, context, RoundTrips(context.evaluator))
        for node in graph.visit(self, operators()):
            try:
                if not work.sink(node):
                    work.rise(node)
            except DeclinedError as declined:
                graph.skip(node, str(declined))


class _Work(msgspec.Struct):
    graph: GraphView
    context: Context
    trips: RoundTrips

    @property
    def _layout(self) -> str:
        """`tensorrt`, `ort-cuda`, `onnx`, or `ort-cpu` for both of its kinds."""
        name = self.context.target.name
        return "ort-cpu" if name.startswith("ort-cpu") else name

    def _maker(self, name: str) -> NodeProto | None:
        """The DequantizeLinear that makes `name`."""
        node = self.graph.producer(name)
        if node is None or self.graph.op(node) != "DequantizeLinear":
            return None
        return node

    # ---- DequantizeLinear goes down ----

    def sink(self, node: NodeProto) -> bool:
        """Let `node` read codes; False where it does not, or need not."""
        first = self._maker(node.input[0])
        if first is None:
            return False
        if self._fold(node, first):
            return True
        if not self._gains(node, first):
            return False
        made = parameters(self.graph, first)
        how = carried(self.graph, node, made)
        if not takes(self.graph, node, made.data_type):
            return False
        sources = self._sources(node, how, made)
        if sources is None:
            return False
        edit = Edit(self.graph, node)
        for slot, source in zip(how.data, sources, strict=True):
            edit.set_input(node, slot, source)
        _set_constants(edit, node, how)
        for index, output in enumerate(node.output):
            codes = self.graph.fresh(f"{output}_quantized")
            edit.divert(node, index, codes)
            if self.graph.is_used(output):
                self._like(edit, first, [codes, *first.input[1:]], output, how)
        return self.graph.apply(edit, f"{node.op_type} moves codes as it moves values")

    def _sources(
        self, node: NodeProto, how: Carried, made: Parameters
    ) -> list[str] | None:
        """The codes that `node` would read, all with the parameters `made`."""
        found = []
        for slot in how.data:
            maker = self._maker(node.input[slot])
            if maker is None or not parameters(self.graph, maker).equals(made):
                return None
            found.append(maker.input[0])
        return found

    def _like(
        self, edit: Edit, first: NodeProto, inputs: list[str], output: str, how: Carried
    ) -> None:
        """A DequantizeLinear of other values than `first`, along another axis."""
        settings = {
            item.name: attributes.value_of(item)
            for item in first.attribute
            if item.name != "axis"
        }
        settings["axis"] = how.axis
        edit.insert("DequantizeLinear", inputs, [output], settings)

    def _fold(self, node: NodeProto, first: NodeProto) -> bool:
        """Transpose or reshape constant codes in the file."""
        graph, name = self.graph, first.input[0]
        if not reshapes(graph, node) or graph.weight(name) is None:
            return False
        if not _is_alone(graph, first):
            return False
        made = parameters(graph, first)
        edit = Edit(graph, node, max_growth=MAX_GROWTH)
        names = list(first.input)
        moved = [0]
        if made.is_blocked and graph.op(node) == "Transpose":
            moved = list(range(len(names)))  # the scales lie as the codes do
            how = carried(graph, node, msgspec.structs.replace(made, block_size=0))
        else:
            how = carried(graph, node, made)
        for slot in moved:
            codes = _reshaped(graph, node, names[slot])
            if codes is None:
                return False
            names[slot] = edit.add_weight(codes, names[slot])
        edit.erase(node)
        self._like(edit, first, names, node.output[0], how)
        return graph.apply(edit, "the codes of a constant can be moved in the file")

    def _gains(self, node: NodeProto, first: NodeProto) -> bool:
        """Whether the target has something of it if `node` moves codes."""
        if self._layout not in ("onnx", "ort-cpu"):
            return False
        constant = self.graph.weight(first.input[0]) is not None
        if constant and self.graph.op(node) == "Gather":
            return True
        if not constant and self.keeps_pairs(first):
            return False
        readers = [use.node for name in node.output for use in self.graph.uses(name)]
        if any(self._is_undone(first, reader) for reader in readers):
            return True
        if self._layout != "ort-cpu" or grows(self.graph, node):
            return False
        return any(
            self.graph.holds(reader)
            and (
                self.graph.op(reader) in STATIC_KERNELS or is_carrier(self.graph, reader)
            )
            for reader in readers
        )

    def keeps_pairs(self, node: NodeProto) -> bool:
        """Whether `node`, a Q or DQ, is to stay beside its partner.

        On x86 ONNX Runtime runs int8 activations as uint8, which it makes of a
        QuantizeLinear with a DequantizeLinear right behind it: apart, nothing fuses.
        """
        if not self.context.target.keeps_int8_pairs:
            return False
        return parameters(self.graph, node).data_type == TensorProto.INT8

    def _is_undone(self, first: NodeProto, reader: NodeProto) -> bool:
        """Whether `requantize` removes `reader`, once it stands beside `first`."""
        graph = self.graph
        if not graph.holds(reader) or graph.op(reader) != "QuantizeLinear":
            return False
        made = parameters(graph, first)
        if not made.is_per_tensor or not made.equals(parameters(graph, reader)):
            return False
        self.trips.check(graph, first, reader, made)
        return True

    # ---- QuantizeLinear goes up ----

    def rise(self, node: NodeProto) -> bool:
        """Let `node` work on what the quantizer behind it makes of what it reads."""
        graph = self.graph
        if self._layout != "ort-cpu" or graph.op(node) == "MaxPool":
            return False
        read = [i for i, name in enumerate(node.output) if graph.is_used(name)]
        quantizers = {index: self._reader(node.output[index]) for index in read}
        last = next(iter(quantizers.values()), None)
        if last is None or not self._leads_to_fused(node) or self.keeps_pairs(last):
            return False
        made = parameters(graph, last)
        if not made.is_per_tensor or not takes(graph, node, made.data_type):
            return False
        for other in quantizers.values():
            if other is None or not are_alike(graph, last, other):
                return False
        how = carried(graph, node, made)
        edit = Edit(graph, node)
        for slot in how.data:
            source = [node.input[slot], *last.input[1:]]
            settings = {i.name: attributes.value_of(i) for i in last.attribute}
            edit.set_input(node, slot, edit.insert(last.op_type, source, 1, settings)[0])
        _set_constants(edit, node, how)
        for index, name in enumerate(node.output):
            quantizer = quantizers.get(index)
            if quantizer is None:
                edit.divert(node, index, graph.fresh(f"{name}_quantized"))
            else:
                edit.erase(quantizer)
                edit.divert(node, index, quantizer.output[0])
        return graph.apply(edit, "ONNX Runtime fuses QuantizeLinear with what is before")

    def _reader(self, name: str) -> NodeProto | None:
        """The QuantizeLinear that alone reads `name`."""
        use = self.graph.only_use(name) if name else None
        if use is None or use.view is not self.graph or use.index != 0:
            return None
        return use.node if self.graph.op(use.node) == "QuantizeLinear" else None

    def _leads_to_fused(self, node: NodeProto) -> bool:
        """Whether data come from what fuses with a quantizer, others from one."""
        ends = list(self._ends(node))
        return STATIC_KERNELS.issuperset(set(ends) - {"DequantizeLinear"}) and not (
            STATIC_KERNELS.isdisjoint(ends)
        )

    def _ends(self, node: NodeProto) -> Iterator[str]:
        """The operators that make its data, behind what only moves them.

        Empty texts stand for those whose results others read, too.
        """
        slots = range(len(node.input)) if self.graph.op(node) == "Concat" else (0,)
        for slot in slots:
            name = node.input[slot]
            maker = self.graph.producer(name)
            op = "" if maker is None else self.graph.op(maker)
            if op != "DequantizeLinear" and self.graph.only_use(name) is None:
                yield ""
            elif maker is not None and op != "MaxPool" and is_carrier(self.graph, maker):
                yield from self._ends(maker)
            else:
                yield op


def _is_alone(graph: GraphView, first: NodeProto) -> bool:
    """Whether nothing but `first` reads its codes, and one node what it makes."""
    codes = graph.only_use_everywhere(first.input[0])
    return codes is not None and graph.only_use(first.output[0]) is not None


def _reshaped(graph: GraphView, node: NodeProto, name: str) -> Array | None:
    """What `node` makes of the constant `name`; None where that is not known."""
    array = graph.array(name)
    if array is None:
        return None
    if graph.op(node) == "Transpose":
        perm = axes.perm_of(graph, node)
        return None if perm is None else np.ascontiguousarray(np.transpose(array, perm))
    shape = graph.shape(node.output[0])
    dims = [dim for dim in shape or () if isinstance(dim, int)]
    return None if shape is None or len(dims) < len(shape) else array.reshape(dims)


def _set_constants(edit: Edit, node: NodeProto, how: Carried) -> None:
    for slot, value in how.constants.items():
        hint = f"{node.output[0]}_zero_point"
        edit.set_input(node, slot, edit.add_weight(value, hint))
