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

from onnxopt.channels.decision import Decision
from onnxopt.channels.engine import analyse
from onnxopt.channels.groups import Groups
from onnxopt.manager import Context
from onnxopt.model import Model
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


@pytest.fixture
def reasons(context: Context) -> Callable[[ModelProto, str], list[str | None]]:
    """For each channel of a value what keeps it, None where it goes."""

    def call(source: ModelProto, name: str) -> list[str | None]:
        view = Model.open(source).main
        decision = Decision(Groups(analyse(view, context.evaluator)))
        (slot,) = decision.groups.slots_of(name)
        return [decision.reason(atom) for atom in slot.atoms.tolist()]

    return call


def check_numbers(source: ModelProto, made: ModelProto) -> None:
    """The same interface, and equal but for rounding on feeds of several sizes."""
    for field in ("input", "output"):
        assert list(getattr(made.graph, field)) == list(getattr(source.graph, field))
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
    check_units(shrink(source), "GRU", 1, HIDDEN)
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
