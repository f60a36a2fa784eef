"""Model: the scopes of one ModelProto, plus where its weights lie."""

from __future__ import annotations

import io
import itertools
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakKeyDictionary

from google.protobuf.message import DecodeError, EncodeError
from onnx import FunctionProto, ModelProto, NodeProto

from onnxopt import attributes, checks, wire
from onnxopt.errors import InvalidModelError, UsageError
from onnxopt.graph import GraphView
from onnxopt.ledger import Ledger
from onnxopt.shapes import Shapes
from onnxopt.weights import SOURCE, WeightStore, copy_fields, tensor_bytes, tensors

log = logging.getLogger("onnxopt.model")

_PURE_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc")

Source = str | os.PathLike[str] | ModelProto | Any
"""A path, a ModelProto, or an onnx_graphsurgeon.Graph."""


class Model:
    """One model, ours to edit: a protobuf without its large weights, and a WeightStore.

    `main` is the view of the main graph, `functions` those of the local functions'
    bodies. Views of subgraphs are children of the view that they stand in.
    """

    def __init__(self, proto: ModelProto, weights: WeightStore) -> None:
        self.proto = proto
        self.weights = weights
        self.notes: list[str] = []
        self.names: set[str] = set()
        self.version = 0  # edits so far
        self.analyses: WeakKeyDictionary[GraphView, tuple[int, Any]]
        self.analyses = WeakKeyDictionary()  # by scope, with the version they are of
        self.ledger = Ledger()
        self.shapes = Shapes(self)
        self._sequence = itertools.count(-(1 << 60))
        self._functions = {_key(function): function for function in proto.functions}
        self.notes += checks.drop_duplicates(proto)
        checks.check_proto(proto)
        self.main = GraphView(self, proto.graph, "main")
        self.functions = [
            GraphView(self, function, f"function {function.domain}::{function.name}")
            for function in proto.functions
        ]
        self._bodies = {_key(view.proto): view for view in self.functions}
        self._dropped: list[FunctionProto] = []
        self.main.pin(checks.trained_names(proto))
        for view in self.views():
            if view.is_unordered:
                self.notes.append(f"{view.scope}: nodes were not sorted; they are now")
                view.settle()
        for tensor in tensors(proto):
            weights.check(tensor)

    @classmethod
    def open(
        cls, source: Source, base_dir: str | os.PathLike[str] | None = None
    ) -> Model:
        """The model in a file, or a copy of one in memory (never the caller's own).

        `base_dir`: the folder of external data, for models in memory. Raises
        InvalidModelError where the model is malformed or unsafe, UsageError where the
        file cannot be read.
        """
        folder = Path(base_dir) if base_dir is not None else None
        if isinstance(source, ModelProto):
            return cls._from_proto(source, folder)
        if isinstance(source, str | os.PathLike):
            return cls._from_file(Path(source), folder)
        if hasattr(source, "nodes") and hasattr(source, "opset"):
            from onnxopt import surgeon

            return cls._from_proto(surgeon.export(source), folder)
        raise UsageError(
            f"a model is a path, a ModelProto or a gs.Graph, not {type(source).__name__}"
        )

    @classmethod
    def _from_file(cls, path: Path, folder: Path | None) -> Model:
        if path.is_fifo():
            raise UsageError(f"cannot read {path}: it is a pipe; give a file")
        try:
            file = open(path, "rb")  # noqa: SIM115 - the store keeps it open
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        weights = WeightStore(folder or path.parent, path)
        weights.add_source(SOURCE, file, str(path))
        proto = _parse(file, str(path))
        try:
            return cls(proto, weights)
        except InvalidModelError as error:
            hint = "mend it or export it again"
            raise InvalidModelError(f"{path}: {error}; {hint}") from None

    @classmethod
    def _from_proto(cls, proto: ModelProto, folder: Path | None) -> Model:
        weights = WeightStore(folder)
        try:
            data = proto.SerializeToString()
        except (EncodeError, ValueError):  # over 2 GiB: protobuf's limit
            return cls(_copy_large(proto, weights), weights)
        if len(data) < wire.MIN_PAYLOAD:
            return cls(_parse(io.BytesIO(data), "the model"), weights)
        file = tempfile.TemporaryFile(prefix="onnxopt-")  # noqa: SIM115 - as above
        file.write(data)
        file.flush()
        weights.add_source(SOURCE, file, "the model")
        return cls(_parse(file, "the model"), weights)

    def views(self) -> Iterator[GraphView]:
        """Every scope: the main graph, what is inside it, then function bodies."""
        stack = [*reversed(self.functions), self.main]
        while stack:
            view = stack.pop()
            yield view
            stack.extend(view.children())

    def settle(self) -> None:
        """Bring the protobuf of every scope in order."""
        for view in self.views():
            view.settle()
        for index in range(len(self.proto.functions) - 1, -1, -1):
            if any(self.proto.functions[index] is gone for gone in self._dropped):
                del self.proto.functions[index]
        self._dropped.clear()

    def opset(self, view: GraphView, domain: str = "") -> int:
        """The operator set version that `view` imports for `domain`; 0 where none."""
        while view.parent is not None:
            view = view.parent
        proto = view.proto if isinstance(view.proto, FunctionProto) else self.proto
        for entry in proto.opset_import:
            if (entry.domain or "ai.onnx") == (domain or "ai.onnx"):
                return int(entry.version)
        return 0

    def is_call(self, node: NodeProto) -> bool:
        """Whether `node` calls a model-local function."""
        return bool(self._functions) and _key(node) in self._functions

    def function(self, node: NodeProto) -> GraphView | None:
        """The body of the local function that `node` calls; None for all other nodes."""
        return self._bodies.get(_key(node)) if self._bodies else None

    def drop_function(self, view: GraphView) -> None:
        """Take a local function out of the model; `Edit` is the way to do it."""
        key = _key(view.proto)
        self.functions.remove(view)
        del self._functions[key], self._bodies[key]
        self._dropped.append(view.proto)

    def restore_function(self, view: GraphView) -> None:
        """Undo `drop_function`."""
        key = _key(view.proto)
        self.functions.append(view)
        self._functions[key], self._bodies[key] = view.proto, view
        self._dropped.pop()

    def is_pure(self, node: NodeProto) -> bool:
        """Whether running `node` has no effect but its outputs.

        Operators of unknown domains may have others, so they are never removed.
        """
        if self.is_call(node):
            return all(self.is_pure(inner) for inner in self._functions[_key(node)].node)
        if node.domain not in _PURE_DOMAINS:
            return False
        return all(
            self.is_pure(inner)
            for _, graph in (attributes.subgraphs(node) if node.attribute else ())
            for inner in graph.node
        )

    def fresh(self, hint: str) -> str:
        """A name that no value of any scope has; it is taken from now on."""
        name = hint
        for number in itertools.count(1):
            if name not in self.names:
                break
            name = f"{hint}_{number}"
        self.names.add(name)
        return name

    def next_sequence(self) -> int:
        """A number larger than any before it, and far below 0."""
        return next(self._sequence)

    def bytes(self) -> int:
        """The size of the whole, structure and weights, wherever they lie."""
        outside = (
            tensor_bytes(tensor) for tensor in tensors(self.proto) if tensor.data_location
        )
        return int(self.proto.ByteSize()) + sum(outside)


def _key(item: FunctionProto | NodeProto) -> tuple[str, str, str]:
    name = item.name if isinstance(item, FunctionProto) else item.op_type
    return item.domain, name, getattr(item, "overload", "")


def _parse(file: BinaryIO, label: str) -> ModelProto:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise InvalidModelError(f"{label} is empty")
    proto = ModelProto()
    try:
        proto.ParseFromString(wire.skeleton(file, size, SOURCE))
    except (wire.WireError, DecodeError, ValueError):
        raise InvalidModelError(
            f"{label} is not an ONNX model, or is cut short ({size:,} bytes): "
            "copy or export it again"
        ) from None
    if not proto.HasField("graph"):
        raise InvalidModelError(f"{label} is not an ONNX model: it has no graph")
    return proto


def _copy_large(proto: ModelProto, weights: WeightStore) -> ModelProto:
    """A copy of a model in memory of over 2 GiB, with its large weights spilled."""
    new = ModelProto()
    copy_fields(proto, new, without=["graph"])
    copy_fields(proto.graph, new.graph, without=["initializer"])
    for tensor in proto.graph.initializer:
        large = len(tensor.raw_data) >= wire.MIN_PAYLOAD
        new.graph.initializer.append(weights.spill(tensor) if large else tensor)
    return new
