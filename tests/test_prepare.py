"""Changes that the user asks for: inputs frozen, shapes fixed, the opset raised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info
from test_fidelity import FEATURES, base, difference, serialized

import onnxopt
from onnxopt import prepare
from onnxopt.errors import UsageError
from onnxopt.model import Model
from onnxopt.save import stage, to_proto

ort: Any = pytest.importorskip("onnxruntime")
Array = NDArray[Any]
FLOAT = TensorProto.FLOAT


def run(model: ModelProto | Path, feed: Mapping[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = model.SerializeToString() if isinstance(model, ModelProto) else model
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feed)))


def make_model(
    nodes: Sequence[NodeProto],
    outputs: Sequence[str] = ("y",),
    weights: Mapping[str, Array] | None = None,
    opset: int = 17,
    ir: int = 8,
    functions: Sequence[FunctionProto] = (),
) -> ModelProto:
    """Nodes over input x of shape [N, 3, 4]; weights are not inputs."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [make_tensor_value_info("x", FLOAT, ["N", 3, 4])],
        [make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    domains = sorted({node.domain for node in nodes} - {""})
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid(domain, 1) for domain in domains]
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=ir, functions=list(functions)
    )


def x(seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {"x": random.standard_normal((2, 3, 4)).astype(np.float32)}


def assert_equal(found: Sequence[Array], expected: Sequence[Array]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


# ---- frozen inputs ----


def with_default(ir: int = 8) -> ModelProto:
    """y = x + w, where w has a default that the caller may override."""
    weight = np.full(4, 2, np.float32)
    model = make_model(
        [make_node("Add", ["x", "w"], ["y"])], weights={"w": weight}, ir=ir
    )
    model.graph.input.insert(0, make_tensor_value_info("w", FLOAT, [4]))
    return model


def test_frozen_inputs_are_no_inputs_any_more() -> None:
    source = with_default()
    model = prepare.freeze_inputs(Model.open(source))
    made = to_proto(model)
    assert [value.name for value in made.graph.input] == ["x"]
    assert model.main.weight("w") is not None
    assert_equal(run(made, x()), run(source, x()))
    assert model.notes == ["inputs with defaults are constants now: w"]


def test_only_the_inputs_change_when_they_are_frozen() -> None:
    made = to_proto(prepare.freeze_inputs(Model.open(with_default())))
    expected = with_default()
    del expected.graph.input[0]
    assert serialized(made) == serialized(expected)


def test_nothing_to_freeze_is_no_change() -> None:
    for source in (base(), with_default(ir=3)):
        model = Model.open(source)
        assert prepare.freeze_inputs(model) is model
        assert serialized(to_proto(model)) == serialized(source)


def test_frozen_inputs_can_be_folded() -> None:
    source = make_model(
        [make_node("Neg", ["w"], ["n"]), make_node("Add", ["x", "n"], ["y"])],
        weights={"w": np.ones(4, np.float32)},
    )
    source.graph.input.append(make_tensor_value_info("w", FLOAT, [4]))
    kept = onnxopt.optimize(source, validate=False)
    frozen = onnxopt.optimize(source, validate=False, freeze_inputs=True)
    assert [node.op_type for node in kept.model.graph.node] == ["Neg", "Add"]
    assert [node.op_type for node in frozen.model.graph.node] == ["Add"]
    assert any("constants now: w" in note for note in frozen.report.notes)


# ---- fixed shapes ----


def dims_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]


def symbolic() -> ModelProto:
    """Inputs, an output and a value that share the symbol N."""
    model = make_model(
        [make_node("Add", ["x", "z"], ["s"]), make_node("Relu", ["s"], ["y"])]
    )
    graph = model.graph
    graph.input.append(make_tensor_value_info("z", FLOAT, ["N", "M", 4]))
    graph.value_info.append(make_tensor_value_info("s", FLOAT, ["N", 3, 4]))
    graph.output[0].CopyFrom(make_tensor_value_info("y", FLOAT, ["N", "K", 4]))
    return model


def test_fixed_dims_reach_what_shares_their_symbol() -> None:
    model = prepare.fix_shapes(Model.open(symbolic()), {"x": [5, 3, 4]})
    graph = to_proto(model).graph
    assert [dims_of(value) for value in graph.input] == [[5, 3, 4], [5, "M", 4]]
    assert dims_of(graph.output[0]) == [5, "K", 4]
    assert dims_of(graph.value_info[0]) == [5, 3, 4]
    assert model.main.shape("x") == (5, 3, 4)
    assert model.notes == ["input shapes are fixed in the file: x:[5, 3, 4]"]


def test_fixing_changes_nothing_else() -> None:
    source = base()
    for add in FEATURES.values():
        add(source)
    made = to_proto(prepare.fix_shapes(Model.open(source), {"x": [7, 2000]}))
    expected = ModelProto.FromString(source.SerializeToString())
    for value in (
        *expected.graph.input,
        *expected.graph.output,
        *expected.graph.value_info,
    ):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "N":
                dim.dim_value = 7
    assert serialized(made) == serialized(expected), difference(made, expected)


def test_a_dim_of_minus_one_is_open() -> None:
    """So careless exporters write it, and ONNX Runtime reads it."""
    source = symbolic()
    source.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    made = to_proto(prepare.fix_shapes(Model.open(source), {"x": [5, 3, 4]}))
    assert dims_of(made.graph.input[0]) == [5, 3, 4]


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ({"q": [1]}, "no input 'q'; there are x, z"),
        ({"x": [5, 3]}, "input 'x' does not have 2 dims"),
        ({"x": [5, 2, 4]}, "input 'x': a dim is 3 in the model, not 2"),
        ({"x": [5, 3, 4], "z": [6, 3, 4]}, "dim 'N' cannot be two sizes at once"),
    ],
)
def test_shapes_that_do_not_fit(shapes: dict[str, list[int]], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        prepare.fix_shapes(Model.open(symbolic()), shapes)


def test_what_came_in_stays_as_it_is() -> None:
    source = symbolic()
    onnxopt.optimize(source, validate=False, fix_shapes={"x": [5, 3, 4]}, opset=18)
    assert serialized(source) == serialized(symbolic())


# ---- the opset ----


def raised(source: ModelProto, version: int) -> ModelProto:
    return to_proto(prepare.raise_opset(Model.open(source), version))


def branch(name: str, op_type: str) -> onnx.GraphProto:
    nodes = [make_node(op_type, ["x"], [name], axes=[1], doc_string=f"about {name}")]
    output = make_tensor_value_info(name, FLOAT, None)
    return helper.make_graph(nodes, f"graph of {name}", [], [output], doc_string="doc")


SCALES = np.array([1, 1, 2], np.float32)
CHANGED: dict[str, tuple[list[NodeProto], dict[str, Array], int, int, int]] = {
    # operators that are others in the newer opset: nodes, weights, IR, from, to
    "axes": ([make_node("ReduceSum", ["x"], ["y"], axes=[1])], {}, 6, 11, 17),
    "reduce_max": ([make_node("ReduceMax", ["x"], ["y"], axes=[1])], {}, 8, 17, 18),
    "clip": ([make_node("Clip", ["x"], ["y"], min=-0.5, max=0.5)], {}, 3, 6, 13),
    "pad": ([make_node("Pad", ["x"], ["y"], pads=[0, 0, 1, 0, 0, 1])], {}, 3, 9, 13),
    "softmax": ([make_node("Softmax", ["x"], ["y"], axis=1)], {}, 6, 11, 13),
    "upsample": ([make_node("Upsample", ["x", "s"], ["y"])], {"s": SCALES}, 4, 9, 13),
    "slice": (
        [make_node("Slice", ["x"], ["y"], axes=[1], starts=[0], ends=[2])],
        {},
        4,
        9,
        13,
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_operators_that_change_still_compute_the_same(name: str) -> None:
    nodes, weights, ir, old, new = CHANGED[name]
    source = make_model(nodes, weights=weights, opset=old, ir=ir)
    made = raised(source, new)
    assert {entry.domain: entry.version for entry in made.opset_import} == {"": new}
    assert made.ir_version >= ir
    assert_equal(run(made, x()), run(source, x()))


def test_what_the_converter_adds_takes_no_name_that_is_taken() -> None:
    node = make_node("Softmax", ["x"], ["y"], name="soft", axis=1)
    made = raised(make_model([node], opset=11), 13)
    names = [node.name for node in made.graph.node if node.name]
    assert len(names) > 1
    assert len(set(names)) == len(names)
    assert "soft" in names
    assert_equal(run(made, x()), run(make_model([node], opset=11), x()))


def test_what_a_changed_operator_is_called_and_told_stays() -> None:
    node = make_node("ReduceSum", ["x"], ["y"], name="sum", axes=[1], doc_string="doc")
    node.metadata_props.add(key="k", value="v")
    made = raised(make_model([node], opset=11), 17).graph.node[-1]
    assert (made.op_type, made.name, made.doc_string) == ("ReduceSum", "sum", "doc")
    assert [(entry.key, entry.value) for entry in made.metadata_props] == [("k", "v")]
    assert len(made.input) == 2


def test_branches_are_raised_too_and_keep_what_is_told_of_them() -> None:
    condition = numpy_helper.from_array(np.array(True), "c")
    source = make_model(
        [
            make_node(
                "If",
                ["c"],
                ["y"],
                then_branch=branch("a", "ReduceSum"),
                else_branch=branch("b", "ReduceMax"),
            )
        ],
        opset=11,
    )
    source.graph.initializer.append(condition)
    made = raised(source, 18)
    assert_equal(run(made, x()), run(source, x()))
    for attribute in made.graph.node[-1].attribute:
        assert attribute.g.doc_string == "doc"
        assert attribute.g.node[-1].doc_string.startswith("about ")


SPARSE = ("attributes_of_every_type", "constants_with_sparse_values")
CANNOT = {*SPARSE, "sparse_initializers"}
"""onnx's converter refuses sparse tensors."""


def at(model: ModelProto, version: int) -> ModelProto:
    for holder in (model, *model.functions):
        for entry in holder.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = version
    return model


@pytest.mark.parametrize("name", FEATURES)
def test_what_does_not_change_survives_to_the_byte(name: str) -> None:
    source = base()
    FEATURES[name](source)
    source = at(source, 14)
    if name in CANNOT:
        with pytest.raises(UsageError, match="onnx cannot convert opset 14 to 18"):
            raised(source, 18)
        return
    made = raised(source, 18)
    expected = at(source, 18)
    assert serialized(made) == serialized(expected), difference(made, expected)


def test_weights_outside_stay_outside(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).standard_normal((4, 2000)).astype(np.float32)
    nodes = [
        make_node("ReduceSum", ["x"], ["s"], axes=[1], keepdims=0),
        make_node("MatMul", ["s", "w"], ["y"]),
    ]
    source = make_model(nodes, weights={"w": weight}, opset=11)
    expected = run(source, x())
    onnx.save(source, tmp_path / "in.onnx", save_as_external_data=True, location="w.bin")
    model = prepare.raise_opset(Model.open(tmp_path / "in.onnx"), 17)
    assert model.proto.ByteSize() < 2000
    (tmp_path / "out").mkdir()
    with stage(model, tmp_path / "out" / "m.onnx") as staged:
        staged.commit()
    assert len(list((tmp_path / "out").glob("*.data"))) == 1
    assert_equal(run(tmp_path / "out" / "m.onnx", x()), expected)


def test_large_constants_keep_their_payload() -> None:
    values = numpy_helper.from_array(np.arange(2000, dtype=np.float32).reshape(4, 500))
    nodes = [
        make_node("Constant", [], ["w"], value=values),
        make_node("ReduceSum", ["x"], ["s"], axes=[1], keepdims=0),
        make_node("MatMul", ["s", "w"], ["y"]),
    ]
    source = make_model(nodes, opset=11)
    assert Model.open(source).proto.ByteSize() < 2000
    assert_equal(run(raised(source, 17), x()), run(source, x()))


def function_of(op_type: str, **attributes: Any) -> FunctionProto:
    return helper.make_function(
        "local",
        "f",
        ["a"],
        ["b"],
        [make_node(op_type, ["a"], ["b"], **attributes)],
        [helper.make_opsetid("", 11)],
    )


def calling(function: FunctionProto) -> ModelProto:
    call = make_node("f", ["x"], ["y"], domain="local")
    return make_model([call], opset=11, functions=[function])


def test_functions_come_along_where_their_operators_stay_the_same() -> None:
    source = calling(function_of("Elu", alpha=0.5))
    made = raised(source, 17)
    assert made.functions[0].opset_import[0].version == 17
    assert_equal(run(made, x()), run(source, x()))


def test_functions_whose_operators_change_are_refused() -> None:
    """onnx's converter drops functions, and ONNX Runtime takes one opset for all."""
    source = calling(function_of("ReduceSum", axes=[1]))
    with pytest.raises(UsageError, match="ReduceSum in function local::f is another"):
        raised(source, 17)


def test_opsets_that_cannot_be() -> None:
    model = Model.open(make_model([make_node("Relu", ["x"], ["y"])], opset=17))
    assert prepare.raise_opset(model, 17) is model
    with pytest.raises(UsageError, match="can only raise it"):
        prepare.raise_opset(model, 16)
    with pytest.raises(UsageError, match="onnx cannot convert opset 17 to 9999"):
        prepare.raise_opset(model, 9999)


def test_the_report_tells_of_a_raised_opset() -> None:
    source = make_model([make_node("ReduceSum", ["x"], ["y"], axes=[1])], opset=11)
    result = onnxopt.optimize(source, passes="", opset=17, validate=False)
    assert result.report.notes == ["opset 11 became 17"]
    assert result.report.source.opset == {"ai.onnx": 11}
    assert result.report.output is not None
    assert result.report.output.opset == {"ai.onnx": 17}
