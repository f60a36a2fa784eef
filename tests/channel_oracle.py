"""Random small networks in which the fate of every channel is known by construction.

The builder decides, weight by weight, which channels are zero or constant and which
inputs a layer does not read; it keeps a number for each channel of each value and unites
the numbers of those that can only go together. It shares no code with `onnxopt.channels`:
what a network has to lose is worked out here from those notes alone, as a bound. Where
the notes leave a choice (which constant carries the others across a padding), each
choice counts as one channel that may stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

Array = NDArray[Any]
Kind = float | None
"""What a channel is: a constant (0.0: zero), or None where it may be anything."""
Dims = tuple[int | str, ...]
Constants = Literal["bias", "carrier", "stay"]
"""What a layer does with constant inputs: they go into its bias, all but one go, or
nothing is said."""


# ---- what is known ----


@dataclass(frozen=True)
class Value:
    """A value with channels on `axis`: their numbers, and what they are."""

    name: str
    ids: tuple[int, ...]
    kinds: tuple[Kind, ...]
    dims: Dims
    axis: int = 1

    @property
    def space(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.dims[2]), int(self.dims[3])


@dataclass(frozen=True)
class Reader:
    """A layer: which of its outputs reads which input ([outputs, inputs])."""

    inputs: tuple[int, ...]
    kinds: tuple[Kind, ...]
    outputs: tuple[int, ...]
    reads: NDArray[np.bool_]
    constants: Constants
    groups: int = 1


@dataclass(frozen=True)
class Part:
    """The channels `ids` along one axis of the constant that a node reads.

    The node is an `op_type`, the last one before `output`: an Add may have come in
    between. The constant is its input `index`, perhaps through QuantizeLinear and
    DequantizeLinear.
    """

    output: str
    op_type: str
    index: int
    axis: int
    ids: tuple[int, ...]


@dataclass
class Truth:
    """The notes: united numbers, readers, and what is barred or not certain."""

    parent: list[int] = field(default_factory=list)
    stays: set[int] = field(default_factory=set)
    doubt: set[int] = field(default_factory=set)
    readers: list[Reader] = field(default_factory=list)
    values: list[tuple[int, ...]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    def new(self, count: int) -> tuple[int, ...]:
        """Numbers for new channels."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return tuple(range(start, start + count))

    def root(self, number: int) -> int:
        """The one number that stands for all it is united with."""
        while self.parent[number] != number:
            number = self.parent[number]
        return number

    def unite(self, first: Iterable[int], second: Iterable[int]) -> None:
        """Pair by pair, these go together."""
        for one, two in zip(first, second, strict=True):
            self.parent[self.root(one)] = self.root(two)

    def roots(self, numbers: Iterable[int]) -> set[int]:
        """The roots of many."""
        return {self.root(number) for number in numbers}


class Fate:
    """What goes for certain (`gone`, roots), and of which sets one more may stay."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        barred = truth.roots(truth.stays | truth.doubt)
        self.gone = truth.roots(range(len(truth.parent))) - barred
        self.choices: set[frozenset[int]] = set()
        before = -1
        while before != len(self.gone):
            before = len(self.gone)
            for reader in truth.readers:
                self.gone -= self._needed(reader)
                self.gone -= self._unbalanced(reader)
            self.choices = self._choices()

    def left(self, part: Part) -> int:
        """At most how many channels of a part are left."""
        roots = [self.truth.root(number) for number in part.ids]
        kept = sum(root not in self.gone for root in roots)
        more = sum(max(roots.count(root) for root in some) for some in self.choices)
        return min(kept + more, len(roots))

    def _read(self, reader: Reader) -> NDArray[np.bool_]:
        """For each input whether an output that may stay reads it."""
        open_ = {root for some in self.choices for root in some}
        sure = self.gone - open_
        lives = [self.truth.root(number) not in sure for number in reader.outputs]
        return np.asarray(reader.reads[lives].any(axis=0))

    def _needed(self, reader: Reader) -> set[int]:
        """The inputs that the layer cannot do without."""
        found = set()
        for number, kind, read in zip(
            reader.inputs, reader.kinds, self._read(reader), strict=True
        ):
            is_free = kind == 0.0 or not read
            if not is_free and (kind is None or reader.constants == "stay"):
                found.add(self.truth.root(number))
        return found

    def _unbalanced(self, reader: Reader) -> set[int]:
        """A grouped layer loses whole groups, and equally many of the others."""
        if reader.groups == 1:
            return set()
        sides = [
            np.array([self.truth.root(number) for number in side]).reshape(
                reader.groups, -1
            )
            for side in (reader.inputs, reader.outputs)
        ]
        masks = [np.isin(side, list(self.gone)) for side in sides]
        rest = ~(masks[0].all(axis=1) & masks[1].all(axis=1))
        found: set[int] = set()
        for side, mask in zip(sides, masks, strict=True):
            counts = mask[rest].sum(axis=1)
            if len(set(counts.tolist())) > 1 or mask[rest].all(axis=1).any():
                found.update(side[rest].reshape(-1).tolist())
        for some in self.choices:
            if some & set(np.concatenate([s.reshape(-1) for s in sides]).tolist()):
                found |= some
        return found & self.gone

    def _choices(self) -> set[frozenset[int]]:
        found = {frozenset(self._carriers(reader)) for reader in self.truth.readers}
        for ids in self.truth.values:
            roots = self.truth.roots(ids)
            if roots <= self.gone:
                found.add(frozenset(roots))
        return {some for some in found if some}

    def _carriers(self, reader: Reader) -> set[int]:
        """The constants of which one has to stay for the others."""
        if reader.constants != "carrier":
            return set()
        pairs = zip(reader.inputs, reader.kinds, self._read(reader), strict=True)
        roots = {
            self.truth.root(number)
            for number, kind, read in pairs
            if read and kind is not None and kind != 0.0
        }
        if roots & self.truth.roots(self.truth.stays):
            return set()
        return roots & self.gone


@dataclass(frozen=True)
class Network:
    """A model, and for each part of its constants how many channels it had and keeps.

    `step` is the largest step of its quantized activations, 0.0 where it has none.
    """

    model: ModelProto
    expected: tuple[tuple[Part, int, int], ...]
    step: float

    @property
    def has_to_lose(self) -> int:
        """How many channels have to go, counted in every constant."""
        return sum(size - left for _, size, left in self.expected)


def size_of(model: ModelProto, part: Part) -> int:
    """How many channels of a part a model has; 0 where its node is not there."""
    makers = {name: node for node in model.graph.node for name in node.output}
    known = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    node = makers.get(part.output)
    while node is not None and node.op_type != part.op_type and node.op_type == "Add":
        node = next((makers[name] for name in node.input if name in makers), None)
    if node is None or node.op_type != part.op_type:
        return 0
    name = node.input[part.index]
    while name not in known:
        maker = makers[name]
        if maker.op_type == "Constant":
            return int(maker.attribute[0].t.dims[part.axis])
        name = maker.input[0]
    return int(known[name][part.axis])


# ---- building ----


@dataclass
class Builder:
    """Grows one network."""

    random: Random
    opset: int
    batch: int | str
    truth: Truth = field(default_factory=Truth)
    nodes: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    step: float = 0.0
    count: int = 0
    hot: int = 0

    def __post_init__(self) -> None:
        """NumPy draws the weights."""
        self.rng = np.random.default_rng(self.random.randrange(1 << 32))

    def name(self, start: str = "t") -> str:
        """A new name."""
        self.count += 1
        return f"{start}{self.count}"

    def chance(self, probability: float) -> bool:
        """True that often."""
        return self.random.random() < probability

    def constant(self, array: Array, start: str = "w") -> str:
        """An initializer, or now and then a Constant node."""
        name = self.name(start)
        if array.nbytes < 4096 and self.chance(0.1):
            value = numpy_helper.from_array(array)
            self.nodes.append(helper.make_node("Constant", [], [name], value=value))
        else:
            self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def floats(self, values: Any) -> str:
        """A constant of float32."""
        return self.constant(np.asarray(values, np.float32))

    def ints(self, *values: int) -> str:
        """A constant vector of int64."""
        return self.constant(np.array(values, np.int64), "s")

    def node(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node with one output."""
        name = self.name()
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        self.seen.update(inputs)
        return name

    def made(self, value: Value) -> Value:
        """Note a value, for others to read."""
        self.truth.values.append(value.ids)
        self.values.append(value)
        return value

    def like(self, given: Value, name: str, kinds: Iterable[Kind]) -> Value:
        """A value with the channels of another, that are something else now."""
        return self.made(replace(given, name=name, kinds=tuple(kinds)))

    def note(self, output: str, index: int, axis: int, ids: Sequence[int]) -> None:
        """These channels of a constant can be counted afterwards."""
        op_type = next(n.op_type for n in self.nodes if output in n.output)
        self.truth.parts.append(Part(output, op_type, index, axis, tuple(ids)))

    def image(self) -> Value:
        """A value to go on from: mostly the last one."""
        images = [v for v in self.values if len(v.dims) == 4 and v.axis == 1]
        return images[-1] if self.chance(0.75) else self.random.choice(images)

    def amount(self) -> float:
        """A constant that is not zero."""
        return float(
            np.float32(self.random.choice([-1, 1, 1]) * self.random.uniform(0.3, 1.5))
        )


# ---- weights with known rows and columns ----


def matrix(
    b: Builder, outputs: int, given: Value, taps: tuple[int, ...], groups: int = 1
) -> Array:
    """A weight [outputs, inputs / groups, *taps] of which some columns are zero."""
    inputs = len(given.ids) // groups
    spread = math.sqrt(inputs * math.prod(taps))
    made = b.rng.uniform(0.3, 1.5, (outputs, inputs, *taps)) / spread
    made *= b.rng.choice([-1, 1], made.shape)
    if inputs > 1:
        for column in range(inputs):
            if b.chance(0.1):
                made[:, column] = 0
    return np.asarray(made, np.float32)


def mask(b: Builder, weight: Array, bias: Array | None, given: Value) -> None:
    """Make some outputs zero or constant; at least one is left as it is."""
    left = b.random.randrange(len(weight))
    dead = [kind is not None for kind in given.kinds]
    for row in range(len(weight)):
        if row == left:
            continue
        draw = b.random.random()
        if draw < 0.4:
            weight[row] = 0
            if bias is not None:
                bias[row] = b.amount() if draw < 0.2 else 0
        elif draw < 0.5 and any(dead) and weight.shape[1] == len(dead):
            weight[row, ~np.array(dead)] = 0  # reads only what is dead


def mixed(
    weight: Array, bias: Array | None, given: Value, groups: int, is_padded: bool
) -> tuple[NDArray[np.bool_], tuple[Kind, ...]]:
    """What each output reads [outputs, inputs], and what it is."""
    outputs, inputs = len(weight), len(given.ids)
    flat = weight.reshape(outputs, weight.shape[1], -1).astype(np.float64)
    reads = np.zeros((outputs, inputs), bool)
    sums = np.zeros((outputs, inputs))
    for row in range(outputs):
        start = row * groups // outputs * flat.shape[1]
        reads[row, start : start + flat.shape[1]] = (flat[row] != 0).any(axis=1)
        sums[row, start : start + flat.shape[1]] = flat[row].sum(axis=1)
    kinds: list[Kind] = []
    for row in range(outputs):
        live = [i for i in range(inputs) if reads[row, i] and given.kinds[i] != 0.0]
        total = 0.0 if bias is None else float(bias[row])
        if any(given.kinds[i] is None for i in live) or (live and is_padded):
            kinds.append(None)
        else:
            kinds.append(total + sum(sums[row, i] * (given.kinds[i] or 0) for i in live))
    return reads, tuple(kinds)


@dataclass
class Stored:
    """A weight as the model holds it: `array` is what it amounts to."""

    name: str
    array: Array
    scale: Array | None = None


def store(b: Builder, array: Array, kind: str, axis: int = 0) -> Stored:
    """As floats, as integers to dequantize, or as floats that go through both."""
    if kind == "float":
        return Stored(b.floats(array), array)
    per_axis = b.opset >= 13 and b.chance(0.6)
    count = array.shape[axis]
    step = max(float(np.abs(array).max()), 1e-3) / 100
    scale: Array = np.full(count if per_axis else (), step, np.float32)
    if per_axis:
        scale = (scale * b.rng.uniform(0.8, 1.2, count)).astype(np.float32)
    shape = [1] * array.ndim
    shape[axis] = -1
    wide = scale.reshape(shape) if per_axis else scale
    codes = np.clip(np.rint(array / wide), -128, 127).astype(np.int8)
    attributes = {"axis": axis} if per_axis else {}
    zero = b.constant(np.zeros(scale.shape, np.int8))
    if kind == "codes":
        given = b.constant(_some_scales_zero(b, codes, scale, axis))
        made = b.node("DequantizeLinear", [given, b.floats(scale), zero], **attributes)
    else:
        name = b.floats(scale)
        coded = b.node("QuantizeLinear", [b.floats(array), name, zero], **attributes)
        made = b.node("DequantizeLinear", [coded, name, zero], **attributes)
    wide = scale.reshape(shape) if per_axis else scale
    return Stored(made, np.asarray(codes * wide, np.float32), scale)


def _some_scales_zero(b: Builder, codes: Array, scale: Array, axis: int) -> Array:
    """Where a row is zero, its scale may be, whatever its codes are then."""
    if scale.ndim and b.chance(0.5):
        rows = np.moveaxis(codes, axis, 0)
        for row in range(len(rows)):
            if not rows[row].any():
                rows[row] = b.random.randrange(1, 5)
                scale[row] = 0
    return codes


# ---- convolutions ----

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel": 1},
    {"kernel": 1},
    {"kernel": 1, "strides": [2, 2]},
    {"kernel": 1, "pads": [1, 1, 1, 1]},
    {"kernel": 1, "auto_pad": "SAME_UPPER"},
    {"kernel": 3},
    {"kernel": 3, "auto_pad": "VALID"},
    {"kernel": 3, "pads": [1, 1, 1, 1]},
    {"kernel": 3, "pads": [1, 1, 1, 1]},
    {"kernel": 3, "pads": [1, 1, 1, 1], "strides": [2, 2]},
    {"kernel": 3, "pads": [0, 0, 1, 1], "strides": [2, 2]},
    {"kernel": 3, "pads": [2, 0, 0, 1]},
    {"kernel": 3, "pads": [2, 2, 2, 2], "dilations": [2, 2]},
    {"kernel": 3, "auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"kernel": 3, "auto_pad": "SAME_LOWER"},
]
SAME = [g for g in GEOMETRIES if g in ({"kernel": 1}, {"kernel": 3, "pads": [1] * 4})]


def out_size(size: int, geometry: dict[str, Any], axis: int) -> int:
    """How many positions a convolution or pool has along an axis."""
    stride: int = geometry.get("strides", [1, 1])[axis]
    if geometry.get("auto_pad", "").startswith("SAME"):
        return -(-size // stride)
    pads: list[int] = geometry.get("pads", [0] * 4)
    reach: int = (geometry["kernel"] - 1) * geometry.get("dilations", [1, 1])[axis] + 1
    return (size + pads[axis] + pads[axis + 2] - reach) // stride + 1


def fitting(
    b: Builder, given: Value, choices: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A geometry that leaves something of the image."""
    found = [
        geometry
        for geometry in choices
        if all(
            out_size(size, geometry, axis) > 0 for axis, size in enumerate(given.space)
        )
    ]
    return b.random.choice(found)


def is_padded(geometry: dict[str, Any]) -> bool:
    """Whether taps can fall outside."""
    same = geometry.get("auto_pad", "").startswith("SAME") and geometry["kernel"] > 1
    return same or any(geometry.get("pads", []))


def attributes_of(geometry: dict[str, Any]) -> dict[str, Any]:
    """As the operator takes them."""
    made = {key: value for key, value in geometry.items() if key != "kernel"}
    return {**made, "kernel_shape": [geometry["kernel"]] * 2}


def conv(
    b: Builder,
    given: Value,
    outputs: int,
    geometry: dict[str, Any],
    *,
    groups: int = 1,
    masked: bool = True,
    kind: str = "float",
) -> Value:
    """A convolution, some outputs of which are zero or constant if `masked`."""
    weight = matrix(b, outputs, given, (geometry["kernel"],) * 2, groups)
    bias = _bias(b, outputs) if b.chance(0.7) else None
    if masked:
        mask(b, weight, bias, given)
    stored = store(b, weight, kind)
    inputs = [given.name, stored.name]
    if bias is not None and kind == "codes" and b.chance(0.5):
        name, bias = _coarse(b, bias)
        inputs.append(name)
        kind = "coarse"
    elif bias is not None:
        inputs.append(b.floats(bias))
    extra = {"group": groups} if groups > 1 else {}
    name = b.node("Conv", inputs, **attributes_of(geometry), **extra)
    return _conv_made(b, name, given, stored.array, bias, geometry, groups, kind)


def _bias(b: Builder, outputs: int) -> Array:
    return b.rng.uniform(-0.5, 0.5, outputs).astype(np.float32)


def _coarse(b: Builder, bias: Array) -> tuple[str, Array]:
    """A bias as integers of a step of its own: what else is added is not among them."""
    step = np.float32(b.random.uniform(0.1, 0.3))
    codes = np.rint(bias / step).astype(np.int32)
    name = b.node("DequantizeLinear", [b.constant(codes), b.floats(step)])
    return name, np.asarray(codes * step, np.float32)


def _conv_made(
    b: Builder,
    name: str,
    given: Value,
    weight: Array,
    bias: Array | None,
    geometry: dict[str, Any],
    groups: int,
    kind: str,
) -> Value:
    padded = is_padded(geometry)
    reads, kinds = mixed(weight, bias, given, groups, padded)
    ids = b.truth.new(len(weight))
    space = [out_size(size, geometry, axis) for axis, size in enumerate(given.space)]
    dims: Dims = (given.dims[0], len(weight), *space)
    b.note(name, 1, 0, ids)
    if groups > 1 and groups == len(given.ids):
        times = len(weight) // groups
        b.truth.unite(ids, [given.ids[row // times] for row in range(len(weight))])
    else:
        way: Constants = "stay" if kind == "coarse" else "bias"
        if padded:
            way = "carrier" if groups == 1 and kind == "float" else "stay"
        b.truth.readers.append(Reader(given.ids, given.kinds, ids, reads, way, groups))
        if groups == 1:
            b.note(name, 1, 1, given.ids)
    return b.made(Value(name, ids, kinds, dims))


def convolution(b: Builder) -> None:
    """A convolution, what normalizes it, and an activation."""
    given = b.image()
    geometry = fitting(b, given, GEOMETRIES)
    has_norm = b.chance(0.4)
    outputs = b.random.choice([4, 5, 6, 7, 8, 9, 10, 12])
    kind = b.random.choice(["float"] * 4 + ["codes", "both"])
    masked = not has_norm or b.chance(0.3)
    made = conv(b, given, outputs, geometry, masked=masked, kind=kind)
    if has_norm:
        made = norm(b, made)
    if b.chance(0.7):
        activation(b, made)


def border(b: Builder) -> None:
    """Constants in front of a padding, behind which they differ at the border."""
    given = b.image()
    live, dead = b.random.choice([3, 5, 8, 8]), b.random.randrange(2, 6)
    weight = matrix(b, live + dead, given, (1, 1))
    bias = _bias(b, live + dead)
    for row in b.random.sample(range(live + dead), dead):
        weight[row], bias[row] = 0, b.amount()
    name = b.node("Conv", [given.name, b.floats(weight), b.floats(bias)])
    made = _conv_made(b, name, given, weight, bias, {"kernel": 1}, 1, "float")
    padded = [geometry for geometry in GEOMETRIES if is_padded(geometry)]
    draw = b.random.random()
    if draw < 0.3:
        quantized_layer(b, made, padded)
    elif draw < 0.5:
        pooling(b, made)
    else:
        made = conv(b, made, b.random.randrange(4, 9), fitting(b, made, padded))
        if b.chance(0.3):
            norm(b, made)


def grouped(b: Builder) -> None:
    """Two groups behind a layer of its own, often with as many dead in each."""
    given = conv(b, b.image(), b.random.choice([4, 6, 8]), {"kernel": 1}, masked=False)
    given = _evenly_dead(b, given) if b.chance(0.7) else norm(b, given)
    outputs = b.random.choice([4, 6, 8])
    masked = b.chance(0.5)
    geometry = fitting(b, given, GEOMETRIES)
    made = conv(b, given, outputs, geometry, groups=2, masked=masked)
    if not masked:
        _evenly_dead(b, made)


def _evenly_dead(b: Builder, given: Value) -> Value:
    """A mask that multiplies the same channels of both halves by zero."""
    half = np.ones(len(given.ids) // 2)
    half[b.random.sample(range(len(half)), b.random.randrange(1, len(half)))] = 0
    return masking(b, given, np.tile(half, 2))


def depthwise(b: Builder) -> None:
    """Each channel by itself, or twice."""
    given = b.image()
    count = len(given.ids)
    if count < 2:
        return
    times = b.random.choice([1, 1, 2]) if count <= 6 else 1
    geometry = fitting(b, given, GEOMETRIES)
    kind = b.random.choice(["float", "float", "codes"])
    made = conv(b, given, count * times, geometry, groups=count, kind=kind)
    if b.chance(0.4):
        norm(b, made)


def norm(b: Builder, given: Value) -> Value:
    """BatchNormalization; some channels are scaled by zero."""
    count = len(given.ids)
    gamma, mean = b.rng.uniform(0.5, 1.5, count), b.rng.uniform(-0.5, 0.5, count)
    beta, variance = b.rng.uniform(-0.5, 0.5, count), b.rng.uniform(0.5, 2.0, count)
    left = b.random.randrange(count)
    for channel in range(count):
        draw = b.random.random()
        if channel != left and draw < 0.4:
            gamma[channel] = 0
            beta[channel] = b.amount() if draw < 0.15 else 0
    numbers = [array.astype(np.float32) for array in (gamma, beta, mean, variance)]
    name = b.node(
        "BatchNormalization", [given.name, *(b.floats(array) for array in numbers)]
    )
    gamma, beta, mean, variance = (array.astype(np.float64) for array in numbers)
    scale = gamma / np.sqrt(variance + 1e-5)
    kinds: list[Kind] = []
    for channel, kind in enumerate(given.kinds):
        if scale[channel] == 0:
            kinds.append(float(beta[channel]))
        else:
            moved = None if kind is None else (kind - mean[channel]) * scale[channel]
            kinds.append(None if moved is None else float(moved + beta[channel]))
    for index in range(1, 5):
        b.note(name, index, 0, given.ids)
    return b.like(given, name, kinds)


# ---- element by element ----


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _hard_swish(x: float) -> float:
    return x * min(1.0, max(0.0, x / 6 + 0.5))


UNARY: list[tuple[str, Callable[[float], float]]] = [
    ("Relu", lambda x: max(x, 0.0)),
    ("Relu", lambda x: max(x, 0.0)),
    ("Sigmoid", _sigmoid),
    ("Tanh", math.tanh),
    ("Identity", lambda x: x),
    ("Neg", lambda x: -x),
    ("Abs", abs),
    ("HardSwish", _hard_swish),
    ("LeakyRelu", lambda x: x if x >= 0 else x * float(np.float32(0.01))),
    ("Clip", lambda x: min(max(x, 1.0), 6.0)),
    ("Exp", math.exp),
    ("PRelu", lambda x: x),
]


def activation(b: Builder, given: Value) -> Value:
    """A unary operator, or one with a slope for each channel."""
    op_type, function = b.random.choice(UNARY)
    if op_type == "PRelu":
        return _prelu(b, given)
    inputs = [given.name]
    if (op_type == "HardSwish" and b.opset < 14) or (op_type == "Exp" and b.hot):
        op_type, function = UNARY[0]
    if op_type == "Clip":
        inputs += [b.floats(1), b.floats(6)]
    b.hot += op_type == "Exp"
    kinds = [None if kind is None else function(kind) for kind in given.kinds]
    return b.like(given, b.node(op_type, inputs), kinds)


def _prelu(b: Builder, given: Value) -> Value:
    slope = b.rng.uniform(-0.5, 0.5, len(given.ids)).astype(np.float32)
    shape = [-1 if axis == given.axis else 1 for axis in range(1, len(given.dims))]
    name = b.node("PRelu", [given.name, b.floats(slope.reshape(shape))])
    b.note(name, 1, given.axis - 1, given.ids)
    kinds = [
        kind if kind is None or kind >= 0 else kind * float(rate)
        for kind, rate in zip(given.kinds, slope, strict=True)
    ]
    return b.like(given, name, kinds)


def unary(b: Builder) -> None:
    """An activation of any value."""
    activation(b, b.image())


def combine(op_type: str, one: Kind, two: Kind) -> Kind:
    """What becomes of two channels."""
    if op_type == "Mul" and 0.0 in (one, two):
        return 0.0
    if one is None or two is None:
        return None
    return {"Add": one + two, "Sub": one - two, "Mul": one * two}[op_type]


def binary(b: Builder, op_type: str, one: Value, two: Value) -> Value:
    """Two values of the same channels; the second may be [N, C, 1, 1]."""
    b.truth.unite(one.ids, two.ids)
    inputs = [one.name, two.name]
    if op_type != "Sub" and b.chance(0.3):
        inputs.reverse()
    pairs = zip(one.kinds, two.kinds, strict=True)
    name = b.node(op_type, inputs)
    return b.like(one, name, [combine(op_type, *pair) for pair in pairs])


def per_channel(b: Builder) -> None:
    """A constant for each channel is added, or multiplies it: a mask."""
    given = b.image()
    count = len(given.ids)
    op_type = b.random.choice(["Add", "Sub", "Mul", "Mul"])
    array = b.rng.uniform(0.3, 1.2, count).astype(np.float32)
    for channel in range(1, count):
        if b.chance(0.3):
            array[channel] = 0
    masking(b, given, array, op_type)


def masking(b: Builder, given: Value, array: Array, op_type: str = "Mul") -> Value:
    """An operand with one element for each channel."""
    shape = b.random.choice([(-1, 1, 1), (1, -1, 1, 1)])
    name = b.node(op_type, [given.name, b.floats(array.reshape(shape))])
    b.note(name, 1, len(shape) - 3, given.ids)
    pairs = zip(given.kinds, map(float, array), strict=True)
    return b.like(given, name, [combine(op_type, *pair) for pair in pairs])


def residual(b: Builder) -> None:
    """A branch of one or two layers, added to what it starts from."""
    given = b.image()
    inner = conv(b, given, b.random.randrange(4, 8), fitting(b, given, SAME))
    inner = activation(b, norm(b, inner) if b.chance(0.4) else inner)
    inner = conv(b, inner, len(given.ids), fitting(b, inner, SAME))
    if b.chance(0.3):
        inner = norm(b, inner)
    binary(b, b.random.choice(["Add", "Add", "Sub"]), given, inner)


def twins(b: Builder) -> None:
    """Two layers side by side, combined."""
    given, outputs = b.image(), b.random.randrange(4, 8)
    geometry = fitting(b, given, GEOMETRIES)
    one = conv(b, given, outputs, geometry)
    two = conv(b, given, outputs, geometry)
    if b.chance(0.5):
        one = activation(b, one)
    binary(b, b.random.choice(["Add", "Sub", "Mul"]), one, two)


def gate(b: Builder) -> None:
    """Squeeze and excitation."""
    given = b.image()
    small = conv(b, pooled(b, given), b.random.randrange(2, 4), {"kernel": 1})
    kinds = [None if kind is None else max(kind, 0.0) for kind in small.kinds]
    small = b.like(small, b.node("Relu", [small.name]), kinds)
    wide = conv(b, small, len(given.ids), {"kernel": 1}, masked=b.chance(0.5))
    kinds = [None if kind is None else _sigmoid(kind) for kind in wide.kinds]
    wide = b.like(wide, b.node("Sigmoid", [wide.name]), kinds)
    binary(b, "Mul", given, wide)


# ---- channels side by side ----


def concat(b: Builder) -> None:
    """What follows from one value in two or three ways, side by side."""
    given = b.image()
    parts = [conv(b, given, b.random.randrange(2, 5), fitting(b, given, SAME))]
    parts += [given] if b.chance(0.5) else [activation(b, parts[0])]
    if b.chance(0.3):
        parts.append(conv(b, given, 2, {"kernel": 1}))
    b.random.shuffle(parts)
    axis = b.random.choice([1, -3])
    name = b.node("Concat", [part.name for part in parts], axis=axis)
    ids = tuple(number for part in parts for number in part.ids)
    kinds = tuple(kind for part in parts for kind in part.kinds)
    b.made(Value(name, ids, kinds, (given.dims[0], len(ids), *given.dims[2:])))


def split(b: Builder) -> None:
    """Two or three parts, all of which are read."""
    given = b.image()
    count = len(given.ids)
    if count < 4:
        return
    is_equal = count % 2 == 0 and b.chance(0.5)
    first = count // 2 if is_equal else b.random.randrange(1, count)
    sizes = [first, count - first]
    names = [b.name(), b.name()]
    inputs = [given.name]
    attributes: dict[str, Any] = {"axis": 1}
    if is_equal and b.opset >= 18 and b.chance(0.5):
        attributes["num_outputs"] = 2
    elif not is_equal or b.opset >= 18:
        if b.opset < 13:
            attributes["split"] = sizes
        else:
            inputs.append(b.ints(*sizes))
    b.nodes.append(helper.make_node("Split", inputs, names, **attributes))
    b.seen.update(inputs)
    ends = ((0, first), (first, count))
    for name, (low, high) in zip(names, ends, strict=True):
        dims = (given.dims[0], high - low, *given.dims[2:])
        b.made(Value(name, given.ids[low:high], given.kinds[low:high], dims))


def cut(b: Builder) -> None:
    """A range of channels; the others are not read here."""
    given = b.image()
    count = len(given.ids)
    if count < 3:
        return
    low = b.random.randrange(0, count - 1)
    high = b.random.randrange(low + 1, count + 1)
    end = b.random.choice([high, high - count if high < count else 1 << 31])
    start = b.random.choice([low, low - count])
    inputs = [given.name, b.ints(start), b.ints(end), b.ints(1)]
    dims = (given.dims[0], high - low, *given.dims[2:])
    name = b.node("Slice", inputs)
    b.made(Value(name, given.ids[low:high], given.kinds[low:high], dims))


def shuffle(b: Builder) -> None:
    """Channels change places, two by two: what goes then is not said."""
    given = b.image()
    count, (height, width) = len(given.ids), given.space
    if count % 2:
        return
    half = count // 2
    apart = b.node("Reshape", [given.name, b.ints(0, 2, half, height, width)])
    turned = b.node("Transpose", [apart], perm=[0, 2, 1, 3, 4])
    name = b.node("Reshape", [turned, b.ints(0, count, height, width)])
    order = np.arange(count).reshape(2, half).T.reshape(-1).tolist()
    b.truth.doubt.update(given.ids)
    ids = tuple(given.ids[place] for place in order)
    kinds = tuple(given.kinds[place] for place in order)
    b.made(replace(given, name=name, ids=ids, kinds=kinds))


# ---- space ----


def pool(b: Builder) -> None:
    """A pool of any value."""
    pooling(b, b.image())


def pooling(b: Builder, given: Value) -> None:
    """MaxPool and AveragePool, also where the padding counts."""
    choices: list[dict[str, Any]] = [
        {"kernel": 2, "strides": [2, 2]},
        {"kernel": 3, "pads": [1, 1, 1, 1]},
        {"kernel": 3, "pads": [0, 0, 1, 1], "strides": [2, 2]},
        {"kernel": 3, "auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"kernel": 1},
    ]
    geometry = fitting(b, given, choices)
    attributes = attributes_of(geometry)
    op_type = b.random.choice(["MaxPool", "AveragePool", "AveragePool"])
    counts = op_type == "AveragePool" and b.chance(0.6)
    if counts:
        attributes["count_include_pad"] = 1
    changes = counts and is_padded(geometry)
    kinds = [None if changes and kind else kind for kind in given.kinds]
    space = [out_size(size, geometry, axis) for axis, size in enumerate(given.space)]
    name = b.node(op_type, [given.name], **attributes)
    b.made(replace(given, name=name, kinds=tuple(kinds), dims=(*given.dims[:2], *space)))


def pad(b: Builder) -> None:
    """A border of zeros, of twos, or of what is there."""
    given = b.image()
    height, width = given.space
    if min(height, width) < 2 or max(height, width) > 9:
        return
    pads = b.random.choice([[1, 1, 1, 1], [0, 1, 1, 0]])
    mode = b.random.choice(["zero", "two", "reflect", "edge", "none"])
    inputs = [given.name, b.ints(0, 0, *pads[:2], 0, 0, *pads[2:])]
    border: Kind = None
    if mode in ("zero", "two", "none"):
        border = 2.0 if mode == "two" else 0.0
        inputs += [] if mode == "none" else [b.floats(border)]
        name = b.node("Pad", inputs)
    else:
        name = b.node("Pad", inputs, mode=mode)
    kinds = [None if border not in (None, kind) else kind for kind in given.kinds]
    dims = (*given.dims[:2], height + pads[0] + pads[2], width + pads[1] + pads[3])
    b.made(replace(given, name=name, kinds=tuple(kinds), dims=dims))


def mean(b: Builder, given: Value, keepdims: int) -> str:
    """ReduceMean over height and width."""
    axes = b.random.choice([[2, 3], [-2, -1]])
    if b.opset >= 18:
        return b.node("ReduceMean", [given.name, b.ints(*axes)], keepdims=keepdims)
    return b.node("ReduceMean", [given.name], axes=axes, keepdims=keepdims)


def pooled(b: Builder, given: Value) -> Value:
    """[N, C, 1, 1]: the mean over the image."""
    if b.chance(0.3):
        name = mean(b, given, 1)
    else:
        name = b.node("GlobalAveragePool", [given.name])
    return b.made(replace(given, name=name, dims=(*given.dims[:2], 1, 1)))


# ---- quantized activations ----


def quantized(b: Builder) -> None:
    """Any value as codes, and mostly a convolution of codes by codes."""
    quantized_layer(b, b.image(), GEOMETRIES)


def quantized_layer(
    b: Builder, given: Value, geometries: Sequence[dict[str, Any]]
) -> None:
    """A convolution of codes by codes, its bias in their product's scale."""
    step = np.float32(b.random.uniform(0.02, 0.06))
    zero = np.uint8(b.random.choice([0, 64, 128]))
    b.step = max(b.step, float(step))
    scale, point = b.floats(step), b.constant(np.asarray(zero))
    codes = b.node("QuantizeLinear", [given.name, scale, point])
    name = b.node("DequantizeLinear", [codes, scale, point])
    given = b.like(given, name, [_rounded(kind, step, int(zero)) for kind in given.kinds])
    if b.chance(0.8):
        _quantized_conv(b, given, step, fitting(b, given, geometries))


def _rounded(kind: Kind, step: np.float32, zero: int) -> Kind:
    """What a constant is on the grid; None where rounding may go either way."""
    if kind is None:
        return None
    steps = kind / float(step)
    if abs(steps % 1.0 - 0.5) < 0.01:
        return None
    code = min(max(round(steps) + zero, 0), 255)
    return float(np.float32(code - zero) * step)


def _quantized_conv(
    b: Builder, given: Value, step: np.float32, geometry: dict[str, Any]
) -> None:
    outputs = b.random.randrange(4, 8)
    weight = matrix(b, outputs, given, (geometry["kernel"],) * 2)
    bias = _bias(b, outputs)
    mask(b, weight, bias, given)
    stored = store(b, weight, "codes")
    assert stored.scale is not None
    scale = np.where(stored.scale == 0, step, step * stored.scale).astype(np.float32)
    codes = np.rint(bias / scale).astype(np.int32)
    attributes = {"axis": 0} if scale.ndim else {}
    made = b.node("DequantizeLinear", [b.constant(codes), b.floats(scale)], **attributes)
    name = b.node("Conv", [given.name, stored.name, made], **attributes_of(geometry))
    bias = np.asarray(codes * scale, np.float32)
    _conv_made(b, name, given, stored.array, bias, geometry, 1, "codes")


# ---- other layouts ----


def channels_last(b: Builder) -> None:
    """A MatMul over the channels of an image, on its last axis."""
    given = b.image()
    name = b.node("Transpose", [given.name], perm=[0, 2, 3, 1])
    dims = (given.dims[0], *given.dims[2:], given.dims[1])
    last = b.made(replace(given, name=name, dims=dims, axis=3))
    made = product(b, last, b.random.randrange(3, 7))
    if b.chance(0.5):
        made = activation(b, made)
    name = b.node("Transpose", [made.name], perm=[0, 3, 1, 2])
    dims = (given.dims[0], len(made.ids), *given.dims[2:])
    b.made(replace(made, name=name, dims=dims, axis=1))


def tokens(b: Builder) -> None:
    """The same with positions in one axis, by Reshape, and back."""
    given = b.image()
    count, (height, width) = len(given.ids), given.space
    first = b.random.choice([0, b.batch if isinstance(b.batch, int) else 0])
    shapes = [(first, count, height * width), (0, count, -1), (0, 0, -1)]
    flat = b.node("Reshape", [given.name, b.ints(*b.random.choice(shapes))])
    name = b.node("Transpose", [flat], perm=[0, 2, 1])
    dims: Dims = (given.dims[0], height * width, count)
    last = b.made(replace(given, name=name, dims=dims, axis=2))
    made = product(b, last, b.random.randrange(3, 7))
    outputs = len(made.ids)
    back = b.node("Transpose", [made.name], perm=[0, 2, 1])
    shape = b.random.choice(
        [
            (first, outputs, height, width),
            (-1, outputs, height, width),
            (0, -1, height, width),
        ]
    )
    name = b.node("Reshape", [back, b.ints(*shape)])
    dims = (given.dims[0], outputs, height, width)
    b.made(replace(made, name=name, dims=dims, axis=1))


def product(b: Builder, given: Value, outputs: int, needs_bias: bool = False) -> Value:
    """A MatMul, mostly with an Add behind it."""
    weight = matrix(b, outputs, given, ())
    bias = _bias(b, outputs) if needs_bias or b.chance(0.7) else None
    mask(b, weight, bias, given)
    stored = store(b, weight.T, b.random.choice(["float"] * 3 + ["codes", "both"]), 1)
    first = name = b.node("MatMul", [given.name, stored.name])
    if bias is not None:
        pair = [name, b.floats(bias)]
        if b.chance(0.3):
            pair.reverse()
        name = b.node("Add", pair)
    reads, kinds = mixed(stored.array.T, bias, given, 1, False)
    ids = b.truth.new(outputs)
    b.truth.readers.append(Reader(given.ids, given.kinds, ids, reads, "bias"))
    b.note(first, 1, 0, given.ids)
    b.note(first, 1, 1, ids)
    axis = len(given.dims) - 1
    return b.made(Value(name, ids, kinds, (*given.dims[:-1], outputs), axis))


def gemm(b: Builder, given: Value, outputs: int) -> Value:
    """A Gemm with any of its attributes."""
    weight = matrix(b, outputs, given, ())
    bias = _bias(b, outputs)
    mask(b, weight, bias, given)
    turned, alpha, beta = b.chance(0.5), 1.0, 1.0
    attributes: dict[str, Any] = {"transB": 1} if turned else {}
    if b.chance(0.3):
        alpha, beta = attributes["alpha"], attributes["beta"] = 0.5, 2.0
    inputs = [given.name, b.floats(weight if turned else weight.T)]
    if b.chance(0.3):
        inputs[0] = b.node("Transpose", [given.name], perm=[1, 0])
        attributes["transA"] = 1
    inputs.append(b.floats(bias.reshape(b.random.choice([(-1,), (1, -1)]))))
    name = b.node("Gemm", inputs, **attributes)
    reads, kinds = mixed(weight * alpha, bias * beta, given, 1, False)
    ids = b.truth.new(outputs)
    b.truth.readers.append(Reader(given.ids, given.kinds, ids, reads, "bias"))
    b.note(name, 1, 0, ids if turned else given.ids)
    b.note(name, 1, 1, given.ids if turned else ids)
    return b.made(Value(name, ids, kinds, (given.dims[0], outputs)))


# ---- the end of a network ----


def flat(b: Builder, given: Value) -> Value:
    """[N, K]: pooled, or every position of every channel."""
    draw = b.random.random()
    if draw < 0.25:
        name = mean(b, given, 0)
        return b.made(replace(given, name=name, dims=given.dims[:2]))
    if draw < 0.7:
        given = pooled(b, given)
    times = math.prod(given.space)
    size = times * len(given.ids)
    shapes = [(0, -1), (-1, size), (0, size)]
    if isinstance(b.batch, int):
        shapes += [(b.batch, size), (b.batch, -1)]
    if b.chance(0.4):
        name = b.node("Flatten", [given.name])
    else:
        name = b.node("Reshape", [given.name, b.ints(*b.random.choice(shapes))])
    ids = tuple(number for number in given.ids for _ in range(times))
    kinds = tuple(kind for kind in given.kinds for _ in range(times))
    return b.made(Value(name, ids, kinds, (given.dims[0], size)))


def head(b: Builder) -> Value:
    """Everything that nothing has read yet comes together in a few features."""
    ends = [value for value in b.values if value.name not in b.seen]
    vectors = [flat(b, value) for value in ends]
    last = vectors[0]
    if len(vectors) > 1:
        name = b.node("Concat", [vector.name for vector in vectors], axis=1)
        ids = tuple(number for vector in vectors for number in vector.ids)
        kinds = tuple(kind for vector in vectors for kind in vector.kinds)
        last = b.made(Value(name, ids, kinds, (last.dims[0], len(ids))))
    if b.chance(0.6):
        maker = b.random.choice([gemm, product])
        last = maker(b, last, b.random.randrange(4, 9))
        last = norm(b, last) if b.chance(0.3) else last
        last = activation(b, last)
    if b.chance(0.3):
        return product(b, last, 3, needs_bias=True)
    return gemm(b, last, 3)


PIECES: list[Callable[[Builder], None]] = [
    *[convolution] * 6,
    *[depthwise] * 2,
    *[grouped] * 2,
    *[border] * 3,
    *[unary] * 2,
    *[residual] * 2,
    twins,
    per_channel,
    *[gate] * 2,
    *[concat] * 2,
    split,
    cut,
    shuffle,
    *[pool] * 2,
    *[pad] * 2,
    *[quantized] * 2,
    channels_last,
    tokens,
]


def network(seed: int) -> Network:
    """The network of a seed: a few pieces, a head, perhaps one more output."""
    random = Random(seed)
    opset = random.choice([11, 13, 17, 18, 21])
    batch: int | str = 2 if random.random() < 0.3 else "N"
    b = Builder(random, opset, batch)
    inputs = Value("x", b.truth.new(3), (None,) * 3, (b.batch, 3, 8, 8))
    b.truth.stays.update(inputs.ids)
    b.made(inputs)
    convolution(b)
    for _ in range(random.randrange(1, 5)):
        random.choice(PIECES)(b)
    outputs = [head(b)]
    inner = [value for value in b.values if value.name in b.seen and value is not inputs]
    if random.random() < 0.15:
        outputs.append(random.choice(inner))
    for value in outputs:
        b.truth.stays.update(value.ids)
    return Network(_model(b, inputs, outputs), _expected(b.truth), b.step)


def _expected(truth: Truth) -> tuple[tuple[Part, int, int], ...]:
    fate = Fate(truth)
    return tuple((part, len(part.ids), fate.left(part)) for part in truth.parts)


def _model(b: Builder, given: Value, outputs: Sequence[Value]) -> ModelProto:
    graph = helper.make_graph(
        b.nodes,
        "random",
        [_declared(given)],
        [_declared(value) for value in outputs],
        b.weights,
    )
    imports = [helper.make_opsetid("", b.opset)]
    model: ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    if b.chance(0.3):
        model = shape_inference.infer_shapes(model)
    return model


def _declared(value: Value) -> Any:
    return helper.make_tensor_value_info(value.name, TensorProto.FLOAT, list(value.dims))
