"""Shapes and dtypes of values, by ONNX shape inference over the whole model.

What the model declares about inner values and outputs is left out of the question:
declared ranks are sometimes wrong, and a rewrite may only rest on what is inferred.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onnx import GraphProto, ModelProto, TypeProto, ValueInfoProto, shape_inference

from onnxopt import attributes, memory, open_shapes
from onnxopt.bare import MARK, bare_copy

if TYPE_CHECKING:
    from onnxopt.graph import GraphView, Shape
    from onnxopt.model import Model

log = logging.getLogger("onnxopt.shapes")

_LID = 512 << 20
"""Bytes that following the values of shapes may take."""

_MOST_RUNS = 8
"""Runs of inference, each with what the one before it left open but is certain."""

Known = dict[str, tuple[int, "Shape | None"]]


class Shapes:
    """Answers for every scope; inference runs when asked for a value that is new.

    Facts in a function body hold per call site, so nothing is known there.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known: dict[GraphView, Known] = {}
        self._version = -1
        self._run: int | None = None
        self._promised: set[str] | None = None
        self._loose: set[str] = set()
        self._is_explosive = False

    def shape(self, view: GraphView, name: str) -> Shape | None:
        """Dims of `name` (int, symbol or None each), None where even the rank is open."""
        found = self._find(view, name)
        return found[1] if found else None

    def dtype(self, view: GraphView, name: str) -> int | None:
        """ONNX element type of `name`, None where unknown."""
        found = self._find(view, name)
        return found[0] if found and found[0] else None

    def forget(self) -> None:
        """Infer anew when asked next: edits may have made more of it known."""
        self._version = -1
        self._known = {}

    def is_reliable(self, symbol: str) -> bool:
        """Whether equal symbols mean equal sizes.

        A symbol that several input dims share is only a promise: ONNX Runtime runs
        feeds that break it. One that inference made, or that one dim has, is a fact,
        except for the elements of a sequence: they share a symbol, and differ.
        """
        if self._promised is None:
            counts = Counter(
                dim.dim_param
                for value in self._model.proto.graph.input
                for dim in value.type.tensor_type.shape.dim
            )
            self._promised = {name for name, count in counts.items() if count > 1}
        return symbol not in self._promised and symbol not in self._loose

    def _find(self, view: GraphView, name: str) -> tuple[int, Shape | None] | None:
        home = view.home(name)
        if home is None:
            return None
        tensor = home.weight(name)
        if tensor is not None:
            return tensor.data_type, tuple(tensor.dims)
        if home.is_function:
            return None
        known = self._known.get(home, {}).get(name)
        if known is None and self._may_know_more():
            self._infer()
            known = self._known.get(home, {}).get(name)
        return known

    def _may_know_more(self) -> bool:
        """Whether there were edits; within one run of a pass only once.

        Where a value stays unknown, asking again after every edit would cost an
        inference of the whole model each time.
        """
        if self._version == self._model.version:
            return False
        return self._run is None or self._run != self._model.runs or self._version < 0

    def _infer(self) -> None:
        self._version = self._model.version
        self._run = self._model.runs
        self._known = {}
        for view in self._model.views():
            view.settle()
        try:
            bare = bare_copy(self._model)
            inferred = self._inferred(bare)
            for _ in range(_MOST_RUNS):
                if not open_shapes.declare(bare.graph, inferred.graph, self.is_reliable):
                    break
                inferred = self._inferred(bare)
        except (shape_inference.InferenceError, ValueError) as error:
            log.info("shape inference failed: %s", error)
            return
        self._read(self._model.main, inferred.graph)

    def _inferred(self, bare: ModelProto) -> ModelProto:
        """With the values of shapes followed, unless that would take all memory.

        onnx keeps an object for each element of a vector whose size it knows, so that
        one long vector (a bomb, or weights in one dimension) costs 100 times its size.
        """
        if not self._is_explosive:
            try:
                with memory.at_most(_LID + 8 * bare.ByteSize()):
                    return shape_inference.infer_shapes(bare, data_prop=True)
            except MemoryError:
                log.info("shape inference does without the values of shapes")
                self._is_explosive = True
        return shape_inference.infer_shapes(bare)

    def _read(self, view: GraphView, graph: GraphProto) -> None:
        known: Known = {}
        for value in (*graph.value_info, *graph.output, *graph.input):
            found = _tensor_type(value)
            if found is None:
                self._loose.update(_symbols(value.type))
            else:
                known[value.name.partition(MARK)[0]] = found
        self._known[view] = known
        if not any(view.children()):
            return
        for ours, theirs in zip(view.proto.node, graph.node, strict=True):
            inner = attributes.subgraphs(theirs)
            for child, (_, subgraph) in zip(view.children_of(ours), inner, strict=True):
                self._read(child, subgraph)


def _tensor_type(value: ValueInfoProto) -> tuple[int, Shape | None] | None:
    if not value.type.HasField("tensor_type"):
        return None
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
        for dim in tensor.shape.dim
    )
    return tensor.elem_type, dims


def _symbols(kind: TypeProto) -> Iterator[str]:
    """The symbolic dims of a type, those of what it contains included."""
    yield from (dim.dim_param for dim in kind.tensor_type.shape.dim)
    for inner in (kind.sequence_type, kind.optional_type):
        if inner.HasField("elem_type"):
            yield from _symbols(inner.elem_type)
    if kind.map_type.HasField("value_type"):
        yield from _symbols(kind.map_type.value_type)
