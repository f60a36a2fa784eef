"""Which values two models make differently, by comparing how each is made.

Values of the main graph that both models have, by name, are common. The segment of a
common value is what makes it from inputs, constants and other common values. Equal
segments make equal values from equal ones, so only the others have to be run.

    reference   x -> Conv -> c -> BatchNormalization -> b -> Relu -> y
    candidate   x -> Conv' ------------------------------> b -> Relu -> y

Here b and y are common, and b alone is made differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.validation.taps import TapModel
from onnxopt.weights import attribute_tensors


def common_values(one: TapModel, two: TapModel) -> list[str]:
    """Names that nodes of both main graphs make, in the order of `two`; no constants."""
    return [
        name
        for name in sorted(one.order.keys() & two.order.keys(), key=two.order.__getitem__)
        if not _is_constant(one, name) and not _is_constant(two, name)
    ]


def _is_constant(taps: TapModel, name: str) -> bool:
    return taps.maker(name).op_type == "Constant"


def known_difference(one: TapModel, two: TapModel, name: str) -> str | None:
    """How a value's type or static shape differs between the models, if it does."""
    types = one.graph.dtype(name), two.graph.dtype(name)
    if types[0] and types[1] and types[0] != types[1]:
        return f"has element type {types[1]}, not {types[0]}"
    first, second = one.graph.shape(name), two.graph.shape(name)
    if first is None or second is None:
        return None
    same = len(first) == len(second) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int))
        for a, b in zip(first, second, strict=True)
    )
    return None if same else f"has shape {list(second)}, not {list(first)}"


def surely_alike(one: TapModel, two: TapModel, name: str) -> bool:
    """Whether a value is known to be a tensor of one type and size in both models."""
    shapes = one.graph.shape(name), two.graph.shape(name)
    return (
        one.graph.dtype(name) is not None
        and one.graph.dtype(name) == two.graph.dtype(name)
        and shapes[0] is not None
        and shapes[0] == shapes[1]
        and all(isinstance(dim, int) for dim in shapes[0])
    )


def made_differently(one: TapModel, two: TapModel, common: Collection[str]) -> list[str]:
    """Those of `common`, in its order, whose segments are not the same in both."""
    known = set(common)
    left, right = _Signatures(one, known), _Signatures(two, known)
    return [name for name in common if left.made[name] != right.made[name]]


class _Signatures:
    """What makes each value: equal signatures mean equal computations."""

    def __init__(self, taps: TapModel, common: Collection[str]) -> None:
        self.taps, self.common = taps, common
        self.graph, self.weights = taps.graph, taps.model.weights
        self.constants = taps.digests
        self.functions = {
            (f.domain, f.name, f.overload): f for f in taps.model.proto.functions
        }
        self.bodies: dict[tuple[str, str, str], bytes] = {}
        self.made: dict[str, bytes] = {}
        for node in taps.nodes:
            whole = self._node(node)
            for index, name in enumerate(node.output):
                self.made[name] = _digest(whole, str(index).encode())

    def _node(self, node: NodeProto) -> bytes:
        version = self.graph.opset(node.domain)
        parts = [f"{node.domain or 'ai.onnx'}:{node.op_type}:{node.overload}:{version}"]
        return _digest(
            *(part.encode() for part in parts),
            b"calls",
            *self._calls(node),
            *(self._attribute(a) for a in sorted(node.attribute, key=lambda a: a.name)),
            b"inputs",
            *(self._value(name) for name in node.input),
            b"captures",
            *(self._value(name) for name in sorted(self._captures(node))),
        )

    def _calls(self, node: NodeProto) -> Iterator[bytes]:
        """The functions that a node calls, or what is inside it, each with its own."""
        for inner in attributes.nodes_in([node]):
            key = (inner.domain, inner.op_type, inner.overload)
            if key in self.functions:
                yield self._function(key)

    def _function(self, key: tuple[str, str, str]) -> bytes:
        if key not in self.bodies:
            self.bodies[key] = b""  # a function cannot call itself
            function = self.functions[key]
            bare = FunctionProto.FromString(function.SerializeToString())
            del bare.node[:], bare.attribute_proto[:]
            self.bodies[key] = _digest(
                bare.SerializeToString(deterministic=True),
                *map(self._attribute, function.attribute_proto),
                *(self._body_node(node) for node in function.node),
            )
        return self.bodies[key]

    def _body_node(self, node: NodeProto) -> bytes:
        bare = NodeProto.FromString(node.SerializeToString())
        del bare.attribute[:]
        return _digest(
            bare.SerializeToString(deterministic=True),
            *map(self._attribute, node.attribute),
            *self._calls(node),
        )

    def _captures(self, node: NodeProto) -> Iterator[str]:
        """Outer values that the node's subgraphs read."""
        for name in self.taps.sources(node) - set(node.input):
            if name in self.made or self.graph.weight(name) is not None:
                yield name

    def _value(self, name: str) -> bytes:
        if name in self.common:
            return b"value " + name.encode()
        if name not in self.constants and (tensor := self.graph.weight(name)) is not None:
            self.constants[name] = self._tensor(tensor)
        return (
            self.constants.get(name) or self.made.get(name) or b"input " + name.encode()
        )

    def _attribute(self, attribute: AttributeProto) -> bytes:
        """Its value: payloads of tensors by their contents, wherever they lie."""
        if not (tensors := list(attribute_tensors([attribute]))):
            return bytes(attribute.SerializeToString(deterministic=True))
        bare = AttributeProto.FromString(attribute.SerializeToString())
        for tensor in attribute_tensors([bare]):
            for field in ("raw_data", "external_data", "data_location", "name"):
                tensor.ClearField(field)
        return _digest(
            bare.SerializeToString(deterministic=True), *map(self._tensor, tensors)
        )

    def _tensor(self, tensor: TensorProto) -> bytes:
        head = f"{tensor.data_type}:{list(tensor.dims)}".encode()
        if tensor.data_type == TensorProto.STRING:
            return _digest(head, *tensor.string_data)
        found = hashlib.sha256(head)
        for piece in self.weights.chunks(tensor):
            found.update(piece)
        return b"constant " + found.digest()


def _digest(*parts: bytes) -> bytes:
    """A hash of the parts, each with its length, so that none runs into the next."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()
