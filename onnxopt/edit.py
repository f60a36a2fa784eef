"""Edit: the one way to change a graph.

An edit is built first and carried out by `GraphView.apply`, whole or not at all. While
it runs, every primitive change notes its inverse; a refusal (the growth budget, the
bisect limit, a cycle, an interface that would change) undoes them, last first. Nodes
and weights that the edit leaves without a reader go with it, so that its true cost in
bytes is known when the budget is asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    ValueInfoProto,
    helper,
)

from onnxopt import attributes, operators
from onnxopt.graph import GraphView, Read, annotated, constant_value
from onnxopt.inlining import Content
from onnxopt.ledger import FORBIDDEN
from onnxopt.weights import Array, attribute_tensors, field_bytes, inline_bytes

if TYPE_CHECKING:
    from onnxopt.model import Model


class Refused(Exception):  # noqa: N818 - a signal inside this module, not an error
    """The edit may not be done; the text is the reason for the report."""


class EditError(AssertionError):
    """A pass built an edit that would break the graph: a bug in the pass."""


class Edit:
    """A list of changes to one scope, on behalf of `node` (the report names it).

    Where it would grow the model by more than `max_growth` bytes, it is refused.
    """

    def __init__(
        self, graph: GraphView, node: NodeProto | None, max_growth: int | None = None
    ) -> None:
        self.graph = graph
        self._subject = node
        self.max_growth = max_growth
        self._steps: list[Callable[[_Journal], object]] = []

    @property
    def is_empty(self) -> bool:
        """Whether it would change nothing."""
        return not self._steps

    @property
    def node(self) -> NodeProto:
        """The node that the edit is about."""
        assert self._subject is not None, "this edit is about a weight"
        return self._subject

    # ---- building ----

    def insert(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str] = 1,
        attrs: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        name: str = "",
    ) -> list[str]:
        """Add a node before the edit's own, with its metadata; returns the output names.

        Attributes that are None are left out.
        """
        if isinstance(outputs, int):
            hint = self.node.output[0] if self.node.output else op_type
            outputs = [self.graph.fresh(f"{hint}_{op_type}") for _ in range(outputs)]
        if not name and self.node.name:
            name = self.graph.fresh(f"{self.node.name}_{op_type}")
        made = helper.make_node(
            op_type, inputs, outputs, name=name or None, domain=domain
        )
        for key, value in (attrs or {}).items():
            if value is not None:
                made.attribute.append(attributes.make(key, value))
        made.metadata_props.extend(self.node.metadata_props)
        self._steps.append(lambda j: j.insert(self.graph, made, self.node))
        return list(outputs)

    def rewrite(
        self,
        op_type: str,
        inputs: Sequence[str],
        attrs: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
    ) -> None:
        """Put a node with the same outputs, name and metadata in the edit's place."""
        node = self.node
        made = helper.make_node(
            op_type, inputs, node.output, name=node.name or None, domain=domain
        )
        for key, value in (attrs or {}).items():
            if value is not None:
                made.attribute.append(attributes.make(key, value))
        if node.doc_string:
            made.doc_string = node.doc_string
        made.metadata_props.extend(node.metadata_props)
        _place_as(made, node)
        self.erase(node)
        self._steps.append(lambda j: j.insert(self.graph, made, node))

    def erase(self, node: NodeProto) -> None:
        """Remove a node; its outputs need no reader, or a new producer in this edit."""
        self._check_own(node)
        self._steps.append(lambda j: j.erase(self.graph, node))

    def bypass(self, node: NodeProto, values: Mapping[str, str]) -> None:
        """Remove a node and let the readers of its outputs read other values instead.

        `values` maps each output that is read to its replacement. Where it is an output
        of the scope, the replacement's producer takes over the name.
        """
        self._check_own(node)
        self._steps.append(lambda j: j.bypass(self.graph, node, values))

    def adopt(self, content: Content) -> None:
        """Put the content of another scope (see `onnxopt.inlining`) before the node.

        What of it nothing reads goes again.
        """
        self._steps.append(lambda j: j.adopt(self.graph, content, self.node))

    def hand_on(self, olds: Sequence[str], news: Sequence[str]) -> None:
        """Let who reads the outputs `olds` of the erased node read other values instead.

        Where the old name must stay, as an output, an Identity makes it.
        """
        for old, new in zip(olds, news, strict=False):
            if not old or old == new:
                continue
            if self.graph.is_output(old) or self.graph.is_pinned(old):
                self.insert("Identity", [new], [old])
            else:
                self.redirect(old, new)

    def redirect(self, old: str, new: str) -> None:
        """Let all who read `old`, which is no output, read `new` instead."""
        self._steps.append(lambda j: j.redirect(self.graph, old, new))

    def import_domain(self, domain: str, version: int) -> None:
        """Let the model import a domain that it has not imported so far."""
        self._steps.append(lambda j: j.import_domain(self.graph.model, domain, version))

    def drop_function(self, function: GraphView) -> None:
        """Remove a local function that nothing calls."""
        self._steps.append(lambda j: j.drop_function(function))

    def set_input(self, node: NodeProto, index: int, name: str) -> None:
        """Let input `index` of `node` read `name`; slots before it are filled with ""."""
        self._check_own(node)
        self._steps.append(lambda j: j.set_input(self.graph, node, index, name))

    def set_inputs(self, node: NodeProto, names: Sequence[str]) -> None:
        """Let `node` read these values and no others."""
        self._check_own(node)
        self._steps.append(lambda j: j.set_inputs(self.graph, node, names))

    def divert(self, node: NodeProto, index: int, name: str) -> None:
        """Let output `index` of `node` be the new value `name`.

        Who reads the old one needs another producer of it in this edit.
        """
        self._check_own(node)
        self._steps.append(lambda j: j.divert(self.graph, node, index, name))

    def set_op_type(self, node: NodeProto, op_type: str) -> None:
        """Let `node` be another standard operator, with the inputs that it has."""
        self._check_own(node)
        self._steps.append(lambda j: j.set_op_type(self.graph, node, op_type))

    def set_attribute(self, node: NodeProto, name: str, value: Any) -> None:
        """Set an attribute, or remove it where `value` is None."""
        self._check_own(node)
        self._steps.append(lambda j: j.set_attribute(self.graph, node, name, value))

    def add_weight(self, value: Array | TensorProto, hint: str, name: str = "") -> str:
        """Add a constant to the scope; returns its name (`name`, or a fresh one)."""
        name = name or self.graph.fresh(hint)
        if isinstance(value, TensorProto):
            tensor = TensorProto()
            tensor.CopyFrom(value)
            tensor.name = name
        else:
            tensor = self.graph.model.weights.tensor(value, name)
        self._steps.append(lambda j: j.add_weight(self.graph, tensor, self._subject))
        return name

    def set_weight(self, name: str, value: Array) -> None:
        """Replace the payload of a constant for all who read it."""
        tensor = self.graph.model.weights.tensor(value, name)
        self._steps.append(lambda j: j.set_weight(self.graph, name, tensor))

    def drop_weight(self, name: str) -> None:
        """Remove an initializer that nothing reads."""
        self._steps.append(lambda j: j.drop_weight(self.graph, name))

    def set_shape(
        self, name: str, elem_type: int, dims: Sequence[int | str | None]
    ) -> None:
        """Correct the declared type of an inner value, where one is declared."""
        self._steps.append(lambda j: j.set_shape(self.graph, name, elem_type, dims))

    def forget_shapes(self) -> None:
        """Say that the edit changes shapes that are known by now, declared or not."""
        self._steps.append(lambda j: setattr(j, "reshaped", True))

    def _check_own(self, node: NodeProto) -> None:
        """An edit changes nodes of its own scope; an inner node is its own view's."""
        if not self.graph.holds(node):
            raise EditError(f"{self.graph.scope}: {node.name!r} is not one of its nodes")

    # ---- carrying out ----

    def commit(self, why: str) -> bool:
        """Carry the edit out; `GraphView.apply` is the way to call this."""
        graph, ledger = self.graph, self.graph.model.ledger
        journal = _Journal()
        label = None if self._subject is None else graph.label(self._subject)
        try:
            if ledger.forbids(graph, self._subject, why):
                raise Refused(FORBIDDEN)
            for step in self._steps:
                step(journal)
            journal.sweep()
            journal.check()
            refusal = ledger.refusal(journal.bytes, self.max_growth)
            if refusal:
                raise Refused(refusal)
        except Refused as refused:
            journal.roll_back()
            if self._subject is not None:
                graph.skip(self._subject, str(refused))
            return False
        except BaseException:
            journal.roll_back()
            raise
        journal.publish()
        self._steps.clear()  # they hold the edit itself
        if journal.reshaped:
            graph.model.shapes.forget()
        graph.model.version += 1
        ledger.record(graph, self._subject, why, journal.nodes, journal.bytes, label)
        return True


class _Journal:
    """Primitive changes to views, each with its inverse, and what they touched."""

    def __init__(self) -> None:
        self.undo: list[Callable[[], object]] = []
        self.touched: list[tuple[GraphView, NodeProto]] = []
        self.freed: list[tuple[GraphView, str]] = []
        self.relieved: list[tuple[GraphView, str]] = []
        self.undefined: list[tuple[GraphView, str]] = []
        self.bytes = 0
        self.nodes = 0
        self.reshaped = False  # what is known of shapes may no longer hold

    def roll_back(self) -> None:
        for inverse in reversed(self.undo):
            inverse()
        self.undo.clear()  # the inverses hold the journal itself

    def publish(self) -> None:
        """Tell the views' change logs; there is no way back from here."""
        self.undo.clear()
        for home, name in self.relieved:
            uses = home._uses.get(name, ())
            if len(uses) == 1:  # rules that need a sole reader may apply to it now
                use = next(iter(home._uses[name].values()))
                self.touched.append((use.view, use.node))
        for view, node in self._touched_outwards():
            view.changes.append(node)

    def _touched_outwards(self) -> Iterator[tuple[GraphView, NodeProto]]:
        """What was touched, and the nodes of outer scopes that it stands in."""
        for view, node in self.touched:
            yield view, node
            yield from view.enclosing()

    # ---- nodes ----

    def insert(self, view: GraphView, node: NodeProto, anchor: NodeProto) -> NodeProto:
        _check_exists(view, node.op_type, node.domain)
        view.proto.node.append(node)
        kept: NodeProto = view.proto.node[-1]
        self.undo.append(lambda: self._detach(view, kept))
        place = view._rank[id(anchor)][0]
        self._attach(view, kept, (place, view.model.next_sequence()))
        view._connect(kept)
        for name in kept.output:  # which may have had readers before it had a producer
            for use in view.uses(name):
                if (
                    view._rank[id(use.view.ancestor(view, use.node))]
                    <= view._rank[id(kept)]
                ):
                    view._unordered = True
        view._misplaced = True
        return kept

    def erase(self, view: GraphView, node: NodeProto) -> None:
        if not view.holds(node):
            return  # a sweep, or an earlier step, was here before
        rank = view._rank[id(node)]
        children = view._children.get(id(node), [])
        passed = [item for child in children for item in child.passed()]
        reads = self._detach(view, node)
        self.undo.append(lambda: self._reattach(view, node, rank, children, reads))
        if reads or passed:
            lost = [(read.home, read.name) for read in reads] + passed
            self.freed += lost
            self.relieved += lost
        self.undefined += [(view, name) for name in node.output if name]

    def _attach(self, view: GraphView, node: NodeProto, rank: tuple[int, int]) -> None:
        view._nodes[id(node)] = node
        view._enlist(node)
        view._rank[id(node)] = rank
        view._dead.pop(id(node), None)
        for name in filter(None, node.output):
            if name in view._producer or name in view._given or name in view._weights:
                raise EditError(f"{view.scope}: {name!r} is defined already")
            view._producer[name] = node
        self.bytes += _node_bytes(node)
        self.nodes += 1 + (_inner_nodes(node) if node.attribute else 0)
        self.touched.append((view, node))

    def _reattach(
        self,
        view: GraphView,
        node: NodeProto,
        rank: tuple[int, int],
        children: Sequence[GraphView],
        reads: Iterable[Read],
    ) -> None:
        self._attach(view, node, rank)
        if children:
            view._children[id(node)] = list(children)
            _count_passed(children, 1)
        for read in reads:
            read.put_back()

    def _detach(self, view: GraphView, node: NodeProto) -> list[Read]:
        for name in filter(None, node.output):
            if view._producer.get(name) is node:
                del view._producer[name]
                view._gone.add(name)
        reads = view.drop_reads(node)
        self.nodes -= 1
        if id(node) in view._children:
            self.nodes -= _inner_nodes(node)
            _count_passed(view._children.pop(id(node)), -1)
        del view._nodes[id(node)]
        view._delist(node)
        view._dead[id(node)] = node
        self.bytes -= _node_bytes(node)
        return reads

    def set_input(self, view: GraphView, node: NodeProto, index: int, name: str) -> None:
        length = len(node.input)
        old = node.input[index] if index < length else ""
        if old == name:
            return
        read = view.drop_use(node, index) if old else None
        if read is not None:
            self.freed.append((read.home, old))
            self.relieved.append((read.home, old))
        self.undo.append(lambda: self._unset_input(view, node, index, old, length, read))
        self.bytes -= _field_bytes(node)
        node.input.extend([""] * (index + 1 - length))
        node.input[index] = name
        if name:
            view._add_use(node, index, name)
        if old and name and old not in node.input:
            self._move_shards(node, old, name)
        self.bytes += _field_bytes(node)
        self.touched.append((view, node))

    def divert(self, view: GraphView, node: NodeProto, index: int, name: str) -> None:
        old = node.output[index]
        if view.home(name) is not None:
            raise EditError(f"{name!r} is defined already")
        self.bytes -= _field_bytes(node)
        node.output[index] = name
        self.bytes += _field_bytes(node)
        view._producer[name] = node
        del view._producer[old]
        view._gone.add(old)
        self.undo.append(lambda: self._undivert(view, node, index, old))
        self.undefined.append((view, old))
        self.touched.append((view, node))

    def _undivert(self, view: GraphView, node: NodeProto, index: int, old: str) -> None:
        del view._producer[node.output[index]]
        node.output[index] = old
        view._producer[old] = node

    def set_inputs(self, view: GraphView, node: NodeProto, names: Sequence[str]) -> None:
        for index in range(max(len(names), len(node.input))):
            self.set_input(view, node, index, names[index] if index < len(names) else "")
        surplus = len(node.input) - len(names)
        if surplus > 0:
            self.bytes -= _field_bytes(node)
            del node.input[len(names) :]
            self.bytes += _field_bytes(node)
            self.undo.append(lambda: node.input.extend([""] * surplus))

    def _move_shards(self, node: NodeProto, old: str, new: str) -> None:
        """Let what is said of sharding an input be said of the one in its place."""
        for spec in _shards(node, old):
            spec.tensor_name = new
            self.undo.append(functools.partial(setattr, spec, "tensor_name", old))

    def _unset_input(
        self,
        view: GraphView,
        node: NodeProto,
        index: int,
        old: str,
        length: int,
        read: Read | None,
    ) -> None:
        if node.input[index]:
            view.drop_use(node, index)
        node.input[index] = old
        del node.input[length:]
        if read is not None:
            read.put_back()

    def set_attribute(
        self, view: GraphView, node: NodeProto, name: str, value: Any
    ) -> None:
        size = _node_bytes(node)
        index = next((i for i, a in enumerate(node.attribute) if a.name == name), None)
        if index is not None:
            if node.attribute[index].type in (
                AttributeProto.GRAPH,
                AttributeProto.GRAPHS,
            ):
                raise EditError(f"{name!r} is a subgraph: edit it by its own view")
            before = AttributeProto.FromString(node.attribute[index].SerializeToString())
            del node.attribute[index]
            self.undo.append(lambda: node.attribute.insert(index, before))
        if value is not None:
            place = len(node.attribute) if index is None else index
            node.attribute.insert(place, attributes.make(name, value))
            self.undo.append(lambda: node.attribute.pop(place))
        self.bytes += _node_bytes(node) - size
        self.touched.append((view, node))

    def _rename_operator(self, view: GraphView, node: NodeProto, op_type: str) -> None:
        view._delist(node)
        self.bytes -= _field_bytes(node)
        node.op_type = op_type
        self.bytes += _field_bytes(node)
        view._enlist(node)

    def set_op_type(self, view: GraphView, node: NodeProto, op_type: str) -> None:
        _check_exists(view, op_type, node.domain)
        before = node.op_type
        self._rename_operator(view, node, op_type)
        self.undo.append(lambda: self._rename_operator(view, node, before))
        self.touched.append((view, node))

    def bypass(self, view: GraphView, node: NodeProto, values: Mapping[str, str]) -> None:
        for old, new in values.items():
            self.redirect(view, old, new)
        self.erase(view, node)
        for old, new in values.items():
            if view.is_output(old):
                self._rename(view, new, old)

    def redirect(self, view: GraphView, old: str, new: str) -> None:
        if view.is_pinned(old):
            raise Refused(f"{old!r} is passed through by an inner scope")
        for use in view.uses(old):
            if use.view.home(new) is not view.home(new):
                raise Refused(f"{new!r} means another value in an inner scope")
            self.set_input(use.view, use.node, use.index, new)

    def adopt(self, view: GraphView, content: Content, anchor: NodeProto) -> None:
        for tensor in content.weights:
            self.add_weight(view, tensor, anchor)
            self.freed.append((view, tensor.name))
        for sparse in content.sparse:
            self._add_sparse(view, sparse)
        for node in content.nodes:
            self.insert(view, node, anchor)
            self.freed += [(view, name) for name in node.output if name]
        self._append(view.proto.value_info, content.value_info)
        if isinstance(view.proto, GraphProto) and content.annotations:
            self._append(view.proto.quantization_annotation, content.annotations)
            pinned = set(annotated(content.annotations)) - view._pinned
            view._pinned |= pinned
            self.undo.append(lambda: view._pinned.difference_update(pinned))

    def _add_sparse(self, view: GraphView, sparse: SparseTensorProto) -> None:
        assert isinstance(view.proto, GraphProto)
        name = sparse.values.name
        if view.home(name) is view:
            raise EditError(f"{name!r} is defined already")
        self._append(view.proto.sparse_initializer, [sparse])
        view._given.add(name)
        self.undo.append(lambda: view._given.discard(name))

    def import_domain(self, model: Model, domain: str, version: int) -> None:
        entry = helper.make_opsetid(domain, version)
        self._append(model.proto.opset_import, [entry])

    def drop_function(self, function: GraphView) -> None:
        function.model.drop_function(function)
        self.bytes -= 1 + _field_bytes(function.proto)  # its tag is two bytes
        self.undo.append(lambda: function.model.restore_function(function))

    def _append(self, items: Any, new: Sequence[Any]) -> None:
        """Extend a repeated field whose order is nobody's business."""
        length = len(items)
        items.extend(new)
        self.bytes += sum(map(_field_bytes, new))
        self.undo.append(lambda: items.__delitem__(slice(length, None)))

    def _rename(self, view: GraphView, old: str, new: str) -> None:
        """Let the producer of `old` make the scope's output `new` instead."""
        maker = view.producer(old)
        if maker is None:
            raise Refused(f"output {new!r} would be an input or a constant of the graph")
        if view.is_output(old) or view.is_pinned(old):
            raise Refused(f"output {new!r} would be the same value as {old!r}")
        if any(use.view.home(new) not in (None, view) for use in view.uses(old)):
            raise Refused(f"{new!r} means another value in an inner scope")
        index = list(maker.output).index(old)
        # both names are defined while the readers move, forwards and backwards alike
        self._set_output(view, maker, index, new)
        self.undo.append(lambda: view._producer.pop(new))
        for use in view.uses(old):
            self.set_input(use.view, use.node, use.index, new)
        view._producer.pop(old)
        view._gone.add(old)
        self.undo.append(lambda: self._set_output(view, maker, index, old))
        self._rename_annotation(view, old, new)
        self.touched.append((view, maker))

    def _rename_annotation(self, view: GraphView, old: str, new: str) -> None:
        """The quantization annotation of a value follows its name."""
        if isinstance(view.proto, FunctionProto):
            return
        found = {item.tensor_name: item for item in view.proto.quantization_annotation}
        if old in found and new not in found:
            found[old].tensor_name = new
            self.undo.append(lambda: setattr(found[old], "tensor_name", old))

    def _set_output(
        self, view: GraphView, maker: NodeProto, index: int, name: str
    ) -> None:
        self.bytes -= _field_bytes(maker)
        for spec in _shards(maker, maker.output[index]):
            spec.tensor_name = name
        maker.output[index] = name
        self.bytes += _field_bytes(maker)
        view._producer[name] = maker

    # ---- weights ----

    def add_weight(
        self, view: GraphView, tensor: TensorProto, anchor: NodeProto | None
    ) -> None:
        graph, model = view.proto, view.model
        old_format = model.proto.ir_version < 4
        if isinstance(graph, FunctionProto) or not view.holds_initializers:
            value = TensorProto.FromString(tensor.SerializeToString())
            value.ClearField("name")
            node = helper.make_node("Constant", [], [tensor.name])
            node.attribute.append(attributes.make("value", value))
            assert anchor is not None
            self.insert(view, node, anchor)
            return
        if view.home(tensor.name) is view:
            raise EditError(f"{tensor.name!r} is defined already")
        graph.initializer.append(tensor)
        kept = graph.initializer[-1]
        view._weights[tensor.name] = kept
        self.bytes += inline_bytes(kept)
        if old_format:
            graph.input.append(
                helper.make_tensor_value_info(kept.name, kept.data_type, kept.dims)
            )
            self.bytes += _field_bytes(graph.input[-1])
            view._given.add(kept.name)
            view.listed()[kept.name] = graph.input[-1]
        self.undo.append(lambda: self._unadd_weight(view, graph, kept, old_format))
        self.touched += [(use.view, use.node) for use in view.uses(kept.name)]

    def _unadd_weight(
        self, view: GraphView, graph: GraphProto, tensor: TensorProto, listed: bool
    ) -> None:
        del view._weights[tensor.name]
        view._dead[id(tensor)] = tensor
        if listed:
            view._given.discard(tensor.name)
            del view.listed()[tensor.name], graph.input[-1]

    def drop_weight(self, view: GraphView, name: str) -> None:
        tensor = view._weights[name]
        graph = view.proto
        assert isinstance(graph, GraphProto)
        del view._weights[name]
        view._dead[id(tensor)] = tensor
        view._gone.add(name)
        self.bytes -= inline_bytes(tensor)
        self.undo.append(lambda: _restore_weight(view, tensor))
        self.undefined.append((view, name))
        if name in view._given:
            value = view.listed().pop(name)
            view._dead[id(value)] = value
            self.bytes -= _field_bytes(value)
            view._given.discard(name)
            self.undo.append(lambda: _restore_input(view, value))

    def set_weight(self, view: GraphView, name: str, tensor: TensorProto) -> None:
        home = view.home(name)
        assert home is not None
        maker = home.producer(name)
        if maker is not None and (old := constant_value(maker)) is not None:
            value = TensorProto.FromString(tensor.SerializeToString())
            for attribute in list(maker.attribute):
                self.set_attribute(home, maker, attribute.name, None)
            self.set_attribute(home, maker, "value", value)
        else:
            kept = home._weights[name]
            old = TensorProto.FromString(kept.SerializeToString())
            self.bytes -= inline_bytes(kept)
            _set_payload(kept, tensor)
            self.bytes += inline_bytes(kept)
            self.undo.append(lambda: kept.CopyFrom(old))
        if (old.data_type, *old.dims) != (tensor.data_type, *tensor.dims):
            self._declare(home, name, tensor.data_type, tensor.dims)
        self.touched += [(use.view, use.node) for use in home.uses(name)]

    def set_shape(
        self, view: GraphView, name: str, elem_type: int, dims: Sequence[int | str | None]
    ) -> None:
        self._declare(view, name, elem_type, dims)

    def _declare(
        self, view: GraphView, name: str, elem_type: int, dims: Sequence[int | str | None]
    ) -> None:
        """Where the type of `name` is declared: before IR 4 a weight is an input, too."""
        self.reshaped = True
        weights = view.proto.input if name in view._weights else ()
        for value in (*view.proto.value_info, *weights):
            if not isinstance(value, str) and value.name == name:
                before = type(value).FromString(value.SerializeToString())
                value.type.CopyFrom(helper.make_tensor_type_proto(elem_type, dims))
                self.bytes += _field_bytes(value) - _field_bytes(before)
                self.undo.append(functools.partial(value.CopyFrom, before))

    # ---- finishing ----

    def sweep(self) -> None:
        """Take out what lost its last reader, and what only that needed."""
        while self.freed:
            view, name = self.freed.pop()
            if view.is_used(name):
                continue
            maker = view.producer(name)
            if maker is not None:
                if view.is_removable(maker):
                    self.erase(view, maker)
            elif name in view._weights and view.is_droppable(name):
                self.drop_weight(view, name)

    def check(self) -> None:
        """Raise where a value lost its definition but not its readers, or on a cycle."""
        for view, name in self.undefined:
            if view.is_used(name) and view.home(name) is not view:
                raise EditError(f"{view.scope}: {name!r} is read but nothing makes it")
        for view, node in self._touched_outwards():
            if not view.is_unordered:
                continue  # every dependency agrees with the ranks
            if view.is_out_of_order(node) and view.depends_on_itself(node):
                raise Refused(f"{view.label(node)} would depend on itself")


def _count_passed(children: Iterable[GraphView], number: int) -> None:
    """Note in the scopes around that inner scopes pass their values on, or no longer."""
    for child in children:
        for home, name in child.passed():
            home._captured[name] += number


def _check_exists(view: GraphView, op_type: str, domain: str) -> None:
    """Never emit an operator that the scope's operator sets lack."""
    opset = view.opset(domain)
    if domain not in ("", "ai.onnx"):
        if not opset:
            raise Refused(f"the model does not import the domain {domain!r}")
    elif not operators.exists(op_type, opset):
        raise Refused(f"opset {opset} has no {op_type}")


def _field_bytes(message: Any) -> int:
    """The size of a node or the like, with its tag and length."""
    return field_bytes(int(message.ByteSize()))


def _node_bytes(node: NodeProto) -> int:
    """The size of a node with its payloads, wherever they lie."""
    size = int(node.ByteSize())
    for tensor in attribute_tensors(node.attribute) if node.attribute else ():
        if tensor.data_location:
            size += inline_bytes(tensor) - _field_bytes(tensor)
    return field_bytes(size)


def _inner_nodes(node: NodeProto) -> int:
    return sum(1 for _ in attributes.nodes_in([node])) - 1


def _set_payload(tensor: TensorProto, new: TensorProto) -> None:
    """Give `tensor` the payload of `new`; name, doc string and metadata stay."""
    kept = TensorProto(name=tensor.name)
    if tensor.doc_string:
        kept.doc_string = tensor.doc_string
    if tensor.metadata_props:
        kept.metadata_props.extend(tensor.metadata_props)
    tensor.CopyFrom(new)
    tensor.MergeFrom(kept)


def _restore_weight(view: GraphView, tensor: TensorProto) -> None:
    view._weights[tensor.name] = tensor
    view._dead.pop(id(tensor), None)


def _restore_input(view: GraphView, value: ValueInfoProto) -> None:
    view._dead.pop(id(value), None)
    view.listed()[value.name] = value
    view._given.add(value.name)


def _place_as(made: NodeProto, node: NodeProto) -> None:
    """Let `made` run on the devices of `node`; it may read other values."""
    for configuration in getattr(node, "device_configurations", ()):
        copy = made.device_configurations.add()
        copy.CopyFrom(configuration)
        del copy.sharding_spec[:]
        for spec in configuration.sharding_spec:
            if spec.tensor_name in (*made.input, *made.output):
                copy.sharding_spec.append(spec)


def _shards(node: NodeProto, name: str) -> list[Any]:
    """The multi-device annotations of `node` that are about value `name`."""
    return [
        spec
        for configuration in getattr(node, "device_configurations", ())
        for spec in configuration.sharding_spec
        if spec.tensor_name == name
    ]
