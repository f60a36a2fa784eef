"""GraphView: the def-use index over one scope.

A scope is the main graph, a subgraph of an If, Loop or Scan, or a function body. The
view answers who makes a value and who reads it (captures by inner scopes count), keeps
the index true while `onnxopt.edit` changes the protobuf, and logs which nodes changed,
so that a pass revisits only those.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, MutableSequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    NodeProto,
    TensorAnnotation,
    TensorProto,
    ValueInfoProto,
    helper,
)

from onnxopt import attributes
from onnxopt.errors import InvalidModelError
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.edit import Edit
    from onnxopt.model import Model
    from onnxopt.symbolic.fact import Fact

Shape = tuple[int | str | None, ...]


class Use(msgspec.Struct, frozen=True, eq=False):
    """Input slot `index` of `node`, which stands in `view` (an inner scope captures)."""

    node: NodeProto
    index: int
    view: GraphView


_NO_USES: dict[tuple[int, int], Use] = {}


class Read(NamedTuple):
    """An entry of the index that was taken out: `home` defined `name`, `use` read it."""

    home: GraphView
    name: str
    use: Use

    def put_back(self) -> None:
        """Undo the taking out, whatever defines the name by now."""
        key = (id(self.use.node), self.use.index)
        self.home._uses.setdefault(self.name, {})[key] = self.use


class GraphView:
    """One scope of a model: an index to ask, and `apply` to change it."""

    def __init__(
        self,
        model: Model,
        proto: GraphProto | FunctionProto,
        scope: str,
        parent: GraphView | None = None,
        owner: NodeProto | None = None,
    ) -> None:
        self.model = model
        self.proto = proto
        self.scope = scope
        self.parent = parent
        self.owner = owner
        self._in_function: bool = parent._in_function if parent else self.is_function
        self.changes: list[NodeProto] = []
        self._nodes: dict[int, NodeProto] = {}
        self._ops: dict[int, str] = {}
        self._by_op: dict[str, dict[int, NodeProto]] = {}
        self._rank: dict[int, tuple[int, int]] = {}
        self._children: dict[int, list[GraphView]] = {}
        self._producer: dict[str, NodeProto] = {}
        self._weights: dict[str, TensorProto] = {}
        self._given: set[str] = set()
        self._outputs: dict[str, int] = {}
        self._pinned: set[str] = set()
        self._captured: Counter[str] = Counter()  # by inner scopes, as their outputs
        self._passed: list[tuple[GraphView, str]] = []  # outer values that are outputs
        self._uses: dict[str, dict[tuple[int, int], Use]] = {}
        self._dead: dict[int, NodeProto | TensorProto | ValueInfoProto] = {}
        self._listed: dict[str, ValueInfoProto] | None = None  # inputs, once asked for
        self._gone: set[str] = set()
        self._unordered = False  # some rank contradicts a dependency
        self._misplaced = False  # the protobuf's order contradicts the ranks
        self._cursors: dict[int, tuple[object, int]] = {}
        self._index()

    # ---- asking ----

    @property
    def is_function(self) -> bool:
        """Whether this is a function body: no initializers, facts hold per call site."""
        return isinstance(self.proto, FunctionProto)

    def opset(self, domain: str = "") -> int:
        """The version of an operator set that this scope imports; 0 where it does not."""
        return self.model.opset(self, domain)

    def nodes(self, ops: Collection[str] = ()) -> list[NodeProto]:
        """The nodes of these operators (none: of all) in topological order."""
        self.settle()
        if not ops:
            return list(self.proto.node)
        found = [node for op in ops for node in self._by_op.get(op, {}).values()]
        found.sort(key=lambda node: self._rank[id(node)])
        return found

    def children(self) -> Iterator[GraphView]:
        """The views of the subgraphs directly inside this scope."""
        for views in self._children.values():
            yield from views

    def op(self, node: NodeProto) -> str:
        """`Conv` for a standard operator, `domain::Conv` for one of another domain.

        A call of a model-local function is never a standard operator.
        """
        known = self._ops.get(id(node))
        if known is not None:
            return known
        if self.model.is_call(node):
            return f"{node.domain}::{node.op_type}()"
        if node.domain in ("", "ai.onnx"):
            return node.op_type
        return f"{node.domain}::{node.op_type}"

    def producer(self, name: str) -> NodeProto | None:
        """The node of this scope that makes `name`; None for inputs and weights."""
        return self._producer.get(name)

    def uses(self, name: str) -> list[Use]:
        """Every node input that reads `name`, in this scope and inside it."""
        return list(self._uses.get(name, {}).values())

    def is_output(self, name: str) -> bool:
        """Whether `name` leaves this scope as one of its outputs."""
        return name in self._outputs

    def is_pinned(self, name: str) -> bool:
        """Whether something besides nodes and outputs refers to `name`."""
        return name in self._pinned or self._captured.get(name, 0) > 0

    def is_used(self, name: str) -> bool:
        """Whether anything at all depends on `name`."""
        if self._uses.get(name) or name in self._outputs:
            return True
        return self.is_pinned(name)

    def only_use(self, name: str) -> Use | None:
        """The one reader of `name`, None where others (an output too) depend on it."""
        uses = self._uses.get(name, {})
        if len(uses) != 1 or name in self._outputs or self.is_pinned(name):
            return None
        return next(iter(uses.values()))

    def home_uses(self, name: str) -> list[Use]:
        """`uses`, asked of the scope that defines `name`."""
        home = self.home(name)
        return home.uses(name) if home is not None else []

    def only_use_everywhere(self, name: str) -> Use | None:
        """`only_use`, asked of the scope that defines `name`."""
        home = self.home(name)
        return home.only_use(name) if home is not None else None

    def outputs(self) -> list[str]:
        """The names of the scope's outputs, in order."""
        if isinstance(self.proto, FunctionProto):
            return list(self.proto.output)
        return [value.name for value in self.proto.output]

    def home(self, name: str) -> GraphView | None:
        """The innermost scope from here outwards that defines `name`."""
        view: GraphView | None = self
        while view is not None:
            if name in view._producer or name in view._given or name in view._weights:
                return view
            view = view.parent
        return None

    def weight(self, name: str) -> TensorProto | None:
        """The constant called `name`: an initializer or a Constant node's value.

        None where the caller of the model may override it, and for sparse tensors.
        """
        home = self.home(name)
        if home is None:
            return None
        tensor = home._weights.get(name)
        if tensor is not None:
            return None if home._is_overridable(name) else tensor
        node = home._producer.get(name)
        return constant_value(node) if node is not None else None

    def array(self, name: str) -> Array | None:
        """The constant called `name` as an array; None where `weight` has none."""
        tensor = self.weight(name)
        return None if tensor is None else self.model.weights.array(tensor)

    def shape(self, name: str) -> Shape | None:
        """The inferred dims of `name`: numbers, or texts, equal where the sizes are."""
        return self.model.shapes.shape(self, name)

    def dtype(self, name: str) -> int | None:
        """The inferred ONNX element type of `name`."""
        return self.model.shapes.dtype(self, name)

    def fact(self, name: str) -> Fact:
        """Type, dims (as polynomials) and, of small integers, the value of `name`."""
        return self.model.shapes.fact(self, name)

    def same_shape(self, first: str, second: str) -> bool:
        """Whether two values are known to have equal dims."""
        dims = self.shape(first)
        return dims is not None and dims == self.shape(second)

    def precedes(self, first: NodeProto, second: NodeProto) -> bool:
        """Whether `first` stands before `second` in this scope's order."""
        return self._rank[id(first)] < self._rank[id(second)]

    def fresh(self, hint: str) -> str:
        """A value name that no scope of the model uses."""
        return self.model.fresh(hint)

    def label(self, node: NodeProto) -> str:
        """How reports call a node."""
        return node.name or f"{node.op_type}:{next(filter(None, node.output), '')}"

    @property
    def holds_initializers(self) -> bool:
        """Whether constants of this scope can be initializers rather than nodes.

        Before IR 4 an initializer is an input as well, which a subgraph cannot grow.
        """
        old_format = self.model.proto.ir_version < 4
        return not self.is_function and not (old_format and self.parent is not None)

    @property
    def is_unordered(self) -> bool:
        """Whether some node stands before one that it depends on."""
        return self._unordered

    @property
    def is_attached(self) -> bool:
        """Whether the node that holds this scope, if one does, is still in the model."""
        if self.parent is None or self.owner is None:
            return True
        return self.parent.holds(self.owner) and self.parent.is_attached

    def pin(self, names: Iterable[str]) -> None:
        """Keep values that something outside the graph refers to by name."""
        self._pinned.update(names)

    def children_of(self, node: NodeProto) -> list[GraphView]:
        """The views of a node's subgraphs, in attribute order."""
        return self._children.get(id(node), [])

    def holds(self, node: NodeProto) -> bool:
        """Whether `node` is still part of this scope."""
        return self._nodes.get(id(node)) is node

    def is_removable(self, node: NodeProto) -> bool:
        """Whether nothing reads the outputs of `node` and running it has no effect."""
        if any(self.is_used(name) for name in node.output if name):
            return False
        if not self._outputs and self.parent is None:
            return False  # a graph without outputs: nothing says what it is for
        return self.model.is_pure(node)

    def is_droppable(self, name: str) -> bool:
        """Whether initializer `name` may go, read or not: it is not an optional input."""
        return name in self._weights and not self._is_overridable(name)

    def listed(self) -> dict[str, ValueInfoProto]:
        """The inputs by name, as edits keep them up."""
        assert isinstance(self.proto, GraphProto)
        if self._listed is None:
            self._listed = {value.name: value for value in self.proto.input}
        return self._listed

    def initializers(self) -> list[TensorProto]:
        """The initializers of this scope."""
        return list(self._weights.values())

    # ---- visiting and changing ----

    def visit(
        self, owner: object, ops: Collection[str] = (), *, references: bool = False
    ) -> Iterator[NodeProto]:
        """Nodes to look at: all of them once, then only what changed and its neighbours.

        `owner` (hashable) tells whose visit this is; `ops` restricts it to operators
        as `op` names them. Nodes that an edit touches during the visit come again, unless
        they are still to come, so a pass needs no loop of its own. Nodes whose attributes
        are references to a function's attributes are left out unless `references`: their
        values differ by call site.
        """
        _, start = self._cursors.get(id(owner), (owner, None))
        if start == len(self.changes):
            return
        may_refer = self._in_function and not references
        first = self.nodes(ops) if start is None else self._around(start, ops)
        queue, waiting = deque(first), {id(node) for node in first}
        seen, budget = len(self.changes), 1000 + 60 * len(self._nodes)
        while queue:
            node = queue.popleft()
            waiting.discard(id(node))
            if self.holds(node):
                budget -= 1
                if budget < 0:
                    raise RuntimeError(f"{owner} does not settle in scope {self.scope}")
                if not (may_refer and attributes.has_references(node)):
                    yield node
            if len(self.changes) > seen:
                for other in self._around(seen, ops):
                    if id(other) not in waiting:
                        waiting.add(id(other))
                        queue.append(other)
                seen = len(self.changes)
        self._cursors[id(owner)] = owner, len(self.changes)

    def forget_visits(self) -> None:
        """Let the next visit of each owner be of all nodes."""
        self._cursors.clear()

    def apply(self, edit: Edit, why: str) -> bool:
        """Carry out `edit`, whole or not at all; False where it may not be done.

        The reason of a refusal (growth, bisect limit, an interface that would change)
        goes to the report.
        """
        return edit.commit(why)

    def skip(self, node: NodeProto, reason: str) -> None:
        """Record that the running pass declines to rewrite `node`."""
        self.model.ledger.skip(self, node, reason)

    def settle(self) -> None:
        """Take what is dead out of the protobuf and restore the topological order."""
        if self._dead:
            _compact(self.proto.node, self._dead)
            if isinstance(self.proto, GraphProto):
                _compact(self.proto.initializer, self._dead)
                if self._listed is not None:
                    _compact(self.proto.input, self._dead)
            self._dead.clear()
        if self._gone:
            self._forget_gone()
        if self._unordered:
            rank = {key: index for index, key in enumerate(self._topological())}
            self.proto.node.sort(key=lambda node: rank[id(node)])
            self._rank = {key: (index, 0) for key, index in rank.items()}
        elif self._misplaced:
            self.proto.node.sort(key=lambda node: self._rank[id(node)])
        self._unordered = self._misplaced = False

    def settle_all(self) -> None:
        """`settle` this scope and those inside it."""
        self.settle()
        for child in self.children():
            child.settle_all()

    # ---- the index ----

    def _index(self) -> None:
        graph = self.proto
        if isinstance(graph, FunctionProto):
            self._given.update(graph.input)
            names: Iterable[str] = graph.output
        else:
            self._given.update(value.name for value in graph.input)
            self._given.update(item.values.name for item in graph.sparse_initializer)
            self._weights = {tensor.name: tensor for tensor in graph.initializer}
            names = (value.name for value in graph.output)
            self._pinned.update(annotated(graph.quantization_annotation))
        for name in names:
            self._outputs[name] = self._outputs.get(name, 0) + 1
        for position, node in enumerate(graph.node):
            self._nodes[id(node)] = node
            self._rank[id(node)] = (position, 0)
            self._enlist(node)
            for name in node.output:
                if name:
                    self._define(name, node)
        self.model.names.update(self._producer, self._given, self._weights)
        for node in graph.node:
            self._connect(node)
        for name in self._outputs:
            self._pin_capture(name)

    def _define(self, name: str, node: NodeProto) -> None:
        if name in self._producer or name in self._given or name in self._weights:
            raise InvalidModelError(
                f"{self.scope}: value {name!r} is defined twice (by {self.label(node)})"
            )
        self._producer[name] = node

    def _pin_capture(self, name: str) -> None:
        """A scope may pass an outer value straight through: the outer name must stay."""
        home = self.home(name)
        if home is None:
            raise InvalidModelError(f"{self.scope}: nothing makes its output {name!r}")
        if home is not self:
            home._captured[name] += 1
            self._passed.append((home, name))
            maker = home._producer.get(name)
            if maker is not None and self.owner is not None:
                _, owner = next(pair for pair in self.enclosing() if pair[0] is home)
                if home._rank[id(maker)] >= home._rank[id(owner)]:
                    home._unordered = True

    def _connect(self, node: NodeProto) -> None:
        """Record what `node` reads, and build the views of its subgraphs."""
        for index, name in enumerate(node.input):
            if name:
                self._add_use(node, index, name)
        for label, graph in attributes.subgraphs(node) if node.attribute else ():
            scope = f"{self.scope}/{self.label(node)}:{label}"
            child = GraphView(self.model, graph, scope, self, node)
            self._children.setdefault(id(node), []).append(child)

    def _add_use(self, node: NodeProto, index: int, name: str) -> None:
        home = self.home(name)
        if home is None:
            raise InvalidModelError(
                f"{self.scope}: {self.label(node)} reads {name!r}, which nothing makes"
            )
        home._uses.setdefault(name, {})[id(node), index] = Use(node, index, self)
        maker, reader = home._producer.get(name), self.ancestor(home, node)
        if maker is not None and home._rank[id(maker)] >= home._rank[id(reader)]:
            home._unordered = True

    def ancestor(self, outer: GraphView, node: NodeProto) -> NodeProto:
        """`node` itself, or the node of scope `outer` whose subgraph it stands in."""
        if self is not outer:
            for view, owner in self.enclosing():
                if view is outer:
                    return owner
        return node

    def drop_use(self, node: NodeProto, index: int) -> Read | None:
        """Take input `index` of `node`, a node here or inside, out of the index.

        It stands in the scope that defined the value when it was put in; that scope
        may no longer define it.
        """
        return self._drop(node.input[index], (id(node), index))

    def _drop(self, name: str, key: tuple[int, int]) -> Read | None:
        view: GraphView | None = self
        while view is not None:
            uses = view._uses.get(name)
            use = uses.pop(key, None) if uses else None
            if use is not None:
                return Read(view, name, use)
            view = view.parent
        return None

    def drop_reads(self, node: NodeProto) -> list[Read]:
        """Take all that `node` and the nodes inside it read from here outwards out."""
        key = id(node)
        found = [self._drop(name, (key, i)) for i, name in enumerate(node.input) if name]
        for child in self._children.get(id(node), ()):
            found += [self.drop_use(*slot) for slot in child.slots()]
        return [read for read in found if read is not None]

    def passed(self) -> Iterator[tuple[GraphView, str]]:
        """Values of outer scopes, with these, that are outputs here or inside."""
        yield from self._passed
        for child in self.children():
            yield from child.passed()

    def slots(self) -> Iterator[tuple[NodeProto, int]]:
        """Every node input here and inside that reads something."""
        for node in self._nodes.values():
            for index, name in enumerate(node.input):
                if name:
                    yield node, index
        for child in self.children():
            yield from child.slots()

    def _is_overridable(self, name: str) -> bool:
        """Whether initializer `name` is a default that the model's caller may replace."""
        return name in self._given and self.model.proto.ir_version >= 4

    def _around(self, start: int, ops: Collection[str]) -> list[NodeProto]:
        """The nodes logged since `start`, and those next to them, each once."""
        if ops and not any(map(self._by_op.get, ops)):
            return []
        changed = {id(node): node for node in self.changes[start:]}
        found: dict[int, NodeProto] = {}
        for key, node in changed.items():
            if key not in self._nodes:
                continue
            found[key] = node
            for name in node.input:
                maker = self._producer.get(name)
                if maker is not None:
                    found.setdefault(id(maker), maker)
            for name in node.output:
                for use in self._uses.get(name, _NO_USES).values():
                    if use.view is self:
                        found.setdefault(id(use.node), use.node)
        if not ops:
            return list(found.values())
        return [node for node in found.values() if self.op(node) in ops]

    def _enlist(self, node: NodeProto) -> None:
        """Put `node` into the index of operators."""
        op = self.op(node)
        self._ops[id(node)] = op
        self._by_op.setdefault(op, {})[id(node)] = node

    def _delist(self, node: NodeProto) -> None:
        """Take `node` out of the index of operators, before it becomes another."""
        del self._by_op[self._ops.pop(id(node))][id(node)]

    def _sources(self, node: NodeProto) -> Iterator[NodeProto]:
        """The nodes of this scope that `node` depends on, captures included."""
        for name in node.input:
            maker = self._producer.get(name)
            if maker is not None:
                yield maker
        for child in self._children.get(id(node), ()):
            for name in child.captures():
                maker = self._producer.get(name)
                if maker is not None:
                    yield maker

    def captures(self) -> Iterator[str]:
        """Names that this scope, and those inside it, read from outer scopes."""
        for node in self._nodes.values():
            for name in node.input:
                if name and self.home(name) is not self:
                    yield name
            for child in self._children.get(id(node), ()):
                for name in child.captures():
                    if self.home(name) is not self:
                        yield name
        for name in self._outputs:
            if self.home(name) is not self:
                yield name

    def _topological(self) -> list[int]:
        """Node ids in topological order, by rank where the order leaves a choice.

        Raises InvalidModelError on a cycle.
        """
        order: list[int] = []
        state: dict[int, bool] = {}  # False while its sources are being placed
        by_rank = sorted(self._nodes, key=self._rank.__getitem__)
        for root in by_rank:
            stack = []
            if root not in state:
                state[root] = False
                stack = [(root, self._sources(self._nodes[root]))]
            while stack:
                key, sources = stack[-1]
                for maker in sources:
                    known = state.get(id(maker))
                    if known is False:
                        raise InvalidModelError(
                            f"{self.scope}: {self.label(maker)} depends on itself"
                        )
                    if known is None:
                        state[id(maker)] = False
                        stack.append((id(maker), self._sources(maker)))
                        break
                else:
                    state[key] = True
                    order.append(key)
                    stack.pop()
        return order

    def is_out_of_order(self, node: NodeProto) -> bool:
        """Whether `node` depends on one that ranks after it."""
        if not self.holds(node):
            return False
        rank = self._rank[id(node)]
        return any(self._rank[id(maker)] >= rank for maker in self._sources(node))

    def enclosing(self) -> Iterator[tuple[GraphView, NodeProto]]:
        """The scopes around this one, each with the node that holds it, inner first."""
        view = self
        while view.parent is not None and view.owner is not None:
            yield view.parent, view.owner
            view = view.parent

    def depends_on_itself(self, node: NodeProto) -> bool:
        """Whether there is a cycle through `node`."""
        stack, seen = [node], set[int]()
        while stack:
            for maker in self._sources(stack.pop()):
                if maker is node:
                    return True
                if id(maker) not in seen:
                    seen.add(id(maker))
                    stack.append(maker)
        return False

    def _forget_gone(self) -> None:
        """Drop value_info and annotations of values that no longer exist."""
        gone = {name for name in self._gone if self.home(name) is not self}
        self._gone.clear()
        for index in range(len(self.proto.value_info) - 1, -1, -1):
            if self.proto.value_info[index].name in gone:
                del self.proto.value_info[index]
        if isinstance(self.proto, GraphProto):
            annotations = self.proto.quantization_annotation
            for index in range(len(annotations) - 1, -1, -1):
                if annotations[index].tensor_name in gone:
                    del annotations[index]


def constant_value(node: NodeProto) -> TensorProto | None:
    """The value of a Constant node as a tensor; None for all else and sparse values."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    if len(node.attribute) != 1 or node.attribute[0].ref_attr_name:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value":
        return attribute.t if attribute.type == AttributeProto.TENSOR else None
    kind = _CONSTANT_KINDS.get(attribute.name)
    if kind is None:
        return None
    value = helper.get_attribute_value(attribute)
    many = attribute.name.endswith("s")
    items = list(value) if many else [value]
    return helper.make_tensor("", kind, [len(items)] if many else [], items)


_CONSTANT_KINDS = {
    "value_int": TensorProto.INT64,
    "value_ints": TensorProto.INT64,
    "value_float": TensorProto.FLOAT,
    "value_floats": TensorProto.FLOAT,
    "value_string": TensorProto.STRING,
    "value_strings": TensorProto.STRING,
}


def annotated(annotations: Iterable[TensorAnnotation]) -> Iterator[str]:
    """The scales and zero points that quantization annotations name."""
    for annotation in annotations:
        for entry in annotation.quant_parameter_tensor_names:
            yield entry.value


def _compact(items: MutableSequence[Any], dead: Collection[int]) -> None:
    """Delete the items whose ids are in `dead` from a repeated field, last first."""
    indices = [index for index, item in enumerate(items) if id(item) in dead]
    for index in reversed(indices):
        del items[index]
