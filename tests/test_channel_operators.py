"""Recurrent, quantized, grouped and rearranging operators: what goes, and what stays.

Each model is built with masks that the test chose, so that it knows the size that every
weight must have afterwards; numbers are those of ONNX Runtime, as the file says it, on
feeds of several sizes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import from_array
from onnx.reference import ReferenceEvaluator

from onnxopt.manager import Context, PassManager
from onnxopt.model import Model
from onnxopt.recipe import parse_pipeline
from tests import support
from tests.support import Array

PIPELINE = "zero-channels"
SIZES = (2, 1, 5)
Dims = Sequence[int | str]


class Net:
    """A model while it grows: weights by name, nodes in order."""

    def __init__(self, opset: int = 17, **inputs: Dims) -> None:
        self.opset, self.inputs = opset, inputs
        self.kinds: dict[str, int] = {}
        self.weights: dict[str, Array] = {}
        self.nodes: list[NodeProto] = []

    def random(self, name: str, *dims: int) -> Array:
        """Ordinary values, different ones for each name."""
        return rng(name).standard_normal(dims).astype(np.float32)

    def weight(self, name: str, array: Any) -> str:
        """A weight."""
        array = np.asarray(array)
        self.weights[name] = array.astype(np.float32) if array.dtype == float else array
        return name

    def add(
        self, op_type: str, inputs: str, outputs: str = "y", domain: str = "", **more: Any
    ) -> None:
        """A node; names are separated by spaces, `_` stands for an absent one."""
        read, made = (
            ["" if name == "_" else name for name in names.split()]
            for names in (inputs, outputs)
        )
        self.nodes.append(helper.make_node(op_type, read, made, domain=domain, **more))

    def model(self, kind: int = TensorProto.FLOAT, **ranks: int) -> ModelProto:
        """The model; the ranks of its outputs, 3 for y, are all that is said of them."""
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "main",
            [
                value(name, self.kinds.get(name, TensorProto.FLOAT), dims)
                for name, dims in self.inputs.items()
            ],
            [
                value(name, kind, [None] * rank)
                for name, rank in (ranks or {"y": 3}).items()
            ],
            [from_array(array, name) for name, array in self.weights.items()],
        )
        domains = {node.domain for node in self.nodes} - {""}
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(domain, 1) for domain in sorted(domains)]
        made = helper.make_model(graph, ir_version=8, opset_imports=imports)
        return made


def rng(name: str, number: int = 0) -> np.random.Generator:
    return np.random.default_rng([number, zlib.crc32(name.encode())])


@pytest.fixture
def shrink(context: Context) -> Callable[..., Model]:
    """Shrinks a model, verified node by node; compares numbers; a second run is idle."""

    def call(source: ModelProto, pipeline: str = PIPELINE) -> Model:
        model = support.run_passes(source, pipeline, context)
        made = support.final(model)
        check_numbers(source, made)
        again = support.run_passes(made, pipeline, context)
        assert again.ledger.edits == 0
        return model

    return call


def check_numbers(source: ModelProto, made: ModelProto) -> None:
    """The same interface, and equal but for rounding on feeds of several sizes."""
    for field in ("input", "output"):
        assert list(getattr(made.graph, field)) == list(getattr(source.graph, field))
    if made.opset_import[0].version != 18:  # deprecated, but it runs
        onnx.checker.check_model(made)
    for number, size in enumerate(SIZES):
        feed = {}
        for value in support.own_inputs(source.graph):
            tensor = value.type.tensor_type
            dims = [dim.dim_value or size for dim in tensor.shape.dim]
            kind = tensor.elem_type
            feed[value.name] = support.random_array(rng(value.name, number), kind, dims)
        expected = support.run(source, feed)
        support.assert_same(expected, support.run(made, feed), "equivalent")
        assert all(np.isfinite(array.astype(float)).all() for array in expected)


def dims(model: Model) -> dict[str, list[int]]:
    """The dims of every weight."""
    return {tensor.name: list(tensor.dims) for tensor in model.proto.graph.initializer}


def attribute(model: Model, op_type: str, name: str) -> Any:
    """An attribute of the first node of an operator."""
    node = next(n for n in model.main.nodes() if n.op_type == op_type)
    found = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return found.get(name)


# ---- LSTM, GRU, RNN ----

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
CANDIDATE = {"LSTM": 3, "GRU": 2, "RNN": 0}
HIDDEN = 6


def recurrent(
    op_type: str,
    dead: Sequence[Sequence[int]],
    features: int = 5,
    hidden: int = HIDDEN,
    **more: Any,
) -> Net:
    """X [steps, batch, features] and weights W, R, B of which `dead` units are zero.

    Only the rows of the candidate gate are zero: the other gates do what they want.
    """
    net = Net(x=("T", "N", features))
    gates, ways = GATES[op_type], len(dead)
    net.weight("W", net.random("W", ways, gates, hidden, features))
    net.weight("R", net.random("R", ways, gates, hidden, hidden))
    net.weight("B", net.random("B", ways, 2, gates, hidden))
    for way, units in enumerate(dead):
        rows = list(units)
        net.weights["W"][way, CANDIDATE[op_type], rows] = 0
        net.weights["R"][way, CANDIDATE[op_type], rows] = 0
        net.weights["B"][way, :, CANDIDATE[op_type], rows] = 0
    net.weights["W"].shape = (ways, gates * hidden, features)
    net.weights["R"].shape = (ways, gates * hidden, hidden)
    net.weights["B"].shape = (ways, 2 * gates * hidden)
    inputs = more.pop("inputs", "x W R B")
    outputs = more.pop("outputs", "Y")
    if ways == 2:
        more["direction"] = "bidirectional"
    net.add(op_type, inputs, outputs, hidden_size=hidden, **more)
    return net


def read_all(net: Net, ways: int, hidden: int = HIDDEN) -> Net:
    """What exporters write behind it, and a layer that reads every unit."""
    net.add("Transpose", "Y", "t", perm=[0, 2, 1, 3])
    net.weight("flat", np.array([0, 0, -1]))
    net.add("Reshape", "t flat", "f")
    net.weight("V", net.random("V", ways * hidden, 3))
    net.add("MatMul", "f V")
    return net


def check_units(
    model: Model, op_type: str, ways: int, left: int, features: int = 5
) -> None:
    gates, found = GATES[op_type], dims(model)
    assert found["W"] == [ways, gates * left, features]
    assert found["R"] == [ways, gates * left, left]
    assert found["B"] == [ways, 2 * gates * left]
    assert attribute(model, op_type, "hidden_size") == left


@pytest.mark.parametrize("op_type", GATES)
@pytest.mark.parametrize("ways", [1, 2])
def test_units_go(op_type: str, ways: int, shrink: Callable[..., Model]) -> None:
    """Different ones of each direction."""
    source = read_all(recurrent(op_type, [(1, 4), (0, 5)][:ways]), ways).model()
    model = shrink(source)
    check_units(model, op_type, ways, HIDDEN - 2)
    assert dims(model)["V"] == [ways * (HIDDEN - 2), 3]


def test_directions_lose_equally_many(shrink: Callable[..., Model]) -> None:
    """Two of one and one of the other: one of each goes."""
    model = shrink(read_all(recurrent("GRU", [(1, 4), (2,)]), 2).model())
    check_units(model, "GRU", 2, HIDDEN - 1)


@pytest.mark.parametrize("op_type", GATES)
def test_a_direction_goes(op_type: str, shrink: Callable[..., Model]) -> None:
    """All units of the first: what is left runs in reverse."""
    model = shrink(read_all(recurrent(op_type, [range(HIDDEN), (3,)]), 2).model())
    check_units(model, op_type, 1, HIDDEN - 1)
    assert attribute(model, op_type, "direction") == b"reverse"


def test_listed_activations_keep_both_directions(shrink: Callable[..., Model]) -> None:
    """They are listed by direction."""
    names = ["Tanh", "Relu"]
    net = recurrent("RNN", [range(HIDDEN), (3,)], activations=names)
    check_units(shrink(read_all(net, 2).model()), "RNN", 2, HIDDEN - 1)


@pytest.mark.parametrize("bad", ["Sigmoid", "HardSigmoid", "Affine", "Softplus"])
@pytest.mark.parametrize("op_type", GATES)
def test_activations_that_lift_zero(
    op_type: str, bad: str, shrink: Callable[..., Model]
) -> None:
    """A candidate of zero is then not zero."""
    names = {"LSTM": ["Sigmoid", bad, "Tanh"], "GRU": ["Sigmoid", bad], "RNN": [bad]}
    more = {"activation_alpha": [0.5], "activation_beta": [0.25]}
    if bad in ("Sigmoid", "Softplus"):
        more = {}
    net = recurrent(op_type, [(1, 4)], activations=names[op_type], **more)
    check_units(shrink(read_all(net, 1).model()), op_type, 1, HIDDEN)


def test_activations_that_keep_zero(shrink: Callable[..., Model]) -> None:
    """Whatever the case they are written in."""
    net = recurrent("LSTM", [(1, 4)], activations=["sigmoid", "Softsign", "RELU"])
    check_units(shrink(read_all(net, 1).model()), "LSTM", 1, HIDDEN - 2)


def test_a_bias_of_the_candidate_keeps_the_unit(shrink: Callable[..., Model]) -> None:
    """Also where the halves add up to zero: behind a reset gate they need not."""
    net = recurrent("GRU", [(1, 4)], linear_before_reset=1)
    bias = net.weights["B"].reshape(2, 3, HIDDEN)
    bias[:, 2, 1] = 0.5, -0.5
    check_units(shrink(read_all(net, 1).model()), "GRU", 1, HIDDEN - 1)


def test_other_gates_do_not_matter(shrink: Callable[..., Model]) -> None:
    """A unit whose gates are zero and whose candidate is not, stays."""
    net = recurrent("LSTM", [()])
    for gate in range(3):
        net.weights["W"][0, gate * HIDDEN] = 0
        net.weights["R"][0, gate * HIDDEN] = 0
    check_units(shrink(read_all(net, 1).model()), "LSTM", 1, HIDDEN)


def test_units_that_read_zero_units_only(shrink: Callable[..., Model]) -> None:
    """The largest set that agrees with itself: 1 reads 4 and itself, 4 reads 1."""
    net = read_all(recurrent("LSTM", [(1, 4)]), 1)
    rows = net.weights["R"].reshape(4, HIDDEN, HIDDEN)[3]
    rows[1, [1, 4]], rows[4, 1] = 0.5, 2
    check_units(shrink(net.model()), "LSTM", 1, HIDDEN - 2)
    rows[4, 0] = 1
    check_units(shrink(net.model()), "LSTM", 1, HIDDEN)


def test_units_that_nothing_reads(shrink: Callable[..., Model]) -> None:
    """Not the layer behind them, nor a unit that matters."""
    net = read_all(recurrent("GRU", [()]), 1)
    net.weights["V"][[0, 3, 5]] = 0
    rows = net.weights["R"].reshape(3, HIDDEN, HIDDEN)
    rows[:, :, [0, 3]] = 0
    rows[:, 0, 3] = 1  # 3 is read by 0 alone, and 5 by others
    check_units(shrink(net.model()), "GRU", 1, HIDDEN - 2)


def test_lengths_and_settings(shrink: Callable[..., Model]) -> None:
    """Steps beyond a length are zero; clip, coupled gates, a reset before the product."""
    for op_type, more in (
        ("LSTM", {"clip": 0.5, "input_forget": 1}),
        ("GRU", {"linear_before_reset": 1}),
        ("GRU", {"clip": 0.5}),
    ):
        net = recurrent(op_type, [(1, 4), (0, 2)], inputs="x W R B lengths", **more)
        net.inputs["x"] = (3, 2, 5)
        net.weight("lengths", np.array([3, 2], np.int32))
        check_units(shrink(read_all(net, 2).model()), op_type, 2, HIDDEN - 2)


@pytest.mark.parametrize("opset", [7, 14, 22])
def test_recurrent_opsets(opset: int, shrink: Callable[..., Model]) -> None:
    """The operator's versions differ in types and layout."""
    net = recurrent("LSTM", [(1, 4)])
    net.opset = opset
    check_units(shrink(read_all(net, 1).model()), "LSTM", 1, HIDDEN - 2)


def test_units_that_are_read_by_way_of_another(shrink: Callable[..., Model]) -> None:
    """The layer reads 1 alone, which reads 3, which reads 0; 5 reads all."""
    net = read_all(recurrent("LSTM", [()]), 1)
    net.weights["V"][[0, 2, 3, 4, 5]] = 0
    rows = net.weights["R"].reshape(4, HIDDEN, HIDDEN)
    rows[:, :5] = 0
    rows[0, 1, 3] = rows[1, 3, 0] = 1
    check_units(shrink(net.model()), "LSTM", 1, 3)


def test_two_units_that_change_places(shrink: Callable[..., Model]) -> None:
    """Each unit is dead in one direction: behind a Transpose their order differs."""
    net = recurrent("RNN", [(0,), (1,)], hidden=2)
    net.add("Transpose", "Y", "t", perm=[0, 2, 3, 1])
    net.weight("flat", np.array([0, 0, -1]))
    net.add("Reshape", "t flat", "f")
    net.weight("V", net.random("V", 4, 3))
    net.add("MatMul", "f V")
    check_units(shrink(net.model()), "RNN", 2, 2)


STATES = {
    "zeros": (np.zeros((1, 1, HIDDEN)), HIDDEN - 2, True),
    "numbers": (np.array([[[1, 0, 2, 3, 0, 4.0]]]), HIDDEN - 2, False),
    "of a dead unit": (np.array([[[1, 0, 2, 3, 0.5, 4]]]), HIDDEN - 1, False),
}


@pytest.mark.parametrize("case", STATES)
def test_initial_states(case: str, shrink: Callable[..., Model]) -> None:
    """Zeros are dropped, numbers sliced; a unit that starts from one stays."""
    state, left, is_dropped = STATES[case]
    net = recurrent("LSTM", [(1, 4)], inputs="x W R B _ h c P")
    net.inputs["x"] = ("T", 1, 5)
    net.weight("h", state)
    net.weight("c", state)
    net.weight("P", net.random("P", 1, 3 * HIDDEN))
    model = shrink(read_all(net, 1).model())
    check_units(model, "LSTM", 1, left)
    assert dims(model)["P"] == [1, 3 * left]
    assert ("h" in dims(model)) != is_dropped
    if not is_dropped:
        assert dims(model)["h"] == dims(model)["c"] == [1, 1, left]


def test_zeros_made_for_the_batch(shrink: Callable[..., Model]) -> None:
    """Zeros of a computed shape are dropped; another value keeps every unit."""
    for value, left in ((0.0, HIDDEN - 2), (1.0, HIDDEN)):
        net = recurrent("LSTM", [(1, 4)], inputs="x W R B _ h h")
        lstm = net.nodes.pop()
        net.weight("one", np.array([1]))
        net.weight("H", np.array([HIDDEN]))
        net.add("Shape", "x", "shape")
        net.add("Gather", "shape one", "n")
        net.add("Concat", "one n H", "size", axis=0)
        tensor = from_array(np.array([value], np.float32))
        net.add("ConstantOfShape", "size", "h", value=tensor)
        net.nodes.append(lstm)
        check_units(shrink(read_all(net, 1).model()), "LSTM", 1, left)


def test_initial_states_of_both_directions(shrink: Callable[..., Model]) -> None:
    """Each loses its own units."""
    net = recurrent("LSTM", [(1, 4), (0, 2)], inputs="x W R B _ h _")
    net.inputs["x"] = ("T", 1, 5)
    state = net.random("h", 2, 1, HIDDEN)
    state[0, 0, [1, 4]] = 0
    state[1, 0, [0, 2]] = 0
    net.weight("h", state)
    model = shrink(read_all(net, 2).model())
    check_units(model, "LSTM", 2, HIDDEN - 2)
    assert dims(model)["h"] == [2, 1, HIDDEN - 2]


def test_an_initial_state_from_outside_stays(shrink: Callable[..., Model]) -> None:
    """It may be anything."""
    net = recurrent("GRU", [(1, 4)], inputs="x W R B _ h")
    net.inputs["h"] = (1, "N", HIDDEN)
    check_units(shrink(read_all(net, 1).model()), "GRU", 1, HIDDEN)


def test_the_last_state_is_an_output(
    shrink: Callable[..., Model], reasons: Callable[..., list[str | None]]
) -> None:
    """Then all units stay, and the reason says so."""
    source = read_all(recurrent("GRU", [(1, 4)], outputs="Y last"), 1).model(y=3, last=3)
    model = shrink(source)
    check_units(model, "GRU", 1, HIDDEN)
    (said,) = [skip.reason for skip in support.skips(model)]
    assert said == "2 dead channels stay: 'last' is an output of the graph"
    assert set(reasons(source, "Y")) == {"'last' is an output of the graph"}


@pytest.mark.parametrize("ways", [1, 2])
def test_the_last_states_go_on(ways: int, shrink: Callable[..., Model]) -> None:
    """Y_h and Y_c, added, into a layer."""
    net = recurrent("LSTM", [(1, 4), (0, 2)][:ways], outputs="_ h c")
    net.add("Add", "h c", "s")
    net.add("Transpose", "s", "t", perm=[1, 0, 2])
    net.weight("flat", np.array([0, -1]))
    net.add("Reshape", "t flat", "f")
    net.weight("V", net.random("V", ways * HIDDEN, 3))
    net.add("Gemm", "f V")
    check_units(shrink(net.model(y=2)), "LSTM", ways, HIDDEN - 2)


def test_features(shrink: Callable[..., Model]) -> None:
    """Zero ones go, constant ones into the bias, unread ones, too."""
    net = Net(x=("T", "N", 4))
    first = net.random("V0", 4, 7)
    first[:, [0, 2, 3]] = 0
    net.weight("V0", first)
    net.weight("b0", [0, 1, 0, 2.5, 1, 1, 1])
    net.add("MatMul", "x V0", "m")
    net.add("Add", "m b0", "a")
    inner = recurrent("LSTM", [(1, 4), (0, 2)], features=7)
    inner.weights["W"][:, :, 5] = 0
    net.weights.update(inner.weights)
    net.nodes += inner.nodes
    net.nodes[-1].input[0] = "a"
    model = shrink(read_all(net, 2).model())
    check_units(model, "LSTM", 2, HIDDEN - 2, 3)
    assert dims(model)["V0"] == [4, 3]


@pytest.mark.parametrize("constant", [0.0, 1.5])
def test_a_missing_bias(constant: float, shrink: Callable[..., Model]) -> None:
    """It is made where a constant feature needs it."""
    net = Net(x=("T", "N", 4))
    first = net.random("V0", 4, 7)
    first[:, 3] = 0
    net.weight("V0", first)
    net.weight("b0", [0, 1, 0, constant, 1, 1, 1])
    net.add("MatMul", "x V0", "m")
    net.add("Add", "m b0", "a")
    inner = recurrent("GRU", [()], features=7, inputs="a W R")
    del inner.weights["B"]
    net.weights.update(inner.weights)
    net.nodes += inner.nodes
    found = dims(shrink(read_all(net, 1).model()))
    assert found["W"] == [1, 3 * HIDDEN, 6]
    assert ([1, 6 * HIDDEN] in found.values()) == (constant != 0)


def test_a_stack(shrink: Callable[..., Model]) -> None:
    """Units of one are features of the next, through Squeeze."""
    net = recurrent("LSTM", [(1, 4)])
    net.weight("one", np.array([1]))
    net.add("Squeeze", "Y one", "s")
    inner = recurrent("GRU", [(0,), (3,)], features=HIDDEN)
    for name in "WRB":
        net.weights[f"{name}2"] = inner.weights[name]
    net.nodes += inner.nodes
    net.nodes[-1].input[:] = ["s", "W2", "R2", "B2"]
    net.nodes[-1].output[:] = ["Y2"]
    read_all(net, 2)
    net.nodes[-3].input[0] = "Y2"
    model = shrink(net.model())
    check_units(model, "LSTM", 1, HIDDEN - 2)
    assert dims(model)["W2"] == [2, 3 * (HIDDEN - 1), HIDDEN - 2]
    assert dims(model)["V"] == [2 * (HIDDEN - 1), 3]


def test_two_that_share_weights(shrink: Callable[..., Model]) -> None:
    """They lose the same, and still share."""
    net = recurrent("RNN", [(1, 4)])
    net.inputs["z"] = ("T", "N", 5)
    net.add("RNN", "z W R B", "Z", hidden_size=HIDDEN)
    net.add("Add", "Y Z", "sum")
    read_all(net, 1)
    net.nodes[-3].input[0] = "sum"
    model = shrink(net.model())
    check_units(model, "RNN", 1, HIDDEN - 2)
    assert len(dims(model)) == 5


def test_units_on_axes_that_something_mixes(shrink: Callable[..., Model]) -> None:
    """A maximum over the directions compares units: only those of both can go."""
    net = recurrent("GRU", [(1, 4), (0, 4)])
    net.add("ReduceMax", "Y", "m", axes=[1], keepdims=0)
    net.weight("V", net.random("V", HIDDEN, 3))
    net.add("MatMul", "m V")
    check_units(shrink(net.model()), "GRU", 2, HIDDEN)


def test_directions_that_change_places(shrink: Callable[..., Model]) -> None:
    """Units before directions: only units of both can go."""
    net = recurrent("GRU", [(1, 4), (0, 4)])
    net.add("Transpose", "Y", "t", perm=[0, 2, 3, 1])
    net.weight("flat", np.array([0, 0, -1]))
    net.add("Reshape", "t flat", "f")
    net.weight("V", net.random("V", 2 * HIDDEN, 3))
    net.add("MatMul", "f V")
    check_units(shrink(net.model()), "GRU", 2, HIDDEN - 1)


@pytest.mark.parametrize("op_type", ["Slice", "Split", "Concat", "Gather"])
def test_steps_are_picked(op_type: str, shrink: Callable[..., Model]) -> None:
    """Along the steps, units of both directions go through."""
    net = recurrent("GRU", [(1, 4), (0, 2)])
    net.inputs["x"] = (4, "N", 5)
    net.weight("i", np.array([3]))
    net.weight("j", np.array([4]))
    net.weight("two", np.array([2, 2]))
    net.weight("zero", np.array([0]))
    match op_type:
        case "Slice":
            net.add("Slice", "Y i j zero", "Z")
        case "Split":
            net.add("Split", "Y two", "Z rest", axis=0)
        case "Concat":
            net.add("Concat", "Y Y", "Z", axis=0)
        case "Gather":
            net.add("Gather", "Y i", "Z", axis=0)
    read_all(net, 2)
    net.nodes[-3].input[0] = "Z"
    check_units(shrink(net.model()), "GRU", 2, HIDDEN - 2)


@pytest.mark.parametrize("literal", [2 * HIDDEN, -1])
def test_literal_sizes(literal: int, shrink: Callable[..., Model]) -> None:
    """The shape that a Reshape is given follows, and what the model declares."""
    net = read_all(recurrent("LSTM", [(1, 4), (0, 2)]), 2)
    net.weights["flat"][2] = literal
    source = net.model()
    source.graph.value_info.append(
        helper.make_tensor_value_info("t", 1, ["T", "N", 2, HIDDEN])
    )
    source.graph.value_info.append(
        helper.make_tensor_value_info("f", 1, ["T", "N", 2 * HIDDEN])
    )
    model = shrink(source)
    check_units(model, "LSTM", 2, HIDDEN - 2)
    for value, size in zip(model.proto.graph.value_info, (4, 8), strict=True):
        assert value.type.tensor_type.shape.dim[-1].dim_value == size


def test_weights_that_are_inputs_stay(reasons: Callable[..., list[str | None]]) -> None:
    """They may be anything."""
    net = recurrent("LSTM", [(1, 4)])
    net.inputs["R"] = net.weights.pop("R").shape
    source = read_all(net, 1).model()
    assert all("not constant" in str(reason) for reason in reasons(source, "Y"))


@pytest.mark.parametrize("constant", [0.0, 0.5])
def test_text_recognizer(constant: float, shrink: Callable[..., Model]) -> None:
    """Convolution, columns of the image as steps, two directions, a layer."""
    net = Net(x=("N", 3, 4, "L"))
    first = net.random("W0", 6, 3, 4, 1)
    first[[0, 2, 3]] = 0
    shift = net.random("b0", 6)
    shift[[0, 2, 3]] = constant
    net.weight("W0", first)
    net.weight("b0", shift)
    net.weight("two", np.array([2]))
    net.add("Conv", "x W0 b0", "c")
    net.add("Relu", "c", "r")
    net.add("Squeeze", "r two", "s")
    net.add("Transpose", "s", "steps", perm=[2, 0, 1])
    inner = recurrent("LSTM", [(1, 4), (0, 2)], features=6)
    net.weights.update(inner.weights)
    net.nodes += inner.nodes
    net.nodes[-1].input[0] = "steps"
    model = shrink(read_all(net, 2).model())
    check_units(model, "LSTM", 2, HIDDEN - 2, 3)
    assert dims(model)["W0"] == [3, 3, 4, 1]


@pytest.mark.parametrize("op_type", ["LSTM", "GRU"])
def test_batch_first(op_type: str, context: Context) -> None:
    """layout = 1, which ONNX Runtime does not run: by ONNX's reference."""
    net = recurrent(op_type, [(1, 4)], layout=1, outputs="Y h")
    net.inputs["x"] = ("N", "T", 5)
    net.weight("two", np.array([2]))
    net.add("Squeeze", "Y two", "s")
    net.add("Add", "s h", "a")
    net.weight("V", net.random("V", HIDDEN, 3))
    net.add("MatMul", "a V")
    source = net.model()
    model = Model.open(source)
    PassManager(parse_pipeline(PIPELINE)).run(model, context)
    check_units(model, op_type, 1, HIDDEN - 2)
    x = net.random("x", 2, 3, 5)
    expected, found = (
        ReferenceEvaluator(proto).run(None, {"x": x})
        for proto in (source, support.final(model))
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(40))
def test_random_cells(seed: int, shrink: Callable[..., Model]) -> None:
    """As many units go as the shorter list of dead ones says, and never all of them."""
    draw = np.random.default_rng(seed)
    op_type = str(draw.choice(list(GATES)))
    ways, hidden = int(draw.integers(1, 3)), int(draw.integers(2, 9))
    dead = [np.flatnonzero(draw.random(hidden) < draw.random()) for _ in range(ways)]
    dead = [units[: hidden - 1] for units in dead]
    net = recurrent(op_type, dead, hidden=hidden)
    gates = GATES[op_type]
    table = net.weights["R"].reshape(ways, gates, hidden, hidden)
    for way, units in enumerate(dead):  # they may read one another
        rows = draw.random((len(units), len(units))).astype(np.float32)
        table[way, CANDIDATE[op_type]][np.ix_(units, units)] = rows
    if draw.random() < 0.5:
        net.opset = 14
    read_all(net, ways, hidden)
    model = shrink(net.model())
    left = hidden - min(len(units) for units in dead)
    check_units(model, op_type, ways, left)
    assert dims(model)["V"] == [ways * left, 3]


# ---- operators between two layers ----


def between(
    channels: int, dead: Sequence[int], *, opset: int = 17, bias: Any = None
) -> Net:
    """t [N, channels, 4, 4], of which `dead` ones are zero, or what `bias` says."""
    net = Net(opset, x=("N", 3, 4, 4))
    first = net.random("W", channels, 3, 1, 1)
    first[list(dead)] = 0
    shift = net.random("b", channels)
    shift[list(dead)] = 0 if bias is None else bias
    net.weight("W", first)
    net.weight("b", shift)
    net.add("Conv", "x W b", "t")
    return net


def close(net: Net, channels: int, name: str = "p") -> ModelProto:
    """A layer that reads all channels of `name`."""
    net.weight("V", net.random("V", 2, channels, 1, 1))
    net.add("Conv", f"{name} V")
    return net.model(y=4)


def check_pair(model: Model, first: int, second: int | None = None) -> None:
    """How many channels are left between the layers."""
    found = dims(model)
    assert found["W"][0] == found["b"][0] == first
    assert found["V"][1] == (first if second is None else second)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode: str, shrink: Callable[..., Model]) -> None:
    """A whole block goes: wherever it lies."""
    block = [3 * place + 1 for place in range(4)] if mode == "DCR" else range(4, 8)
    for dead, left in ((block, 2), (list(block)[:3], 3)):
        net = between(12, dead, bias=0.5)
        net.add("DepthToSpace", "t", "p", blocksize=2, mode=mode)
        check_pair(shrink(close(net, 3)), 4 * left, left)


def test_depth_to_space_of_unlike_constants(shrink: Callable[..., Model]) -> None:
    """Each is constant, but not what is made of them."""
    net = between(12, [4, 5, 6, 7], bias=[0, 0, 0, 1])
    net.add("DepthToSpace", "t", "p", blocksize=2, mode="CRD")
    check_pair(shrink(close(net, 3)), 12, 3)


def test_space_to_depth(shrink: Callable[..., Model]) -> None:
    """A channel goes where all that is made of it can be done without."""
    net = between(3, [1], bias=0.5)
    net.add("SpaceToDepth", "t", "p", blocksize=2)
    check_pair(shrink(close(net, 12)), 2, 8)
    net = between(3, [])
    net.add("SpaceToDepth", "t", "p", blocksize=2)
    close(net, 12)
    net.weights["V"][:, [1, 4, 7, 10]] = 0
    check_pair(shrink(net.model(y=4)), 2, 8)
    net.weights["V"][0, 10] = 1
    check_pair(shrink(net.model(y=4)), 3, 12)


@pytest.mark.parametrize("opset", [7, 9])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_upsample(opset: int, mode: str, shrink: Callable[..., Model]) -> None:
    """The old name of Resize; scales were an attribute first."""
    net = between(4, [1, 3], opset=opset, bias=0.5)
    scales = [1.0, 1.0, 2.0, 2.0]
    if opset == 7:
        net.add("Upsample", "t", "p", mode=mode, scales=scales)
    else:
        net.weight("s", scales)
        net.add("Upsample", "t s", "p", mode=mode)
    check_pair(shrink(close(net, 4)), 2)


@pytest.mark.parametrize("op_type", ["Resize", "Upsample"])
def test_scales_that_mix_channels(op_type: str, shrink: Callable[..., Model]) -> None:
    """Four channels are four by a factor of 1.125, but not the same four."""
    net = between(4, [1, 3], opset=7 if op_type == "Upsample" else 17)
    scales = [1.0, 1.125, 2.0, 2.0]
    if op_type == "Upsample":
        net.add("Upsample", "t", "p", mode="nearest", scales=scales)
    else:
        net.weight("s", scales)
        net.add("Resize", "t _ s", "p", mode="nearest")
    check_pair(shrink(close(net, 4)), 4)


def test_resize_by_computed_sizes(shrink: Callable[..., Model]) -> None:
    """The number of channels stands in a Concat, where it is corrected."""
    net = between(4, [1, 3], bias=0.5)
    net.inputs["x"] = ("N", 3, "H", "H")
    net.weights.update(
        first=np.array([0]), one=np.array([2]), two=np.array([4]), c=np.array([4])
    )
    net.add("Shape", "x", "shape")
    net.add("Gather", "shape first", "n")
    net.add("Slice", "shape one two", "hw")
    net.add("Add", "hw hw", "large")
    net.add("Concat", "n c large", "sizes", axis=0)
    net.add("Resize", "t _ _ sizes", "p", mode="linear")
    model = shrink(close(net, 4))
    check_pair(model, 2)


@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [3], [1, 3]])
@pytest.mark.parametrize("is_sized", [True, False])
def test_resize_that_names_its_axes(
    axes: list[int], is_sized: bool, shrink: Callable[..., Model]
) -> None:
    """Channels go where it does not name theirs; its vector is of other axes."""
    net = between(4, [1, 3], opset=18, bias=0.5)
    large = [4 if axis == 1 else 9 for axis in axes]
    net.weights["s"] = np.array(large) if is_sized else np.ones(len(axes), np.float32)
    net.add("Resize", "t _ _ s" if is_sized else "t _ s", "p", mode="linear", axes=axes)
    model = shrink(close(net, 4))
    check_pair(model, 4 if 1 in axes else 2)
    assert dims(model)["s"] == [len(axes)]


def test_resize_by_a_scale_near_one(
    shrink: Callable[..., Model], reasons: Callable[..., list[str | None]]
) -> None:
    """The number of channels stays what it is, but they are mixed."""
    net = between(4, [1, 3])
    net.weight("s", [1.0, 1.1, 2.0, 2.0])
    net.add("Resize", "t _ s", "p", mode="linear")
    source = close(net, 4)
    assert any("keep the size" in str(reason) for reason in reasons(source, "t"))


# ---- norms ----


@pytest.mark.parametrize("opset", [18, 21])
def test_group_norm(opset: int, shrink: Callable[..., Model]) -> None:
    """Whole groups only; scale and bias are by group first, then by channel."""
    count = 3 if opset == 18 else 6
    for dead, left in (((2, 3), 4), ((2, 4), 6)):
        net = between(6, dead, opset=opset)
        net.weight("scale", net.random("scale", count))
        net.weight("shift", net.random("shift", count))
        net.add("GroupNormalization", "t scale shift", "p", num_groups=3)
        model = shrink(close(net, 6))
        check_pair(model, left)
        assert attribute(model, "GroupNormalization", "num_groups") == left // 2
        assert dims(model)["scale"] == dims(model)["shift"] == [left * count // 6]


def test_group_norm_with_scales_of_zero(shrink: Callable[..., Model]) -> None:
    """What it makes is constant, and what it is given is not needed."""
    for zero, left in (((2, 3), 4), ((2,), 6)):
        net = between(6, (), opset=21)
        scale = net.random("scale", 6)
        scale[list(zero)] = 0
        net.weight("scale", scale)
        net.weight("shift", net.random("shift", 6))
        net.add("GroupNormalization", "t scale shift", "p", num_groups=3)
        check_pair(shrink(close(net, 6)), left)


def test_a_zero_beside_what_is_not_read(shrink: Callable[..., Model]) -> None:
    """Of a group, one is zero, and the other is not needed: what both make is needed."""
    net = between(6, (2,), opset=21)
    net.weight("scale", net.random("scale", 6))
    net.weight("shift", net.random("shift", 6))
    net.add("GroupNormalization", "t scale shift", "p", num_groups=3)
    close(net, 6)
    net.weights["V"][:, 3] = 0
    check_pair(shrink(net.model(y=4)), 6)


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_instance_norm(constant: float, shrink: Callable[..., Model]) -> None:
    """A zero becomes the shift; of another constant nothing is said."""
    net = between(4, [1, 3], bias=constant)
    net.weight("scale", net.random("scale", 4))
    net.weight("shift", net.random("shift", 4))
    net.add("InstanceNormalization", "t scale shift", "p")
    check_pair(shrink(close(net, 4)), 2 if not constant else 4)


def test_group_norm_in_parts(shrink: Callable[..., Model]) -> None:
    """Reshape, InstanceNormalization, Reshape, Mul, Add."""
    for dead, left in (((2, 3), 4), ((2, 4), 6)):
        net = between(6, dead)
        net.weight("ones", np.ones(3))
        net.weight("zeros", np.zeros(3))
        net.weight("scale", net.random("scale", 6, 1, 1))
        net.weight("shift", net.random("shift", 6, 1, 1))
        net.weight("apart", np.array([0, 3, -1]))
        net.weight("back", np.array([0, 6, 4, 4]))
        net.add("Reshape", "t apart", "r")
        net.add("InstanceNormalization", "r ones zeros", "n")
        net.add("Reshape", "n back", "q")
        net.add("Mul", "q scale", "m")
        net.add("Add", "m shift", "p")
        model = shrink(close(net, 6))
        check_pair(model, left)
        assert dims(model)["ones"] == [left // 2]


def test_lrn_keeps_neighbours_apart(
    shrink: Callable[..., Model], reasons: Callable[..., list[str | None]]
) -> None:
    """A zero stays zero in it, but is counted among the neighbours."""
    net = between(4, [1, 3])
    net.add("LRN", "t", "p", size=3)
    source = close(net, 4)
    check_pair(shrink(source), 4)
    assert {str(reason).split(" (")[0] for reason in reasons(source, "t")} >= {
        "it sums over neighbouring channels"
    }


# ---- grouped ConvTranspose ----


@pytest.mark.parametrize("bias", [False, True])
def test_grouped_transposed(bias: bool, shrink: Callable[..., Model]) -> None:
    """Every group loses as many inputs, and as many outputs."""
    net = between(6, [1, 3, 4])
    net.weight("U", net.random("U", 6, 4, 2, 2))
    net.weight("c", net.random("c", 8))
    net.weights["U"][:3, 2] = net.weights["U"][3:, 0] = 0
    net.weights["c"][[2, 4]] = 0
    inputs = "t U c" if bias else "t U"
    net.add("ConvTranspose", inputs, "p", group=2, strides=[2, 2], pads=[1, 1, 0, 0])
    if not bias:
        del net.weights["c"]
    model = shrink(close(net, 8))
    check_pair(model, 4, 6)
    assert dims(model)["U"] == [4, 3, 2, 2]
    assert dims(model).get("c", [6]) == [6]


def test_a_group_of_a_transposed_goes(shrink: Callable[..., Model]) -> None:
    """All its inputs, and so all its outputs."""
    net = between(6, [0, 1, 2])
    net.weight("U", net.random("U", 6, 4, 2, 2))
    net.add("ConvTranspose", "t U", "p", group=2)
    model = shrink(close(net, 8))
    check_pair(model, 3, 4)
    assert dims(model)["U"] == [3, 4, 2, 2]
    assert attribute(model, "ConvTranspose", "group") == 1


def test_depthwise_transposed(shrink: Callable[..., Model]) -> None:
    """Input and output are one channel; a bias makes it constant."""
    for shift, left in ((0.0, 4), (1.0, 4)):
        net = between(6, [1, 4])
        net.weight("U", net.random("U", 6, 1, 2, 2))
        net.weight("c", np.arange(6.0))
        net.weights["c"][[1, 4]] = shift
        net.add("ConvTranspose", "t U c", "p", group=6, strides=[2, 2])
        model = shrink(close(net, 6))
        check_pair(model, left)
        assert dims(model)["U"] == [left, 1, 2, 2]
        assert dims(model)["c"] == [left]
        assert attribute(model, "ConvTranspose", "group") == left


# ---- integers ----

ZERO = 7
"""The zero point of activations."""


def quantized(
    channels: int,
    dead: Sequence[int],
    *,
    bias: int = 0,
    per_channel: bool = False,
    kind: type = np.uint8,
) -> Net:
    """t: codes [N, channels, 4, 4]; the sums of `dead` channels are `bias`."""
    net = Net(x=("N", 3, 4, 4))
    zero = net.weight("zero", np.array(ZERO, kind))
    scale = net.weight("scale", np.float32(0.05))
    scale_w, zero_w = weight_codes(net, "W", (channels, 3, 1, 1), dead, per_channel)
    shift = rng("b").integers(-2000, 2000, channels).astype(np.int32)
    shift[list(dead)] = bias
    net.weight("b", shift)
    net.add("QuantizeLinear", f"x {scale} {zero}", "q")
    net.add("QLinearConv", f"q scale zero W {scale_w} {zero_w} scale zero b", "t")
    return net


def weight_codes(
    net: Net, name: str, size: Sequence[int], dead: Sequence[int], per_channel: bool
) -> tuple[str, str]:
    """Weight `name`, and the names of its scale and zero point, which is not 0."""
    count = size[0] if per_channel else 1
    zeros = np.full(size[0], 3, np.int8)
    codes = rng(name).integers(-60, 60, size).astype(np.int8)
    codes[list(dead)] = 3
    net.weight(name, codes)
    shape = (count,) if per_channel else ()
    scale = rng(name).uniform(0.01, 0.03, shape).astype(np.float32)
    return (
        net.weight(f"{name}_scale", scale),
        net.weight(f"{name}_zero", zeros[:count].reshape(shape)),
    )


def close_codes(net: Net, channels: int, name: str = "p", **more: Any) -> ModelProto:
    """A quantized layer that reads all channels of `name`, and floats behind it."""
    taps = more.pop("taps", 1)
    scale, zero = weight_codes(net, "V", (2, channels, taps, taps), (), False)
    net.weight("out", np.float32(0.4))
    net.add("QLinearConv", f"{name} scale zero V {scale} {zero} out zero", "c", **more)
    net.add("DequantizeLinear", "c out zero")
    return net.model(y=4)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_quantized_convolutions(
    per_channel: bool, kind: type, shrink: Callable[..., Model]
) -> None:
    """Codes at the zero point go, padded or not; so do the scales of outputs."""
    if kind is np.int8 and not per_channel:
        return  # signed data: one case is enough
    net = quantized(5, [1, 3], per_channel=per_channel, kind=kind)
    source = close_codes(net, 5, "t", taps=3, pads=[1, 1, 1, 1])
    found = dims(shrink(source))
    assert found["W"][0] == found["b"][0] == found["V"][1] == 3
    assert found["W_scale"] == found["W_zero"] == ([3] if per_channel else [])


def test_a_quantized_constant(shrink: Callable[..., Model]) -> None:
    """Into the int32 bias, exactly."""
    found = dims(shrink(close_codes(quantized(5, [1, 3], bias=900), 5, "t", taps=3)))
    assert found["W"][0] == found["V"][1] == 3


@pytest.mark.parametrize("pads", [[1, 1, 1, 1], [0, 0, 0, 1]])
def test_quantized_constants_and_padding(
    pads: list[int], shrink: Callable[..., Model]
) -> None:
    """A few carry the integer sums of all, at the border as well."""
    net = quantized(16, range(10), bias=900)
    net.weights["b"][:10] = rng("codes").integers(-3000, 3000, 10)
    model = shrink(close_codes(net, 16, "t", taps=3, pads=pads))
    found = dims(model)
    assert 6 < found["W"][0] == found["V"][1] <= 10


@pytest.mark.parametrize("bias", [0, 900])
@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("is_float", [False, True])
def test_quantized_gemm(
    bias: int, turned: int, is_float: bool, shrink: Callable[..., Model]
) -> None:
    """Behind a global pool: its rows, or columns, go with the channels before it."""
    net = quantized(5, [1, 3], bias=bias)
    net.add("QLinearGlobalAveragePool", f"t {P} {P}", "m", MS)
    net.add("Flatten", "m", "f")
    scale, zero = weight_codes(net, "V", (2, 5) if turned else (5, 2), (), False)
    net.weight("k", np.array([100, -200], np.int32))
    more = "" if is_float else f" {P}"
    out = "y" if is_float else "c"
    net.add("QGemm", f"f {P} V {scale} {zero} k{more}", out, MS, transB=turned, alpha=0.5)
    if not is_float:
        net.add("DequantizeLinear", f"c {P}")
    found = dims(shrink(net.model(y=2)))
    assert found["W"][0] == found["V"][1 if turned else 0] == 3


def test_a_bias_that_is_too_large(shrink: Callable[..., Model]) -> None:
    """It would leave the range of int32: nothing goes."""
    net = quantized(5, [1], bias=900)
    close_codes(net, 5, "t", taps=3)
    net.weight("full", np.full(2, 2**31 - 1, np.int32))
    net.weights["V"][:, 1] = 100
    net.nodes[-2].input.append("full")
    model = shrink(net.model(y=4))
    assert dims(model)["W"][0] == 5
    assert any("does not fit" in str(skip) for skip in support.skips(model))


def test_quantized_depthwise(shrink: Callable[..., Model]) -> None:
    """Input and output are one channel."""
    net = quantized(5, [1, 3])
    scale, zero = weight_codes(net, "D", (5, 1, 3, 3), (), True)
    net.add(
        "QLinearConv",
        f"t scale zero D {scale} {zero} scale zero",
        "p",
        group=5,
        pads=[1, 1, 1, 1],
    )
    model = shrink(close_codes(net, 5))
    found = dims(model)
    assert found["W"][0] == found["D"][0] == found["V"][1] == 3
    assert found["D_scale"] == found["D_zero"] == [3]


def test_quantized_groups(shrink: Callable[..., Model]) -> None:
    """Equally many of each."""
    net = quantized(6, [1, 3, 4])
    scale, zero = weight_codes(net, "D", (4, 3, 3, 3), (0, 3), True)
    net.add("QLinearConv", f"t scale zero D {scale} {zero} scale zero", "p", group=2)
    found = dims(shrink(close_codes(net, 4)))
    assert found["W"][0] == 4
    assert found["D"] == [2, 2, 3, 3]
    assert found["D_scale"] == [2]
    assert found["V"][1] == 2


def test_quantized_outputs_that_nothing_reads(shrink: Callable[..., Model]) -> None:
    """Their column of the next weight is its zero point."""
    net = quantized(5, [])
    close_codes(net, 5, "t", taps=3, pads=[1, 1, 1, 1])
    net.weights["V"][:, [0, 4]] = 3
    assert dims(shrink(net.model(y=4)))["W"][0] == 3


MS = "com.microsoft"
P = "scale zero"
BETWEEN_CODES = {
    "sum": lambda net: net.add("QLinearAdd", f"t {P} t {P} wide shifted", "p", MS),
    "product": lambda net: net.add("QLinearMul", f"t {P} t {P} wide shifted", "p", MS),
    "sigmoid": lambda net: net.add("QLinearSigmoid", f"t {P} wide shifted", "p", MS),
    "leaky": lambda net: net.add("QLinearLeakyRelu", f"t {P} wide shifted", "p", MS),
    "mean": lambda net: net.add(
        "QLinearGlobalAveragePool", f"t {P} wide shifted", "p", MS
    ),
    "pool": lambda net: net.add(
        "QLinearAveragePool", f"t {P} wide shifted", "p", MS, kernel_shape=[2, 2]
    ),
    "concat": lambda net: net.add(
        "QLinearConcat", f"wide shifted t {P} q {P}", "p", MS, axis=1
    ),
}


@pytest.mark.parametrize("bias", [0, 900])
@pytest.mark.parametrize("case", BETWEEN_CODES)
def test_between_codes(case: str, bias: int, shrink: Callable[..., Model]) -> None:
    """Zeros go, and constants where no border follows; of another scale they are read."""
    net = quantized(5, [1, 3], bias=bias)
    net.weight("wide", np.float32(0.083))
    net.weight("shifted", np.array(19, np.uint8))
    BETWEEN_CODES[case](net)
    more = 3 if case == "concat" else 0
    close_codes(net, 5 + more)
    net.nodes[-2].input[1:3] = ["wide", "shifted"]
    found = dims(shrink(net.model(y=4)))
    left = 5 if bias and case == "pool" else 3
    assert found["W"][0] == left
    assert found["V"][1] == left + more


def test_a_gate_of_codes(shrink: Callable[..., Model]) -> None:
    """QLinearMul: a zero of one operand decides, the other is not needed there."""
    net = quantized(5, [1, 3])
    scale, zero = weight_codes(net, "G", (5, 3, 1, 1), (), False)
    net.add("QLinearConv", f"q scale zero G {scale} {zero} scale zero", "g")
    net.add("QLinearMul", f"t {P} g {P} {P}", "p", MS)
    found = dims(shrink(close_codes(net, 5)))
    assert found["W"][0] == found["G"][0] == found["V"][1] == 3


def test_quantized_products(shrink: Callable[..., Model]) -> None:
    """QLinearMatMul, with a scale for each column."""
    net = Net(x=("N", "T", 4))
    net.weight("zero", np.array(ZERO, np.uint8))
    net.weight("scale", np.float32(0.05))
    first = rng("W").integers(-60, 60, (4, 6)).astype(np.int8)
    first[:, [0, 5]] = 0
    net.weight("W", first)
    net.weight("W_scale", rng("W").uniform(0.01, 0.02, 6).astype(np.float32))
    net.weight("W_zero", np.zeros(6, np.int8))
    net.weight("V", rng("V").integers(-60, 60, (6, 3)).astype(np.int8))
    net.weight("V_scale", np.float32(0.02))
    net.weight("V_zero", np.array(1, np.int8))
    net.add("QuantizeLinear", "x scale zero", "q")
    net.add("QLinearMatMul", "q scale zero W W_scale W_zero scale zero", "t")
    net.add("QLinearMatMul", "t scale zero V V_scale V_zero scale zero", "c")
    net.add("DequantizeLinear", "c scale zero")
    found = dims(shrink(net.model()))
    assert found["W"] == [4, 4]
    assert found["W_scale"] == found["W_zero"] == [4]
    assert found["V"] == [4, 3]


def dynamic(op_type: str, dead: Sequence[int], bias: float = 0) -> Net:
    """What dynamic quantization makes of two layers; `dead` channels are `bias`."""
    is_conv = op_type == "ConvInteger"
    net = Net(x=("N", 3, 4, 4) if is_conv else ("N", "T", 3))
    for name, source, count, given in (("W", "x", 5, 3), ("V", "t", 2, 5)):
        size = (count, given, 1, 1) if is_conv else (given, count)
        codes = rng(name).integers(0, 120, size).astype(np.uint8)
        if name == "W":
            codes[(slice(None),) * (not is_conv) + (list(dead),)] = 60
        shift = net.random(f"{name}_b", count)
        if name == "W":
            shift[list(dead)] = bias
        net.weight(name, codes)
        net.weight(f"{name}_zero", np.array(60, np.uint8))
        net.weight(f"{name}_scale", np.float32(0.02))
        net.weight(f"{name}_b", shift.reshape(-1, *[1, 1] * is_conv))
        made = [f"{source}_{part}" for part in ("codes", "scale", "zero")]
        net.add("DynamicQuantizeLinear", source, " ".join(made))
        net.add(op_type, f"{made[0]} {name} {made[2]} {name}_zero", f"{source}_sums")
        net.add("Cast", f"{source}_sums", f"{source}_floats", to=1)
        net.add("Mul", f"{made[1]} {name}_scale", f"{source}_both")
        net.add("Mul", f"{source}_floats {source}_both", f"{source}_product")
        target = "t" if name == "W" else "y"
        net.add("Add", f"{source}_product {name}_b", target)
    return net


@pytest.mark.parametrize("op_type", ["ConvInteger", "MatMulInteger"])
@pytest.mark.parametrize("bias", [0.0, 9.0])
def test_dynamically_quantized(
    op_type: str, bias: float, shrink: Callable[..., Model]
) -> None:
    """The range includes zero, so that zeros go; a constant may be the largest value."""
    net = dynamic(op_type, [1, 4], bias)
    found = dims(shrink(net.model(y=4 if op_type == "ConvInteger" else 3)))
    axis = 0 if op_type == "ConvInteger" else 1
    assert (
        found["W"][axis] == found["W_b"][0] == found["V"][1 - axis] == (5 if bias else 3)
    )


def test_unread_channels_of_a_dynamic_range_stay(shrink: Callable[..., Model]) -> None:
    """They decide about the scale of all."""
    for dead in ([], [1, 4]):
        net = dynamic("MatMulInteger", dead, 9.0)
        net.weights["V"][[1, 4]] = 60
        assert dims(shrink(net.model()))["W"] == [3, 5]


# ---- sums ----


@pytest.mark.parametrize("op_type", ["ReduceSum", "ReduceL1", "ReduceL2", "ReduceMax"])
@pytest.mark.parametrize("constant", [0.0, 0.5])
@pytest.mark.parametrize("axes", [(1,), (1, 2, 3), (1, -1)])
def test_sums_over_channels(
    op_type: str, constant: float, axes: Sequence[int], shrink: Callable[..., Model]
) -> None:
    """A zero adds nothing; a constant can be added behind a plain sum."""
    net = between(4, [1, 3], bias=constant)
    if op_type == "ReduceSum":
        net.weight("axes", np.array(axes))
        net.add(op_type, "t axes")
    else:
        net.add(op_type, "t", axes=axes)
    left = 4
    if op_type == "ReduceSum" or (op_type != "ReduceMax" and not constant):
        left = 2
    found = dims(shrink(net.model(y=4)))
    assert found["W"][0] == found["b"][0] == left


def test_a_sum_over_an_open_size(shrink: Callable[..., Model]) -> None:
    """How often a constant counts depends on the input."""
    net = between(4, [1, 3], bias=[0, 0.5])
    net.inputs["x"] = ("N", 3, "H", 4)
    net.weight("axes", np.array([1, 2]))
    net.add("ReduceSum", "t axes")
    assert dims(shrink(net.model(y=4)))["W"][0] == 3


@pytest.mark.parametrize("op_type", ["ReduceMax", "ReduceMin", "ReduceLogSumExp"])
def test_reductions_that_count_zeros(
    op_type: str, reasons: Callable[..., list[str | None]]
) -> None:
    """Each says why."""
    net = between(4, [1, 3])
    net.add(op_type, "t", axes=[1])
    found = reasons(net.model(y=4), "t")
    assert all(f"({op_type}:y)" in str(reason) for reason in found)


# ---- values of a single channel ----


@pytest.mark.parametrize("case", ["concat", "flatten", "reshape", "gate"])
def test_a_value_of_one_channel_goes(case: str, shrink: Callable[..., Model]) -> None:
    """Through an Add, to a Concat that leaves it out; a gate of one channel stays."""
    net = Net(x=("N", 3, 4, 4))
    net.weight("W", net.random("W", 3, 3, 1, 1))
    net.weight("U", np.zeros((1, 3, 1, 1)))
    net.weight("k", [0.7])
    net.weight("s1", np.array([0, 1, 16]))
    net.weight("s3", np.array([0, 3, 16]))
    net.add("Conv", "x W", "t")
    net.add("Conv", "x U", "u")
    net.add("Add", "u k", "v")
    rank = {"concat": 4, "gate": 4, "reshape": 3, "flatten": 2}[case]
    net.weight("V", net.random("V", 2, {2: 64, 3: 4}.get(rank, 4), *[1] * (rank - 2)))
    if case in ("concat", "gate"):
        net.add("Concat", "t v", "p", axis=1)
    elif case == "flatten":
        net.add("Flatten", "t", "tf")
        net.add("Flatten", "v", "vf")
        net.add("Concat", "tf vf", "p", axis=1)
    else:
        net.add("Reshape", "t s3", "tf")
        net.add("Reshape", "v s1", "vf")
        net.add("Concat", "tf vf", "p", axis=1)
    if case == "flatten":
        net.add("Gemm", "p V", "c", transB=1)
    else:
        net.add("Conv", "p V", "c")
    if case == "gate":
        net.add("Mul", "c v")
    else:
        net.add("Identity", "c")
    found = dims(shrink(net.model(y=rank)))
    assert ("U" in found) == (case == "gate")
    if case != "gate":
        assert found["V"][1] == (48 if case == "flatten" else 3)


@pytest.mark.parametrize("bias", [True, False])
def test_a_gemm_that_does_not_read_its_bias(
    bias: bool, shrink: Callable[..., Model]
) -> None:
    """beta = 0: what a constant adds becomes a bias that it does read."""
    net = Net(x=("N", 3))
    first = net.random("W", 3, 4)
    first[:, [1, 2]] = 0
    net.weight("W", first)
    net.weight("b", [1, 2, 0, 4.0])
    net.weight("V", net.random("V", 4, 2))
    net.weight("c", [5, 6.0])
    net.add("Gemm", "x W b", "t")
    net.add("Gemm", "t V c" if bias else "t V", beta=0.0)
    if not bias:
        del net.weights["c"]
    found = dims(shrink(net.model(y=2)))
    assert found["W"] == [3, 2]
    assert found["V"] == [2, 2]


# ---- inner graphs and functions ----


def pair() -> ModelProto:
    """Two layers with two dead channels between them."""
    net = between(5, [1, 3], bias=0.5)
    net.add("Relu", "t", "p")
    return close(net, 5)


def sizes(model: Model) -> dict[str, list[list[int]]]:
    """The dims of weights in every scope, by name."""
    found: dict[str, list[list[int]]] = {}
    for graph in support.graphs(model.proto):
        for tensor in graph.initializer:
            found.setdefault(tensor.name, []).append(list(tensor.dims))
        for node in graph.node:
            if node.op_type == "Constant":
                found.setdefault(node.output[0], []).append(
                    list(node.attribute[0].t.dims)
                )
    return found


@pytest.mark.parametrize("wrap", [support.in_branches, support.in_loop])
def test_layers_inside(
    wrap: Callable[[ModelProto], ModelProto], shrink: Callable[..., Model]
) -> None:
    """Branches and bodies shrink as the main graph does."""
    source = pair()
    found = sizes(shrink(wrap(source)))
    assert all(size[0] == 3 for name in "Wb" for size in found[name])
    assert all(size[1] == 3 for size in found["V"])


def test_a_loop_over_weights_from_outside(shrink: Callable[..., Model]) -> None:
    """They are read in the body alone, and shrink with it."""
    source = support.in_loop(pair())
    body = next(n for n in source.graph.node if n.op_type == "Loop").attribute[0].g
    source.graph.initializer.extend(body.initializer)
    del body.initializer[:]
    found = sizes(shrink(source))
    assert all(5 not in size for each in found.values() for size in each)


def test_a_scan(shrink: Callable[..., Model]) -> None:
    """Its body is a graph like any other; what runs through it keeps its size."""
    body = pair().graph
    body.node.append(helper.make_node("Identity", ["state"], ["next"]))
    value = helper.make_tensor_value_info
    body.input.insert(0, value("state", 1, [1]))
    body.output.insert(0, value("next", 1, [1]))
    outer = helper.make_graph(
        [helper.make_node("Scan", ["s", "xs"], ["e", "y"], body=body, num_scan_inputs=1)],
        "main",
        [value("s", 1, [1]), value("xs", 1, ["T", 2, 3, 4, 4])],
        [value("e", 1, [1]), value("y", 1, [None] * 5)],
    )
    source = helper.make_model(
        outer, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
    )
    found = sizes(shrink(source))
    assert found["W"][0][0] == found["V"][0][1] == 3


def test_a_value_that_an_inner_graph_reads_stays(
    shrink: Callable[..., Model], reasons: Callable[..., list[str | None]]
) -> None:
    """Captured by a branch: all its channels stay, and the reason says so."""
    net = between(5, [1, 3])
    net.inputs["c"] = (1,)
    net.kinds["c"] = TensorProto.BOOL
    net.weight("V", net.random("V", 2, 5, 1, 1))
    net.add("Conv", "t V", "z")
    value = helper.make_tensor_value_info
    branches = {}
    for label, op_type in (("then_branch", "Neg"), ("else_branch", "Abs")):
        node = helper.make_node(op_type, ["t"], [f"{op_type}_t"])
        out = value(f"{op_type}_t", 1, [None] * 4)
        branches[label] = helper.make_graph([node], label, [], [out])
    net.weight("flat", np.array([], np.int64))
    net.add("Reshape", "c flat", "cond")
    net.add("If", "cond", "y", **branches)
    source = net.model(y=4, z=4)
    assert dims(shrink(source))["W"][0] == 5
    assert set(reasons(source, "t")) == {"an inner graph reads 't'"}


def test_a_function_is_declined_and_inlined_shrinks(shrink: Callable[..., Model]) -> None:
    """No size is known in its body, which the report says; called inline, all goes."""
    source = support.in_function(pair())
    model = shrink(source)
    assert model.ledger.edits == 0
    assert any("function's body" in skip.reason for skip in support.skips(model))
    found = sizes(shrink(source, "inline-functions,zero-channels"))
    assert all(5 not in size for each in found.values() for size in each)


def picked_directions(dead: Sequence[Sequence[int]]) -> ModelProto:
    """The last states of each direction by themselves, and joined again."""
    net = recurrent("LSTM", dead, outputs="_ h")
    for way in range(2):
        net.weight(f"i{way}", np.array(way))
        net.add("Gather", f"h i{way}", f"h{way}", axis=0)
    net.add("Concat", "h0 h1", "both", axis=1)
    net.weight("V", net.random("V", 2 * HIDDEN, 3))
    net.add("MatMul", "both V")
    return net.model(y=2)


def test_last_states_by_direction(shrink: Callable[..., Model]) -> None:
    """Each direction picked for itself, and joined again."""
    model = shrink(picked_directions([(1, 4), (0, 2)]))
    check_units(model, "LSTM", 2, HIDDEN - 2)


def test_a_direction_that_is_picked_goes(shrink: Callable[..., Model]) -> None:
    """All units of the first are dead, but it is picked: one stays, or none is picked."""
    model = shrink(picked_directions([range(HIDDEN), (0, 2)]))
    assert dims(model)["R"][2] == HIDDEN - 2
