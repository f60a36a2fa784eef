"""Helpers of the pass tests: models from text, runs in ONNX Runtime, comparisons."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.helper import make_node, make_tensor_value_info, tensor_dtype_to_np_dtype
from onnx.numpy_helper import from_array, to_array

from onnxopt import verifier
from onnxopt.ledger import Ledger
from onnxopt.manager import Context, PassManager
from onnxopt.model import Model
from onnxopt.recipe import parse_pipeline
from onnxopt.report import Guarantee, Skip

Array = npt.NDArray[Any]
Feed = dict[str, Array]

SPECIAL = (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e30, 0.5)


def parse(text: str) -> ModelProto:
    """The model that `text` describes."""
    return onnx.parser.parse_model(text)


def model_of(body: str, opset: int = 17, ir: int = 8) -> ModelProto:
    """The model whose graph, and functions, `body` describes."""
    return parse(f'<ir_version: {ir}, opset_import: ["" : {opset}, "local" : 1]>\n{body}')


def run_passes(
    source: ModelProto,
    pipeline: str,
    context: Context | None = None,
    *,
    budget: int | None = None,
    limit: int | None = None,
) -> Model:
    """A copy of `source` after the passes that `pipeline` names, verified in full."""
    model = Model.open(source)
    model.ledger = Ledger(budget, limit)
    PassManager(parse_pipeline(pipeline), verify_each=True).run(model, context)
    verifier.verify(model, "at the end", rebuild=True)
    return model


def final(model: Model) -> ModelProto:
    """The model as one protobuf that holds its weights."""
    proto = copy.deepcopy(model.proto)
    for graph in graphs(proto):
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                tensor.CopyFrom(model.weights.inline(tensor))
    return proto


def graphs(proto: ModelProto) -> list[GraphProto]:
    """The main graph and all the subgraphs in it and in the functions."""
    found = [proto.graph]
    nodes = [*proto.graph.node, *(n for f in proto.functions for n in f.node)]
    while nodes:
        for attribute in nodes.pop().attribute:
            for graph in (attribute.g, *attribute.graphs):
                if graph.node or graph.output:
                    found.append(graph)
                    nodes.extend(graph.node)
    return found


def skips(model: Model) -> list[Skip]:
    """What the passes that ran declined."""
    return [skip for report in model.ledger.reports() for skip in report.skipped]


def op_types(model: Model) -> list[str]:
    """The operators of the main graph, in order."""
    return [node.op_type for node in model.main.nodes()]


# ---- running ----


def run(
    proto: ModelProto, feed: Mapping[str, Array], optimized: bool = False
) -> list[Any]:
    """The outputs of the model in ONNX Runtime's CPU provider, as the file says it.

    With `optimized` as ONNX Runtime rewrites it.

    Weights are not packed for faster kernels, which round differently: a weight that a
    pass made constant is to be multiplied as the computed one was.
    """
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.graph_optimization_level = level
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, dict(feed)))


def feeds_of(proto: ModelProto, sizes: Sequence[int] = (2, 1, 3)) -> list[Feed]:
    """One feed for each size that the symbolic dims take.

    All but the first have zeros of both signs, infinities and NaN among their values.
    """
    return [_feed(proto, number, size) for number, size in enumerate(sizes)]


def _feed(proto: ModelProto, number: int, size: int) -> Feed:
    weights = {tensor.name for tensor in proto.graph.initializer}
    feed = {}
    for value in proto.graph.input:
        if value.name not in weights:
            tensor = value.type.tensor_type
            dims = [
                dim.dim_value if dim.HasField("dim_value") else size
                for dim in tensor.shape.dim
            ]
            rng = np.random.default_rng([number, zlib.crc32(value.name.encode())])
            feed[value.name] = random_array(rng, tensor.elem_type, dims, number > 0)
    return feed


def random_array(
    rng: np.random.Generator, kind: int, dims: Sequence[int], special: bool = False
) -> Array:
    """Values of an ONNX dtype; `special`: not only ordinary ones."""
    if kind == TensorProto.BOOL:
        return np.asarray(rng.integers(0, 2, dims) == 1)
    dtype = tensor_dtype_to_np_dtype(kind)
    if dtype.kind in "iu":
        return rng.integers(0, 5, dims).astype(dtype)
    values = rng.standard_normal(dims)
    if special:
        values = np.where(rng.random(dims) < 0.3, rng.choice(SPECIAL, dims), values)
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(dtype)


def assert_same(
    expected: Sequence[Any], found: Sequence[Any], guarantee: Guarantee = "bitwise"
) -> None:
    """Equal by == with NaN in the same places; `equivalent` allows for rounding."""
    assert len(expected) == len(found)
    for left, right in zip(expected, found, strict=True):
        if isinstance(left, list):
            assert_same(left, right, guarantee)
            continue
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        if guarantee == "bitwise" or left.dtype.kind not in "fV":
            np.testing.assert_array_equal(left, right)
        else:
            _assert_close(left.astype(np.float64), right.astype(np.float64), left.dtype)


def _assert_close(left: Array, right: Array, dtype: np.dtype[Any]) -> None:
    finite = np.isfinite(left)
    np.testing.assert_array_equal(finite, np.isfinite(right))
    np.testing.assert_array_equal(left[~finite], right[~finite])
    scale = np.abs(left[finite]).max(initial=0.0)
    tolerance = {"float16": 4e-3, "bfloat16": 3e-2}.get(str(dtype), 1e-5)
    np.testing.assert_allclose(left[finite], right[finite], 0, tolerance * scale)


# ---- putting a graph into other scopes ----


def own_inputs(graph: GraphProto) -> list[onnx.ValueInfoProto]:
    """The inputs of a graph that are no initializers."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def in_branches(source: ModelProto) -> ModelProto:
    """The graph of `source` in both branches of an If, with the same names in each.

    One more output keeps the branches from being the same altogether.
    """
    model, graph = _outer(source)
    graph.input.append(make_tensor_value_info("cond__", TensorProto.BOOL, []))
    branches = {}
    for label, op_type in (("then_branch", "Not"), ("else_branch", "Xor")):
        branch = branches[label] = GraphProto()
        branch.CopyFrom(source.graph)
        del branch.input[:]
        inputs = ["cond__"] * (1 if op_type == "Not" else 2)
        branch.node.append(make_node(op_type, inputs, ["which__"]))
        branch.output.append(make_tensor_value_info("which__", TensorProto.BOOL, []))
    names = [f"{value.name}__" for value in source.graph.output]
    node = make_node("If", ["cond__"], [*names, "which_out__"], **branches)
    _finish(graph, source, [node], names, None)
    graph.output.append(make_tensor_value_info("which_out__", TensorProto.BOOL, []))
    return model


def in_loop(source: ModelProto) -> ModelProto:
    """The graph of `source` in the body of a Loop of two rounds, outputs stacked."""
    model, graph = _outer(source)
    body = GraphProto()
    body.CopyFrom(source.graph)
    del body.input[:]
    body.input.append(make_tensor_value_info("iter__", TensorProto.INT64, []))
    body.input.append(make_tensor_value_info("go__", TensorProto.BOOL, []))
    body.input.append(make_tensor_value_info("state__", TensorProto.BOOL, []))
    body.node.append(make_node("Not", ["state__"], ["go_on__"]))
    body.node.append(make_node("Not", ["go__"], ["new_state__"]))
    body.output.insert(0, make_tensor_value_info("go_on__", TensorProto.BOOL, []))
    body.output.insert(1, make_tensor_value_info("new_state__", TensorProto.BOOL, []))
    graph.initializer.append(from_array(np.array(2, np.int64), "trips__"))
    graph.initializer.append(from_array(np.array(True), "start__"))
    graph.initializer.append(from_array(np.array(False), "state0__"))
    names = [f"{value.name}__" for value in source.graph.output]
    inputs = ["trips__", "start__", "state0__"]
    node = make_node("Loop", inputs, ["state_out__", *names], body=body)
    _finish(graph, source, [node], names, 2)
    return model


def in_function(source: ModelProto) -> ModelProto:
    """The graph of `source` as a local function that is called twice."""
    model, graph = _outer(source)
    inputs = [value.name for value in own_inputs(source.graph)]
    outputs = [value.name for value in source.graph.output]
    function = FunctionProto(domain="local", name="wrapped", input=inputs, output=outputs)
    function.opset_import.extend(source.opset_import)
    for tensor in source.graph.initializer:
        function.node.append(make_node("Constant", [], [tensor.name], value=tensor))
    function.node.extend(source.graph.node)
    model.functions.append(function)
    if not any(entry.domain == "local" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("local", 1))
    rounds = [[f"{name}__{i}" for name in outputs] for i in range(2)]
    calls = [make_node("wrapped", inputs, names, domain="local") for names in rounds]
    _finish(graph, source, calls[:1], rounds[0], None)
    graph.node.append(calls[1])
    for value, name in zip(source.graph.output, rounds[1], strict=True):
        graph.output.add().CopyFrom(value)
        graph.output[-1].name = name
    return model


def _outer(source: ModelProto) -> tuple[ModelProto, GraphProto]:
    model = ModelProto()
    model.CopyFrom(source)
    graph = GraphProto(name="outer")
    graph.input.extend(own_inputs(source.graph))
    model.graph.CopyFrom(graph)
    return model, model.graph


def _finish(
    graph: GraphProto,
    source: ModelProto,
    nodes: Iterable[NodeProto],
    names: Sequence[str],
    stacked: int | None,
) -> None:
    graph.node.extend(nodes)
    for value, name in zip(source.graph.output, names, strict=True):
        made = graph.output.add()
        made.name = name
        made.type.tensor_type.elem_type = value.type.tensor_type.elem_type
        if stacked is not None:
            made.type.tensor_type.shape.dim.add().dim_value = stacked
        made.type.tensor_type.shape.dim.extend(value.type.tensor_type.shape.dim)


# ---- tensors that the text form cannot write ----


def retype(proto: ModelProto, name: str, kind: str) -> None:
    """Give initializer or Constant `name` another dtype, with the same values."""
    tensor = find_tensor(proto, name)
    dtype = tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind.upper()))
    tensor.CopyFrom(from_array(to_array(tensor).astype(dtype), tensor.name))


def randomize(proto: ModelProto, name: str) -> None:
    """Fill initializer `name` with ordinary random values."""
    tensor = find_tensor(proto, name)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = random_array(rng, tensor.data_type, tuple(tensor.dims))
    tensor.CopyFrom(from_array(values, tensor.name))


def find_tensor(proto: ModelProto, name: str) -> TensorProto:
    """The initializer, or the value of the Constant node, that is called `name`."""
    for graph in (*graphs(proto), *proto.functions):
        for tensor in graph.initializer if isinstance(graph, GraphProto) else ():
            if tensor.name == name:
                return tensor
        for node in graph.node:
            if node.op_type == "Constant" and name in node.output:
                return node.attribute[0].t
    raise KeyError(name)
