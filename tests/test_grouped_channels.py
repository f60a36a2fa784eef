"""Constants in front of grouped convolutions, and channels that a Reshape makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from onnx.numpy_helper import from_array

from onnxopt.manager import Context
from onnxopt.model import Model
from tests import support

PIPELINE = "dead-layers,zero-channels"


@pytest.fixture
def shrink(context: Context) -> Callable[[ModelProto], Model]:
    """Shrinks a model and compares the numbers; a second time there is nothing to do."""

    def call(source: ModelProto) -> Model:
        model = support.run_passes(source, PIPELINE, context)
        made = support.final(model)
        onnx.checker.check_model(made, full_check=True)
        for size in (2, 1):
            feed = support.feeds_of(source, (size,))[0]
            expected = support.run(source, feed)
            support.assert_same(expected, support.run(made, feed), "equivalent")
        assert support.run_passes(made, PIPELINE, context).ledger.edits == 0
        return model

    return call


def dims(model: Model, name: str) -> list[int]:
    return list(support.find_tensor(model.proto, name).dims)


def grouped(biases: Sequence[float | None], size: str = "H", pads: int = 1) -> ModelProto:
    """Two groups read what a layer makes: constants, None where it is live."""
    count = len(biases)
    source = support.model_of(
        f"""main (float[N,2,{size},{size}] x) => (float[N,6,P,Q] y)
        <float[{count},2,1,1] W = {{}}, float[{count}] b = {{}},
        float[6,{count // 2},3,3] D = {{}}> {{
           t = Conv (x, W, b)
           y = Conv <group = 2, pads = [{pads},{pads},{pads},{pads}]> (t, D)
        }}"""
    )
    random = np.random.default_rng(0)
    weight = random.standard_normal((count, 2, 1, 1)).astype(np.float32)
    for index, bias in enumerate(biases):
        weight[index] *= bias is None
    bias = np.array([1.0 if bias is None else bias for bias in biases], np.float32)
    support.find_tensor(source, "W").CopyFrom(from_array(weight, "W"))
    support.find_tensor(source, "b").CopyFrom(from_array(bias, "b"))
    support.randomize(source, "D")
    return source


CARRIED = {
    # what the channels are: how many are left of each group
    "two in each": ((None, 2, 3, None, -1, None, 0.5, None), 3),
    "of one value": ((2, 2, 2, None, 2, None, 2, 2), 2),
    "three and two": ((1, 2, 3, None, 4, 5, None, None), 3),
    "one in each": ((1, None, None, 2, None, None), 3),
    "in one group only": ((1, 2, None, None, None, None), 3),
    "zeros need no carrier": ((0, 0, None, None, 0, 0), 1),
    "a zero and constants": ((0, 2, None, None, 3, 0), 2),
}


@pytest.mark.parametrize("case", CARRIED)
def test_a_constant_of_each_group_carries_the_others(
    shrink: Callable[[ModelProto], Model], case: str
) -> None:
    """At the border a tap outside reads 0; of each group one constant stays for that."""
    biases, left = CARRIED[case]
    model = shrink(grouped(biases))
    assert dims(model, "D") == [6, left, 3, 3]
    assert dims(model, "W")[0] == 2 * left


def test_without_padding_all_go(shrink: Callable[[ModelProto], Model]) -> None:
    biases = (None, 2, 3, None, -1, None, 0.5, None)
    model = shrink(grouped(biases, size="4", pads=0))
    assert dims(model, "D") == [6, 2, 3, 3]


def test_where_the_size_is_known_a_map_may_replace_them(
    shrink: Callable[[ModelProto], Model],
) -> None:
    """A channel more would open a block of its own, and the map is small."""
    live = (None,) * 4
    model = shrink(grouped((*live, *range(1, 9), *range(2, 10), *live), size="3"))
    assert dims(model, "D") == [6, 4, 3, 3]
    assert [node.op_type for node in model.proto.graph.node].count("Add") == 1


BEHIND = {
    "transposed": "y = ConvTranspose <strides = [2,2]> (r, V)",
    "through a relu": "s = Relu (r)\n y = Conv (s, U)",
    "resized": 'u = Resize <mode = "nearest"> (r, , scales)\n y = Conv (u, U)',
}


def reshaped(behind: str, dead: Sequence[int]) -> ModelProto:
    """Channels of 2 x 2 elements from a Gemm, of which `dead` are zero."""
    source = support.model_of(
        f"""main (float[N,5] x) => (float[N,4,P,Q] y)
        <float[12,5] W = {{}}, float[12] b = {{}}, float[3,4,1,1] V = {{}},
        float[4,3,1,1] U = {{}}, int64[4] shape = {{-1,3,2,2}},
        float[4] scales = {{1,1,2,2}},
        float[3] g = {{1,2,3}}, float[3] h = {{0,0,0}}> {{
           t = Gemm <transB = 1> (x, W, b)
           r = Reshape (t, shape)
           {behind}
        }}"""
    )
    for name in "WbUV":
        support.randomize(source, name)
    for name in "Wb":
        tensor = support.find_tensor(source, name)
        array = onnx.numpy_helper.to_array(tensor).copy()
        array[list(dead)] = 0
        tensor.CopyFrom(from_array(array, name))
    return source


@pytest.mark.parametrize("case", ["transposed", "through a relu", "resized"])
def test_a_reader_says_which_axis_holds_the_channels(
    shrink: Callable[[ModelProto], Model], case: str
) -> None:
    model = shrink(reshaped(BEHIND[case], range(4, 8)))
    assert dims(model, "W") == [8, 5]
    assert dims(model, "b") == [8]
    shape = onnx.numpy_helper.to_array(support.find_tensor(model.proto, "shape"))
    assert shape.tolist() == [-1, 2, 2, 2]


@pytest.mark.parametrize("case", ["transposed", "through a relu", "resized"])
def test_a_channel_of_which_an_element_is_live_stays(
    shrink: Callable[[ModelProto], Model], case: str
) -> None:
    model = shrink(reshaped(BEHIND[case], range(5, 8)))
    assert dims(model, "W") == [12, 5]


def test_elements_of_a_norm_go_by_channel(
    shrink: Callable[[ModelProto], Model],
) -> None:
    source = reshaped(
        "q = BatchNormalization (r, g, h, h, g)\n"
        + BEHIND["transposed"].replace("(r, V)", "(q, V)"),
        range(8, 12),
    )
    model = shrink(source)
    assert dims(model, "W") == [8, 5]
    assert dims(model, "V") == [2, 4, 1, 1]


@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_depthwise_layer_of_a_constant(op_type: str, context: Context) -> None:
    """Its number of groups follows, though what it reads is an initializer."""
    source = support.model_of(
        f"""main (float[N,3,4,4] x) => (float[N,A,B,C] y)
        <float[1,3,4,4] k = {{}}, float[3,1,1,1] w = {{1,0,2}},
         float[3,3,1,1] W = {{1,2,3, 0,0,0, 4,5,6}}, float[2,3,1,1] V = {{}}> {{
           d = {op_type} <group: int = 3> (k, w)
           t = Conv (x, W)
           s = Mul (t, d)
           y = Conv (s, V)
        }}"""
    )
    for name in "kV":
        support.randomize(source, name)
    made = support.final(support.run_passes(source, "zero-channels", context))
    assert list(support.find_tensor(made, "W").dims) == [2, 3, 1, 1]
    for feed in support.feeds_of(source, (2,)):
        expected, found = support.run(source, feed), support.run(made, feed)
        support.assert_same(expected, found, "equivalent")
