"""Evaluating constant subgraphs: by ONNX Runtime in a worker, else by onnx.reference.

The worker starts when the first evaluation needs it and serves all that follow, at
ORT_DISABLE_ALL: the same kernels that would compute the value at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.message import EncodeError
from onnx import ModelProto, NodeProto, ValueInfoProto, helper

from onnxopt import arithmetic
from onnxopt.errors import ProviderError, SessionError, WorkerError
from onnxopt.graph import GraphView
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.runtime import Worker

MEMORY_LIMIT = 2 << 30
MAX_VALUE_BYTES = 512 << 20
"""No value larger than this is computed, not even on the way to a smaller one."""


class EvaluationError(Exception):
    """The value could not be computed; the text is the reason."""


class Evaluator:
    """Computes the outputs of models without inputs; a context manager."""

    def __init__(self, timeout: float = 600.0) -> None:
        self._timeout = timeout
        self._worker: Worker | None = None

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _started(self) -> Worker:
        if self._worker is None:
            from onnxopt.runtime import Worker  # most models need no worker

            self._worker = Worker(timeout=self._timeout, memory_limit=MEMORY_LIMIT)
        return self._worker

    def evaluate(self, model: ModelProto) -> dict[str, Array]:
        """The outputs of `model`, by name. Raises EvaluationError.

        The reference evaluator is asked only where ORT has no kernel for an operator.
        """
        names = [value.name for value in model.graph.output]
        try:
            session = self._started().load(_serialized(model))
            try:
                values = session.run({})
            finally:
                session.close()
        except SessionError as error:
            if "NOT_IMPLEMENTED" not in str(error) and "ould not find" not in str(error):
                raise EvaluationError(f"ONNX Runtime: {error}") from None
            values = _by_reference(model, names)
        except (WorkerError, ProviderError) as error:
            raise EvaluationError(str(error)) from None
        arrays = {name: values[name] for name in names}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise EvaluationError("a value is not a tensor")
        return arrays


def constant_model(
    graph: GraphView, nodes: Sequence[NodeProto], outputs: Sequence[str]
) -> ModelProto:
    """A model without inputs: `nodes` of `graph` with the constants that they read."""
    made = {name for node in nodes for name in node.output}
    read = {name for node in nodes for name in node.input if name}
    model = ModelProto(ir_version=max(graph.model.proto.ir_version, 4))
    model.opset_import.append(helper.make_opsetid("", graph.opset()))
    model.graph.name = "constants"
    for name in sorted(read - made):
        tensor = graph.weight(name)
        assert tensor is not None, f"{name!r} is not a constant"
        inline = model.graph.initializer.add()
        inline.CopyFrom(graph.model.weights.inline(tensor))
        inline.name = name
    model.graph.node.extend(nodes)
    model.graph.output.extend(ValueInfoProto(name=name) for name in outputs)
    return model


def constant_values(
    graph: GraphView, evaluator: Evaluator, nodes: Sequence[NodeProto], names: list[str]
) -> dict[str, Array]:
    """What `nodes` make, of `names`: by NumPy where it can, else by ONNX Runtime.

    `nodes` stand in topological order. Raises EvaluationError.
    """
    known: dict[str, Array | None] = {"": None}
    for node in nodes:
        inputs = [known[n] if n in known else graph.array(n) for n in node.input]
        made = arithmetic.evaluate(node, inputs, graph.opset(), most=MAX_VALUE_BYTES)
        if made is None:
            return evaluator.evaluate(constant_model(graph, nodes, names))
        known[node.output[0]] = made
    found = {name: known[name] for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _serialized(model: ModelProto) -> bytes:
    try:
        return bytes(model.SerializeToString())
    except (EncodeError, ValueError):
        raise EvaluationError("its sources take more than 2 GiB") from None


def _by_reference(model: ModelProto, names: Sequence[str]) -> dict[str, Array]:
    from onnx.reference import ReferenceEvaluator  # large, and seldom needed

    try:
        values = ReferenceEvaluator(model).run(None, {})
    except Exception as error:  # noqa: BLE001 - it raises whatever its NumPy code does
        raise EvaluationError(
            f"onnx.reference: {type(error).__name__}: {error}"
        ) from None
    return dict(zip(names, values, strict=True))
