"""Transformers of which parts are masked: what is zero by construction goes, exactly.

The builders write ViT, BERT, GPT-2 and Llama blocks as exporters do, with shapes that
are literals or computed. They decide which heads, dims and units are zero, and so which
size each weight has to have afterwards; no code is shared with `onnxopt.channels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx.checker
import onnx.printer
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxopt.evaluate import Evaluator
from onnxopt.manager import Context
from onnxopt.model import Model
from onnxopt.passes import PIPELINES
from tests import support

Array = NDArray[Any]
SIZES = ((2, 5), (1, 7))
"""Batch and sequence of the feeds; the first one where the model is static."""


# ---- building ----


@dataclass
class Net:
    """A graph that grows; `expected`: the dims that weights are to have in the end."""

    seed: int
    opset: int = 17
    dynamic: bool = True
    hidden: int = 12
    broadcasts: bool = False
    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    expected: dict[str, tuple[int, ...]] = field(default_factory=dict)
    shapes: dict[tuple[str, tuple[int, ...]], str] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        """Weights and masks are drawn by NumPy."""
        self.rng = np.random.default_rng(self.seed)

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """A node; the name of its output, or the names."""
        self.count += 1
        names = [f"t{self.count}_{place}" for place in range(outputs)]
        node = helper.make_node(op_type, inputs, names, f"n{self.count}", **attributes)
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def weight(self, name: str, *dims: int) -> str:
        """Random floats under a name that is new."""
        assert name not in self.weights
        drawn = self.rng.uniform(0.2, 1.0, dims) * self.rng.choice([-1, 1], dims)
        scale = 1 / np.sqrt(dims[0]) if len(dims) > 1 else 0.5
        self.weights[name] = (drawn * scale).astype(np.float32)
        return name

    def const(self, values: Any, dtype: Any = np.int64) -> str:
        """A constant."""
        self.count += 1
        self.weights[f"c{self.count}"] = np.asarray(values, dtype)
        return f"c{self.count}"

    def pick(self, size: int, share: float) -> list[int]:
        """Indices to lose: about that share, at least one, never all."""
        count = min(max(1, round(size * share)), size - 1)
        return sorted(self.rng.choice(size, count, replace=False).tolist())

    def coin(self) -> bool:
        """True half of the time."""
        return bool(self.rng.random() < 0.5)

    def size(self, name: str, axis: int) -> str:
        """One size of a value, computed, as a vector."""
        shape = self.op("Shape", name)
        return str(self.op("Gather", shape, self.const([axis])))

    def reshape(self, name: str, like: str, sizes: Sequence[int]) -> str:
        """Reshape to [batch, sequence, *sizes], in one of the ways that exporters do."""
        if not self.dynamic:
            literals = self.const([*SIZES[0], *sizes])
        elif self.coin():
            literals = self.const([0, 0, *sizes])
        else:
            parts = [self.size(like, 0), self.size(like, 1)]
            # what -1 stands for is known only where nothing broadcasts over the batch
            last = sizes[-1] if len(sizes) > 1 or self.broadcasts else -1
            parts += [self.const([size]) for size in (*sizes[:-1], last)]
            key = like, tuple(sizes)  # who wants the same shape reads the same one
            if key not in self.shapes:
                self.shapes[key] = self.op("Concat", *parts, axis=0)
            literals = self.shapes[key]
        return str(self.op("Reshape", name, literals))

    def linear(self, name: str, given: str, size: int, outputs: int, bias: bool) -> str:
        """MatMul and perhaps Add; their constants are `name`.w and `name`.b."""
        made = self.op("MatMul", given, self.weight(f"{name}.w", size, outputs))
        if bias:
            made = self.op("Add", made, self.weight(f"{name}.b", outputs))
        return str(made)

    def norm(self, name: str, given: str) -> str:
        """LayerNormalization."""
        size = self.hidden
        names = self.weight(f"{name}.g", size), self.weight(f"{name}.h", size)
        return str(self.op("LayerNormalization", given, *names))

    def zero(self, name: str, axis: int, indices: Iterable[int]) -> None:
        """Make slices of a weight zero, if it is there."""
        if name in self.weights:
            np.moveaxis(self.weights[name], axis, 0)[list(indices)] = 0

    def expect(self, name: str, *dims: int) -> None:
        """The size that a weight is to have; -1 for an axis that keeps its own."""
        if name in self.weights:
            own = self.weights[name].shape
            self.expected[name] = tuple(
                size if want < 0 else want for want, size in zip(dims, own, strict=True)
            )

    def model(self, output: str, inputs: Sequence[str] = ("x",)) -> ModelProto:
        """The model, with input x [batch, sequence, hidden] or ids [batch, sequence]."""
        batch, sequence = ("batch", "sequence") if self.dynamic else SIZES[0]
        given = []
        for name in inputs:
            kind, dims = TensorProto.INT64, [batch, sequence]
            if name == "x":
                kind, dims = TensorProto.FLOAT, [batch, sequence, self.hidden]
            given.append(helper.make_tensor_value_info(name, kind, dims))
        self.nodes.append(helper.make_node("Identity", [output], ["y"], "last"))
        graph = helper.make_graph(
            self.nodes,
            "transformer",
            given,
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", "c"])],
            [numpy_helper.from_array(v, k) for k, v in self.weights.items()],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        made: ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return made


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention and what it loses; `groups`: queries for each key head."""

    count: int
    dims: int
    groups: int
    heads: list[int]  # key heads that are lost
    scores: list[int]  # dims of queries and keys that are lost
    values: list[int]  # dims of values that are lost

    @property
    def kept(self) -> int:
        """Key heads that are left."""
        return self.count - len(self.heads)

    def flat(self, heads: Iterable[int], dims: Iterable[int]) -> list[int]:
        """Channels of these dims of these heads."""
        return [head * self.dims + d for head in heads for d in dims]

    def queries(self, heads: Iterable[int]) -> list[int]:
        """The query heads of key heads."""
        return [h * self.groups + g for h in heads for g in range(self.groups)]


def mask(net: Net, name: str, h: Heads, rope: bool = False) -> None:
    """Zero what the attention `name` loses, each time on one side of those it may be."""
    every, heads = range(h.dims), range(h.count)
    wide = range(h.count * h.groups)
    if net.coin():  # heads without values
        net.zero(f"{name}.v.w", 1, h.flat(h.heads, every))
        net.zero(f"{name}.v.b", 0, h.flat(h.heads, every))
    else:  # heads that nothing reads
        net.zero(f"{name}.o.w", 0, h.flat(h.queries(h.heads), every))
    for dims, left, right in ((h.scores, "q", "k"), (h.values, "v", "o")):
        for dim in dims:
            side = left if net.coin() else right
            axis = 0 if side == "o" else 1
            pair = [dim]
            if rope and dims is h.scores:
                pair = [dim, (dim + h.dims // 2) % h.dims]
                side = left if dim % (h.dims // 2) % 2 else right
            of = wide if side in "qo" else heads
            net.zero(f"{name}.{side}.w", axis, h.flat(of, pair))
            if side != "o":
                net.zero(f"{name}.{side}.b", 0, h.flat(of, pair))


def expect(net: Net, name: str, h: Heads) -> None:
    """The sizes that are left of the weights of an attention."""
    scores, values = h.dims - len(h.scores), h.dims - len(h.values)
    wide = h.kept * h.groups
    for side, size in (
        ("q", wide * scores),
        ("k", h.kept * scores),
        ("v", h.kept * values),
    ):
        net.expect(f"{name}.{side}.w", -1, size)
        net.expect(f"{name}.{side}.b", size)
    net.expect(f"{name}.o.w", wide * values, -1)


def drawn(net: Net, count: int, dims: int, groups: int = 1, rope: bool = False) -> Heads:
    """Sizes, and what is lost of them."""
    scores = net.pick(dims, 0.4)
    if rope:
        half = net.pick(dims // 2, 0.4)
        scores = [*half, *(dim + dims // 2 for dim in half)]
    heads = net.pick(count, 0.4)
    return Heads(count, dims, groups, heads, scores, net.pick(dims, 0.4))


def core(net: Net, q: str, k: str, v: str, scale: float, more: str = "") -> str:
    """Scores, Softmax, context; all [batch, heads, sequence, dims], k transposed."""
    scores = net.op("MatMul", q, k)
    if scale:
        scores = net.op("Mul", scores, net.const(scale, np.float32))
    else:  # by the root of a size that is computed
        size = net.op("Gather", net.op("Shape", q), net.const(3))
        root = net.op("Sqrt", net.op("Cast", size, to=TensorProto.FLOAT))
        scores = net.op("Div", scores, root)
    if more:
        scores = net.op("Add", scores, more)
    weights = net.op("Softmax", scores, axis=-1)
    return str(net.op("MatMul", weights, v))


def merged(net: Net, context: str, like: str, size: int) -> str:
    """[batch, heads, sequence, dims] as [batch, sequence, heads * dims]."""
    return net.reshape(net.op("Transpose", context, perm=[0, 2, 1, 3]), like, [size])


def causal(net: Net, like: str) -> str:
    """A mask [1, 1, sequence, sequence] as far as the sequence goes."""
    whole = np.triu(np.full((1, 1, 16, 16), -1e4, np.float32), 1)
    table, end = net.const(whole, np.float32), net.size(like, 1)
    for axis in (2, 3):
        table = net.op("Slice", table, net.const([0]), end, net.const([axis]))
    return table


def ffn(net: Net, name: str, given: str, size: int, gelu: bool) -> str:
    """Two layers with an activation between; some units are zero or not read."""
    units = net.linear(f"{name}.up", given, net.hidden, size, True)
    act = net.op("Gelu" if net.opset >= 20 else "Relu", units)
    if gelu and net.opset < 20:
        erf = net.op("Erf", net.op("Div", units, net.const(1.4142135, np.float32)))
        half = net.op("Mul", units, net.op("Add", erf, net.const(1, np.float32)))
        act = net.op("Mul", half, net.const(0.5, np.float32))
    made = net.linear(f"{name}.down", act, size, net.hidden, True)
    gone = net.pick(size, 0.5)
    for unit in gone:
        if net.coin():
            net.zero(f"{name}.up.w", 1, [unit])
            net.zero(f"{name}.up.b", 0, [unit])
        else:
            net.zero(f"{name}.down.w", 0, [unit])
    net.expect(f"{name}.up.w", -1, size - len(gone))
    net.expect(f"{name}.up.b", size - len(gone))
    net.expect(f"{name}.down.w", size - len(gone), -1)
    return made


# ---- BERT: three layers, heads by Reshape and Transpose ----


def bert_attention(net: Net, name: str, given: str) -> str:
    """Queries, keys and values each by a layer of its own."""
    h = drawn(net, 3, 4)
    size = h.count * h.dims
    parts = []
    for side in "qkv":
        flat = net.linear(f"{name}.{side}", given, net.hidden, size, True)
        split = net.reshape(flat, given, [h.count, h.dims])
        perm = [0, 2, 3, 1] if side == "k" else [0, 2, 1, 3]
        parts.append(net.op("Transpose", split, perm=perm))
    context = core(net, parts[0], parts[1], parts[2], 0.5 if net.coin() else 0)
    flat = merged(net, context, given, size)
    out = net.linear(f"{name}.o", flat, size, net.hidden, True)
    mask(net, name, h)
    expect(net, name, h)
    return out


def bert(seed: int, dynamic: bool) -> Net:
    """Two blocks, the norms behind the sums."""
    net = Net(seed, dynamic=dynamic)
    x = "x"
    for block in range(2):
        x = net.op("Add", x, bert_attention(net, f"a{block}", x))
        x = net.norm(f"n{block}", x)
        x = net.op("Add", x, ffn(net, f"f{block}", x, 10, True))
        x = net.norm(f"m{block}", x)
    net.nodes.append(helper.make_node("Identity", [x], ["end"]))
    return net


# ---- GPT-2: one Gemm for all three, cut by Split ----


def conv1d(net: Net, name: str, given: str, size: int, outputs: int) -> str:
    """GPT-2's layer: a Gemm on [batch * sequence, size]."""
    like = given
    flat = net.op("Reshape", given, net.const([-1, size]))
    names = net.weight(f"{name}.w", size, outputs), net.weight(f"{name}.b", outputs)
    made = net.op("Gemm", flat, *names)
    if net.dynamic:
        sizes = [net.size(like, 0), net.size(like, 1), net.const([outputs])]
        return str(net.op("Reshape", made, net.op("Concat", *sizes, axis=0)))
    return net.reshape(made, like, [outputs])


def gpt2_attention(net: Net, name: str, given: str) -> str:
    """Queries, keys and values are parts of one value."""
    h = drawn(net, 3, 4)
    size = h.count * h.dims
    whole = conv1d(net, f"{name}.qkv", given, net.hidden, 3 * size)
    if net.opset >= 13:
        flats = net.op("Split", whole, net.const([size] * 3), outputs=3, axis=2)
    else:
        flats = net.op("Split", whole, outputs=3, axis=2, split=[size] * 3)
    parts = []
    for side, flat in zip("qkv", flats, strict=True):
        split = net.reshape(flat, given, [h.count, h.dims])
        perm = [0, 2, 3, 1] if side == "k" else [0, 2, 1, 3]
        parts.append(net.op("Transpose", split, perm=perm))
    context = core(net, parts[0], parts[1], parts[2], 0.5, causal(net, given))
    flat = merged(net, context, given, size)
    out = conv1d(net, f"{name}.o", flat, size, net.hidden)
    # the parts are masked on their own, then put together
    for place, side in enumerate("qkv"):
        part = slice(place * size, (place + 1) * size)
        net.weights[f"{name}.{side}.w"] = net.weights[f"{name}.qkv.w"][:, part]
        net.weights[f"{name}.{side}.b"] = net.weights[f"{name}.qkv.b"][part]
    mask(net, name, h)
    for side in "qkv":
        del net.weights[f"{name}.{side}.w"], net.weights[f"{name}.{side}.b"]
    scores, values = h.dims - len(h.scores), h.dims - len(h.values)
    left = h.kept * (2 * scores + values)
    net.expect(f"{name}.qkv.w", -1, left)
    net.expect(f"{name}.qkv.b", left)
    net.expect(f"{name}.o.w", h.kept * values, -1)
    return out


def gpt2(seed: int, dynamic: bool) -> Net:
    """Embeddings with positions, two blocks, the norms before the layers, tied head."""
    net = Net(seed, dynamic=dynamic, opset=17)
    rows = net.op("Gather", net.weight("wte", 20, net.hidden), "ids")
    places = net.weight("wpe", 16, net.hidden)
    net.weights["wpe"] = net.weights["wpe"][None]
    places = net.op("Slice", places, net.const([0]), net.size("ids", 1), net.const([1]))
    x = net.op("Add", rows, places)
    for block in range(2):
        given = net.norm(f"n{block}", x)
        x = net.op("Add", x, gpt2_attention(net, f"a{block}", given))
        given = net.norm(f"m{block}", x)
        x = net.op("Add", x, ffn(net, f"f{block}", given, 10, True))
    head = net.op("Transpose", "wte", perm=[1, 0])
    x = net.op("MatMul", net.norm("last", x), head)
    net.nodes.append(helper.make_node("Identity", [x], ["end"]))
    return net


# ---- ViT: one layer, one Reshape to [3, heads, dims] ----


def vit_attention(net: Net, name: str, given: str) -> str:
    """All three have the same shape, so they lose the same dims."""
    h = drawn(net, 3, 4)
    h = Heads(h.count, h.dims, 1, h.heads, h.scores, h.scores)
    size = h.count * h.dims
    flat = net.linear(f"{name}.qkv", given, net.hidden, 3 * size, True)
    split = net.reshape(flat, given, [3, h.count, h.dims])
    whole = net.op("Transpose", split, perm=[2, 0, 3, 1, 4])
    if net.coin():
        parts = [net.op("Gather", whole, net.const(i), axis=0) for i in range(3)]
    else:
        cut = net.op("Split", whole, outputs=3, axis=0)
        parts = [net.op("Squeeze", part, net.const([0])) for part in cut]
    q = net.op("Mul", parts[0], net.const(0.5, np.float32))
    k = net.op("Transpose", parts[1], perm=[0, 1, 3, 2])
    context = core(net, q, k, parts[2], scale=1.0)
    out = net.linear(
        f"{name}.o", merged(net, context, given, size), size, net.hidden, True
    )
    for place, side in enumerate("qkv"):
        part = slice(place * size, (place + 1) * size)
        net.weights[f"{name}.{side}.w"] = net.weights[f"{name}.qkv.w"][:, part]
        net.weights[f"{name}.{side}.b"] = net.weights[f"{name}.qkv.b"][part]
    mask(net, name, h)
    for side in "qkv":
        del net.weights[f"{name}.{side}.w"], net.weights[f"{name}.{side}.b"]
    left = h.kept * (h.dims - len(h.scores))
    net.expect(f"{name}.qkv.w", -1, 3 * left)
    net.expect(f"{name}.qkv.b", 3 * left)
    net.expect(f"{name}.o.w", left, -1)
    return out


def vit(seed: int, dynamic: bool) -> Net:
    """Two blocks, the norms before the layers."""
    net = Net(seed, dynamic=dynamic)
    x = "x"
    for block in range(2):
        given = net.norm(f"n{block}", x)
        x = net.op("Add", x, vit_attention(net, f"a{block}", given))
        given = net.norm(f"m{block}", x)
        x = net.op("Add", x, ffn(net, f"f{block}", given, 10, True))
    net.nodes.append(helper.make_node("Identity", [x], ["end"]))
    return net


# ---- Llama: grouped heads, rotated positions, RMSNorm, SwiGLU ----


def rms_norm(net: Net, name: str, given: str) -> str:
    """Decomposed, or by one operator."""
    gamma = net.weight(f"{name}.g", net.hidden)
    if net.opset >= 23:
        return str(net.op("RMSNormalization", given, gamma, epsilon=1e-3))
    square = net.op("Pow", given, net.const(2, np.float32))
    mean = net.op("ReduceMean", square, axes=[-1], keepdims=1)
    root = net.op("Sqrt", net.op("Add", mean, net.const(1e-3, np.float32)))
    if net.coin():
        normed = net.op("Div", given, root)
    else:
        normed = net.op("Mul", given, net.op("Reciprocal", root))
    return str(net.op("Mul", gamma, normed))


def rotated(net: Net, given: str, cos: str, sin: str, dims: int) -> str:
    """x * cos + rotate_half(x) * sin."""
    half, axis = dims // 2, net.const([3])
    low = net.op("Slice", given, net.const([0]), net.const([half]), axis)
    high = net.op("Slice", given, net.const([half]), net.const([1 << 40]), axis)
    turned = net.op("Concat", net.op("Neg", high), low, axis=-1)
    return str(net.op("Add", net.op("Mul", given, cos), net.op("Mul", turned, sin)))


def tables(net: Net, dims: int, how: str) -> tuple[str, str]:
    """cos and sin [.., 1, sequence, dims]: cut or gathered from tables, or computed."""
    rates = 1 / 10.0 ** (np.arange(0, dims, 2) / dims)
    angles = np.outer(np.arange(16), rates)
    both = np.concatenate([angles, angles], 1)
    if how == "computed":
        places = net.op("Unsqueeze", "places", net.const([1]))
        column = net.const(rates[None, :, None], np.float32)
        product = net.op("MatMul", column, net.op("Cast", places, to=1))
        freqs = net.op("Transpose", product, perm=[0, 2, 1])
        whole = net.op("Concat", freqs, freqs, axis=-1)
        made = [net.op(f, whole) for f in ("Cos", "Sin")]
        axis = net.const([1])
        return net.op("Unsqueeze", made[0], axis), net.op("Unsqueeze", made[1], axis)
    found = []
    for name, function in (("cos", np.cos), ("sin", np.sin)):
        net.weights[name] = function(both).astype(np.float32)
        if how == "gathered":
            rows = net.op("Gather", name, "places")
            found.append(net.op("Unsqueeze", rows, net.const([1])))
        else:
            end = net.size("ids", 1)
            rows = net.op("Slice", name, net.const([0]), end, net.const([0]))
            found.append(net.op("Unsqueeze", rows, net.const([0, 1])))
    return found[0], found[1]


def repeated(net: Net, given: str, like: str, h: Heads) -> str:
    """Each key head once for each query head of its group."""
    wide = net.op("Unsqueeze", given, net.const([2]))
    batch, sequence = net.size(like, 0), net.size(like, 1)
    sizes = [batch, net.const([h.count]), net.const([h.groups]), sequence]
    dims = net.const([h.dims])
    if net.coin():
        wide = net.op("Tile", wide, net.const([1, 1, h.groups, 1, 1]))
    else:
        shape = net.op("Concat", *sizes, dims, axis=0)
        if net.coin():  # as exporters write sizes that are not to change
            ones = net.op("Equal", shape, net.const([-1]))
            shape = net.op("Where", ones, net.const([1]), shape)
        wide = net.op("Expand", wide, shape)
    shape = net.op(
        "Concat", batch, net.const([h.count * h.groups]), sequence, dims, axis=0
    )
    return str(net.op("Reshape", wide, shape))


def llama_attention(
    net: Net, name: str, given: str, h: Heads, turn: tuple[str, str]
) -> str:
    """Fewer key heads than query heads; queries and keys are rotated."""
    parts = []
    for side in "qkv":
        count = h.count * (h.groups if side == "q" else 1)
        flat = net.linear(f"{name}.{side}", given, net.hidden, count * h.dims, False)
        split = net.reshape(flat, given, [count, h.dims])
        part = net.op("Transpose", split, perm=[0, 2, 1, 3])
        if side != "v":
            part = rotated(net, part, *turn, h.dims)
        if side != "q" and h.groups > 1:
            part = repeated(net, part, given, h)
        parts.append(part)
    keys = net.op("Transpose", parts[1], perm=[0, 1, 3, 2])
    context = core(net, parts[0], keys, parts[2], 0.5, causal(net, given))
    size = h.count * h.groups * h.dims
    flat = merged(net, context, given, size)
    return net.linear(f"{name}.o", flat, size, net.hidden, False)


def swiglu(net: Net, name: str, given: str, size: int) -> str:
    """down(silu(gate(x)) * up(x))."""
    gate = net.linear(f"{name}.gate", given, net.hidden, size, False)
    gate = net.op("Mul", gate, net.op("Sigmoid", gate))
    up = net.linear(f"{name}.up", given, net.hidden, size, False)
    made = net.linear(f"{name}.down", net.op("Mul", gate, up), size, net.hidden, False)
    gone = net.pick(size, 0.5)
    for unit in gone:
        side = net.rng.choice(["gate", "up", "down"])
        net.zero(f"{name}.{side}.w", 0 if side == "down" else 1, [unit])
    for side in ("gate", "up"):
        net.expect(f"{name}.{side}.w", -1, size - len(gone))
    net.expect(f"{name}.down.w", size - len(gone), -1)
    return made


def llama(seed: int, dynamic: bool, how: str = "gathered", opset: int = 17) -> Net:
    """Two blocks; some channels of the residual stream are zero throughout."""
    net = Net(seed, dynamic=dynamic, opset=opset, broadcasts=how != "cut")
    x = net.op("Gather", net.weight("embed", 20, net.hidden), "ids")
    turn = tables(net, 8, how)
    lost = drawn(net, 3, 8, 2, rope=True).scores  # the tables serve every block
    for block in range(2):
        drawn_here = drawn(net, 3, 8, 2, rope=True)
        h = Heads(3, 8, 2, drawn_here.heads, lost, drawn_here.values)
        given = rms_norm(net, f"n{block}", x)
        x = net.op("Add", x, llama_attention(net, f"a{block}", given, h, turn))
        mask(net, f"a{block}", h, rope=True)
        expect(net, f"a{block}", h)
        given = rms_norm(net, f"m{block}", x)
        x = net.op("Add", x, swiglu(net, f"f{block}", given, 10))
    head = net.op("Transpose", "embed", perm=[1, 0])
    x = net.op("MatMul", rms_norm(net, "last", x), head)
    net.nodes.append(helper.make_node("Identity", [x], ["end"]))
    narrow(net)
    return net


def narrow(net: Net) -> None:
    """Make channels of the residual stream zero wherever they are written."""
    gone = net.pick(net.hidden, 0.4)
    left = net.hidden - len(gone)
    net.zero("embed", 1, gone)
    net.expect("embed", -1, left)
    for name in list(net.weights):
        _, _, last = name.partition(".")
        if last in ("o.w", "down.w"):
            net.zero(name, 1, gone)
            net.expected[name] = net.expected[name][0], left
        elif last in ("q.w", "k.w", "v.w", "gate.w", "up.w"):
            net.expected[name] = left, net.expected[name][1]
        elif last == "g":
            net.expect(name, left)


# ---- checking ----


@pytest.fixture(scope="module")
def worker() -> Any:
    """One context, so that all share one worker process."""
    with Evaluator() as evaluator:
        yield Context(evaluator=evaluator)


def feeds(model: ModelProto) -> list[support.Feed]:
    """A feed for each size; static models have one size."""
    found = []
    for number, (batch, sequence) in enumerate(SIZES):
        rng = np.random.default_rng(number)
        feed: support.Feed = {}
        for value in model.graph.input:
            dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
            if all(dims[:2]):
                batch, sequence = dims[:2]
            if value.name == "x":
                array = rng.standard_normal((batch, sequence, dims[2]))
                feed["x"] = array.astype(np.float32)
            elif value.name.startswith("past_"):
                kept = [size or 2 for size in dims[1:]]
                array = rng.standard_normal((batch, *kept))
                feed[value.name] = array.astype(np.float32)
            elif value.name == "ids":
                feed["ids"] = np.asarray(rng.integers(0, 20, (batch, sequence)))
            else:
                feed["places"] = np.tile(np.arange(sequence), (batch, 1))
        found.append(feed)
    return found


def shrink(net: Net, context: Context, pipeline: str = "zero-channels") -> Model:
    """Shrinks, compares numbers at two sizes and all sizes of weights."""
    used = {name for node in net.nodes for name in node.input}
    inputs = [name for name in ("x", "ids", "places") if name in used]
    return check(net, net.model("end", inputs), context, pipeline)


def check(
    net: Net, source: ModelProto, context: Context, pipeline: str = "zero-channels"
) -> Model:
    """The same for a model that has more inputs or outputs."""
    onnx.checker.check_model(source)
    try:
        model = support.run_passes(source, pipeline, context)
        result = support.final(model)
        onnx.checker.check_model(result)
        for feed in feeds(source):
            expected, found = support.run(source, feed), support.run(result, feed)
            support.assert_same(expected, found, "equivalent")
        sizes = {t.name: tuple(t.dims) for t in result.graph.initializer}
        wrong = {
            name: (sizes.get(name), dims)
            for name, dims in net.expected.items()
            if sizes.get(name) != dims
        }
        assert not wrong, "name: (found, expected)"
        again = support.run_passes(result, pipeline, context)
        assert again.ledger.edits == 0, "the second run still finds something"
    except BaseException:
        print(onnx.printer.to_text(source))
        raise
    return model


Build = Callable[[int, bool], Net]
NETS: dict[str, Build] = {
    "bert": bert,
    "gpt2": gpt2,
    "vit": vit,
    "llama": llama,
    "llama, computed": lambda seed, dynamic: llama(seed, dynamic, "computed"),
    "llama, cut": lambda seed, dynamic: llama(seed, dynamic, "cut"),
    "llama, 23": lambda seed, dynamic: llama(seed, dynamic, opset=23),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", NETS)
def test_blocks(name: str, dynamic: bool, seed: int, worker: Context) -> None:
    """Heads, dims, units and channels that are zero go, and nothing else changes."""
    shrink(NETS[name](seed, dynamic), worker)


# ---- one attention, masked by hand ----

HEADS, DIMS = 3, 4
SIZE = HEADS * DIMS


@dataclass
class Single(Net):
    """One attention of 3 heads of 4 dims, with hooks at its inner values."""

    names: list[str] = field(default_factory=list)

    def build(
        self,
        scores: Callable[[str], str] = lambda name: name,
        weights: Callable[[str], str] = lambda name: name,
        heads: Callable[[str, str], str] = lambda side, name: name,
        bias: bool = True,
        memory: str = "x",
    ) -> Single:
        """x to the output of the last layer; keys and values are of `memory`."""
        parts = {}
        for side in "qkv":
            given = "x" if side == "q" else memory
            flat = self.linear(side, given, self.hidden, SIZE, bias)
            split = self.reshape(flat, given, [HEADS, DIMS])
            made = self.op("Transpose", split, perm=[0, 2, 1, 3])
            parts[side] = heads(side, made)
        keys = self.op("Transpose", parts["k"], perm=[0, 1, 3, 2])
        product = scores(self.op("MatMul", parts["q"], keys))
        mixed = weights(self.op("Softmax", product, axis=-1))
        context = self.op("MatMul", mixed, parts["v"])
        flat = merged(self, context, "x", SIZE)
        out = self.linear("o", flat, SIZE, self.hidden, bias)
        self.nodes.append(helper.make_node("Identity", [out], ["end"]))
        return self

    def lose(self, side: str, channels: Iterable[int], bias: float = 0.0) -> None:
        """Make channels of a layer zero, or constant."""
        listed = list(channels)
        self.zero(f"{side}.w", 0 if side == "o" else 1, listed)
        if side != "o" and f"{side}.b" in self.weights:
            self.weights[f"{side}.b"][listed] = bias

    def keeps(self, q: int, k: int, v: int) -> None:
        """How many channels each layer is to have in the end."""
        for side, size in (("q", q), ("k", k), ("v", v)):
            self.expect(f"{side}.w", -1, size)
        self.expect("o.w", v, -1)


def head(*heads: int) -> list[int]:
    """The channels of whole heads."""
    return [h * DIMS + d for h in heads for d in range(DIMS)]


def dim(*dims: int) -> list[int]:
    """The channels of these dims of every head."""
    return [h * DIMS + d for h in range(HEADS) for d in dims]


def test_constant_values(worker: Context) -> None:
    """The rows of a Softmax sum to 1: what values are constant goes into the bias."""
    net = Single(0).build()
    net.lose("v", dim(1), 0.75)
    net.lose("v", head(2), -0.5)
    net.keeps(8, 8, 6)
    shrink(net, worker)


def test_constant_values_of_another_sequence(worker: Context) -> None:
    """Of no keys the sum is zero: constants stay, zeros go."""
    net = Single(0).build(memory="past_x")
    net.lose("v", dim(1), 0.75)
    net.lose("v", dim(2))
    net.keeps(12, 12, 9)
    source = net.model("end")
    sizes: list[int | str | None] = ["batch", "keys", net.hidden]
    kind = TensorProto.FLOAT
    source.graph.input.append(helper.make_tensor_value_info("past_x", kind, sizes))
    check(net, source, worker)


def test_constant_values_behind_a_guard(worker: Context) -> None:
    """Rows that a guard may change need not sum to 1."""

    def guarded(name: str) -> str:
        nan = net.op("IsNaN", name)
        return str(net.op("Where", nan, net.const(0, np.float32), name))

    net = Single(0)
    net.build(weights=guarded)
    net.lose("v", dim(1), 0.75)
    net.keeps(12, 12, 12)
    shrink(net, worker)


def test_zero_values_behind_a_guard(worker: Context) -> None:
    """Zeros are zero whatever the weights are."""
    net = Single(0)
    net.build(weights=lambda name: str(net.op("Mul", name, net.const(2, np.float32))))
    net.lose("v", [*dim(1), *head(0)])
    net.keeps(8, 8, 6)
    shrink(net, worker)


def test_dims_of_one_head_stay(worker: Context) -> None:
    """Every head keeps the same dims."""
    net = Single(1).build()
    net.lose("k", [1, 2, 5])
    net.lose("v", [0, 4, 11])
    net.keeps(12, 12, 12)
    shrink(net, worker)


def test_dims_of_the_heads_that_are_left(worker: Context) -> None:
    """What goes of the others need not be the same in a head that goes."""
    net = Single(1).build()
    net.lose("k", [1, 5])
    net.lose("v", [*head(2), 3, 7])
    net.keeps(6, 6, 6)
    shrink(net, worker)


def test_zero_scores_stay(worker: Context) -> None:
    """A head without queries takes the mean of its values."""
    net = Single(2).build()
    net.lose("q", head(1))
    net.keeps(12, 12, 12)
    shrink(net, worker)


def test_no_scores_at_all(worker: Context) -> None:
    """One dim stays for the shapes."""
    net = Single(2).build()
    net.lose("q", range(SIZE))
    net.keeps(3, 3, 12)
    shrink(net, worker)


def test_no_values_at_all(worker: Context) -> None:
    """One head of one dim stays, unless other passes take it out."""
    net = Single(2).build()
    net.lose("v", range(SIZE))
    net.keeps(1, 1, 1)
    shrink(net, worker)


def test_talking_heads(worker: Context) -> None:
    """A Softmax over the heads, or a layer between them, keeps all; not the dims."""
    net = Single(3)
    net.build(scores=lambda name: str(net.op("Softmax", name, axis=1)))
    net.lose("v", head(0))
    net.lose("k", dim(3))
    net.keeps(9, 9, 12)
    shrink(net, worker)


def test_scores_that_are_given_away(worker: Context) -> None:
    """Weights that are an output keep their heads; the dims go."""
    net = Single(3)
    net.build()
    net.lose("v", [*head(0), *dim(2)])
    net.lose("q", dim(3))
    softmax = next(node for node in net.nodes if node.op_type == "Softmax")
    net.names = [softmax.output[0]]
    net.keeps(9, 9, 9)
    source = net.model("end")
    dims: list[int | str | None] = ["a", HEADS, "s", "t"]
    given = helper.make_tensor_value_info(softmax.output[0], TensorProto.FLOAT, dims)
    source.graph.output.append(given)
    check(net, source, worker)


def test_weights_of_heads_whose_number_is_open(worker: Context) -> None:
    """They may be one for all heads, or one for each: values keep their heads."""
    net = Net(4, hidden=SIZE)
    values = net.op(
        "Reshape", net.linear("v", "x", SIZE, SIZE, False), net.const([0, 0, HEADS, DIMS])
    )
    turned = net.op("Transpose", values, perm=[0, 2, 1, 3])
    mixed = net.op("MatMul", "weights", turned)
    back = net.op("Transpose", mixed, perm=[0, 2, 1, 3])
    joined = net.op("Reshape", back, net.const([0, 0, SIZE]))
    end = net.linear("o", joined, SIZE, SIZE, False)
    net.zero("v.w", 1, head(0))
    source = net.model(end)
    sizes: list[int | str | None] = ["batch", "heads", "sequence", "sequence"]
    kind = TensorProto.FLOAT
    source.graph.input.append(helper.make_tensor_value_info("weights", kind, sizes))
    result = support.final(support.run_passes(source, "zero-channels", worker))
    for (batch, length), heads in zip(SIZES, (HEADS, 1), strict=True):
        feed = {"x": (batch, length, SIZE), "weights": (batch, heads, length, length)}
        arrays = {
            name: net.rng.standard_normal(dims).astype(np.float32)
            for name, dims in feed.items()
        }
        expected, found = support.run(source, arrays), support.run(result, arrays)
        support.assert_same(expected, found, "equivalent")


def test_heads_with_constants_of_their_own(worker: Context) -> None:
    """A bias for each head, as ALiBi has it, loses heads with the scores."""
    net = Single(4)
    slopes = net.weight("slopes", 1, HEADS, 1, 1)
    net.build(scores=lambda name: str(net.op("Add", name, slopes)))
    net.lose("o", head(1))
    net.keeps(8, 8, 8)
    net.expect("slopes", 1, 2, 1, 1)
    shrink(net, worker)


def normed(net: Net, name: str, scale: str) -> str:
    """x / sqrt(mean(x * x) + epsilon) * scale over the last axis."""
    mean = net.op("ReduceMean", net.op("Mul", name, name), axes=[-1])
    root = net.op("Sqrt", net.op("Add", mean, net.const(1e-2, np.float32)))
    return str(net.op("Mul", net.op("Div", name, root), scale))


@pytest.mark.parametrize("op", ["parts", "RMSNormalization"])
def test_norm_of_queries(op: str, worker: Context) -> None:
    """Over the dims of a head: dims that are zero go, with their scale."""
    net = Single(5, opset=23 if op != "parts" else 17)
    scales = {side: net.weight(f"{side}.g", DIMS) for side in "qk"}

    def heads(side: str, name: str) -> str:
        if side == "v":
            return name
        if op == "parts":
            return normed(net, name, scales[side])
        return str(net.op(op, name, scales[side], epsilon=1e-2))

    net.build(heads=heads)
    net.lose("q", dim(0, 2))
    net.lose("k", dim(0, 2))
    net.lose("v", head(2))
    net.keeps(4, 4, 8)
    net.expect("q.g", 2)
    net.expect("k.g", 2)
    shrink(net, worker)


@pytest.mark.parametrize("op", ["parts", "RMSNormalization"])
def test_norm_of_what_is_not_zero(op: str, worker: Context) -> None:
    """A scale of zero makes zeros of what the norm has read: they stay before it."""
    net = Single(5, opset=23 if op != "parts" else 17)
    scale = net.weight("q.g", DIMS)
    net.weights[scale][1] = 0

    def heads(side: str, name: str) -> str:
        if side != "q":
            return name
        if op == "parts":
            return normed(net, name, scale)
        return str(net.op(op, name, scale))

    net.build(heads=heads)
    net.keeps(12, 12, 12)
    shrink(net, worker)


def test_layer_norm_of_queries(worker: Context) -> None:
    """With a mean taken off, dims stay; a scale and bias of zero are no reason."""
    net = Single(6)
    names = net.weight("g", DIMS), net.weight("h", DIMS)
    net.weights["g"][2] = net.weights["h"][2] = 0

    def heads(side: str, name: str) -> str:
        return str(net.op("LayerNormalization", name, *names)) if side == "q" else name

    net.build(heads=heads)
    net.lose("q", dim(0))
    net.lose("o", head(0))
    net.keeps(8, 8, 8)
    shrink(net, worker)


def test_scale_of_zero_behind_a_layer_norm(worker: Context) -> None:
    """What a LayerNormalization makes constant goes into the layers that read it."""
    net = Net(7)
    given = net.norm("n", "x")
    net.weights["n.g"][[1, 5]] = 0
    units = net.op("Relu", net.linear("up", given, net.hidden, 8, True))
    out = net.linear("down", units, 8, net.hidden, True)
    net.zero("up.w", 0, [i for i in range(net.hidden) if i not in (1, 5)])
    net.nodes.append(helper.make_node("Identity", [out], ["end"]))
    net.expect("up.w", net.hidden, 1)  # all are constant, and one stays
    shrink(net, worker)


@pytest.mark.parametrize("side", [0, 1])
def test_half_of_a_rotated_pair(side: int, worker: Context) -> None:
    """Both dims of a pair go, or none."""
    net = Single(8)
    turn = tables_of(net)

    def heads(name: str, value: str) -> str:
        return value if name == "v" else rotated(net, value, *turn, DIMS)

    net.build(heads=heads)
    net.lose("k", dim(1, *([3] if side else [])))
    left = 6 if side else 12
    net.keeps(left, left, 12)
    shrink(net, worker)


def tables_of(net: Net) -> tuple[str, str]:
    """cos and sin [1, 1, sequence, dims], cut from constants."""
    angles = np.outer(np.arange(16), [1.0, 0.1, 1.0, 0.1])
    found = []
    for function in (np.cos, np.sin):
        table = net.const(function(angles)[None, None], np.float32)
        end = net.size("x", 1)
        axis = net.const([2])
        found.append(str(net.op("Slice", table, net.const([0]), end, axis)))
    return found[0], found[1]


def test_one_query_head_of_a_group(worker: Context) -> None:
    """Key heads serve whole groups: a query head alone stays."""
    net = Net(9, broadcasts=True)
    h = Heads(2, 4, 2, [], [], [])
    net.op("Identity", "ids")
    turn = tables_of(net)
    out = llama_attention(net, "a", "x", h, turn)
    net.nodes.append(helper.make_node("Identity", [out], ["end"]))
    net.zero("a.o.w", 0, range(4, 8))
    for side, size in (("q", 16), ("k", 8), ("v", 8)):
        net.expect(f"a.{side}.w", -1, size)
    net.nodes = [node for node in net.nodes if node.input[0] != "ids"]
    shrink(net, worker)


def test_every_second_query_head(worker: Context) -> None:
    """The same query head of every group goes: the groups are smaller then."""
    net = Net(9, broadcasts=True)
    h = Heads(2, 4, 2, [], [], [])
    out = llama_attention(net, "a", "x", h, tables_of(net))
    net.nodes.append(helper.make_node("Identity", [out], ["end"]))
    net.zero("a.o.w", 0, [*range(4, 8), *range(12, 16)])
    for side in "qkv":
        net.expect(f"a.{side}.w", -1, 8)
    shrink(net, worker)


def test_hidden_channels_behind_a_layer_norm(worker: Context) -> None:
    """A zero in the residual stream moves the mean: it stays."""
    net = Net(10)
    x = net.linear("in", "x", net.hidden, net.hidden, False)
    net.zero("in.w", 1, [0, 3])
    out = net.linear("out", net.norm("n", x), net.hidden, net.hidden, False)
    net.nodes.append(helper.make_node("Identity", [out], ["end"]))
    net.expect("in.w", 12, 12)
    shrink(net, worker)


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum", "ReduceL2", "ReduceMax"])
def test_reductions_over_channels(op: str, worker: Context) -> None:
    """Zeros go from sums; from means, if the number is made up for; not from extremes."""
    net = Net(11)
    x = net.linear("in", "x", net.hidden, 8, False)
    net.zero("in.w", 1, [0, 3])
    axes: dict[str, Any] = {"axes": [-1]}
    names = [x]
    if op == "ReduceSum":
        axes, names = {}, [x, net.const([-1])]
    total = net.op(op, *names, keepdims=1, **axes)
    out = net.linear("out", net.op("Add", x, total), 8, net.hidden, False)
    net.nodes.append(helper.make_node("Identity", [out], ["end"]))
    net.zero("out.w", 0, [0, 3])
    net.expect("in.w", 12, 8 if op == "ReduceMax" else 6)
    shrink(net, worker)


def test_cached_keys(worker: Context) -> None:
    """Keys of earlier steps come from outside, and say how many heads there are."""
    net = Single(12)
    net.build(
        heads=lambda side, name: (
            name if side == "q" else str(net.op("Concat", f"past_{side}", name, axis=2))
        )
    )
    net.lose("v", [*head(0), *dim(2)])
    net.lose("k", dim(3))
    net.keeps(12, 12, 12)
    source = net.model("end")
    for side in "kv":
        dims: list[int | str | None] = ["batch", HEADS, "past", DIMS]
        kind = TensorProto.FLOAT
        source.graph.input.append(
            helper.make_tensor_value_info(f"past_{side}", kind, dims)
        )
    check(net, source, worker)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama, cut"])
def test_with_all_passes(name: str, worker: Context) -> None:
    """The numbers are the same after all else that may happen to a transformer."""
    net = NETS[name](5, True)
    net.expected.clear()  # weights may have other names by then
    shrink(net, worker, ",".join(PIPELINES["default"]))


@pytest.mark.parametrize("name", NETS)
def test_masks_at_random(name: str, worker: Context) -> None:
    """Slices of any weight are zero, whether others agree or not: still the same."""
    for seed in range(3):
        net = NETS[name](seed, seed > 0)
        net.expected.clear()
        for key, array in net.weights.items():
            if not key.startswith("c") and array.dtype == np.float32:
                for axis in range(array.ndim):
                    net.zero(key, axis, net.pick(array.shape[axis], 0.4)[:2])
        shrink(net, worker)
