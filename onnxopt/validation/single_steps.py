"""Quantizers that a model has in single steps: which of its operators Round are theirs.

    v = Div(x, s); c = Clip(Round(v), -128, 127); y = Mul(c, s)

Such a model flips codes as one with QuantizeLinear does, which replaces them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from onnx import NodeProto

_CLAMPS = {"Clip", "Max", "Min"}
_ON_THE_WAY = {"Add", "Cast", "Relu", "Sub", *_CLAMPS}
_SCALES = {"Div", "Mul"}


def rounding(nodes: Iterable[NodeProto]) -> dict[str, bool]:
    """Outputs of Round that are clamped and scaled, and whether a Cast is in between."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    makers: dict[str, NodeProto] = {}
    rounds = []
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
        makers.update(dict.fromkeys(node.output, node))
        if node.op_type == "Round" and node.domain in ("", "ai.onnx"):
            rounds.append(node)
    found = {}
    for node in rounds:
        ops = _behind(node, readers)
        maker = makers.get(node.input[0])
        ahead = set() if maker is None else {maker.op_type}
        if ops & _SCALES and ops <= _SCALES | _ON_THE_WAY and (ops | ahead) & _CLAMPS:
            found[node.output[0]] = "Cast" in ops
    return found


def _behind(node: NodeProto, readers: dict[str, list[NodeProto]]) -> set[str]:
    """The operators that `node` leads to, up to what scales or ends it."""
    ops: set[str] = set()
    waiting, seen = [node.output[0]], {node.output[0]}
    while waiting:
        name = waiting.pop()
        for reader in readers[name]:
            if reader.op_type == "CastLike" and reader.input[0] != name:
                continue  # of this value it reads the type
            ops.add(reader.op_type)
            if reader.op_type in _ON_THE_WAY:
                waiting += [name for name in reader.output if name not in seen]
                seen.update(reader.output)
    return ops
