"""Parameters, multiply-accumulates and nodes, against counts by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

from onnxopt import cost, facts
from onnxopt.model import Model
from onnxopt.save import stage

FLOAT = TensorProto.FLOAT
Dims = Sequence[int | str]


def make_proto(
    nodes: Sequence[NodeProto],
    shape: Dims = (1, 3, 8, 8),
    weights: Mapping[str, Dims] | None = None,
    functions: Sequence[FunctionProto] = (),
) -> ModelProto:
    """Nodes from x of `shape` to y, with zero weights of the given dims, and a flag."""
    arrays: dict[str, Any] = {"flag": np.array(True)}
    arrays |= {name: np.zeros(dims, np.float32) for name, dims in (weights or {}).items()}
    graph = helper.make_graph(
        list(nodes),
        "g",
        [make_tensor_value_info("x", FLOAT, shape)],
        [make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions))


def make_model(*arguments: Any) -> Model:
    return Model.open(make_proto(*arguments))


# ---- multiply-accumulates ----

MACS: dict[str, tuple[NodeProto, Dims, dict[str, Dims], int]] = {
    # per output element: input channels of the group x kernel area
    "conv": (
        make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1]),
        (1, 3, 8, 8),
        {"w": (16, 3, 3, 3)},
        (16 * 8 * 8) * (3 * 3 * 3),
    ),
    "conv of stride 2, batch 4": (
        make_node("Conv", ["x", "w", "b"], ["y"], strides=[2, 2]),
        (4, 3, 9, 9),
        {"w": (16, 3, 3, 3), "b": (16,)},
        (4 * 16 * 4 * 4) * (3 * 3 * 3),
    ),
    "depthwise conv": (
        make_node("Conv", ["x", "w"], ["y"], group=6, pads=[1, 1, 1, 1]),
        (1, 6, 8, 8),
        {"w": (6, 1, 3, 3)},
        (6 * 8 * 8) * (3 * 3),
    ),
    "conv in 1 dimension": (
        make_node("Conv", ["x", "w"], ["y"]),
        (1, 3, 10),
        {"w": (5, 3, 4)},
        (5 * 7) * (3 * 4),
    ),
    # per input element: output channels of the group x kernel area
    "transposed conv": (
        make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], group=2),
        (1, 4, 5, 5),
        {"w": (4, 3, 2, 2)},
        (4 * 5 * 5) * (3 * 2 * 2),
    ),
    "matmul": (
        make_node("MatMul", ["x", "w"], ["y"]),
        (7, 5),
        {"w": (5, 3)},
        7 * 5 * 3,
    ),
    "matmul of a batch": (
        make_node("MatMul", ["x", "w"], ["y"]),
        (2, 6, 7, 5),
        {"w": (5, 3)},
        2 * 6 * 7 * 5 * 3,
    ),
    "matmul of a vector": (
        make_node("MatMul", ["x", "w"], ["y"]),
        (5,),
        {"w": (5, 3)},
        15,
    ),
    "dot product": (make_node("MatMul", ["x", "w"], ["y"]), (5,), {"w": (5,)}, 5),
    "gemm": (
        make_node("Gemm", ["x", "w", "b"], ["y"]),
        (7, 5),
        {"w": (5, 3), "b": (3,)},
        7 * 5 * 3,
    ),
    "gemm, both transposed": (
        make_node("Gemm", ["x", "w"], ["y"], transA=1, transB=1),
        (5, 7),
        {"w": (3, 5)},
        7 * 5 * 3,
    ),
    "what is no product": (make_node("Relu", ["x"], ["y"]), (7, 5), {}, 0),
    "no elements": (make_node("MatMul", ["x", "w"], ["y"]), (0, 5), {"w": (5, 3)}, 0),
    "symbolic dims count as 1": (
        make_node("Conv", ["x", "w"], ["y"]),
        ("N", 3, 8, 8),
        {"w": (16, 3, 1, 1)},
        (16 * 8 * 8) * 3,
    ),
}


@pytest.mark.parametrize("name", MACS)
def test_macs_of_one_operator(name: str) -> None:
    node, shape, weights, expected = MACS[name]
    assert cost.macs(make_model([node], shape, weights)) == expected


def test_macs_of_integer_products() -> None:
    graph = helper.make_graph(
        [make_node("MatMulInteger", ["x", "x"], ["y"])],
        "g",
        [make_tensor_value_info("x", TensorProto.UINT8, [4, 4])],
        [make_tensor_value_info("y", TensorProto.INT32, None)],
    )
    assert cost.macs(Model.open(helper.make_model(graph))) == 4 * 4 * 4


def test_macs_of_linear_quantized_operators() -> None:
    scale = numpy_helper.from_array(np.float32(1), "s")
    zero = numpy_helper.from_array(np.uint8(0), "z")
    weight = numpy_helper.from_array(np.zeros((2, 3, 1, 1), np.uint8), "w")
    conv = make_node(
        "QLinearConv", ["x", "s", "z", "w", "s", "z", "s", "z"], ["y"], name="conv"
    )
    graph = helper.make_graph(
        [conv],
        "g",
        [make_tensor_value_info("x", TensorProto.UINT8, [1, 3, 4, 4])],
        [make_tensor_value_info("y", TensorProto.UINT8, None)],
        [scale, zero, weight],
    )
    model = Model.open(helper.make_model(graph))
    assert cost.macs(model) == (2 * 4 * 4) * 3
    assert cost.parameters(model) == 2 * 3


def test_macs_add_up_over_branches() -> None:
    def branch(name: str, weight: str) -> onnx.GraphProto:
        nodes = [make_node("MatMul", ["x", weight], [name])]
        return helper.make_graph(
            nodes, name, [], [make_tensor_value_info(name, FLOAT, None)]
        )

    choose = make_node(
        "If", ["flag"], ["y"], then_branch=branch("a", "w"), else_branch=branch("b", "v")
    )
    model = make_model([choose], (2, 4), {"w": (4, 8), "v": (4, 16)})
    assert cost.macs(model) == 2 * 4 * 8 + 2 * 4 * 16


def test_macs_are_unknown_where_a_shape_is() -> None:
    nodes = [
        make_node("Odd", ["x"], ["o"], domain="local"),
        make_node("MatMul", ["o", "w"], ["y"]),
    ]
    assert cost.macs(make_model(nodes, (7, 5), {"w": (5, 3)})) is None


def local_function(op_type: str) -> FunctionProto:
    nodes = [make_node(op_type, ["a", "c"], ["b"]), make_node("Relu", ["b"], ["d"])]
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_function("local", "f", ["a", "c"], ["d"], nodes, opsets)


def test_macs_are_unknown_where_a_function_has_products() -> None:
    call = make_node("f", ["x", "w"], ["y"], domain="local")
    weights: dict[str, Dims] = {"w": (5, 3)}
    with_product = make_model([call], (7, 5), weights, [local_function("MatMul")])
    without = make_model([call], (7, 5), weights, [local_function("Add")])
    assert cost.macs(with_product) is None
    assert cost.macs(without) == 0


def test_macs_of_weights_outside(tmp_path: Path) -> None:
    node, shape, weights, expected = MACS["conv"]
    onnx.save(
        make_proto([node], shape, weights),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    model = Model.open(tmp_path / "m.onnx")
    assert cost.macs(model) == expected
    assert cost.parameters(model) == 16 * 3 * 3 * 3 + 1  # the flag


# ---- parameters ----


def test_parameters_are_initializers_and_constants_of_all_scopes() -> None:
    inner = helper.make_graph(
        [
            make_node("Constant", [], ["k"], value_floats=[1.0, 2.0, 3.0]),
            make_node("Add", ["v", "k"], ["t"]),
        ],
        "inner",
        [],
        [make_tensor_value_info("t", FLOAT, None)],
        [numpy_helper.from_array(np.zeros(3, np.float32), "v")],
    )
    nodes = [
        make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros((2, 2)))),
        make_node("Constant", [], ["one"], value_int=1),
        make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner),
    ]
    model = make_model(nodes, (1,), {"w": (10, 10), "scalar": (), "empty": (0, 4)})
    expected = (100 + 1 + 0) + (4 + 1) + 1 + 2 * (3 + 3)
    assert cost.parameters(model) == expected


def test_scales_and_zero_points_are_no_parameters() -> None:
    scale = numpy_helper.from_array(np.ones(4, np.float32), "s")
    zero = numpy_helper.from_array(np.zeros(4, np.int8), "z")
    weight = numpy_helper.from_array(np.zeros((4, 5), np.int8), "w")
    nodes = [
        make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0),
        make_node("MatMul", ["x", "d"], ["y"]),
    ]
    proto = make_proto(nodes, (3, 4))
    del proto.graph.initializer[:]
    proto.graph.initializer.extend([scale, zero, weight])
    assert cost.parameters(Model.open(proto)) == 20
    proto.graph.node.append(make_node("Neg", ["s"], ["also_read"]))
    assert cost.parameters(Model.open(proto)) == 24  # read by others: it is a weight


def test_parameters_of_packed_types_are_elements() -> None:
    array = np.zeros((3, 5), helper.tensor_dtype_to_np_dtype(TensorProto.INT4))
    proto = make_proto([make_node("Identity", ["x"], ["y"])], (1,))
    proto.graph.initializer.append(numpy_helper.from_array(array, "w"))
    assert cost.parameters(Model.open(proto)) == 15 + 1


# ---- nodes ----


def test_nodes_of_all_scopes_count_once_each() -> None:
    inner = helper.make_graph(
        [make_node("Neg", ["x"], ["n"]), make_node("Abs", ["n"], ["t"])],
        "inner",
        [],
        [make_tensor_value_info("t", FLOAT, None)],
    )
    nodes = [
        make_node("If", ["flag"], ["i"], then_branch=inner, else_branch=inner),
        make_node("f", ["i", "i"], ["g"], domain="local"),
        make_node("f", ["g", "g"], ["y"], domain="local"),
    ]
    model = make_model(nodes, (1,), {}, [local_function("Add")])
    assert cost.nodes(model) == 3 + 2 * 2 + 2


# ---- the facts of a file ----


def test_the_facts_of_a_file_are_measured_on_it(tmp_path: Path) -> None:
    node, shape, weights, expected = MACS["conv"]
    proto = make_proto([node], shape, weights)
    options: dict[str, Any] = {"save_as_external_data": True, "location": "w.bin"}
    onnx.save(proto, tmp_path / "m.onnx", size_threshold=0, **options)
    path = tmp_path / "m.onnx"
    side = facts.of_file(Model.open(path), path)
    assert side.bytes.model == path.stat().st_size
    assert side.bytes.data == (tmp_path / "w.bin").stat().st_size
    assert side.nodes == 1
    assert side.macs == expected
    assert side.opset == {"ai.onnx": 18, "local": 1}
    with stage(Model.open(path), tmp_path / "out.onnx") as staged:
        made = Model.open(staged.path)
        of_staged = facts.of_staged(made, staged)
        assert of_staged == facts.of_file(made, staged.path)
        staged.commit()
    assert ModelProto.FromString((tmp_path / "out.onnx").read_bytes()).graph.node
