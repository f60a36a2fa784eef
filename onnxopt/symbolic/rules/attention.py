"""Fused attention: [batch, sequence, heads * dims] or [batch, heads, sequence, dims].

Sources: https://onnx.ai/onnx/operators/onnx__Attention.html and
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from onnxopt import attributes
from onnxopt.symbolic import dim
from onnxopt.symbolic.dim import Dim
from onnxopt.symbolic.fact import Call, Dims, Fact


def attention(call: Call) -> list[Fact]:
    """The standard's: the result, keys and values with those before, the weights."""
    queries, keys, values = (
        _apart(fact.dims, attributes.get(call.node, name, 0))
        for fact, name in zip(
            call.inputs[:3], ("q_num_heads", *["kv_num_heads"] * 2), strict=True
        )
    )
    dtype, is_flat = call.inputs[0].dtype, len(call.inputs[0].dims or ()) == 3
    if queries is None or keys is None or values is None:
        return [Fact(dtype)] * len(call.node.output)
    result: Dims = (*queries[:3], values[3])
    if is_flat:
        result = (result[0], result[2], dim.multiply(result[1], result[3]))
    past = _length(call, 4)
    total = None if past is None else dim.add(past, keys[2])
    return _made(call, result, keys, values, queries, total)


def multi_head_attention(call: Call) -> list[Fact]:
    """Queries, keys and values on their own, or what is packed: not followed."""
    heads = attributes.get(call.node, "num_heads", 0)
    dtype = call.inputs[0].dtype
    queries = _apart(call.inputs[0].dims, heads)
    keys, values = (
        _apart(call.inputs[slot].dims, heads) if call.has(slot) else None
        for slot in (1, 2)
    )
    if queries is None or keys is None or values is None:
        return [Fact(dtype)] * len(call.node.output)
    result = queries[0], queries[2], dim.multiply(heads, values[3])
    past = _length(call, 6)
    is_open = past is None or call.has(8)
    total = None if past is None or is_open else dim.add(past, keys[2])
    return _made(call, result, keys, values, queries, total)


def group_query_attention(call: Call) -> list[Fact]:
    """As the queries; packed ones hold keys and values behind."""
    heads = attributes.get(call.node, "num_heads", 0)
    grouped = attributes.get(call.node, "kv_num_heads", 0)
    dtype, is_packed = call.inputs[0].dtype, not call.has(1)
    queries = _apart(call.inputs[0].dims, heads + 2 * grouped if is_packed else heads)
    if queries is None or heads <= 0 or grouped <= 0:
        return [Fact(dtype)] * len(call.node.output)
    dims = queries[3]
    cache: Dims = (queries[0], grouped, queries[2], dims)
    result = queries[0], queries[2], dim.multiply(heads, dims)
    return _made(call, result, cache, cache, (queries[0], heads, *queries[2:]), None)


def packed_attention(call: Call) -> list[Fact]:
    """com.microsoft's Attention: as wide as the last third of the weight, or as said."""
    given, weight = call.inputs[0], call.inputs[1].dims
    widths = attributes.get(call.node, "qkv_hidden_sizes")
    if given.dims is None or len(given.dims) != 3 or weight is None or len(weight) != 2:
        return [Fact(given.dtype)] * len(call.node.output)
    width: Dim | None = widths[2] if widths else dim.exact_quotient(weight[1], 3)
    if width is None:
        width = call.fresh(2)
    facts = [Fact(given.dtype, (*given.dims[:2], width)), Fact(given.dtype)]
    return facts[: len(call.node.output)]


def skip_norm(call: Call) -> list[Fact]:
    """The first and the last output are as the first input."""
    first = call.inputs[0]
    made = Fact(first.dtype, first.dims)
    return [made, Fact(), Fact(), made][: len(call.node.output)]


def embed_norm(call: Call) -> list[Fact]:
    """A row of the table of words for each index."""
    rows, table = call.inputs[0].dims, call.inputs[2]
    if rows is None or table.dims is None or len(table.dims) != 2:
        return [Fact(table.dtype)]
    made = Fact(table.dtype, (*rows, table.dims[1]))
    return [made, Fact(call.inputs[0].dtype, rows[:1]), made][: len(call.node.output)]


def _apart(dims: Dims | None, heads: int) -> Dims | None:
    """[batch, heads, sequence, dims]; None where that is not known."""
    if dims is not None and len(dims) == 4:
        return dims
    if dims is None or len(dims) != 3 or heads <= 0:
        return None
    size = dim.exact_quotient(dims[2], heads)
    return None if size is None else (dims[0], heads, dims[1], size)


def _length(call: Call, slot: int) -> Dim | None:
    """How many earlier keys an input holds; None where that is not known."""
    if not call.has(slot):
        return 0
    dims = call.inputs[slot].dims
    return dims[2] if dims is not None and len(dims) == 4 else None


def _made(
    call: Call, result: Dims, keys: Dims, values: Dims, queries: Dims, total: Dim | None
) -> list[Fact]:
    """Facts of the outputs, where `total` keys are attended to."""
    dtype, count = call.inputs[0].dtype, len(call.node.output)

    def keys_of(axis: int, slot: int) -> Dim:
        return call.fresh(axis, slot) if total is None else total

    facts = [Fact(dtype, result)]
    for slot, dims in ((1, keys), (2, values)):
        if slot < count:
            facts.append(Fact(dtype, (*dims[:2], keys_of(2, slot), dims[3])))
    if count > 3:
        facts.append(Fact(dtype, (*queries[:3], keys_of(3, 3))))
    return facts
