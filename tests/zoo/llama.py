"""Llama: RMSNorm, rotary embedding, grouped queries, a gated feed-forward.

A RMSNorm divides by the root of a mean over all channels. Of K left of C, where the rest
is zero, that is made up for by gamma sqrt(C / K) and epsilon C / K; a constant other than
zero is part of the mean, and stays. RoPE pairs dim i with dim i + size / 2 of every head,
so these go together, and from the tables of angles, which all blocks read.

Sources: Touvron et al., https://arxiv.org/abs/2302.13971; Su et al.,
https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import TensorProto

from tests.zoo.toolkit import Ints, Maker, Net, Value
from tests.zoo.transformer import (
    By,
    attend,
    copied,
    couple,
    embedding,
    merged,
    picked,
)

WIDTH, WORDS, LENGTH = 24, 40, 32
HEADS, SHARED, SIZE = 4, 2, 6


def _norm(net: Net, x: Value) -> Value:
    """x * rsqrt(mean(x^2) + eps) * gamma."""
    net.rigid.append(x.ids)
    square = net.on(x, "Pow", net.scalar(2.0)).name
    mean = net.node("ReduceMean", [square], axes=[-1], keepdims=1)
    root = net.node("Sqrt", [net.node("Add", [mean, net.scalar(1e-6)])])
    made = net.on(x, "Mul", net.node("Reciprocal", [root]))
    gamma = net.weight(net.random.uniform(0.5, 1.5, WIDTH), {0: x.ids}, "gamma")
    return replace(made, name=net.node("Mul", [gamma, made.name]))


def _angles(net: Net, ids: Ints) -> tuple[str, str]:
    """cos and sin for every place and dim: [1, 1, S, size], for all blocks the same.

    `ids`: dims that go from the tables, too; none where only heads go.
    """
    rate = 100.0 ** (-np.arange(SIZE // 2) * 2 / SIZE)
    angle = np.concatenate([np.outer(np.arange(LENGTH), rate)] * 2, axis=1)
    length = net.node("Gather", [net.node("Shape", ["ids"]), net.ints(1)], axis=0)
    axes = {3: ids} if len(ids) else {}
    found = []
    for function, hint in ((np.cos, "cos"), (np.sin, "sin")):
        table = net.weight(function(angle).reshape(1, 1, LENGTH, SIZE), axes, hint)
        found.append(net.node("Slice", [table, net.ints(0), length, net.ints(2)]))
    return found[0], found[1]


def _rotate(net: Net, x: str, angles: tuple[str, str]) -> str:
    """x cos + rotate_half(x) sin."""
    half = SIZE // 2
    first = net.node("Slice", [x, net.ints(0), net.ints(half), net.ints(3)])
    last = net.node("Slice", [x, net.ints(half), net.ints(2**62), net.ints(3)])
    turned = net.node("Concat", [net.node("Neg", [last]), first], axis=3)
    plain = net.node("Mul", [x, angles[0]])
    return net.node("Add", [plain, net.node("Mul", [turned, angles[1]])])


def _repeat(net: Net, x: str, shape_of: str) -> str:
    """repeat_kv: [N, kv, S, size] to [N, heads, S, size], by way of an Expand."""
    made = net.node("Unsqueeze", [x, net.ints(2)])
    dims = net.node("Shape", [shape_of])
    batch = net.node("Slice", [dims, net.ints(0), net.ints(1)])
    length = net.node("Slice", [dims, net.ints(1), net.ints(2)])
    kept = HEADS // SHARED
    wide = [batch, net.ints(kept), net.ints(SHARED), length, net.ints(SIZE)]
    made = net.node("Expand", [made, net.node("Concat", wide, axis=0)])
    flat = net.node("Concat", [batch, net.ints(HEADS), length, net.ints(SIZE)], axis=0)
    return net.node("Reshape", [made, flat])


def _attention(
    net: Net, x: Value, dims: Ints, mask: str, angles: tuple[str, str]
) -> Value:
    """`dims`: those of the tables, where queries and keys lose dims; else heads go."""
    by: By = "dim" if len(dims) else "head"
    groups = HEADS // SHARED
    q = net.linear(x, HEADS * SIZE, bias=False, gate=by == "head")
    k = net.linear(x, groups * SIZE, bias=False, gate=True)
    v = net.linear(x, groups * SIZE, bias=False)
    couple(net, q.ids, k.ids, v.ids, HEADS, SHARED, by)
    if by == "dim":
        net.union.unite(k.ids[:SIZE], dims)
    shape = copied(net)
    parts = []
    for each, heads in ((q, HEADS), (k, groups), (v, groups)):
        made = net.node("Reshape", [each.name, shape(each, heads, SIZE)])
        parts.append(net.node("Transpose", [made], perm=[0, 2, 1, 3]))
    queries, keys = (_rotate(net, part, angles) for part in parts[:2])
    keys, values = (_repeat(net, part, "ids") for part in (keys, parts[2]))
    keys = net.node("Transpose", [keys], perm=[0, 1, 3, 2])
    made = attend(net, queries, keys, values, SIZE, mask)
    made = net.node("Transpose", [made], perm=[0, 2, 1, 3])
    made = net.node("Reshape", [made, merged(net, x, HEADS, SIZE, shape)])
    wide = np.repeat(v.ids.reshape(groups, 1, SIZE), SHARED, axis=1).reshape(-1)
    return net.linear(Value(made, wide, 2), WIDTH, bias=False)


def _feed_forward(net: Net, x: Value) -> Value:
    gate = net.act(net.linear(x, 32, bias=False), "SiLU")
    made = net.mul(gate, net.linear(x, 32, bias=False))
    return net.linear(made, WIDTH, bias=False)


def _causal(net: Net, ids: str) -> str:
    whole = np.triu(np.full((1, 1, LENGTH, LENGTH), -1e4, np.float32), 1)
    made = net.constant(whole, "causal")
    length = net.node("Gather", [net.node("Shape", [ids]), net.ints(1)], axis=0)
    for axis in (2, 3):
        made = net.node("Slice", [made, net.ints(0), length, net.ints(axis)])
    return made


def llama(seed: int, *, by: By = "head", stream: bool = False) -> Net:
    """Two blocks, two query heads for each key and value head.

    Where `stream`, channels of the stream are masked as well.
    """
    net = Net(seed)
    net.input("ids", ["N", "S"], kind=TensorProto.INT64)
    table = embedding(net, WORDS, WIDTH)
    if stream:
        net.make(Maker(table.name, 1, table.ids))
    else:
        net.freeze(table)
    x = picked(net, table, "ids")
    dims = net.union.new(SIZE if by == "dim" else 0)
    if by == "dim":  # dim i and dim i + size / 2 are rotated into one another
        net.union.unite(*np.split(dims, 2))
    mask, angles = _causal(net, "ids"), _angles(net, dims)
    for _ in range(2):
        x = net.add(x, _attention(net, _norm(net, x), dims, mask, angles))
        x = net.add(x, _feed_forward(net, _norm(net, x)))
    x = net.linear(_norm(net, x), WORDS, bias=False)
    net.output(x, ["N", "S", WORDS])
    return net


def llama_dims(seed: int) -> Net:
    """Dims go from the heads: of all blocks the same, as they share the tables."""
    return llama(seed, by="dim")


def llama_stream(seed: int) -> Net:
    """With zeros in the stream."""
    return llama(seed, stream=True)
