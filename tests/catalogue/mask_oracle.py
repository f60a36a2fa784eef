"""Masks of whole channel groups in a real CNN, and what a shrinker has to take out then.

An oracle: it shares no code with `onnxopt.channels` and works another way. Every channel
of every layer is a number; values carry an array of them along one axis, forward through
the graph in the shapes that ONNX Runtime really gives; numbers that meet are united.
Inputs, outputs and what it does not know freeze theirs. Of the groups that are left free
a share is masked by weights alone, as sparse training does: each masked channel is zero,
or a constant, wherever a layer reads it, so that the layer can do without.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Array = NDArray[Any]
Feed = Mapping[str, Array]
Rule = Callable[[NodeProto], list["Channels"] | None]

ATTEMPTS = 20

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Channels:
    """The channels of a value: one number for each index of `axis`."""

    axis: int
    ids: Ints


@dataclass(frozen=True)
class Layer:
    """A weight by what its axes are; of a depthwise one, `reads` is a single channel."""

    node: NodeProto
    name: str
    out_axis: int
    out: Ints
    in_axis: int
    reads: Ints | None
    bias: str

    @property
    def is_padded(self) -> bool:
        """Whether the border of its output sees fewer taps than the middle."""
        return self.node.op_type == "ConvTranspose" or any(
            _attribute(self.node, "pads", [0])
        )


@dataclass(frozen=True)
class Norm:
    """A BatchNormalization."""

    node: NodeProto
    ids: Ints


@dataclass(frozen=True)
class Shift:
    """A constant with an element for each channel, which is added."""

    name: str
    ids: Ints


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default


# ---- constants, wherever they are ----


def constants(model: ModelProto) -> dict[str, TensorProto]:
    """Initializers and the values of Constant nodes, to be read or changed in place."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = attribute.t
    return found


def count_layers(model: ModelProto) -> int:
    """The elements of all weights of Conv, ConvTranspose, Gemm and MatMul."""
    known = constants(model)
    names = {
        node.input[1]
        for node in model.graph.node
        if node.op_type in LAYERS and node.input[1] in known
    }
    return sum(math.prod(known[name].dims) for name in names)


def count_norms(model: ModelProto) -> int:
    """The elements of all constants that a BatchNormalization reads."""
    known = constants(model)
    norms = [n for n in model.graph.node if n.op_type == "BatchNormalization"]
    return sum(math.prod(known[name].dims) for node in norms for name in node.input[1:5])


# ---- running ----


def session(model: ModelProto) -> Any:
    """The model as it is written, without a single rewrite by ONNX Runtime."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    data = model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def every_value(model: ModelProto, feed: Feed) -> dict[str, Array]:
    """All the values of a run, the inputs and constants with them."""
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    names = [name for node in probe.graph.node for name in node.output if name]
    probe.graph.output.extend(ValueInfoProto(name=name) for name in names)
    values = dict(zip(names, session(probe).run(names, dict(feed)), strict=True))
    known = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {**known, **values, **feed}


# ---- which channels are one ----


class Union:
    """Disjoint sets of channel numbers, some of them frozen."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._frozen: set[int] = set()

    def new(self, count: int) -> Ints:
        """So many channels of their own."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def find(self, number: int) -> int:
        """The number that stands for the set of `number`."""
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def unite(self, one: Ints, two: Ints) -> None:
        """Pair by pair, these are one channel."""
        for left, right in zip(one.tolist(), two.tolist(), strict=True):
            self._parent[self.find(left)] = self.find(right)

    def freeze(self, ids: Iterable[int]) -> None:
        """Let these stay, and all that are one with them."""
        self._frozen.update(int(number) for number in ids)

    def roots(self) -> Ints:
        """For each channel the number of its set."""
        return np.array([self.find(n) for n in range(len(self._parent))], np.int64)

    def frozen(self) -> set[int]:
        """The sets that have to stay."""
        return {self.find(number) for number in self._frozen}


UNARY = {
    "Cast",
    "Clip",
    "Elu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Neg",
    "Relu",
    "Sigmoid",
    "Tanh",
}
POOLS = {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"}
SHAPES = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}


class Walk:
    """One way through the graph: the channels of every value, and what makes them."""

    def __init__(self, model: ModelProto, feed: Feed) -> None:
        self.model = model
        self.union = Union()
        self.layers: list[Layer] = []
        self.norms: list[Norm] = []
        self.shifts: list[Shift] = []
        self.of: dict[str, Channels] = {}
        self._values = every_value(model, feed)
        self._makers = {o: node for node in model.graph.node for o in node.output}
        self._constant = {tensor.name for tensor in model.graph.initializer}
        for name, array in feed.items():
            if array.ndim > 1:
                self._input(name, array.shape)
        for node in model.graph.node:
            self._visit(node)
        for output in model.graph.output:
            self._freeze(output.name)
        self._freeze_shared()

    def _input(self, name: str, shape: Sequence[int]) -> None:
        """The channels of an image are few, on whichever side they are; they stay."""
        axis = 1 if shape[1] <= shape[-1] else len(shape) - 1
        ids = self.union.new(shape[axis])
        self.union.freeze(ids)
        self.of[name] = Channels(axis, ids)

    def _visit(self, node: NodeProto) -> None:
        if all(name in self._constant for name in node.input if name):
            self._constant.update(node.output)
            return
        if node.op_type in LAYERS:
            self._start(node)
        # What a Shape reads may change: the literals that go with it then do, too.
        if node.op_type == "Shape" or not any(name in self.of for name in node.input):
            return
        rule = self._rule(node)
        made = None if rule is None else rule(node)
        if made is None:
            for name in node.input:
                self._freeze(name)
            return
        self.of.update(zip(node.output, made, strict=False))

    def _start(self, node: NodeProto) -> None:
        """What a layer reads has channels, although nothing may be known of them."""
        name = node.input[0]
        if name not in self.of:
            shape = self._shape(name)
            axis = 1 if "Conv" in node.op_type else len(shape) - 1
            self.of[name] = Channels(axis, self.union.new(shape[axis]))
            self._freeze(name)

    def _freeze(self, name: str) -> None:
        if name in self.of:
            self.union.freeze(self.of[name].ids)

    def _rule(self, node: NodeProto) -> Rule | None:
        """None where the operator is not known, or its data has no channels."""
        joins: dict[str, Rule] = {
            **dict.fromkeys(("Add", "Div", "Mul", "Sub"), self._binary),
            "Concat": self._concat,
        }
        if node.op_type in joins:
            return joins[node.op_type]
        rules: dict[str, Rule] = {
            **dict.fromkeys(UNARY, self._unary),
            **dict.fromkeys(POOLS, self._pool),
            **dict.fromkeys(SHAPES, self._reshape),
            "BatchNormalization": self._norm,
            "Conv": self._conv,
            "ConvTranspose": self._conv_transpose,
            "Gemm": self._gemm,
            "MatMul": self._matmul,
            "Pad": self._pad,
            "ReduceMean": self._reduce,
            "Resize": self._resize,
            "Slice": self._slice,
            "Softmax": self._softmax,
            "Split": self._split,
            "Transpose": self._transpose,
        }
        return rules.get(node.op_type) if node.input[0] in self.of else None

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._values[name].shape)

    def _known(self, name: str) -> Array | None:
        return self._values[name] if name in self._constant else None

    # ---- layers ----

    def _conv(self, node: NodeProto) -> list[Channels] | None:
        given, weight = self.of[node.input[0]], node.input[1]
        if given.axis != 1 or weight not in self._constant:
            return None
        groups = _attribute(node, "group", 1)
        outputs, width = self._shape(weight)[:2]
        if width == 1 and groups > 1:
            out, reads = np.repeat(given.ids, outputs // groups), None
        else:
            out = self.union.new(outputs)
            self._alike(out, groups)
            reads = self._alike(given.ids, groups)
        return self._layer(node, 0, out, 1, reads)

    def _alike(self, ids: Ints, groups: int) -> Ints:
        """The channels of the first of `groups`: those of the others go with them."""
        rows = ids.reshape(groups, -1)
        for row in rows[1:]:
            self.union.unite(rows[0], row)
        return np.asarray(rows[0])

    def _conv_transpose(self, node: NodeProto) -> list[Channels] | None:
        given, weight = self.of[node.input[0]], node.input[1]
        is_plain = _attribute(node, "group", 1) == 1 and weight in self._constant
        if given.axis != 1 or not is_plain:
            return None
        out = self.union.new(self._shape(weight)[1])
        return self._layer(node, 1, out, 0, given.ids)

    def _gemm(self, node: NodeProto) -> list[Channels] | None:
        given = self.of[node.input[0]]
        is_known = node.input[1] in self._constant and not _attribute(node, "transA", 0)
        if given.axis != 1 or not is_known:
            return None
        out_axis = 0 if _attribute(node, "transB", 0) else 1
        out = self.union.new(self._shape(node.input[1])[out_axis])
        return self._layer(node, out_axis, out, 1 - out_axis, given.ids)

    def _matmul(self, node: NodeProto) -> list[Channels] | None:
        given = self.of[node.input[0]]
        if node.input[1] not in self._constant:
            return None
        shape = self._shape(node.input[1])
        if len(shape) != 2 or given.axis != len(self._shape(node.input[0])) - 1:
            return None
        return self._layer(node, 1, self.union.new(shape[1]), 0, given.ids)

    def _layer(
        self, node: NodeProto, out_axis: int, out: Ints, in_axis: int, reads: Ints | None
    ) -> list[Channels]:
        bias = node.input[2] if len(node.input) > 2 else ""
        layer = Layer(node, node.input[1], out_axis, out, in_axis, reads, bias)
        self.layers.append(layer)
        last = len(self._shape(node.output[0])) - 1
        return [Channels(1 if "Conv" in node.op_type else last, out)]

    def _norm(self, node: NodeProto) -> list[Channels] | None:
        given = self.of[node.input[0]]
        if given.axis != 1 or not all(name in self._constant for name in node.input[1:]):
            return None
        self.norms.append(Norm(node, given.ids))
        return [given]

    # ---- what hands channels on ----

    def _unary(self, node: NodeProto) -> list[Channels] | None:
        return [self.of[node.input[0]]]

    def _pool(self, node: NodeProto) -> list[Channels] | None:
        given = self.of[node.input[0]]
        return [given] if given.axis == 1 and len(node.output) == 1 else None

    def _reduce(self, node: NodeProto) -> list[Channels] | None:
        given, rank = self.of[node.input[0]], len(self._shape(node.input[0]))
        axes = self._list(node, "axes", 1)
        if axes is None or given.axis in {axis % rank for axis in axes}:
            return None
        if _attribute(node, "keepdims", 1):
            return [given]
        before = sum(axis % rank < given.axis for axis in axes)
        return [Channels(given.axis - before, given.ids)]

    def _list(self, node: NodeProto, name: str, index: int) -> list[int] | None:
        """An attribute that became an input in later opsets."""
        if len(node.input) > index and node.input[index]:
            known = self._known(node.input[index])
            return None if known is None else known.tolist()
        found = _attribute(node, name, None)
        return None if found is None else list(found)

    def _resize(self, node: NodeProto) -> list[Channels] | None:
        given = self.of[node.input[0]]
        if self._shape(node.output[0])[given.axis] != len(given.ids):
            return None
        return [given]

    def _pad(self, node: NodeProto) -> list[Channels] | None:
        """Zeros only, and not between channels."""
        given, rank = self.of[node.input[0]], len(self._shape(node.input[0]))
        pads = self._list(node, "pads", 1)
        value = self._known(node.input[2]) if len(node.input) > 2 else np.zeros(1)
        if pads is None or value is None or value.any():
            return None
        is_ours = pads[given.axis] or pads[given.axis + rank]
        return None if is_ours or _attribute(node, "value", 0.0) else [given]

    def _transpose(self, node: NodeProto) -> list[Channels] | None:
        given, rank = self.of[node.input[0]], len(self._shape(node.input[0]))
        order = _attribute(node, "perm", list(range(rank))[::-1])
        return [Channels(list(order).index(given.axis), given.ids)]

    def _softmax(self, node: NodeProto) -> list[Channels] | None:
        given, rank = self.of[node.input[0]], len(self._shape(node.input[0]))
        axis = _attribute(node, "axis", -1) % rank
        is_one = any(o.version >= 13 for o in self.model.opset_import if not o.domain)
        return [given] if is_one and axis != given.axis else None

    def _reshape(self, node: NodeProto) -> list[Channels] | None:
        """Move the numbers as the values are moved, and see on which axis they end."""
        given = self.of[node.input[0]]
        if len(given.ids) == 1:
            return None
        dims = self._shape(node.input[0])
        wide = [-1 if axis == given.axis else 1 for axis in range(len(dims))]
        labels = np.broadcast_to(given.ids.reshape(wide), dims)
        labels = labels.reshape(self._shape(node.output[0]))
        for axis, size in enumerate(labels.shape):
            rows = np.moveaxis(labels, axis, 0).reshape(size, -1)
            if (rows == rows[:, :1]).all():
                return [Channels(axis, rows[:, 0].copy())]
        return None

    # ---- what joins and parts them ----

    def _binary(self, node: NodeProto) -> list[Channels] | None:
        """Broadcasting counts axes from the right; nothing is divided by a channel."""
        if node.op_type == "Div" and node.input[1] in self.of:
            return None
        rank = len(self._shape(node.output[0]))
        found = [self._operand(name, rank) for name in node.input]
        carried = [each for each in found if each is not None]
        axes = {each.axis for each in carried}
        width = max(len(each.ids) for each in carried)
        if len(axes) != 1 or not self._fit(node, carried[0].axis, width):
            return None
        whole = [each.ids for each in carried if len(each.ids) == width]
        for ids in whole[1:]:
            self.union.unite(whole[0], ids)
        for each in carried:
            if len(each.ids) < width:
                self.union.freeze(each.ids)
        return [Channels(carried[0].axis, whole[0])]

    def _operand(self, name: str, rank: int) -> Channels | None:
        given = self.of.get(name)
        if given is None:
            return None
        return Channels(given.axis + rank - len(self._shape(name)), given.ids)

    def _fit(self, node: NodeProto, axis: int, width: int) -> bool:
        """Whether the other operands are constants that can be cut; notes shifts."""
        rank = len(self._shape(node.output[0]))
        for name in node.input:
            if name in self.of:
                continue
            if name not in self._constant:
                return False
            dims = (1,) * (rank - len(self._shape(name))) + self._shape(name)
            if math.prod(dims) not in (1, dims[axis]):
                return False
            if dims[axis] == width > 1 and node.op_type in ("Add", "Sub"):
                ids = next(self.of[n].ids for n in node.input if n in self.of)
                self.shifts.append(Shift(self._source(name), ids))
        return True

    def _source(self, name: str) -> str:
        """The constant that a constant is a reshaped form of."""
        while name in self._makers and self._makers[name].op_type in SHAPES:
            name = self._makers[name].input[0]
        return name

    def _concat(self, node: NodeProto) -> list[Channels] | None:
        given = [self.of.get(name) for name in node.input]
        carried = [each for each in given if each is not None]
        axis = _attribute(node, "axis", 1) % len(self._shape(node.output[0]))
        if len(carried) < len(given) or len({each.axis for each in carried}) != 1:
            return None
        if axis == carried[0].axis:
            return [Channels(axis, np.concatenate([each.ids for each in carried]))]
        for each in carried[1:]:
            self.union.unite(carried[0].ids, each.ids)
        return [carried[0]]

    def _split(self, node: NodeProto) -> list[Channels] | None:
        given, rank = self.of[node.input[0]], len(self._shape(node.input[0]))
        if _attribute(node, "axis", 0) % rank != given.axis:
            return [given] * len(node.output)
        sizes = [self._shape(name)[given.axis] for name in node.output]
        parts = np.split(given.ids, np.cumsum(sizes)[:-1])
        return [Channels(given.axis, part) for part in parts]

    def _slice(self, node: NodeProto) -> list[Channels] | None:
        given, rank = self.of[node.input[0]], len(self._shape(node.input[0]))
        starts, ends = self._list(node, "starts", 1), self._list(node, "ends", 2)
        if starts is None or ends is None:
            return None
        axes = self._list(node, "axes", 3) or list(range(len(starts)))
        steps = self._list(node, "steps", 4) or [1] * len(starts)
        ids = given.ids
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            if axis % rank == given.axis:
                if step < 1:
                    return None
                ids = ids[start:end:step]
        return [Channels(given.axis, ids)]

    # ---- one constant, several readers ----

    def _freeze_shared(self) -> None:
        """A constant that is masked may have one reader: another would see the mask."""
        written = [
            *((name, layer.out) for layer in self.layers for name in _rows(layer)),
            *((name, norm.ids) for norm in self.norms for name in norm.node.input[1:4]),
            *((shift.name, shift.ids) for shift in self.shifts),
        ]
        uses = Counter(name for node in self.model.graph.node for name in node.input)
        for name, ids in written:
            if uses[name] > 1:
                self.union.freeze(ids)


def _rows(layer: Layer) -> Iterator[str]:
    yield layer.name
    if layer.bias:
        yield layer.bias


# ---- choosing ----


def groups(walk: Walk) -> list[Ints]:
    """The free sets, together where one layer makes them or they meet in a sum."""
    roots, frozen = walk.union.roots(), walk.union.frozen()
    bundles = Union()
    bundles.new(len(roots))
    for layer in walk.layers:
        own = roots[layer.out]
        bundles.unite(own[:-1], own[1:])
    found: dict[int, list[int]] = {}
    for root in np.unique(roots[np.concatenate([each.out for each in walk.layers])]):
        if int(root) not in frozen:
            found.setdefault(bundles.find(int(root)), []).append(int(root))
    return [np.array(members, np.int64) for members in found.values()]


def choose(walk: Walk, share: float, random: np.random.Generator) -> Mask:
    """Which channels are masked: of every group a share, of every value never all."""
    roots = walk.union.roots()
    masked = np.zeros(len(roots), bool)
    for members in groups(walk):
        masked[random.permutation(members)[: int(share * len(members))]] = True
    values = [roots[each.ids] for each in walk.of.values() if len(each.ids)]
    while whole := [each for each in values if masked[each].all()]:
        masked[whole[0][0]] = False
    return np.asarray(masked[roots])


# ---- masking ----


@dataclass
class Writer:
    """Changes of constants; each is written back once."""

    known: dict[str, TensorProto]
    arrays: dict[str, Array] = field(default_factory=dict)

    def zero(self, name: str, dead: Mask, axis: int = 0) -> None:
        """Zero these indices of an axis of a constant."""
        if name not in self.arrays:
            self.arrays[name] = numpy_helper.to_array(self.known[name]).copy()
        np.moveaxis(self.arrays[name], axis, 0)[dead] = 0

    def zero_flat(self, name: str, dead: Mask) -> None:
        """The same of one that has an element for each channel, whatever its shape."""
        axes = self.known[name].dims
        self.zero(name, dead, int(np.argmax(axes)))

    def scale(self, name: str, factor: float) -> None:
        """Make up for the terms that a sum has lost: its variance stays what it was."""
        array = self.arrays[name]
        self.arrays[name] = np.asarray(array * factor, array.dtype)

    def write(self) -> None:
        """Put them into the model."""
        for name, array in self.arrays.items():
            tensor = self.known[name]
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


@dataclass(frozen=True)
class Masked:
    """A masked model; how many parameters of its layers and norms have to go."""

    model: ModelProto
    walk: Walk
    masked: Mask
    layers: int
    norms: int

    def kept(self, name: str) -> tuple[int, Mask] | None:
        """The axis of a value's channels and which of them stay; None where unknown."""
        found = self.walk.of.get(name)
        return None if found is None else (found.axis, ~self.masked[found.ids])


def mask(source: ModelProto, feeds: Sequence[Feed], share: float, seed: int) -> Masked:
    """Mask `share` of each free group, so that the network still answers to its input.

    `feeds`: two of one shape, with at least two samples, so that no axis has size 1 that
    is wider elsewhere. Of the masks that `seed` gives, the first is taken that leaves
    the network alive.
    """
    walk = Walk(source, feeds[0])
    for attempt in range(ATTEMPTS):
        random = np.random.default_rng([seed, attempt])
        masked = choose(walk, share, random)
        model = _written(walk, masked, random)
        if _lives(walk, model, feeds):
            layers = sum(_goes(walk, layer, masked) for layer in walk.layers)
            norms = sum(4 * int(masked[norm.ids].sum()) for norm in walk.norms)
            return Masked(model, walk, masked, layers, norms)
    raise AssertionError(f"no mask of {share} leaves the network alive")


def _lives(walk: Walk, model: ModelProto, feeds: Sequence[Feed]) -> bool:
    """Whether nearly every value depends on the input, and the outputs are not tiny.

    In a network that computes the same whatever it is given, no wrong edit would show.
    """
    one, two = (every_value(model, feed) for feed in feeds[:2])
    answers = []
    for name in walk.of:
        change, size = np.abs(one[name] - two[name]).max(), np.abs(one[name]).max()
        answers.append(change > 1e-3 * size)
    outputs = [np.abs(one[output.name]).max() for output in model.graph.output]
    return float(np.mean(answers)) > 0.9 and min(outputs) > 1e-2


def _goes(walk: Walk, layer: Layer, masked: Mask) -> int:
    """How many elements of a weight have a row or a column that goes."""
    dims = [int(size) for size in constants(walk.model)[layer.name].dims]
    kept = int((~masked[layer.out]).sum())
    if layer.reads is not None:
        kept *= int((~masked[layer.reads]).sum())
        kept *= math.prod(dims) // (dims[layer.out_axis] * dims[layer.in_axis])
    else:
        kept *= math.prod(dims) // dims[layer.out_axis]
    return math.prod(dims) - kept


def _written(walk: Walk, masked: Mask, random: np.random.Generator) -> ModelProto:
    """Zero rows and shifts; where a norm follows, its scale instead, by turns."""
    model = ModelProto()
    model.CopyFrom(walk.model)
    writer = Writer(constants(model))
    by_scale = {}
    for norm in walk.norms:
        dead = masked[norm.ids]
        scale = dead & (random.random(len(dead)) < 0.5)
        by_scale[norm.node.output[0]] = scale
        gamma, beta, mean = norm.node.input[1:4]
        writer.zero(gamma, scale)
        writer.zero(beta, dead)
        writer.zero(mean, dead & ~scale)
    for layer in walk.layers:
        dead = masked[layer.out]
        norm_after = _norm_after(model, layer.node)
        if norm_after is not None:
            dead = dead & ~by_scale[norm_after]
        writer.zero(layer.name, dead, layer.out_axis)
        if layer.bias:
            writer.zero_flat(layer.bias, dead)
        if layer.reads is not None:
            writer.scale(layer.name, float((~masked[layer.reads]).mean()) ** -0.5)
    for shift in walk.shifts:
        writer.zero_flat(shift.name, masked[shift.ids])
    writer.write()
    return model


def _norm_after(model: ModelProto, node: NodeProto) -> str | None:
    """The output of the norm that alone reads a layer, but for a bias in between."""
    readers = [n for n in model.graph.node if node.output[0] in n.input]
    if len(readers) != 1 or readers[0].op_type not in ("Add", "BatchNormalization"):
        return None
    reader = readers[0]
    if reader.op_type == "BatchNormalization":
        return str(reader.output[0])
    known = constants(model)
    is_bias = any(name in known for name in reader.input)
    return _norm_after(model, reader) if is_bias else None
