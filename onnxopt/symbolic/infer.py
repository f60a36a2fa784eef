"""Inference, one value at a time and only where it is asked for.

A value's fact follows from the facts of what its node reads: by a rule of ours, else by
ONNX's own inference of that node alone. A fact once found stays: rewrites keep what
values are. Only where an edit changes dims must all be forgotten.

What a model declares about inner values and outputs is not believed, nor that inputs
whose dims share a symbol have the same sizes: each dim of an input is an atom.

In a function body facts hold per call site, so there nothing is known; from outside, a
call is inferred with the facts of its inputs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from onnx import FunctionProto, NodeProto, TensorProto, ValueInfoProto

from onnxopt import attributes
from onnxopt.graph import GraphView, constant_value
from onnxopt.symbolic import dim, fallback
from onnxopt.symbolic.dim import Atom, Dim
from onnxopt.symbolic.fact import (
    FOLLOWED,
    MAX_VALUE,
    UNKNOWN,
    Fact,
    numbers,
    objects,
    of_type,
)
from onnxopt.symbolic.rules import control
from onnxopt.symbolic.rules.table import RULES
from onnxopt.weights import Array, elements

if TYPE_CHECKING:
    from onnxopt.model import Model

_PLAIN = re.compile(r"[A-Za-z_]\w*")
MAX_CALL_DEPTH = 16


class Inference:
    """Facts about every value of a model's scopes, function bodies aside."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._facts: dict[GraphView, dict[str, Fact]] = {}
        self._numbers: dict[GraphView, int] = {}
        self._shared: set[str] | None = None
        self._inputs: set[Atom] = set()  # sizes of the model's inputs

    def fact(self, view: GraphView, name: str) -> Fact:
        """What is known of `name`, as seen from `view`."""
        home = view.home(name)
        if home is None:
            return UNKNOWN
        found = self.known(home).get(name)
        if found is None:
            found = self._constant(home, name)
        if found is not None:
            return found
        if home.is_function or _is_in_function(home):
            return UNKNOWN
        self._solve(home, name)
        return self.known(home).get(name, UNKNOWN)

    def known(self, view: GraphView) -> dict[str, Fact]:
        """Facts found so far about what `view` defines."""
        return self._facts.setdefault(view, {})

    def renewed(self) -> Inference:
        """One that knows only what is complete: of that no edit tells more.

        What is gone is forgotten, and so is a size that inference gave a name, which
        may turn out to be another one's.
        """
        made = Inference(self.model)
        made._inputs = self._inputs
        for view in self.model.views():
            facts = self._facts.get(view, {})
            made._facts[view] = {
                name: fact
                for name, fact in facts.items()
                if view.home(name) is view and self._is_complete(fact)
            }
        return made

    def holds_all(self, other: Inference) -> bool:
        """Whether nothing is left out that `other` has of values that are there."""
        return all(
            len(self.known(view)) == sum(view.home(name) is view for name in facts)
            for view, facts in other._facts.items()
            if view.is_attached
        )

    def _is_complete(self, fact: Fact) -> bool:
        if not fact.dtype or fact.dims is None or not all(map(self._is_sure, fact.dims)):
            return False
        if fact.value is not None:
            return all(map(self._is_sure, fact.value.flat))
        sizes = numbers(fact.dims)
        is_long = sizes is not None and math.prod(sizes) > MAX_VALUE
        return fact.dtype not in FOLLOWED or is_long

    def _is_sure(self, size: Dim | None) -> bool:
        """Whether it is a number, or made of the sizes of inputs alone."""
        if size is None or isinstance(size, int):
            return size is not None
        return all(
            item in self._inputs for monomial, _ in size.terms for item in monomial
        )

    def _constant(self, home: GraphView, name: str) -> Fact | None:
        """Of a constant; never kept, since an edit may give it another value."""
        tensor = home.weight(name)
        return None if tensor is None else self.of_tensor(tensor)

    def of_tensor(self, tensor: TensorProto) -> Fact:
        """Type and dims of a tensor, and its value where that is one to follow."""
        dims = tuple(tensor.dims)
        if tensor.data_type not in FOLLOWED or elements(tensor) > MAX_VALUE:
            return Fact(tensor.data_type, dims)
        array = self.model.weights.array(tensor)
        return Fact(tensor.data_type, dims, objects(array))

    # ---- the order of asking ----

    def _solve(self, view: GraphView, name: str) -> None:
        """Find the fact of `name` after those that it needs, without recursion."""
        stack, opened = [(view, name)], set[int]()
        while stack:
            home, wanted = stack[-1]
            facts = self.known(home)
            if wanted in facts:
                stack.pop()
                continue
            node = home.producer(wanted)
            if node is None:
                facts[wanted] = self._given(home, wanted)
                continue
            missing = [] if id(node) in opened else self._missing(home, node)
            opened.add(id(node))
            if missing:
                stack += missing
                continue
            self._infer(home, node)
            facts.setdefault(wanted, UNKNOWN)

    def _missing(self, view: GraphView, node: NodeProto) -> list[tuple[GraphView, str]]:
        """What must be known before `node`, and is not: inputs, results of subgraphs."""
        wanted = [(view.home(name), name) for name in node.input if name]
        for child in view.children_of(node):
            wanted += [(child.home(name), name) for name in child.outputs()]
        return [
            (home, name)
            for home, name in wanted
            if home is not None
            and name not in self.known(home)
            and home.weight(name) is None
        ]

    def _infer(self, view: GraphView, node: NodeProto) -> None:
        inputs = [self.fact(view, name) if name else UNKNOWN for name in node.input]
        site = _Site(self, view, node, inputs)
        children = view.children_of(node)
        if children:
            results = [[self.fact(c, name) for name in c.outputs()] for c in children]
            facts = control.outputs(site, results)
        else:
            facts = self.outputs(site)
        known = self.known(view)
        for name, fact in zip(node.output, facts, strict=False):
            if name:
                known[name] = fact
        for name in node.output:
            known.setdefault(name, UNKNOWN)

    def _given(self, view: GraphView, name: str) -> Fact:
        """Of an input of the model, or of a subgraph's."""
        if view.parent is None:
            values = {value.name: value for value in view.proto.input}
            return self._input(values[name]) if name in values else UNKNOWN
        names = [value.name for value in view.proto.input]
        if name not in names or view.owner is None:
            return UNKNOWN
        owner, parent = view.owner, view.parent
        inputs = [self.fact(parent, given) if given else UNKNOWN for given in owner.input]
        site = _Site(self, parent, owner, inputs)
        return control.body_input(site, names.index(name), view.proto.input)

    def _input(self, value: ValueInfoProto) -> Fact:
        def size_of(axis: int, symbol: str) -> Dim:
            is_own = _PLAIN.fullmatch(symbol) and not self._is_shared(symbol)
            made = dim.atom(symbol if is_own else _atom_name(value.name, axis))
            self._inputs.update(dim.atoms(made))
            return made

        return of_type(value.type, size_of)

    def _is_shared(self, symbol: str) -> bool:
        """Whether dims of inputs share it: a promise that feeds may break."""
        if self._shared is None:
            counts = Counter(
                size.dim_param
                for value in self.model.proto.graph.input
                for size in value.type.tensor_type.shape.dim
            )
            self._shared = {name for name, count in counts.items() if count > 1}
        return symbol in self._shared

    # ---- one node ----

    def outputs(self, site: Site) -> list[Fact]:
        """Facts of what a node without subgraphs makes."""
        node = site.node
        value = constant_value(node)
        if value is not None:
            return [self.of_tensor(value)]
        body = self.model.function(node)
        if body is not None and isinstance(body.proto, FunctionProto):
            return self._call(site, body.proto)
        rule = RULES.get(node.domain, {}).get(node.op_type)
        try:
            facts = rule(site) if rule is not None else None
        except (ValueError, IndexError, TypeError):
            return []  # ill-formed: whoever runs the model will say why
        return fallback.outputs(site) if facts is None else facts

    def _call(self, site: Site, function: FunctionProto) -> list[Fact]:
        """A function's outputs, from its body with the facts of this call."""
        if site.depth >= MAX_CALL_DEPTH:
            return []
        known = dict(zip(function.input, site.inputs, strict=False))
        given = attributes.of_call(function, site.node)
        arrays: dict[str, TensorProto] = {}
        for inner in function.node:
            node = attributes.bound(inner, given)
            inputs = [known.get(name, UNKNOWN) for name in node.input]
            if any(True for _ in attributes.subgraphs(node)):
                continue
            value = constant_value(node)
            if value is not None:
                arrays[node.output[0]] = value
            inside = _Inner(self, site, function, node, inputs, arrays)
            known.update(zip(node.output, self.outputs(inside), strict=False))
        return [known.get(name, UNKNOWN) for name in function.output]

    def number(self, view: GraphView) -> str:
        """What tells the atoms of inner scopes apart."""
        if view is self.model.main:
            return ""
        return f"{self._numbers.setdefault(view, len(self._numbers))}:"


class Site:
    """A node and the facts of what it reads: what rules are asked with."""

    depth = 0  # calls of functions around it

    def __init__(self, inference: Inference, node: NodeProto, inputs: list[Fact]) -> None:
        self.inference = inference
        self.node = node
        self.inputs = inputs
        self.opset = self.version(node.domain)

    def has(self, slot: int) -> bool:
        """Whether input `slot` is given."""
        return slot < len(self.node.input) and bool(self.node.input[slot])

    def tensor(self, slot: int) -> TensorProto | None:
        """Input `slot` where it is a constant."""
        raise NotImplementedError

    def array(self, slot: int) -> Array | None:
        """Input `slot` where it is a constant of at most MAX_VALUE elements."""
        tensor = self.tensor(slot) if self.has(slot) else None
        if tensor is None or elements(tensor) > MAX_VALUE:
            return None
        return self.inference.model.weights.array(tensor)

    def fresh(self, axis: int, slot: int = 0) -> Dim:
        """A size of output `slot` of which nothing is known."""
        return dim.atom(_atom_name(f"{self.prefix()}{self.node.output[slot]}", axis))

    def version(self, domain: str) -> int:
        """Of an operator set, as the scope imports it; 0 where it does not."""
        raise NotImplementedError

    def prefix(self) -> str:
        """What comes before the names of values in those of atoms."""
        raise NotImplementedError


class _Site(Site):
    """A node of a scope."""

    def __init__(
        self, inference: Inference, view: GraphView, node: NodeProto, inputs: list[Fact]
    ) -> None:
        self.view = view
        super().__init__(inference, node, inputs)

    def version(self, domain: str) -> int:
        return self.view.opset(domain)

    def tensor(self, slot: int) -> TensorProto | None:
        return self.view.weight(self.node.input[slot])

    def prefix(self) -> str:
        return self.inference.number(self.view)


class _Inner(Site):
    """A node of a function body, at one call of it."""

    def __init__(
        self,
        inference: Inference,
        caller: Site,
        function: FunctionProto,
        node: NodeProto,
        inputs: list[Fact],
        constants: Mapping[str, TensorProto],
    ) -> None:
        self._caller = caller
        self._function = function
        self._constants = constants
        self.depth = caller.depth + 1
        super().__init__(inference, node, inputs)

    def version(self, domain: str) -> int:
        wanted = domain or "ai.onnx"
        imports = self._function.opset_import
        return next((i.version for i in imports if (i.domain or "ai.onnx") == wanted), 0)

    def tensor(self, slot: int) -> TensorProto | None:
        return self._constants.get(self.node.input[slot])

    def prefix(self) -> str:
        return f"{self._caller.prefix()}{next(filter(None, self._caller.node.output))}/"


def _is_in_function(view: GraphView) -> bool:
    return any(outer.is_function for outer, _ in view.enclosing())


def _atom_name(name: str, axis: int) -> str:
    """One that no declared symbol has, and no arithmetic makes."""
    plain = re.sub(r"[^\w.:/-]", lambda found: f"%{ord(found.group()):x}", name)
    return f"{plain}@{axis}"
