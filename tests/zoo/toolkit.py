"""What the networks of the zoo are built with: a model and, beside it, its channels.

Every channel that a layer makes gets a number of its own, an atom; values carry the atoms
of one axis, and what is added, multiplied or normalized together is united. So the
builder knows, for every axis of every weight, which channel each index is and what goes
with it, without a look at the graph: it shares no code with `onnxopt.channels`.

Operators are those that torch's exporters write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import (
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
    shape_inference,
)

Array = NDArray[Any]
Ints = NDArray[np.int64]
Size = int | str


@dataclass(frozen=True)
class Value:
    """The atoms of a value along `axis`."""

    name: str
    ids: Ints
    axis: int = 1

    @property
    def width(self) -> int:
        """How many channels it has."""
        return len(self.ids)


@dataclass(frozen=True)
class Part:
    """Channel `ids` along one axis of a weight."""

    weight: str
    axis: int
    ids: Ints


@dataclass(frozen=True)
class Maker:
    """A weight whose `axis` makes channels `ids`; `normed`: only norms read them.

    A `gate` multiplies channels that others make: where those are zero, it may be
    anything. `also` are further constants with a part in each channel.
    """

    weight: str
    axis: int
    ids: Ints
    bias: str = ""
    normed: bool = False
    gate: bool = False
    also: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Norm:
    """A BatchNormalization: the names of its scale, shift, mean and variance."""

    names: tuple[str, str, str, str]
    ids: Ints


@dataclass
class Union:
    """Disjoint sets of atoms."""

    parent: list[int] = field(default_factory=list)

    def new(self, count: int) -> Ints:
        """So many atoms, each for itself."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, atom: int) -> int:
        """The atom that stands for the set of `atom`."""
        while self.parent[atom] != atom:
            self.parent[atom] = self.parent[self.parent[atom]]
            atom = self.parent[atom]
        return atom

    def unite(self, one: Ints, two: Ints) -> None:
        """Pair by pair, these are one channel."""
        for left, right in zip(one.tolist(), two.tolist(), strict=True):
            self.parent[self.root(left)] = self.root(right)

    def roots(self) -> Ints:
        """For every atom the one that stands for it."""
        return np.array([self.root(atom) for atom in range(len(self.parent))], np.int64)


class Net:
    """A network while it is built.

    `frozen` atoms stay; `rigid` ones do where they are constants other than zero.
    `borders`: rows of atoms that a padded layer reads, of whose constants one stays.
    """

    def __init__(self, seed: int, opset: int = 17) -> None:
        self.random = np.random.default_rng(seed)
        self.opset = opset
        self.union = Union()
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.makers: list[Maker] = []
        self.norms: list[Norm] = []
        self.parts: list[Part] = []
        self.values: list[Ints] = []
        self.frozen: list[Ints] = []
        self.rigid: list[Ints] = []
        self.borders: list[Ints] = []
        self._count = 0

    # ---- the ends ----

    def input(
        self,
        name: str,
        dims: Sequence[Size],
        axis: int = 1,
        kind: int = TensorProto.FLOAT,
    ) -> Value:
        """An input, whose channels stay; the batch is open."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, dims))
        size = dims[axis] if axis < len(dims) else 0
        ids = self.union.new(size if isinstance(size, int) else 0)
        return self.freeze(Value(name, ids, axis))

    def output(self, given: Value, dims: Sequence[Size]) -> None:
        """An output, whose channels stay."""
        self.freeze(given)
        self.nodes.append(helper.make_node("Identity", [given.name], ["out"]))
        if self.outputs:
            self.nodes[-1].output[0] = f"out{len(self.outputs)}"
        name = self.nodes[-1].output[0]
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))

    def freeze(self, given: Value) -> Value:
        """Let these channels stay."""
        self.frozen.append(given.ids)
        return given

    def model(self) -> ModelProto:
        """The model, with the shapes that ONNX infers."""
        weights = [numpy_helper.from_array(a, name) for name, a in self.weights.items()]
        graph = helper.make_graph(self.nodes, "net", self.inputs, self.outputs, weights)
        opsets = [helper.make_opsetid("", self.opset)]
        made = helper.make_model(graph, ir_version=8, opset_imports=opsets)
        return shape_inference.infer_shapes(made, data_prop=True)

    # ---- nodes and constants ----

    def name(self, hint: str) -> str:
        """A free name."""
        self._count += 1
        return f"{hint}_{self._count}"

    def node(self, op_type: str, inputs: Iterable[str], **attributes: Any) -> str:
        """A node of one output; the name of that."""
        made = self.name(op_type.lower())
        node = helper.make_node(op_type, list(inputs), [made], made, **attributes)
        self.nodes.append(node)
        return made

    def on(self, given: Value, op_type: str, *more: str, **attributes: Any) -> Value:
        """An operator that keeps the channels of its first input."""
        made = self.node(op_type, [given.name, *more], **attributes)
        return replace(given, name=made)

    def constant(self, array: Any, hint: str = "const") -> str:
        """A constant without channels."""
        name = self.name(hint)
        self.weights[name] = np.asarray(array)
        return name

    def ints(self, *values: int) -> str:
        """A constant vector of int64."""
        return self.constant(np.array(values, np.int64), "ints")

    def scalar(self, value: float) -> str:
        """A constant float32."""
        return self.constant(np.array(value, np.float32), "scalar")

    def weight(self, array: Array, axes: dict[int, Ints], hint: str = "weight") -> str:
        """A constant with channels on its axes."""
        name = self.constant(array.astype(np.float32), hint)
        self.parts += [Part(name, axis, ids) for axis, ids in axes.items()]
        return name

    def normal(self, *dims: int, fan: int = 1) -> Array:
        """Random values, so that a sum over `fan` Relus of its size stays so."""
        return self.random.standard_normal(dims) * np.sqrt(2 / (fan + 1))

    def make(self, maker: Maker) -> None:
        """Note a layer, and a value that keeps at least one channel."""
        self.makers.append(maker)
        self.values.append(maker.ids)

    # ---- layers ----

    def conv(
        self,
        given: Value,
        out: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        pad: int | None = None,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = True,
        rank: int = 2,
        flat: str = "",
        normed: bool = False,
        gate: bool = False,
    ) -> Value:
        """Conv, as wide as before unless `pad` says otherwise.

        `flat`: "wide" is 1 x kernel, "tall" kernel x 1.
        """
        pad = dilation * (kernel - 1) // 2 if pad is None else pad
        ids = self.union.new(out)
        spread = {"wide": [0, 1], "tall": [1, 0]}.get(flat, [1] * rank)
        taps = [kernel if along else 1 for along in spread]
        width = given.width // groups
        axes = {0: ids}
        if width == 1 and groups > 1:
            self.union.unite(ids, np.repeat(given.ids, out // groups))
        else:
            axes[1] = self._alike(given.ids, groups)
            self._alike(ids, groups)
            if pad:
                self.borders += list(given.ids.reshape(groups, -1))
        fan = width * int(np.prod(taps))
        weight = self.weight(self.normal(out, width, *taps, fan=fan), axes)
        inputs = [given.name, weight]
        if bias:
            inputs.append(self.weight(self.normal(out, fan=10), {0: ids}, "bias"))
        self.make(Maker(weight, 0, ids, inputs[2] if bias else "", normed, gate))
        made = self.node(
            "Conv",
            inputs,
            kernel_shape=taps,
            strides=[stride] * rank,
            pads=[pad * along for along in spread] * 2,
            dilations=[dilation] * rank,
            group=groups,
        )
        return Value(made, ids)

    def _alike(self, ids: Ints, groups: int) -> Ints:
        """The channels of the first of `groups`: those of the others go with them."""
        rows = ids.reshape(groups, -1)
        for row in rows[1:]:
            self.union.unite(rows[0], row)
        return np.asarray(rows[0])

    def conv_transpose(
        self, given: Value, out: int, kernel: int, stride: int, pad: int = 0
    ) -> Value:
        """ConvTranspose: what a constant adds differs from place to place."""
        ids = self.union.new(out)
        fan = given.width * (kernel // stride) ** 2
        array = self.normal(given.width, out, kernel, kernel, fan=fan)
        weight = self.weight(array, {0: given.ids, 1: ids})
        bias = self.weight(self.normal(out, fan=10), {0: ids}, "bias")
        self.make(Maker(weight, 1, ids, bias))
        self.borders.append(given.ids)
        made = self.node(
            "ConvTranspose",
            [given.name, weight, bias],
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[pad] * 4,
        )
        return Value(made, ids)

    def batch_norm(self, given: Value) -> Value:
        """BatchNormalization; the layer before it is marked as normed."""
        draw, size = self.random, given.width
        arrays = (
            draw.uniform(0.5, 1.5, size),
            draw.normal(0, 0.3, size),
            draw.normal(0, 0.3, size),
            draw.uniform(0.5, 1.5, size),
        )
        hints = ("gamma", "beta", "mean", "variance")
        names = [
            self.weight(array, {0: given.ids}, hint)
            for array, hint in zip(arrays, hints, strict=True)
        ]
        self.norms.append(Norm((names[0], names[1], names[2], names[3]), given.ids))
        for place, maker in enumerate(self.makers):
            if np.array_equal(maker.ids, given.ids):
                self.makers[place] = replace(maker, normed=True)
        return self.on(given, "BatchNormalization", *names, epsilon=1e-5)

    def conv_bn(self, given: Value, out: int, *args: int, **options: Any) -> Value:
        """Conv without bias, BatchNormalization."""
        return self.batch_norm(self.conv(given, out, *args, bias=False, **options))

    def cbr(
        self, given: Value, out: int, *args: int, act: str = "Relu", **options: Any
    ) -> Value:
        """The same and an activation."""
        return self.act(self.conv_bn(given, out, *args, **options), act)

    def gemm(self, given: Value, out: int, *, gate: bool = False) -> Value:
        """torch's Linear on a matrix."""
        ids = self.union.new(out)
        array = self.normal(out, given.width, fan=given.width)
        weight = self.weight(array, {0: ids, 1: given.ids})
        bias = self.weight(self.normal(out, fan=10), {0: ids}, "bias")
        self.make(Maker(weight, 0, ids, bias, gate=gate))
        return Value(self.node("Gemm", [given.name, weight, bias], transB=1), ids)

    def linear(
        self, given: Value, out: int, *, bias: bool = True, gate: bool = False
    ) -> Value:
        """torch's Linear on more than a matrix: MatMul and Add, channels at the end."""
        ids = self.union.new(out)
        array = self.normal(given.width, out, fan=given.width)
        weight = self.weight(array, {0: given.ids, 1: ids})
        made = self.node("MatMul", [given.name, weight])
        name = ""
        if bias:
            name = self.weight(self.normal(out, fan=10), {0: ids}, "bias")
            made = self.node("Add", [name, made])
        self.make(Maker(weight, 1, ids, name, gate=gate))
        return Value(made, ids, given.axis)

    def layer_norm(self, given: Value) -> Value:
        """LayerNormalization over the channels: they all stay.

        Its mean and variance are over all of them: without one, be it zero or
        constant, the others come out different.
        """
        self.freeze(given)
        size = given.width
        gamma = self.weight(self.random.uniform(0.5, 1.5, size), {0: given.ids}, "gamma")
        beta = self.weight(self.normal(size, fan=10), {0: given.ids}, "beta")
        return self.on(given, "LayerNormalization", gamma, beta, axis=-1, epsilon=1e-6)

    # ---- activations ----

    def act(self, given: Value, kind: str) -> Value:
        """An activation by torch's name; each keeps a zero."""
        match kind:
            case "SiLU":
                return self._silu(given)
            case "Relu6":
                bounds = self.scalar(0.0), self.scalar(6.0)
                return self.on(given, "Clip", *bounds)
            case "LeakyRelu":
                return self.on(given, "LeakyRelu", alpha=0.1)
            case "Gelu":
                return self._gelu(given)
        return self.on(given, kind)

    def _silu(self, given: Value) -> Value:
        return self.on(given, "Mul", self.on(given, "Sigmoid").name)

    def _gelu(self, given: Value) -> Value:
        root = self.on(given, "Div", self.scalar(float(np.sqrt(2))))
        erf = self.on(self.on(root, "Erf"), "Add", self.scalar(1.0))
        return self.on(self.on(given, "Mul", erf.name), "Mul", self.scalar(0.5))

    # ---- what joins and parts channels ----

    def add(self, *given: Value) -> Value:
        """The sum of values with the same channels."""
        made = given[0]
        for other in given[1:]:
            self.union.unite(made.ids, other.ids)
            made = self.on(made, "Add", other.name)
        return made

    def mul(self, given: Value, gate: Value) -> Value:
        """`given` times a gate for each of its channels."""
        self.union.unite(given.ids, gate.ids)
        return self.on(given, "Mul", gate.name)

    def concat(self, *given: Value) -> Value:
        """Channels side by side."""
        names = [each.name for each in given]
        made = self.node("Concat", names, axis=given[0].axis)
        ids = np.concatenate([each.ids for each in given])
        return Value(made, ids, given[0].axis)

    def split(self, given: Value, *sizes: int) -> list[Value]:
        """Channels apart; every part keeps one."""
        names = [self.name("split") for _ in sizes]
        inputs = [given.name, self.ints(*sizes)]
        self.nodes.append(helper.make_node("Split", inputs, names, axis=given.axis))
        parts = np.split(given.ids, np.cumsum(sizes)[:-1])
        self.values += parts
        return [
            Value(name, ids, given.axis) for name, ids in zip(names, parts, strict=True)
        ]

    def slice(self, given: Value, start: int, end: int) -> Value:
        """A range of the channels, which keeps one."""
        bounds = self.ints(start), self.ints(end), self.ints(given.axis), self.ints(1)
        made = self.on(given, "Slice", *bounds)
        self.values.append(given.ids[start:end])
        return replace(made, ids=given.ids[start:end])

    # ---- space ----

    def pool(self, given: Value, kernel: int, stride: int, pad: int = 0) -> Value:
        """MaxPool."""
        taps = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
        return self.on(given, "MaxPool", **taps)

    def mean_pool(self, given: Value, kernel: int, stride: int, pad: int = 0) -> Value:
        """torch's AveragePool, which counts the padding.

        A constant that is not zero is then another at the border: the layers behind
        would need it there, so it stays.
        """
        taps = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
        if pad:
            self.rigid.append(given.ids)
        return self.on(given, "AveragePool", count_include_pad=1, **taps)

    def global_pool(self, given: Value) -> Value:
        """GlobalAveragePool."""
        return self.on(given, "GlobalAveragePool")

    def flatten(self, given: Value, space: int = 1) -> Value:
        """[N, C, ...] to [N, C * space]."""
        made = self.on(given, "Flatten", axis=1)
        return replace(made, ids=np.repeat(given.ids, space))

    def reshape(self, given: Value, *dims: int) -> Value:
        """The same axis of channels in another shape; the caller says which."""
        return self.on(given, "Reshape", self.ints(*dims))

    def turn(self, given: Value, *order: int) -> Value:
        """Transpose."""
        made = self.on(given, "Transpose", perm=list(order))
        return replace(made, axis=order.index(given.axis))

    def resize(self, given: Value, factor: int, mode: str = "nearest") -> Value:
        """Twice as large, or more."""
        scales = self.constant(np.array([1, 1, factor, factor], np.float32))
        how = "asymmetric" if mode == "nearest" else "half_pixel"
        floor = {"nearest_mode": "floor"} if mode == "nearest" else {}
        options = {"mode": mode, "coordinate_transformation_mode": how, **floor}
        return self.on(given, "Resize", "", scales, **options)

    # ---- common blocks ----

    def squeeze_excite(self, given: Value, inner: int, gate: str = "Sigmoid") -> Value:
        """Global pool, two 1x1 convolutions, a gate for each channel."""
        seen = self.global_pool(given)
        seen = self.act(self.conv(seen, inner, 1), "Relu")
        seen = self.act(self.conv(seen, given.width, 1, gate=True), gate)
        return self.mul(given, seen)

    def classify(self, given: Value, classes: int = 10) -> None:
        """Global pool, Flatten, Gemm: the head of most classifiers."""
        made = self.gemm(self.flatten(self.global_pool(given)), classes)
        self.output(made, ["N", classes])


Builder = Callable[[int], Net]
