"""ONNX's own inference of a single node, for operators without a rule of ours.

Its symbols mean nothing to us, except where it hands on one that we put in; and where it
is known to differ from ONNX Runtime (see `onnxopt.doubt`) it is not asked.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import onnx
import onnx.checker
from onnx import TensorProto, TypeProto, helper, numpy_helper, shape_inference

from onnxopt import attributes, doubt
from onnxopt.symbolic import dim
from onnxopt.symbolic.dim import Dim
from onnxopt.symbolic.fact import MAX_VALUE, UNKNOWN, Fact, array_of, of_type
from onnxopt.weights import elements

if TYPE_CHECKING:
    from onnxopt.symbolic.infer import Site

_KNOWN_DOMAINS = {"", "ai.onnx", "ai.onnx.ml"}
_REFUSALS = (
    shape_inference.InferenceError,
    onnx.checker.ValidationError,  # a type that this version of the operator lacks
    ValueError,
    RuntimeError,
)


def outputs(site: Site) -> list[Fact]:
    """Facts of the outputs by ONNX's inference; [] where it has none."""
    node = site.node
    version = site.version(node.domain)
    schema = _schema(node.op_type, version, node.domain)
    given = [
        (name, fact) for name, fact in zip(node.input, site.inputs, strict=True) if name
    ]
    if schema is None or any(not fact.dtype for _, fact in given):
        return []
    constants = _constants(site)
    if doubt.is_doubtful(node, constants):
        return _without_extents(site)
    sizes: dict[str, Dim] = {}
    types = {name: _type(fact, sizes) for name, fact in given}
    imported = [helper.make_opsetid(node.domain, version)]
    try:
        found = shape_inference.infer_node_outputs(
            schema, node, types, constants, opset_imports=imported
        )
    except _REFUSALS:
        return []
    return [
        _fact(site, slot, found[name], sizes) if name in found else UNKNOWN
        for slot, name in enumerate(node.output)
    ]


@functools.cache
def _schema(op_type: str, version: int, domain: str) -> onnx.defs.OpSchema | None:
    if domain not in _KNOWN_DOMAINS:
        return None
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


def _constants(site: Site) -> dict[str, TensorProto]:
    """Small constants and followed values that are numbers, by name."""
    found = {}
    for slot, name in enumerate(site.node.input):
        if not name:
            continue
        tensor = site.tensor(slot)
        if tensor is not None:
            if elements(tensor) <= MAX_VALUE:
                found[name] = site.inference.model.weights.inline(tensor)
            continue
        array = array_of(site.inputs[slot])
        if array is not None:
            found[name] = numpy_helper.from_array(array, name)
    return found


def _type(fact: Fact, sizes: dict[str, Dim]) -> TypeProto:
    """As ONNX writes it; what its symbols stand for goes into `sizes`."""
    if fact.dims is None:
        return helper.make_tensor_type_proto(fact.dtype, None)
    shape = []
    for size in fact.dims:
        sizes[dim.text(size)] = size
        shape.append(size if isinstance(size, int) else size.text)
    return helper.make_tensor_type_proto(fact.dtype, shape)


def _fact(site: Site, slot: int, kind: TypeProto, sizes: dict[str, Dim]) -> Fact:
    def size_of(axis: int, symbol: str) -> Dim:
        known = sizes.get(symbol)
        return site.fresh(axis, slot) if known is None else known

    return of_type(kind, size_of)


def _without_extents(site: Site) -> list[Fact]:
    """Of an operator over extents that are in doubt: batch and channels are not."""
    data = site.inputs[0]
    if site.node.op_type != "ConvTranspose" or data.dims is None:
        return [Fact(data.dtype)]
    weight = site.inputs[1].dims
    if weight is None:
        return [Fact(data.dtype)]
    channels = dim.multiply(weight[1], int(attributes.get(site.node, "group", 1)))
    extents = [site.fresh(axis) for axis in range(2, len(data.dims))]
    return [Fact(data.dtype, (data.dims[0], channels, *extents))]
