"""Random models for the property tests: small, valid, full of what passes look for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.helper import make_node, make_tensor_value_info
from onnx.numpy_helper import from_array

from tests.support import Array

Dims = tuple[int | str, ...]


@dataclass
class Builder:
    """Grows one graph; inner graphs have builders of their own that see outer values."""

    random: Random
    depth: int = 0
    parent: Builder | None = None
    values: list[tuple[str, Dims]] = field(default_factory=list)
    nodes: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)
    count: list[int] = field(default_factory=lambda: [0])
    opset: int = 17

    # ---- values ----

    def name(self) -> str:
        """A new name; graphs that are not inside one another may use the same."""
        self.count[0] += 1
        return f"v{self.count[0]}"

    def visible(self) -> list[tuple[str, Dims]]:
        """All values that a node here may read."""
        return [*(self.parent.visible() if self.parent else ()), *self.values]

    def pick(self, rank: int | None = None) -> tuple[str, Dims] | None:
        """Any value, or one of that rank."""
        found = [v for v in self.visible() if rank is None or len(v[1]) == rank]
        return self.random.choice(found) if found else None

    def node(
        self, op_type: str, inputs: list[str], dims: Dims, **attributes: object
    ) -> str:
        """Add a node with one output of float32, which others may read."""
        output = self.raw(op_type, inputs, **attributes)
        self.values.append((output, dims))
        return output

    def raw(self, op_type: str, inputs: list[str], **attributes: object) -> str:
        """Add a node whose output only the caller reads."""
        output = self.name()
        self.nodes.append(make_node(op_type, inputs, [output], **attributes))
        return output

    def constant(self, array: Array) -> str:
        """A constant: an initializer, or a Constant node."""
        name = self.name()
        if self.random.random() < 0.3:
            value = from_array(array)
            self.nodes.append(make_node("Constant", [], [name], value=value))
        else:
            self.weights.append(from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        """A constant vector of int64."""
        return self.constant(np.array(values, np.int64))

    def floats(self, *dims: int) -> str:
        """A constant of random values, of zeros or of ones, perhaps still computed."""
        kind = self.random.randrange(6)
        if kind < 2:
            name = self.constant(np.full(dims, kind, np.float32))
        else:
            rng = np.random.default_rng(self.random.randrange(1 << 16))
            name = self.constant(rng.standard_normal(dims).astype(np.float32))
        if kind == 4:
            name = self.raw(self.random.choice(["Neg", "Identity", "Abs"]), [name])
        if kind == 5 and len(dims) == 2:
            name = self.raw("Transpose", [name], perm=[0, 1])
        return name

    def scalar(self, number: float) -> str:
        """A constant of rank 0."""
        return self.constant(np.array(number, np.float32))

    def reduce(self, op_type: str, name: str, **attributes: object) -> str:
        """A reduction over the last axis, of which a 1 stays, for the caller alone."""
        if self.opset >= (13 if op_type == "ReduceSum" else 18):
            return self.raw(op_type, [name, self.ints(-1)], **attributes)
        return self.raw(op_type, [name], axes=[-1], **attributes)

    # ---- what to grow ----

    def grow(self, steps: int) -> None:
        """Add `steps` random pieces."""
        for _ in range(steps):
            self.random.choice(PIECES)(self)


def unary(b: Builder) -> None:
    """An elementwise operator, or one that does nothing."""
    name, dims = b.pick() or ("", ())
    op_type = b.random.choice(
        ["Neg", "Abs", "Relu", "Sigmoid", "Identity", "Dropout", "Identity"]
    )
    b.node(op_type, [name], dims)


def binary(b: Builder) -> None:
    """Two values of equal dims, or one and a constant."""
    name, dims = b.pick() or ("", ())
    others = [other for other, theirs in b.visible() if theirs == dims]
    op_type = b.random.choice(["Add", "Sub", "Mul"])
    if b.random.random() < 0.5:
        b.node(op_type, [name, b.random.choice(others)], dims)
        return
    last = tuple(dim for dim in dims[-1:] if isinstance(dim, int))
    shape = b.random.choice([(), (1,) * len(dims), last])
    pair = [name, b.floats(*shape)]
    if op_type != "Sub" and b.random.random() < 0.3:
        pair.reverse()
    b.node(op_type, pair, dims)


def no_op(b: Builder) -> None:
    """Operators that with these settings change nothing."""
    name, dims = b.pick() or ("", ())
    rank = len(dims)
    kind = b.random.randrange(7)
    if kind == 0:
        b.node("Cast", [name], dims, to=TensorProto.FLOAT)
    elif kind == 1:
        b.node("Transpose", [name], dims, perm=list(range(rank)))
    elif kind == 2:
        b.node("Concat", [name], dims, axis=0)
    elif kind == 3:
        b.node("Expand", [name, b.ints(*[1] * rank)], dims)
    elif kind == 4:
        b.node("Slice", [name, b.ints(0), b.ints(1 << 40), b.ints(-1)], dims)
    elif kind == 5:
        b.node("Pad", [name, b.ints(*[0] * 2 * rank)], dims)
    else:
        b.node("Tile", [name, b.ints(*[1] * rank)], dims)


def reshape(b: Builder) -> None:
    """Chains of Unsqueeze, Squeeze, Flatten and Reshape, also by computed shapes."""
    name, dims = b.pick() or ("", ())
    kind = b.random.randrange(5)
    if kind == 0:
        inner = b.raw("Unsqueeze", [name, b.ints(0)])
        b.node("Squeeze", [inner, b.ints(0)], dims)
    elif kind == 1:
        flat = b.raw("Reshape", [name, b.ints(-1)])
        shape = b.raw("Shape", [name])
        b.node("Reshape", [flat, shape], dims)
    elif kind == 2 and len(dims) == 2 and isinstance(dims[1], int):
        b.node("Reshape", [name, b.ints(-1, dims[1])], dims)
    elif kind == 3 and len(dims) == 2:
        shape = b.raw("Shape", [name])
        first = b.raw("Gather", [shape, b.ints(0)], axis=0)
        whole = b.raw("Concat", [first, b.ints(-1)], axis=0)
        b.node("Reshape", [name, whole], dims)
    elif all(isinstance(dim, int) for dim in dims):
        turned = tuple(reversed(dims))
        b.node("Reshape", [name, b.ints(*(int(dim) for dim in turned))], turned)


def shape_arithmetic(b: Builder) -> None:
    """What is computed from a shape decides the size of a value, and that scales one."""
    name, dims = b.pick() or ("", ())
    vector, size = b.raw("Shape", [name]), len(dims)
    for _ in range(b.random.randrange(1, 5)):
        vector, size = _step(b, vector, size)
    small = b.raw("Mod", [b.raw("Abs", [vector]), b.ints(4)])
    filled = b.raw("ConstantOfShape", [small])
    factor = b.raw("Cast", [b.raw("Size", [filled])], to=TensorProto.FLOAT)
    b.node("Mul", [name, factor], dims)


def _step(b: Builder, vector: str, size: int) -> tuple[str, int]:
    """Another vector of int64 made from one of `size` elements, and its size."""
    draw = b.random
    kind = draw.randrange(9)
    if kind == 0:
        picks = [draw.randrange(-size, size) for _ in range(draw.randrange(1, 4))]
        return b.raw("Gather", [vector, b.ints(*picks)], axis=0), len(picks)
    if kind == 1:
        step = draw.choice([1, 2, -1, -2])
        bounds = [draw.randrange(-size - 2, size + 3) for _ in range(2)]
        start, end = bounds if step > 0 else sorted(bounds, reverse=True)
        kept = len(range(*slice(max(start, -size), end, step).indices(size)))
        if kept and (step > 0 or start >= -size):
            limits = [b.ints(value) for value in (start, end, 0, step)]
            return b.raw("Slice", [vector, *limits]), kept
    if kind == 2 and size < 4:
        pair = [vector, b.ints(draw.randrange(-3, 9))]
        draw.shuffle(pair)
        return b.raw("Concat", pair, axis=0), size + 1
    if kind == 3:
        whole = b.raw("Cast", [vector], to=draw.choice([TensorProto.INT32, 1, 11]))
        return b.raw("Cast", [whole], to=TensorProto.INT64), size
    if kind == 4:
        column = b.raw("Unsqueeze", [vector, b.ints(draw.choice([0, 1, -1]))])
        return b.raw("Reshape", [column, b.ints(-1)]), size
    if kind == 5:
        is_that = b.raw("Equal", [vector, b.ints(draw.randrange(4))])
        return b.raw("Where", [is_that, b.ints(draw.randrange(-2, 5)), vector]), size
    if kind == 6:
        axes = [b.ints(0)] if draw.random() < 0.5 else []
        return b.raw("ReduceSum", [vector, *axes], keepdims=1), 1
    op_type = draw.choice(["Add", "Sub", "Mul", "Div", "Mod", "Max", "Min"])
    return b.raw(op_type, [vector, b.ints(draw.choice([-3, -2, 2, 3]))]), size


def transpose(b: Builder) -> None:
    """Twice, or of dims that are known."""
    name, dims = b.pick() or ("", ())
    perm = list(range(len(dims)))
    b.random.shuffle(perm)
    b.node("Transpose", [name], tuple(dims[axis] for axis in perm), perm=perm)


def there_and_back(b: Builder) -> None:
    """Transposed, worked on along an axis or with others, and transposed back."""
    name, dims = b.pick() or ("", ())
    perm = list(range(len(dims)))
    b.random.shuffle(perm)
    turned = tuple(dims[axis] for axis in perm)
    value = b.node("Transpose", [name], turned, perm=perm)
    for _ in range(b.random.randrange(1, 4)):
        value = _turned_step(b, value, turned)
    back = [perm.index(axis) for axis in range(len(perm))]
    b.node("Transpose", [value], dims, perm=back)


def _turned_step(b: Builder, value: str, dims: Dims) -> str:
    draw, kind = b.random, b.random.randrange(6)
    if kind == 0:
        return b.node("Softmax", [value], dims, axis=draw.randrange(-len(dims), 0))
    if kind == 1 and isinstance(dims[-1], int):
        return b.node("Mul", [value, b.floats(dims[-1])], dims)
    if kind == 2:
        same = [other for other, theirs in b.visible() if theirs == dims]
        return b.node("Add", draw.sample([value, draw.choice(same)], 2), dims)
    if kind == 3:
        ends = [b.ints(0), b.ints(1 << 40), b.ints(draw.randrange(len(dims)))]
        return b.node("Slice", [value, *ends], dims)
    if kind == 4:
        axis = draw.randrange(len(dims))
        column = b.raw("Gather", [value, b.ints(0)], axis=axis)
        return b.node("Sub", [value, column], dims)
    return b.node("Relu", [value], dims)


def apart_and_together(b: Builder) -> None:
    """Cut along an axis, perhaps twice, and joined again; not always in order."""
    name, dims = b.pick() or ("", ())
    axis = b.random.randrange(len(dims))
    size = dims[axis]
    if not isinstance(size, int):
        return
    points = sorted({0, 1 << 40, *(b.random.randrange(size + 1) for _ in range(2))})
    parts = [
        b.raw("Slice", [name, b.ints(start), b.ints(end), b.ints(axis)])
        for start, end in pairwise(points)
    ]
    if b.random.random() < 0.3:
        parts.reverse()
    while len(parts) > 2 and b.random.random() < 0.5:
        parts[:2] = [b.raw("Concat", parts[:2], axis=axis)]
    whole = b.node("Concat", parts, dims, axis=axis - b.random.choice([0, len(dims)]))
    start = b.random.randrange(size)
    again = [b.ints(start), b.ints(b.random.choice([start + 1, 1 << 40])), b.ints(axis)]
    inner = b.raw("Slice", [whole, *again])
    other = [b.ints(0), b.ints(b.random.choice([1, -1, 9])), b.ints(axis)]
    b.node("Add", [b.raw("ReduceSum", [b.raw("Slice", [inner, *other])]), name], dims)


def casts(b: Builder) -> None:
    """To other types and back."""
    name, dims = b.pick() or ("", ())
    kinds = [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BOOL]
    for kind in b.random.choices(kinds, k=b.random.randrange(1, 4)):
        name = b.raw("Cast", [name], to=kind)
    b.node("Cast", [name], dims, to=TensorProto.FLOAT)


def expanded(b: Builder) -> None:
    """Something small, expanded before it meets something large."""
    name, dims = b.pick() or ("", ())
    shape = b.raw("Shape", [name])
    if all(isinstance(dim, int) for dim in dims) and b.random.random() < 0.7:
        shape = b.ints(*(int(dim) for dim in dims))
    small = b.raw("Expand", [b.floats(*[1] * len(dims)), shape])
    b.node(b.random.choice(["Add", "Mul", "Sub"]), [name, small], dims)


def duplicate(b: Builder) -> None:
    """One of the nodes here once more."""
    nodes = [node for node in b.nodes if len(node.output) == 1 and node.input]
    if not nodes:
        return
    node = NodeProto()
    node.CopyFrom(b.random.choice(nodes))
    known = dict(b.visible())
    dims = known.get(node.output[0])
    node.output[0] = b.name()
    b.nodes.append(node)
    if dims is not None:
        b.values.append((node.output[0], dims))


def convolution(b: Builder) -> None:
    """Conv or ConvTranspose with BatchNormalization behind it."""
    found = b.pick(4)
    if found is None or not all(isinstance(dim, int) for dim in found[1]):
        return
    name, dims = found
    channels = int(dims[1])
    op_type = b.random.choice(["Conv", "ConvTranspose"])
    inputs = [name, b.floats(channels, channels, 1, 1)]
    if b.random.random() < 0.5:
        inputs.append(b.floats(channels))
    norm(b, b.node(op_type, inputs, dims), dims)


def linear(b: Builder) -> None:
    """MatMul or Gemm with BatchNormalization behind it."""
    found = b.pick(2)
    if found is None or not isinstance(found[1][1], int):
        return
    name, dims = found
    size = int(dims[1])
    op_type = b.random.choice(["MatMul", "Gemm"])
    norm(b, b.node(op_type, [name, b.floats(size, size)], dims), dims)


def around_layer(b: Builder) -> None:
    """A layer with arithmetic, padding or a choice of channels before and behind it."""
    name, dims = b.pick() or ("", ())
    if len(dims) not in (2, 4) or not isinstance(dims[1], int) or 0 in dims:
        return
    if len(dims) == 4 and not all(isinstance(dim, int) for dim in dims):
        return
    channels = int(dims[1])
    name = _beside(b, name, dims)
    if len(dims) == 4:
        padded = b.raw("Pad", [name, b.ints(0, 0, 1, 1, 0, 0, 1, 1)])
        if b.random.random() < 0.5:
            op_type = b.random.choice(["AveragePool", "Conv"])
            weight = [b.floats(channels, channels, 3, 3)] if op_type == "Conv" else []
            name = b.raw(op_type, [padded, *weight], kernel_shape=[3, 3])
        else:
            name = b.raw("Conv", [name, b.floats(channels, channels, 1, 1)])
    elif b.random.random() < 0.5:
        weight = b.raw("Transpose", [b.floats(channels, channels)])
        name = b.raw("MatMul", [name, weight])
    else:
        name = b.raw("Gemm", [name, b.floats(channels, channels)], transB=1)
    name = _beside(b, name, dims)
    b.node("Relu", [name], dims)


def _beside(b: Builder, name: str, dims: Dims) -> str:
    """`name` of `dims` after up to three operations that a layer can take over."""
    channels, rest = int(dims[1] or 0), [1] * (len(dims) - 2)
    for _ in range(b.random.randrange(4)):
        kind = b.random.randrange(7)
        shape = b.random.choice([(), (channels, *rest), (1, channels, *rest)])
        if kind < 4:
            pair = [name, b.floats(*shape)]
            if b.random.random() < 0.3:
                pair.reverse()
            name = b.raw(b.random.choice(["Add", "Sub", "Mul"]), pair)
        elif kind == 4:
            size = math.prod(shape)
            divisor = np.linspace(0.5, 2.0, size).astype(np.float32).reshape(shape)
            name = b.raw("Div", [name, b.constant(divisor)])
        elif kind == 5:
            order = b.random.sample(range(channels), channels)
            name = b.raw("Gather", [name, b.ints(*order)], axis=1)
        else:
            parameters = [b.floats(channels) for _ in range(3)]
            variance = np.linspace(0.5, 2.0, channels).astype(np.float32)
            inputs = [name, *parameters, b.constant(variance)]
            name = b.raw("BatchNormalization", inputs)
    return name


def norm(b: Builder, name: str, dims: Dims) -> None:
    """BatchNormalization with constant parameters."""
    channels = int(dims[1])
    parameters = [b.floats(channels) for _ in range(3)]
    variance = b.constant(np.linspace(0.5, 2.0, channels).astype(np.float32))
    b.node("BatchNormalization", [name, *parameters, variance], dims)


def quantized_weight(b: Builder) -> None:
    """A constant behind QuantizeLinear and DequantizeLinear, per tensor or per axis."""
    name, dims = b.pick() or ("", ())
    size = dims[-1] if dims and isinstance(dims[-1], int) else 1
    per_axis = b.random.random() < 0.5
    count = (size,) if per_axis else ()
    scale = b.constant(np.full(count, 0.05 + 0.01 * b.random.randrange(5), np.float32))
    zero = b.constant(np.full(count, b.random.choice([0, 3]), np.int8))
    weight = b.floats(size)
    attributes = {"axis": 0} if per_axis else {}
    for _ in range(b.random.choice([1, 1, 2])):
        codes = b.raw("QuantizeLinear", [weight, scale, zero], **attributes)
        back = b.raw("DequantizeLinear", [codes, scale, zero], **attributes)
        b.node("Add", [name, back], dims)


def constants(b: Builder) -> None:
    """Constants made of one another, some of which are read on the way."""
    name, dims = b.pick() or ("", ())
    made = [b.floats()]
    for _ in range(b.random.randrange(1, 5)):
        op_type = b.random.choice(["Neg", "Sigmoid", "Add", "Mul", "Identity"])
        count = 2 if op_type in ("Add", "Mul") else 1
        made.append(b.raw(op_type, [b.random.choice(made) for _ in range(count)]))
    for constant in b.random.sample(made, min(len(made), 2)):
        name = b.node("Mul", [name, constant], dims)


def branch(b: Builder) -> None:
    """An If whose branches read outer values, and may use the same names."""
    if b.depth >= 2:
        return
    name, dims = b.pick() or ("", ())
    start, graphs = b.count[0], []
    ends = []
    for label in ("then", "else"):
        b.count[0] = start if b.random.random() < 0.7 else max([start, *ends])
        inner = Builder(b.random, b.depth + 1, b, count=b.count, opset=b.opset)
        inner.grow(b.random.randrange(1, 4))
        last = b.random.choice(["Neg", "Identity", "Relu"])
        same = [value for value, theirs in inner.visible() if theirs == dims]
        result = inner.node(last, [b.random.choice(same) if same else name], dims)
        graphs.append(graph_of(inner, label, [], [info(result, dims)]))
        ends.append(b.count[0])
    b.count[0] = max(ends)
    cond = "cond"
    if b.random.random() < 0.4:
        cond = b.constant(np.array(b.random.random() < 0.5))
    b.node("If", [cond], dims, then_branch=graphs[0], else_branch=graphs[1])


def loop(b: Builder) -> None:
    """A Loop that carries a value and reads outer ones."""
    if b.depth >= 2:
        return
    name, dims = b.pick() or ("", ())
    inner = Builder(b.random, b.depth + 1, b, count=b.count, opset=b.opset)
    index, go, carried = b.name(), b.name(), b.name()
    inner.values.append((carried, dims))
    inner.grow(b.random.randrange(1, 4))
    same = [value for value, theirs in inner.values if theirs == dims]
    result = inner.node("Sigmoid", [b.random.choice(same)], dims)
    again = inner.raw("Identity", [go])
    inputs = [
        make_tensor_value_info(index, TensorProto.INT64, []),
        make_tensor_value_info(go, TensorProto.BOOL, []),
        info(carried, dims),
    ]
    outputs = [make_tensor_value_info(again, TensorProto.BOOL, []), info(result, dims)]
    body = graph_of(inner, "body", inputs, outputs)
    trips = b.constant(np.array(b.random.randrange(3), np.int64))
    b.node("Loop", [trips, b.constant(np.array(True)), name], dims, body=body)


def clamps(b: Builder) -> None:
    """Two or three clamps in a row."""
    name, dims = b.pick() or ("", ())
    for _ in range(b.random.randrange(2, 4)):
        low, high = sorted(b.random.choice([-1.0, 0.0, 0.5, 2.0]) for _ in range(2))
        kind = b.random.choice(["Relu", "Clip", "Max", "Min"])
        if kind == "Relu":
            name = b.node(kind, [name], dims)
        elif kind == "Clip":
            both = [b.scalar(low), b.scalar(high)]
            bounds = b.random.choice([both, both[:1], ["", both[1]]])
            name = b.node(kind, [name, *bounds], dims)
        else:
            pair = [name, b.scalar(low)]
            name = b.node(kind, b.random.sample(pair, 2), dims)


def layer_norm(b: Builder) -> None:
    """LayerNormalization in single steps, of rows that differ by more than rounding."""
    name, dims = b.pick() or ("", ())
    last = dims[-1] if dims else 1
    if not isinstance(last, int) or last == 1:
        return
    ramp = b.constant(np.arange(last, dtype=np.float32))
    name = b.raw("Add", [name, ramp])
    centred = b.raw("Sub", [name, b.reduce("ReduceMean", name)])
    two = b.scalar(2.0)
    square = b.random.choice([("Pow", [centred, two]), ("Mul", [centred, centred])])
    variance = b.reduce("ReduceMean", b.raw(*square))
    root = b.raw("Sqrt", [b.raw("Add", [variance, b.scalar(0.1)])])
    name = b.node("Div", [centred, root], dims)
    for op_type in ("Mul", "Add")[: b.random.randrange(3)]:
        pair = [name, b.floats(last)]
        name = b.node(op_type, b.random.sample(pair, 2), dims)


def activation(b: Builder) -> None:
    """Gelu, HardSwish or HardSigmoid in single steps."""
    name, dims = b.pick() or ("", ())
    if b.random.random() < 0.5:
        scaled = b.raw("Div", [name, b.scalar(2.0**0.5)])
        gate, number = b.raw("Add", [b.raw("Erf", [scaled]), b.scalar(1.0)]), 0.5
    else:
        shifted = b.raw("Add", [name, b.scalar(3.0)])
        gate, number = b.raw("Clip", [shifted, b.scalar(0), b.scalar(6)]), 1 / 6
    factors = [gate, b.scalar(number), name]
    b.random.shuffle(factors)
    b.node("Mul", [b.raw("Mul", factors[:2]), factors[2]], dims)


def reduction(b: Builder) -> None:
    """Softmax, a norm or a mean in single steps."""
    name, dims = b.pick() or ("", ())
    if not dims:
        return
    kind = b.random.randrange(3)
    if kind == 0:
        less = b.raw("Sub", [name, b.reduce("ReduceMax", name)])
        powers = b.raw("Exp", [less])
        b.node("Div", [powers, b.reduce("ReduceSum", powers)], dims)
    elif kind == 1:
        total = b.reduce("ReduceSum", b.raw("Mul", [name, name]))
        b.node("Sqrt", [total], (*dims[:-1], 1))
    else:
        pair = [b.reduce("ReduceSum", name), b.scalar(b.random.choice([2, 3]))]
        b.node("Div", pair, (*dims[:-1], 1))


PIECES: list[Callable[[Builder], None]] = [
    unary,
    unary,
    binary,
    binary,
    no_op,
    no_op,
    reshape,
    reshape,
    shape_arithmetic,
    transpose,
    there_and_back,
    apart_and_together,
    casts,
    expanded,
    duplicate,
    duplicate,
    convolution,
    linear,
    around_layer,
    around_layer,
    quantized_weight,
    constants,
    clamps,
    layer_norm,
    activation,
    reduction,
    branch,
    loop,
]


def info(name: str, dims: Dims) -> ValueInfoProto:
    """The declaration of a float32 value."""
    return make_tensor_value_info(name, TensorProto.FLOAT, list(dims))


def graph_of(
    b: Builder, name: str, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]
) -> GraphProto:
    """The graph that the builder has grown."""
    return helper.make_graph(b.nodes, name, inputs, outputs, b.weights)


def random_model(random: Random) -> ModelProto:
    """A model of up to a few dozen nodes in up to three scopes."""
    batch: int | str = random.choice([2, "N"])
    b = Builder(random, opset=random.choice([13, 17, 21]))
    inputs: list[tuple[str, Dims]] = [("x", (batch, 3)), ("image", (1, 2, 3, 3))]
    b.values.extend(inputs)
    b.grow(random.randrange(3, 14))
    made = [value for value in b.values if value not in inputs]
    if not made:
        b.node("Relu", ["x"], inputs[0][1])
        made = b.values[-1:]
    outputs = [made[-1], *random.sample(made, min(len(made), random.randrange(3)))]
    graph = graph_of(
        b,
        "random",
        [*(info(*value) for value in inputs), make_tensor_value_info("cond", 9, [])],
        [info(*value) for value in dict.fromkeys(outputs)],
    )
    imports = [helper.make_opsetid("", b.opset)]
    model: ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return model
