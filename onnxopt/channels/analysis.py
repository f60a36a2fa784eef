"""The analysis of one scope: facts forward, demand backward, by the rules of operators.

Activations are taken to be finite: what is multiplied by zero is zero. Where an
operator is known to make something else of a channel (the log of zero), the channel is
WILD and stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnxopt import attributes, zeros
from onnxopt.channels import compute
from onnxopt.channels.demand import NOTHING, Demand, merge
from onnxopt.channels.facts import MAX_ELEMENTS, Fact, Kind, computed, fact, known
from onnxopt.evaluate import EvaluationError, Evaluator, constant_model
from onnxopt.graph import GraphView, Shape
from onnxopt.linear import FLOATS
from onnxopt.weights import Array, elements

if TYPE_CHECKING:
    from onnxopt.channels.rules.rule import Rule

_COMPUTED = {
    "Add",
    "Cast",
    "DequantizeLinear",
    "Div",
    "Flatten",
    "Identity",
    "Mul",
    "Neg",
}
_COMPUTED |= {"QuantizeLinear", "Reshape", "Squeeze", "Sub", "Transpose", "Unsqueeze"}
"""Operators through which a weight stays a constant: none makes much out of little."""
MAX_COMPUTED = 1 << 26
"""Constants with more elements are not computed."""
KEPT_BYTES = 1 << 20
"""Computed constants of at most this size are kept while the analysis lives."""


class Analysis:
    """What is known of every value of `graph` before anything is removed."""

    def __init__(
        self,
        graph: GraphView,
        evaluator: Evaluator,
        rule_of: Callable[[GraphView, NodeProto], Rule],
    ) -> None:
        self.graph = graph
        self.evaluator = evaluator
        self._rule_of = rule_of
        self._facts: dict[str, Fact] = {}
        self._demand: dict[str, Demand] = {}
        self._is_constant: dict[str, bool] = {}
        self._arrays: dict[str, Array | None] = {}
        self.kept: dict[object, Any] = {}  # what rules learned about constants
        self.settled: set[str] = set()  # passes that found nothing to do by it
        self._shapes: dict[str, Shape | None] = {}
        self._version = graph.model.version  # that the shapes are of
        nodes = graph.nodes()
        for node in nodes:
            self._forward(node)
        for node in reversed(nodes):
            self._backward(node)

    # ---- asking ----

    def fact(self, name: str) -> Fact | None:
        """What is known of value or constant `name`; None where nothing is."""
        if not name:
            return None
        if name in self._facts:
            return self._facts[name]
        tensor = self.graph.weight(name)
        if tensor is None and not self._is_constant.get(name):
            return None
        if tensor is not None and elements(tensor) > MAX_ELEMENTS:
            return self._outline(name, tensor)
        array = self.array(name)
        return known(array) if array is not None else None

    def _outline(self, name: str, tensor: TensorProto) -> Fact | None:
        """Of a large constant, which indices of its last axis hold nothing but zero."""
        if ("outline", name) not in self.kept:
            rank = len(tensor.dims)
            found = zeros.count(self.graph.model.weights, tensor, [rank - 1])
            made = None
            if found is not None and tensor.data_type in FLOATS:
                is_zero = found.channels[rank - 1].reshape((1,) * (rank - 1) + (-1,))
                kinds = np.where(is_zero, Kind.CONST, Kind.MAP)
                dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
                made = fact(kinds, np.zeros(kinds.shape, dtype))
            self.kept["outline", name] = made
        known: Fact | None = self.kept["outline", name]
        return known

    def demand(self, name: str) -> Demand:
        """What of `name` something depends on."""
        return self._demand.get(name, NOTHING)

    @property
    def has_findings(self) -> bool:
        """Whether any channel may be other than live."""
        return bool(self._facts) or any(d is not None for d in self._demand.values())

    def is_constant(self, name: str) -> bool:
        """Whether `name` depends on nothing but constants."""
        found = self._is_constant.get(name)
        if found is None:
            found = self.graph.weight(name) is not None
            self._is_constant[name] = found
        return found

    def array(self, name: str) -> Array | None:
        """The value of `name` where it is constant, computed through DequantizeLinear,
        Transpose and the like; None where it is not, or could not be computed."""
        if self.graph.weight(name) is not None:
            return self.graph.array(name)
        if not self._is_constant.get(name):
            return None
        if name in self._arrays:
            return self._arrays[name]
        made = self._computed(name)
        if made is None or made.nbytes <= KEPT_BYTES:
            self._arrays[name] = made
        return made

    def forget_arrays(self) -> None:
        """Compute constants anew: an edit has changed what they are made from."""
        self._arrays.clear()

    def _computed(self, name: str) -> Array | None:
        node = self.graph.producer(name)
        assert node is not None
        if self.graph.op(node) == "DequantizeLinear":
            inputs = [self.array(given) if given else None for given in node.input]
            made = compute.dequantized(node, inputs)
            if made is not None:
                return made
        return self._evaluated(name)

    def _evaluated(self, name: str) -> Array | None:
        nodes: dict[int, NodeProto] = {}
        self._collect(name, nodes)
        ordered = list(nodes.values())
        try:
            model = constant_model(self.graph, ordered, [name])
            return self.evaluator.evaluate(model)[name]
        except EvaluationError:
            return None

    def _collect(self, name: str, nodes: dict[int, NodeProto]) -> None:
        """The nodes that constant `name` is computed by, sources first."""
        waiting = [(name, False)]
        while waiting:
            name, are_sources_there = waiting.pop()
            node = self.graph.producer(name)
            if node is None or self.graph.weight(name) is not None or id(node) in nodes:
                continue
            if are_sources_there:
                nodes[id(node)] = node
            else:
                waiting.append((name, True))
                waiting += [(given, False) for given in node.input if given]

    # ---- shapes ----

    def shape(self, name: str) -> Shape | None:
        """Dims of `name`, None where the rank is open."""
        if self._version != self.graph.model.version:
            self._version = self.graph.model.version
            self._shapes.clear()
        if name not in self._shapes:
            self._shapes[name] = self.graph.shape(name) if name else None
        return self._shapes[name]

    def rank(self, name: str) -> int | None:
        """The rank of `name`, None where it is open."""
        dims = self.shape(name)
        return None if dims is None else len(dims)

    def size(self, name: str, axis: int) -> int | None:
        """The size of one axis, None where it is not known."""
        dims = self.shape(name)
        if dims is None or not -len(dims) <= axis < len(dims):
            return None
        size = dims[axis]
        return size if isinstance(size, int) else None

    def is_float(self, name: str) -> bool:
        """Whether `name` is of a floating-point type."""
        return self.graph.dtype(name) in FLOATS

    # ---- the two sweeps ----

    def rule(self, node: NodeProto) -> Rule:
        """The rule of a node's operator."""
        return self._rule_of(self.graph, node)

    def _forward(self, node: NodeProto) -> None:
        if self._is_computed_constant(node):
            self._is_constant.update(dict.fromkeys(filter(None, node.output), True))
            return
        found = self.rule(node).forward(self, node)
        for name, item in zip(node.output, found, strict=False):
            if name and item is not None:
                self._facts[name] = self._typed(name, item)

    def _typed(self, name: str, item: Fact) -> Fact:
        """The fact with values of the type that `name` has."""
        kind = self.graph.dtype(name)
        if not kind:
            return item
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        if item.values.dtype == dtype:
            return item
        with np.errstate(all="ignore"):
            return computed(item.kinds, item.values.astype(dtype)) or item

    def _is_computed_constant(self, node: NodeProto) -> bool:
        """Whether `node` computes a constant from others, the same on every run."""
        if self.graph.op(node) not in _COMPUTED or attributes.has_references(node):
            return False
        if not all(self.is_constant(name) for name in node.input if name):
            return False
        sizes = self.shape(node.output[0])
        known = [size for size in sizes or () if isinstance(size, int)]
        is_known = sizes is not None and len(known) == len(sizes)
        return is_known and math.prod(known) <= MAX_COMPUTED

    def _backward(self, node: NodeProto) -> None:
        needs = [self._whole_demand(name) for name in node.output]
        is_idle = bool(needs) and all(need is NOTHING for need in needs)
        if is_idle and self.graph.model.is_pure(node):
            wanted: Sequence[Demand] = [NOTHING] * len(node.input)
        elif all(need is None for need in needs) and not self._is_special(node):
            wanted = [None] * len(node.input)
        else:
            wanted = self.rule(node).backward(self, node, needs)
        for name, need in zip(node.input, wanted, strict=True):
            if name and need is not NOTHING:
                self._demand[name] = merge(self._demand.get(name, NOTHING), need)

    def _is_special(self, node: NodeProto) -> bool:
        """Whether the operator may not read all that it is given."""
        return self.rule(node).drops_inputs

    def _whole_demand(self, name: str) -> Demand:
        """The demand on an output of a node, once all its readers have been seen."""
        if not name:
            return NOTHING
        if self.graph.is_output(name) or self._is_captured(name):
            self._demand[name] = None
        fact = self._facts.get(name)
        need = self.demand(name)
        if need is not None and fact is not None and fact.is_wild.any():
            need = merge(need, np.asarray(fact.is_wild))
            self._demand[name] = need
        return need

    def _is_captured(self, name: str) -> bool:
        graph = self.graph
        return graph.is_pinned(name) or any(
            use.view is not graph for use in graph.uses(name)
        )
