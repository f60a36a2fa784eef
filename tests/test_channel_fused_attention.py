"""Fused attention of which parts are masked: what is zero by construction goes, exactly.

Each operator in each of its forms, with masks that agree between heads or not. What has
to be left is worked out here from the masks alone; no code is shared with
`onnxopt.channels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from onnxopt import attributes
from onnxopt.evaluate import Evaluator
from onnxopt.manager import Context
from onnxopt.model import Model
from tests import support
from tests.test_channel_attention import Net, check

Mask = NDArray[np.bool_]
MICROSOFT = "com.microsoft"


@pytest.fixture(scope="module")
def worker() -> Iterator[Context]:
    """One context, so that all share one worker process."""
    with Evaluator() as evaluator:
        yield Context(evaluator=evaluator)


# ---- what is masked, and what that leaves ----


@dataclass
class Masks:
    """True where a column of Q, K or V is zero, or where no row of O reads the result.

    [heads, dims] of queries and of the result, [key heads, dims] of keys and values.
    """

    q: Mask
    k: Mask
    v: Mask
    o: Mask

    @classmethod
    def none(cls, heads: int, keys: int, scores: int, values: int) -> Masks:
        """Nothing is masked."""
        shapes = (heads, scores), (keys, scores), (keys, values), (heads, values)
        return cls(*(np.zeros(shape, bool) for shape in shapes))

    @classmethod
    def drawn(
        cls, rng: Any, sizes: tuple[int, int, int, int], share: float, agree: bool
    ) -> Masks:
        """About a share of heads and dims each; where they do not `agree`, of columns."""
        made = cls.none(*sizes)
        keys, scores, values = sizes[1:]
        group = sizes[0] // keys
        if not agree:
            for mask in (made.q, made.k, made.v, made.o):
                mask[rng.random(mask.shape) < share / 2] = True
        for head in rng.permutation(keys)[: min(keys - 1, round(keys * share))]:
            if rng.random() < 0.5:
                made.v[head] = True
            else:
                made.o[head * group : (head + 1) * group] = True
        for key in range(keys):
            for head in rng.permutation(group)[: round((group - 1) * share)]:
                made.o[key * group + head] = True
        for dim in rng.permutation(scores)[: min(scores - 1, round(scores * share))]:
            (made.q if rng.random() < 0.5 else made.k)[:, dim] = True
        for dim in rng.permutation(values)[: min(values - 1, round(values * share))]:
            (made.v if rng.random() < 0.5 else made.o)[:, dim] = True
        if not agree:  # what is left of nothing is another matter
            head, dim = int(rng.integers(sizes[0])), int(rng.integers(values))
            made.o[head, dim] = made.v[head // group, dim] = False
        return made


@dataclass(frozen=True)
class Left:
    """What an attention has in the end: heads, heads of keys, dims of both."""

    heads: int
    keys: int
    scores: int
    values: int


def left(m: Masks, same: bool = False, step: int = 1) -> Left:
    """`same`: keys and values have equally many dims, a multiple of `step`."""
    keys, group = len(m.k), len(m.q) // len(m.k)
    dead = (np.repeat(m.v, group, axis=0) | m.o).all(axis=1).reshape(keys, group)
    lives = ~dead.all(axis=1)
    assert lives.any(), "a case in which all goes says nothing"
    fewer = int(dead[lives].sum(axis=1).min())  # each group can lose others
    reads = (~dead).reshape(-1)
    scores = (m.q | np.repeat(m.k, group, axis=0))[reads].all(axis=0)
    values = (np.repeat(m.v, group, axis=0) | m.o)[reads].all(axis=0)
    gone = [min(int(mask.sum()), mask.size - 1) for mask in (scores, values)]
    if same:
        count = min(gone)
        while count and (len(scores) - count) % step:
            count -= 1
        gone = [count, count]
    kept = int(lives.sum())
    heads = kept * (group - fewer)
    return Left(heads, kept, len(scores) - gone[0], len(values) - gone[1])


# ---- building ----


@dataclass(frozen=True)
class Form:
    """A form of an operator: heads, key heads, dims of scores and of values, and how."""

    op: str
    sizes: tuple[int, int, int, int] = (4, 4, 4, 4)
    is_apart: bool = False  # [batch, heads, sequence, dims]
    more: str = ""  # what else it has
    same: bool = False
    step: int = 1
    opset: int = 23
    attributes: tuple[tuple[str, Any], ...] = ()

    def has(self, what: str) -> bool:
        """Whether it has that as well."""
        return what in self.more.split()


def linear(net: Net, name: str, given: str, outputs: int, bias: bool) -> str:
    """A layer; its bias by an Add of its own, or left to the attention."""
    return net.linear(name, given, net.hidden, outputs, bias)


def heads_apart(net: Net, flat: str, heads: int, dims: int) -> str:
    """[batch, heads, sequence, dims]."""
    split = net.reshape(flat, "x", [heads, dims])
    return str(net.op("Transpose", split, perm=[0, 2, 1, 3]))


def lengths(net: Net) -> tuple[str, str]:
    """For GroupQueryAttention: the last position of each sequence, and their length."""
    batch, sequence = net.size("x", 0), net.size("x", 1)
    last = net.op("Sub", net.op("Expand", sequence, batch), net.const([1]))
    kind = TensorProto.INT32
    total = net.op("Squeeze", sequence, net.const([0]))
    return net.op("Cast", last, to=kind), net.op("Cast", total, to=kind)


def tables(net: Net, pairs: int) -> tuple[str, str]:
    """cos and sin [positions, pairs]."""
    angles = np.outer(np.arange(16), 1 / 10.0 ** (np.arange(pairs) / pairs))
    names = f"cos{net.count}", f"sin{net.count}"
    for name, function in zip(names, (np.cos, np.sin), strict=True):
        net.weights[name] = function(angles).astype(np.float32)
    return names


def mask_of(net: Net, form: Form) -> str:
    """A mask as large as the scores, perhaps with heads; "" where there is none."""
    if not form.has("mask") and not form.has("mask-by-head"):
        return ""
    heads = form.sizes[0] if form.has("mask-by-head") else 1
    table, axes = net.weight(f"mask{net.count}", 1, heads, 16, 16), (2, 3)
    for axis in axes:
        end = net.size("x", 1)
        table = net.op("Slice", table, net.const([0]), end, net.const([axis]))
    return str(table)


def attention(net: Net, form: Form) -> str:
    """x to the output of the last layer."""
    heads, keys, scores, values = form.sizes
    wide, narrow, out = heads * scores, keys * scores, keys * values
    if form.op == "packed":
        made = packed(net, form)
    else:
        is_bare = form.op != "multi" or not form.has("bias")
        bias = is_bare and not form.has("no-bias")
        q, k, v = (
            linear(net, side, "x", size, bias)
            for side, size in (("q", wide), ("k", narrow), ("v", out))
        )
        make = {"standard": standard, "multi": multi_head, "grouped": grouped}[form.op]
        made = make(net, form, q, k, v)
    y = net.linear("o", made, heads * values, net.hidden, True)
    net.nodes.append(helper.make_node("Identity", [y], ["end"]))
    return y


def standard(net: Net, form: Form, q: str, k: str, v: str) -> str:
    """Attention of the standard."""
    heads, keys, scores, values = form.sizes
    extra: dict[str, Any] = dict(form.attributes)
    if form.is_apart:
        q = heads_apart(net, q, heads, scores)
        k, v = heads_apart(net, k, keys, scores), heads_apart(net, v, keys, values)
    else:
        extra |= {"q_num_heads": heads, "kv_num_heads": keys}
    if form.has("rotary"):
        cos, sin = tables(net, scores // 2)
        turn: dict[str, Any] = {} if form.is_apart else {"num_heads": heads}
        q = net.op("RotaryEmbedding", q, cos, sin, positions(net), **turn)
        turn = {} if form.is_apart else {"num_heads": keys}
        k = net.op("RotaryEmbedding", k, cos, sin, positions(net), **turn)
    made = net.op("Attention", q, k, v, mask_of(net, form), **extra)
    if form.is_apart:
        turned = net.op("Transpose", made, perm=[0, 2, 1, 3])
        made = net.reshape(turned, "x", [heads * values])
    return str(made)


def positions(net: Net) -> str:
    """[batch, sequence]: from 0 on."""
    steps = net.op("Squeeze", net.size("x", 1), net.const([0]))
    row = net.op("Range", net.const(0), steps, net.const(1))
    shape = net.op("Concat", net.size("x", 0), net.size("x", 1), axis=0)
    return str(net.op("Expand", row, shape))


def multi_head(net: Net, form: Form, q: str, k: str, v: str) -> str:
    """MultiHeadAttention of com.microsoft."""
    heads, keys, scores, values = form.sizes
    extra = {"num_heads": heads, **dict(form.attributes)}
    bias = ""
    if form.has("bias"):
        bias = net.weight("qkv.b", heads * (2 * scores + values))
    if form.has("apart-keys"):
        k, v = heads_apart(net, k, keys, scores), heads_apart(net, v, keys, values)
    inputs = [q, k, v, bias, "", mask_of(net, form)]
    return str(net.op("MultiHeadAttention", *inputs, domain=MICROSOFT, **extra))


def grouped(net: Net, form: Form, q: str, k: str, v: str) -> str:
    """GroupQueryAttention of com.microsoft."""
    heads, keys, scores, _ = form.sizes
    extra = {"num_heads": heads, "kv_num_heads": keys, **dict(form.attributes)}
    inputs = [q, k, v, "", "", *lengths(net)]
    if form.has("side-by-side"):
        inputs = [net.op("Concat", q, k, v, axis=-1), "", "", "", "", *inputs[5:]]
    if extra.get("do_rotary"):
        inputs += tables(net, scores // 2)
    if form.has("sink") or form.has("mask") or form.has("mask-by-head"):
        inputs += [""] * (10 - len(inputs)) + [mask_of(net, form)]
    if form.has("sink"):
        inputs.append(net.weight("sink", heads))
    return str(net.op("GroupQueryAttention", *inputs, domain=MICROSOFT, **extra))


def packed(net: Net, form: Form) -> str:
    """Attention of com.microsoft; its weight is cut into q.w, k.w, v.w for masks."""
    heads, _, scores, values = form.sizes
    widths = [heads * scores, heads * scores, heads * values]
    extra: dict[str, Any] = {"num_heads": heads, **dict(form.attributes)}
    if widths[0] != widths[2]:
        extra["qkv_hidden_sizes"] = widths
    weight = net.weight("qkv.w", net.hidden, sum(widths))
    inputs = ["x", weight, net.weight("qkv.b", sum(widths)), "", "", mask_of(net, form)]
    return str(net.op("Attention", *inputs, domain=MICROSOFT, **extra))


def columns(mask: Mask) -> list[int]:
    """The channels of a flat axis."""
    return np.flatnonzero(mask.reshape(-1)).tolist()


def apply(net: Net, masks: Masks) -> None:
    """Zero what is masked, in weights of their own or side by side."""
    start = 0
    for side in "qkv":
        mask = getattr(masks, side)
        gone = columns(mask)
        net.zero(f"{side}.w", 1, gone)
        net.zero(f"{side}.b", 0, gone)
        net.zero("qkv.w", 1, [start + channel for channel in gone])
        net.zero("qkv.b", 0, [start + channel for channel in gone])
        start += mask.size
    net.zero("o.w", 0, columns(masks.o))


def expect(net: Net, form: Form, kept: Left) -> None:
    """The sizes that weights are to have in the end."""
    wide, narrow = kept.heads * kept.scores, kept.keys * kept.scores
    out = kept.keys * kept.values
    for side, size in (("q", wide), ("k", narrow), ("v", out)):
        net.expect(f"{side}.w", -1, size)
        net.expect(f"{side}.b", size)
    net.expect("qkv.w", -1, wide + narrow + out)
    net.expect("qkv.b", wide + narrow + out)
    net.expect("o.w", kept.heads * kept.values, -1)
    net.expect("sink", kept.heads)
    if form.has("mask-by-head"):
        name = next(name for name in net.weights if name.startswith("mask"))
        net.expect(name, -1, kept.heads, -1, -1)


def source_of(net: Net) -> ModelProto:
    """The model, of both domains."""
    source = net.model("end")
    source.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return source


def node_of(model: ModelProto) -> NodeProto:
    """The attention."""
    return next(node for node in model.graph.node if node.op_type.endswith("Attention"))


def shrink(net: Net, form: Form, kept: Left, context: Context) -> NodeProto:
    """Shrinks, compares numbers at two sizes, weights and attributes."""
    expect(net, form, kept)
    model: Model = check(net, source_of(net), context)
    node = node_of(support.final(model))
    names = {"num_heads": kept.heads, "q_num_heads": kept.heads}
    names["kv_num_heads"] = kept.keys
    for name, count in names.items():
        assert attributes.get(node, name, count) == count
    return node


def built(form: Form, seed: int, dynamic: bool = True) -> Net:
    """A model of one attention, of which nothing is masked."""
    net = Net(seed, opset=form.opset, dynamic=dynamic, hidden=6)
    attention(net, form)
    return net


GROUPS = (6, 2, 4, 3)
WIDE = (4, 4, 3, 5)
FORMS: dict[str, Form] = {
    "standard": Form("standard", WIDE),
    "standard, groups": Form("standard", GROUPS),
    "standard, one key head": Form("standard", (4, 1, 4, 4)),
    "standard, apart": Form("standard", GROUPS, is_apart=True),
    "standard, apart, one head": Form("standard", (1, 1, 4, 4), is_apart=True),
    "standard, apart, one key head": Form("standard", (4, 1, 4, 4), is_apart=True),
    "standard, 24": Form("standard", GROUPS, opset=24),
    "standard, mask": Form("standard", GROUPS, more="mask"),
    "standard, mask by head": Form("standard", GROUPS, more="mask-by-head"),
    "standard, apart, mask by head": Form("standard", WIDE, True, "mask-by-head"),
    "standard, causal, capped": Form(
        "standard", GROUPS, attributes=(("is_causal", 1), ("softcap", 2.0))
    ),
    "standard, scaled": Form("standard", WIDE, attributes=(("scale", 0.3),)),
    "multi": Form("multi", WIDE, opset=17),
    "multi, bias": Form("multi", WIDE, more="bias", opset=17),
    "multi, mask": Form("multi", WIDE, more="mask bias", opset=17),
    "multi, mask by head": Form("multi", more="mask-by-head no-bias", opset=17),
    "multi, causal": Form("multi", WIDE, opset=17, attributes=(("unidirectional", 1),)),
    "multi, keys apart": Form("multi", more="apart-keys", same=True, opset=17),
    "grouped": Form("grouped", (6, 2, 24, 24), same=True, step=8, opset=17),
    "grouped, side by side": Form(
        "grouped", (4, 2, 24, 24), more="side-by-side", same=True, step=8, opset=17
    ),
    "grouped, sink": Form(
        "grouped", (4, 2, 16, 16), more="sink mask-by-head", same=True, step=8, opset=17
    ),
    "grouped, rotary": Form(
        "grouped",
        (6, 3, 16, 16),
        same=True,
        step=16,
        opset=17,
        attributes=(("do_rotary", 1),),
    ),
    "packed": Form("packed", opset=17),
    "packed, wide values": Form("packed", WIDE, opset=17),
    "packed, mask by head": Form("packed", more="mask-by-head", opset=17),
    "packed, causal, scaled": Form(
        "packed", opset=17, attributes=(("unidirectional", 1), ("scale", 0.4))
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("name", FORMS)
def test_masks_that_agree(name: str, share: float, seed: int, worker: Context) -> None:
    """Heads and dims that are zero go, and nothing else changes."""
    form = FORMS[name]
    net = built(form, seed, dynamic=seed != 1)
    masks = Masks.drawn(net.rng, form.sizes, share, agree=True)
    apply(net, masks)
    shrink(net, form, left(masks, form.same, form.step), worker)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMS)
def test_masks_that_do_not_agree(name: str, seed: int, worker: Context) -> None:
    """What can go from all heads alike goes."""
    form = FORMS[name]
    net = built(form, seed)
    masks = Masks.drawn(net.rng, form.sizes, 0.5, agree=False)
    apply(net, masks)
    shrink(net, form, left(masks, form.same, form.step), worker)


# ---- one form at a time, masked by hand ----


def nothing(form: Form) -> Masks:
    """No mask yet."""
    return Masks.none(*form.sizes)


def kept_by(net: Net, form: Form, masks: Masks, context: Context) -> NodeProto:
    """Applies masks, shrinks, and compares with what they leave."""
    apply(net, masks)
    return shrink(net, form, left(masks, form.same, form.step), context)


@pytest.mark.parametrize("name", ["standard", "multi", "packed, wide values"])
def test_scale_stays(name: str, worker: Context) -> None:
    """The default is by the number of dims before."""
    form = FORMS[name]
    net, masks = built(form, 0), nothing(form)
    masks.q[:, 0] = True
    node = kept_by(net, form, masks, worker)
    assert attributes.get(node, "scale") == pytest.approx(1 / np.sqrt(form.sizes[2]))


@pytest.mark.parametrize("op", ["standard", "multi", "packed"])
def test_scale_that_is_given(op: str, worker: Context) -> None:
    """It stays as it is."""
    form = Form(op, WIDE, attributes=(("scale", 0.7),))
    net, masks = built(form, 0), nothing(form)
    masks.k[:, 1] = True
    node = kept_by(net, form, masks, worker)
    assert attributes.get(node, "scale") == pytest.approx(0.7)


def test_one_group_loses_more(worker: Context) -> None:
    """Groups keep equally many heads, each those that matter to it."""
    form = FORMS["standard, groups"]
    net, masks = built(form, 0), nothing(form)
    masks.o[[0, 2, 4]] = True  # two of the first group, one of the second
    assert left(masks) == Left(4, 2, 4, 3)
    kept_by(net, form, masks, worker)


@pytest.mark.parametrize("name", ["standard", "multi", "packed"])
def test_no_scores(name: str, worker: Context) -> None:
    """A head without queries takes the mean of its values; one dim stays of all."""
    form = FORMS[name]
    net, masks = built(form, 0), nothing(form)
    masks.k[:] = True
    kept_by(net, form, masks, worker)


@pytest.mark.parametrize("name", ["standard", "multi", "grouped", "packed"])
def test_no_values(name: str, worker: Context) -> None:
    """One head of one dim stays, unless other passes take it out."""
    form = FORMS[name]
    net, masks = built(form, 0), nothing(form)
    masks.v[:] = True
    apply(net, masks)
    sizes = Left(1, 1, 8, 8) if form.op == "grouped" else Left(1, 1, 1, 1)
    shrink(net, form, sizes, worker)


CONSTANT = ["standard", "standard, apart", "multi", "multi, bias", "packed"]


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_values(name: str, worker: Context) -> None:
    """Where nothing masks, weights sum to 1: constants go into the bias behind."""
    form = FORMS[name]
    net, masks = built(form, 0), nothing(form)
    masks.v[0], masks.v[:, 1] = True, True
    apply(net, masks)
    spoil(net, form, masks.v)
    shrink(net, form, left(masks), worker)


MASKING = ["standard, mask", "multi, mask", "grouped", "packed, mask by head"]


@pytest.mark.parametrize("name", MASKING)
def test_constant_values_behind_a_mask(name: str, worker: Context) -> None:
    """A query whose keys are all masked takes zero of them: constants stay."""
    form = FORMS[name]
    net, masks = built(form, 0), nothing(form)
    masks.v[0] = True
    apply(net, masks)
    spoil(net, form, masks.v)
    shrink(net, form, left(nothing(form)), worker)


def spoil(net: Net, form: Form, mask: Mask) -> None:
    """Let the biases of values that are masked be 0.5."""
    start = 2 * form.sizes[0] * form.sizes[2] if "qkv.b" in net.weights else 0
    name = "qkv.b" if start else "v.b"
    net.weights[name][[start + channel for channel in columns(mask)]] = 0.5


@pytest.mark.parametrize("keys", [3, 8])
@pytest.mark.parametrize("causal", [0, 1])
def test_constant_values_of_other_keys(keys: int, causal: int, worker: Context) -> None:
    """There is a key for each query, unless those of one that is late come first."""
    form = Form("standard", WIDE, attributes=(("is_causal", causal),))
    net, masks = Net(0, opset=23, hidden=6), nothing(form)
    memory = net.weight("memory", 1, keys, 6)
    net.nodes.append(helper.make_node("Expand", [memory, "sizes"], ["given"]))
    sizes = [net.size("x", 0), net.const([keys]), net.const([6])]
    net.op("Concat", *sizes, axis=0)
    net.nodes[-1].output[0] = "sizes"
    net.nodes.append(net.nodes.pop(-4))
    start = len(net.nodes)
    attention(net, form)
    for node in net.nodes[start:]:
        if {"k.w", "v.w"} & set(node.input):
            node.input[0] = "given"
    masks.v[0] = True
    apply(net, masks)
    spoil(net, form, masks.v)
    shrink(net, form, left(nothing(form) if causal else masks), worker)


def test_masked_rows_of_constant_values(worker: Context) -> None:
    """The same with a mask that leaves out all keys of a query."""
    form = FORMS["standard, mask"]
    net, masks = built(form, 0), nothing(form)
    table = next(name for name in net.weights if name.startswith("mask"))
    net.weights[table][:, :, 0] = -np.inf
    masks.v[0] = True
    apply(net, masks)
    spoil(net, form, masks.v)
    shrink(net, form, left(nothing(form)), worker)


def test_bias_that_undoes_a_constant(worker: Context) -> None:
    """What counts of a query is the sum of what is given and the bias."""
    form = FORMS["multi, bias"]
    net, masks = built(form, 0), nothing(form)
    masks.k[:, 0] = True
    apply(net, masks)
    start = form.sizes[0] * form.sizes[2]
    net.weights["qkv.b"][[start + channel for channel in columns(masks.k)]] = 0.25
    shrink(net, form, left(nothing(form)), worker)


def test_constant_features(worker: Context) -> None:
    """Of the input of a packed layer, zeros go, unread ones, and constants."""
    form = FORMS["packed"]
    net = Net(0, opset=17, hidden=6)
    net.nodes.append(helper.make_node("Identity", ["x"], ["given"]))
    made = net.linear("first", "given", net.hidden, 6, True)
    start = len(net.nodes)
    attention(net, form)
    for node in net.nodes[start:]:
        if "qkv.w" in node.input:
            node.input[0] = made
    net.zero("first.w", 1, [0, 1])
    net.weights["first.b"][:2] = 0, 0.5
    net.zero("qkv.w", 0, [2])
    masks = nothing(form)
    masks.v[1] = masks.q[:, 2] = True
    apply(net, masks)
    kept = left(masks)
    expect(net, form, kept)
    net.expect("first.w", -1, 3)
    width = kept.heads * (2 * kept.scores + kept.values)
    net.expect("qkv.w", 3, width)
    check(net, source_of(net), worker)


# ---- caches, and other outputs ----


def with_outputs(
    net: Net, outputs: int, inputs: dict[str, tuple[Any, ...]]
) -> ModelProto:
    """The model of `net` with more outputs of the attention, and past_ inputs."""
    node = next(node for node in net.nodes if node.op_type.endswith("Attention"))
    names = ["", "present_key", "present_value", "scores"][1:outputs]
    node.output.extend(names)
    source = source_of(net)
    for name in names:
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, list("efgh"))
        source.graph.output.append(value)
    for name, dims in inputs.items():
        made = helper.make_tensor_value_info(name, TensorProto.FLOAT, list(dims))
        source.graph.input.append(made)
    return source


PAST = {"standard": 4, "multi": 6, "grouped": 3}


@pytest.mark.parametrize("is_past", [True, False], ids=["past", "present"])
@pytest.mark.parametrize("op", PAST)
def test_caches_of_the_interface(op: str, is_past: bool, worker: Context) -> None:
    """Heads and dims of what comes from outside, or goes there, stay: groups do not."""
    sizes = (4, 4, 8, 8) if op == "multi" else (4, 2, 8, 8)
    form = Form(op, sizes, more="no-bias", opset=23)
    net, masks = built(form, 0, dynamic=False), nothing(form)
    node = next(node for node in net.nodes if node.op_type.endswith("Attention"))
    inputs: dict[str, tuple[Any, ...]] = {}
    if is_past and op != "grouped":
        dims = ("batch" if net.dynamic else 2, sizes[1], "before", 8)
        inputs = {"past_key": dims, "past_value": dims}
        names = [*node.input, *[""] * 8][: PAST[op] + 2]
        names[PAST[op] :] = inputs
        del node.input[:]
        node.input.extend(names)
    masks.v[0] = masks.q[:, 1] = masks.k[:, 2] = masks.o[:, 3] = True
    apply(net, masks)
    expect(net, form, Left(sizes[0], sizes[1], 8, 8))
    model = check(net, with_outputs(net, 3, inputs), worker)
    assert attributes.get(node_of(support.final(model)), "scale") is None
    reasons = " ".join(skip.reason for skip in support.skips(model))
    assert "past_key" in reasons or "present_key" in reasons


def test_group_behind_a_cache(worker: Context) -> None:
    """Query heads that nothing reads go from every group; the cache stays."""
    form = Form("standard", GROUPS, more="no-bias")
    net, masks = built(form, 0, dynamic=False), nothing(form)
    masks.o[[1, 5]] = True
    apply(net, masks)
    expect(net, form, Left(4, 2, 4, 3))
    check(net, with_outputs(net, 3, {}), worker)


@pytest.mark.parametrize("op", ["standard", "multi"])
def test_scores_of_the_interface(op: str, worker: Context) -> None:
    """Scores that are an output keep their heads; the dims go."""
    form = Form(op, WIDE, more="no-bias")
    net, masks = built(form, 0), nothing(form)
    masks.v[0] = masks.v[:, 1] = masks.q[:, 2] = True
    apply(net, masks)
    expect(net, form, Left(4, 4, 2, 4))
    source = with_outputs(net, 4, {})
    for name in ("present_key", "present_value"):
        kept = [value for value in source.graph.output if value.name != name]
        del source.graph.output[:]
        source.graph.output.extend(kept)
    node = node_of(source)
    node.output[1] = node.output[2] = ""
    check(net, source, worker)


def test_cache_of_constants(worker: Context) -> None:
    """A prefix of keys and values that is a constant loses the same heads and dims."""
    form = Form("standard", GROUPS, more="no-bias")
    net, masks = built(form, 0), nothing(form)
    masks.o[:3] = masks.q[:, 1] = masks.o[:, 2] = True
    masks.k[:, 3] = masks.v[:, 0] = True  # which the prefix has
    apply(net, masks)
    net.weight("past_keys", 2, 2, 3, 4)
    net.weight("past_values", 2, 2, 3, 3)
    node = next(node for node in net.nodes if node.op_type == "Attention")
    node.input.extend(["past_keys", "past_values"])
    node.output.extend(["present_key", "present_value"])
    net.dynamic = False
    net.expect("past_keys", 2, 1, 3, 3)
    net.expect("past_values", 2, 1, 3, 2)
    expect(net, form, Left(3, 1, 3, 2))
    check(net, static(source_of(net)), worker)


def static(source: ModelProto) -> ModelProto:
    """With a batch of 2."""
    for value in source.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 2
    return source


SHAPES = {
    "standard": (Form("standard", GROUPS), 4),
    "standard, apart": (Form("standard", GROUPS, is_apart=True), 4),
    "multi": (Form("multi", WIDE), 4),
    "grouped": (Form("grouped", (4, 2, 8, 8)), 3),
    "packed": (Form("packed", WIDE), 1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_inferred_shapes(name: str) -> None:
    """Every output has the sizes that are inferred, with symbols for those of inputs."""
    form, outputs = SHAPES[name]
    net = built(form, 0)
    source = with_outputs(net, outputs, {})
    source.graph.output.append(helper.make_empty_tensor_value_info("made"))
    node = node_of(source)
    for reader in source.graph.node:
        for place, given in enumerate(reader.input):
            reader.input[place] = "made" if given == node.output[0] else given
    node.output[0] = "made"
    graph = Model.open(source).main
    for number, (batch, sequence) in enumerate(((2, 5), (1, 7))):
        symbols = {"batch": batch, "sequence": sequence}
        feed = {"x": np.random.default_rng(number).random((batch, sequence, 6))}
        made = support.run(source, {"x": feed["x"].astype(np.float32)})
        for value, array in zip(source.graph.output, made, strict=True):
            shape = graph.shape(value.name)
            assert shape is not None
            if form.op == "grouped" and value.name.startswith("present"):
                shape = (*shape[:2], sequence, *shape[3:])  # as long as its buffer
            assert [symbols.get(str(d), d) for d in shape] == list(array.shape)


# ---- rotated positions ----


def rotary(net: Net, form: Form, domain: str, inter: int, dims: int) -> tuple[Any, Any]:
    """Queries and keys of `form` through RotaryEmbedding, to the end."""
    heads, keys, scores, values = form.sizes
    q, k, v = (
        linear(net, side, "x", size, True)
        for side, size in (
            ("q", heads * scores),
            ("k", keys * scores),
            ("v", keys * values),
        )
    )
    cos, sin = tables(net, (dims or scores) // 2)
    turned = []
    for given, count in ((q, heads), (k, keys)):
        extra: dict[str, Any] = {"num_heads": count, "interleaved": inter}
        if dims:
            extra["rotary_embedding_dim"] = dims
        inputs = [cos, sin, positions(net)]
        if domain:
            inputs, extra["domain"] = [inputs[2], cos, sin], domain
        turned.append(net.op("RotaryEmbedding", given, *inputs, **extra))
    made = net.op("Attention", *turned, v, q_num_heads=heads, kv_num_heads=keys)
    y = net.linear("o", made, heads * values, net.hidden, True)
    net.nodes.append(helper.make_node("Identity", [y], ["end"]))
    return cos, sin


@pytest.mark.parametrize("is_interleaved", [0, 1])
@pytest.mark.parametrize("domain", ["", MICROSOFT])
def test_rotated_pairs(domain: str, is_interleaved: int, worker: Context) -> None:
    """Both of a pair go, from all heads, with a column of the tables."""
    form = Form("standard", (4, 2, 6, 3))
    net, masks = Net(0, opset=23, hidden=6), nothing(form)
    tabled = rotary(net, form, domain, is_interleaved, 0)
    pairs = [(0, 1), (2, 3), (4, 5)] if is_interleaved else [(0, 3), (1, 4), (2, 5)]
    masks.q[:, list(pairs[0])] = masks.k[:, list(pairs[2])] = True
    whole = left(masks)
    assert whole.scores == 2
    masks.k[:, pairs[1][0]] = True  # half a pair stays
    masks.v[1] = True
    for name in tabled:
        net.expect(name, -1, 1)
    apply(net, masks)
    kept = replace(left(masks), scores=2)
    shrink(net, form, kept, worker)


@pytest.mark.parametrize("is_interleaved", [0, 1])
@pytest.mark.parametrize("domain", ["", MICROSOFT])
def test_rotated_first_dims(domain: str, is_interleaved: int, worker: Context) -> None:
    """Those that are rotated stay; of the others some go."""
    form = Form("standard", (4, 2, 7, 3))
    net, masks = Net(0, opset=23, hidden=6), nothing(form)
    rotary(net, form, domain, is_interleaved, 4)
    masks.q[:, [0, 1, 2, 3, 5]] = True
    masks.o[[0, 3]] = True
    apply(net, masks)
    shrink(net, form, replace(left(masks), scores=6), worker)


def strided(net: Net, given: str, cos: str, sin: str) -> str:
    """x * cos + (-x[1::2], x[::2], by turns) * sin."""
    axis, end, step = net.const([3]), net.const([1 << 40]), net.const([2])
    even = net.op("Slice", given, net.const([0]), end, axis, step)
    odd = net.op("Slice", given, net.const([1]), end, axis, step)
    last = net.const([4])
    parts = [net.op("Unsqueeze", n, last) for n in (net.op("Neg", odd), even)]
    pairs = net.op("Concat", *parts, axis=-1)
    turned = net.op("Reshape", pairs, net.const([0, 0, 0, 6]))
    return str(net.op("Add", net.op("Mul", given, cos), net.op("Mul", turned, sin)))


def test_pairs_by_strided_slices(worker: Context) -> None:
    """Neighbours go together, with their columns of the tables."""
    form = Form("standard", (4, 2, 6, 3))
    net, masks = Net(0, opset=23, hidden=6), nothing(form)
    heads, keys, scores, values = form.sizes
    turn = net.weight("cos", 1, 1, 5, 6), net.weight("sin", 1, 1, 5, 6)
    net.dynamic = False
    parts = []
    for side, count, size in (
        ("q", heads, scores),
        ("k", keys, scores),
        ("v", keys, values),
    ):
        flat = linear(net, side, "x", count * size, True)
        part = heads_apart(net, flat, count, size)
        parts.append(part if side == "v" else strided(net, part, *turn))
    made = net.op("Attention", *parts)
    turned = net.op("Transpose", made, perm=[0, 2, 1, 3])
    flat = net.reshape(turned, "x", [heads * values])
    y = net.linear("o", flat, heads * values, net.hidden, True)
    net.nodes.append(helper.make_node("Identity", [y], ["end"]))
    masks.q[:, [0, 1]] = masks.k[:, [4, 5]] = masks.k[:, 2] = masks.v[0] = True
    apply(net, masks)
    net.expect("cos", 1, 1, 5, 2)
    net.expect("sin", 1, 1, 5, 2)
    shrink(net, form, replace(left(masks), scores=2), worker)


def pasts(net: Net, k: str, v: str) -> tuple[str, str]:
    """Keys and values behind those that come from outside."""
    return (
        str(net.op("Concat", "past_key", k, axis=2)),
        str(net.op("Concat", "past_value", v, axis=2)),
    )


@pytest.mark.parametrize("step", [2, 3])
def test_strided_slices(step: int, worker: Context) -> None:
    """Slices with a step part channels anew: as many go as the step is, side by side."""
    net = Net(0, opset=17, hidden=6)
    wide = net.op("Relu", net.linear("up", "x", 6, 12, True))
    parts = []
    for start in range(step):
        window = [net.const([value]) for value in (start, 1 << 40, 2, step)]
        part = net.op("Slice", wide, *window)
        parts.append(net.linear(f"down{start}", part, 12 // step, 6, False))
        net.expect(f"down{start}.w", 12 // step - 1, -1)
    total = parts[0]
    for part in parts[1:]:
        total = net.op("Add", total, part)
    net.nodes.append(helper.make_node("Identity", [total], ["end"]))
    gone = [1, *range(step, 2 * step)]  # of the first ones, another stays
    net.zero("up.w", 1, gone)
    net.zero("up.b", 0, gone)
    net.expect("up.w", -1, 12 - step)
    check(net, source_of(net), worker)


def test_cache_that_is_written_out(worker: Context) -> None:
    """Where a cache is joined by Concat, its heads and dims stay; other layers shrink."""
    net = Net(0, opset=17, hidden=6)
    heads, dims = 3, 4
    size = heads * dims
    parts = {}
    for side in "qkv":
        flat = linear(net, side, "x", size, True)
        parts[side] = heads_apart(net, flat, heads, dims)
    keys, values = pasts(net, parts["k"], parts["v"])
    scores = net.op("MatMul", parts["q"], net.op("Transpose", keys, perm=[0, 1, 3, 2]))
    context = net.op("MatMul", net.op("Softmax", scores, axis=-1), values)
    turned = net.op("Transpose", context, perm=[0, 2, 1, 3])
    made = net.linear("o", net.reshape(turned, "x", [size]), size, net.hidden, True)
    y = ffn(net, made)
    net.nodes.append(helper.make_node("Identity", [y], ["end"]))
    net.zero("v.w", 1, range(dims))
    net.zero("v.b", 0, range(dims))
    net.zero("o.w", 0, range(dims, 2 * dims))
    net.zero("q.w", 1, range(0, size, dims))
    net.zero("q.b", 0, range(0, size, dims))
    for side in "qkv":
        net.expect(f"{side}.w", -1, size)
    net.expect("o.w", size, -1)
    source = source_of(net)
    for name in ("past_key", "past_value"):
        kind, sizes = TensorProto.FLOAT, ["batch", heads, "before", dims]
        source.graph.input.append(helper.make_tensor_value_info(name, kind, sizes))
    model = check(net, source, worker)
    reasons = " ".join(skip.reason for skip in support.skips(model))
    assert "'past_value' comes from outside" in reasons


def ffn(net: Net, given: str) -> str:
    """Two layers, of which 3 units of 8 are zero or not read."""
    up = net.op("Relu", net.linear("up", given, net.hidden, 8, True))
    net.zero("up.w", 1, [0, 5])
    net.zero("up.b", 0, [0, 5])
    down = net.linear("down", up, 8, net.hidden, True)
    net.zero("down.w", 0, [3])
    net.expect("up.w", -1, 5)
    net.expect("down.w", 5, -1)
    return down


# ---- norms of a sum ----


def skip_norm(net: Net, name: str, one: str, two: str, mean: bool) -> list[str]:
    """The norm of one + two + bias, and that sum."""
    inputs = [one, two, net.weight(f"{name}.g", net.hidden)]
    if mean:
        inputs.append(net.weight(f"{name}.h", net.hidden))
    inputs.append(net.weight(f"{name}.b", net.hidden))
    op = "SkipLayerNormalization" if mean else "SkipSimplifiedLayerNormalization"
    made: list[str] = net.op(op, *inputs, outputs=4, domain=MICROSOFT, epsilon=1e-2)
    net.nodes[-1].output[1] = net.nodes[-1].output[2] = ""
    return [made[0], made[3]]


def stream(net: Net, mean: bool) -> None:
    """Embeddings, two layers, each with a norm of the sum before it, and a head."""
    x = net.op("Gather", net.weight("table", 20, net.hidden), "ids")
    y, x = skip_norm(net, "n0", x, net.op("MatMul", x, square(net, "first")), mean)
    y, x = skip_norm(net, "n1", ffn(net, y), x, mean)
    out = net.op("MatMul", net.op("Add", x, y), net.weight("head", net.hidden, 5))
    net.nodes.append(helper.make_node("Identity", [out], ["end"]))


def square(net: Net, name: str) -> str:
    """A weight [hidden, hidden]."""
    return net.weight(f"{name}.w", net.hidden, net.hidden)


def silence(net: Net, gone: Iterable[int]) -> None:
    """Zero what is written to channels of the stream."""
    for name in ("table", "first.w", "down.w"):
        net.zero(name, 1, gone)
    for name in ("down.b", "n0.b", "n1.b"):
        net.zero(name, 0, gone)


def of_ids(net: Net) -> ModelProto:
    """The model that reads indices."""
    source = net.model("end", ["ids"])
    source.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return source


def test_root_mean_square_of_a_sum(worker: Context) -> None:
    """Channels of which every term is zero go from the stream, with their scales."""
    net = Net(0, opset=17, hidden=6)
    stream(net, mean=False)
    silence(net, [1, 4])
    for name in ("n0.g", "n1.g", "n0.b", "n1.b"):
        net.expect(name, 4)
    net.expect("table", -1, 4)
    net.expect("first.w", 4, 4)
    net.expect("head", 4, -1)
    net.expect("up.w", 4, 5)
    net.expect("down.w", 5, 4)
    check(net, of_ids(net), worker)


def test_bias_of_a_sum(worker: Context) -> None:
    """A channel that only the bias of the norm writes to stays."""
    net = Net(0, opset=17, hidden=6)
    stream(net, mean=False)
    silence(net, [1, 4])
    net.weights["n1.b"][4] = 0.3
    net.zero("head", 0, [4])  # it counts in the mean all the same
    net.expect("table", -1, 5)
    net.expect("up.w", 5, 5)
    net.expect("down.w", 5, 5)
    check(net, of_ids(net), worker)


def test_mean_of_a_sum(worker: Context) -> None:
    """Each channel moves the mean: all stay; units go."""
    net = Net(0, opset=17, hidden=6)
    stream(net, mean=True)
    silence(net, [1, 4])
    net.expect("table", -1, 6)
    check(net, of_ids(net), worker)


@pytest.mark.parametrize("mean", [True, False])
def test_scale_of_zero(mean: bool, worker: Context) -> None:
    """What comes out is the shift: it goes into the bias of the layer behind."""
    net = Net(0, opset=17, hidden=6)
    given = net.op("Identity", "x")
    y, _ = skip_norm(net, "n", given, net.op("MatMul", given, square(net, "w")), mean)
    out = net.linear("o", y, net.hidden, 5, True)
    net.nodes.append(helper.make_node("Identity", [out], ["end"]))
    net.zero("n.g", 0, [2])
    check(net, source_of(net), worker)


# ---- whole blocks, as ONNX Runtime's optimizer writes them ----


def test_fused_bert(worker: Context) -> None:
    """Packed attention and norms of sums: heads, dims and units go."""
    form = Form("packed", (3, 3, 4, 4), opset=17)
    net = Net(0, opset=17, hidden=6)
    ids = "ids"
    tables = [net.weight(name, 20, net.hidden) for name in ("words", "places")]
    norm = [net.weight(name, net.hidden) for name in ("e.g", "e.h")]
    embed = net.op("Cast", ids, to=TensorProto.INT32)
    op = "EmbedLayerNormalization"
    x = net.op(op, embed, "", *tables, "", *norm, outputs=2, domain=MICROSOFT)[0]
    made = packed(net, form)
    net.nodes[-1].input[0] = x
    out = net.linear("o", made, 12, net.hidden, True)
    y, _ = skip_norm(net, "n0", x, out, True)
    y, _ = skip_norm(net, "n1", y, ffn(net, y), True)
    net.nodes.append(helper.make_node("Identity", [y], ["end"]))
    masks = nothing(form)
    masks.v[2] = masks.q[:, 1] = masks.k[:, 3] = masks.o[:, 0] = True
    apply(net, masks)
    expect(net, form, left(masks))
    check(net, of_ids(net), worker)


def test_fused_llama(worker: Context) -> None:
    """Grouped heads that rotate, root mean squares of sums, a gate: all of it shrinks."""
    form = FORMS["grouped, rotary"]
    net = Net(0, opset=23, hidden=6)
    x = net.op("Gather", net.weight("table", 20, net.hidden), "ids")
    y = net.op("RMSNormalization", x, net.weight("n.g", net.hidden), epsilon=1e-2)
    heads, keys, dims, _ = form.sizes
    sizes = zip("qkv", (heads, keys, keys), strict=True)
    sides = [net.linear(n, y, net.hidden, count * dims, False) for n, count in sizes]
    start = len(net.nodes)
    made = grouped(net, form, *sides)
    for node in net.nodes[start:]:
        for place, name in enumerate(node.input):
            node.input[place] = "ids" if name == "x" else name
    out = net.linear("o", made, heads * dims, net.hidden, False)
    y, x = skip_norm(net, "n0", x, out, False)
    gate, up = (net.linear(n, y, net.hidden, 8, False) for n in ("gate", "up"))
    gated = net.op("Mul", net.op("Mul", gate, net.op("Sigmoid", gate)), up)
    y, x = skip_norm(net, "n1", x, net.linear("down", gated, 8, 6, False), False)
    last = net.op("MatMul", y, net.weight("head", net.hidden, 5))
    net.nodes.append(helper.make_node("Identity", [last], ["end"]))
    masks = nothing(form)
    masks.v[1] = masks.o[[1, 4]] = True
    apply(net, masks)
    net.zero("gate.w", 1, [2])
    net.zero("up.w", 1, [3])
    net.zero("down.w", 0, [4])
    kept, gone = left(masks), [0, 5]
    assert kept == Left(2, 2, 16, 16)
    for name in ("table", "o.w", "down.w"):
        net.zero(name, 1, gone)
    for name in ("n0.b", "n1.b"):
        net.zero(name, 0, gone)
    for name, count in (("q", kept.heads), ("k", kept.keys), ("v", kept.keys)):
        net.expect(f"{name}.w", 4, count * dims)
    net.expect("o.w", kept.heads * dims, 4)
    net.expect("table", -1, 4)
    net.expect("gate.w", 4, 5)
    net.expect("down.w", 5, 4)
    net.expect("head", 4, -1)
    check(net, of_ids(net), worker)


# ---- what is declined ----


def declined(
    change: Callable[[NodeProto], None], form: Form, context: Context
) -> list[str]:
    """The reasons why a head that is not read stays, once the node is changed."""
    net, masks = built(form, 0), nothing(form)
    masks.o[0] = masks.v[0] = True
    apply(net, masks)
    change(next(node for node in net.nodes if node.op_type.endswith("Attention")))
    model = support.run_passes(source_of(net), "zero-channels", context)
    sizes = {t.name: tuple(t.dims) for t in support.final(model).graph.initializer}
    name = "qkv.w" if form.op == "packed" else "v.w"
    assert sizes[name] == net.weights[name].shape
    return [skip.reason for skip in support.skips(model)]


DECLINED: dict[str, tuple[str, Callable[[NodeProto], None], str]] = {
    "rotating layer": (
        "packed",
        lambda node: node.attribute.append(helper.make_attribute("do_rotary", 1)),
        "in pairs",
    ),
    "cache in one": (
        "packed",
        lambda node: node.output.append("present"),
        "keys and values in one",
    ),
    "heads that do not divide": (
        "multi",
        lambda node: node.attribute[0].CopyFrom(helper.make_attribute("num_heads", 5)),
        "do not divide",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str, worker: Context) -> None:
    """Nothing goes where heads or dims are not known, for a reason."""
    op, change, reason = DECLINED[name]
    found = declined(change, FORMS[op], worker)
    assert any(reason in text for text in found)
