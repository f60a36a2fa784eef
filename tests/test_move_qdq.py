"""move-qdq: the same values wherever codes move, and what ONNX Runtime then fuses."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper
from onnx.numpy_helper import from_array

from onnxopt.manager import Context
from onnxopt.target import target
from tests import support
from tests.support import Array

PIPELINE = "move-qdq,requantize"
LEVELS = ort.GraphOptimizationLevel

MOVERS = {
    "transpose": "Transpose <perm = [0, 2, 3, 1]> (%s)",
    "reshape": "Reshape (%s, shape)",
    "flatten": "Flatten (%s)",
    "squeeze": "Squeeze (%s, first)",
    "unsqueeze": "Unsqueeze (%s, first)",
    "pool": "MaxPool <kernel_shape = [2, 2], pads = [1, 1, 0, 0]> (%s)",
    "concat": "Concat <axis = 1> (%s, %s)",
    "slice": "Slice (%s, first, third, first)",
    "gather": "Gather <axis = 1> (%s, picked)",
    "elements": "GatherElements <axis = 1> (%s, where)",
    "nd": "GatherND (%s, place)",
    "resize": 'Resize <mode = "nearest"> (%s, , up)',
    "expand": "Expand (%s, twice)",
    "tile": "Tile (%s, up_int)",
    "depth": "DepthToSpace <blocksize = 2> (%s)",
    "space": "SpaceToDepth <blocksize = 2> (%s)",
    "pad": "Pad (%s, pads)",
    "reflect": 'Pad <mode = "reflect"> (%s, pads)',
    "split": "Split <axis = 1> (%s)",
}
CONSTANTS = {
    "shape": [1, 8, 64, 1],
    "first": [0],
    "third": [3],
    "picked": [0, 5, -1],
    "where": np.zeros((1, 2, 8, 8)),
    "place": [[0, 3], [0, -1]],
    "twice": [2, 8, 8, 8],
    "up_int": [1, 1, 2, 1],
    "pads": [0, 0, 1, 1, 0, 0, 2, 1],
}


def model(body: str, kind: str = "uint8") -> ModelProto:
    """Of [1, 8, 8, 8] values `x`, with a convolution's weight `w_q` and its scales."""
    zero = {"uint8": 131, "int8": -7}[kind]
    proto = support.model_of(
        f"main (float[1,8,8,8] x) => (float y) <float s = {{0.043}}, float s2 = {{0.08}},"
        f"{kind} z = {{{zero}}}, float[4] up = {{1, 1, 2, 2}}> {{ {body} }}"
    )
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {
        name: np.array(value, np.int64) for name, value in CONSTANTS.items()
    }
    arrays["w_q"] = rng.integers(-60, 60, (8, 8, 3, 3)).astype(np.int8)
    arrays["w_s"] = rng.uniform(0.01, 0.02, 8).astype(np.float32)
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        from_array(array, name) for name, array in arrays.items() if name in read
    )
    rank = _rank(proto)
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info("y", 1, [None] * rank))
    return proto


def _rank(proto: ModelProto) -> int:
    """The number of axes of `y`, which follows from the text."""
    probe = ModelProto()
    probe.CopyFrom(proto)
    probe.graph.output[0].type.tensor_type.ClearField("shape")
    feed = {"x": np.zeros((1, 8, 8, 8), np.float32)}
    return int(np.ndim(support.run(probe, feed)[0]))


def applied(mover: str, value: str, made: str) -> str:
    text = MOVERS[mover]
    outputs = f"{made}, {made}_rest" if mover == "split" else made
    return f"{outputs} = {text % ((value,) * text.count('%s'))}\n"


def assert_kept(source: ModelProto, made: ModelProto) -> None:
    """Bitwise, on ordinary feeds and on one with infinities and NaN."""
    onnx.checker.check_model(made)
    for feed in support.feeds_of(source):
        support.assert_same(support.run(source, feed), support.run(made, feed))


def optimized(proto: ModelProto, folder: Path) -> list[str]:
    """The operators that ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("uint8", "onnx"), ("int8", "ort-cpu-arm"), ("uint8", "ort-cpu-x86")],
)
@pytest.mark.parametrize("mover", MOVERS)
def test_between_equal_pairs(mover: str, kind: str, name: str, context: Context) -> None:
    """Only codes are moved, whatever moves them."""
    body = (
        "q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z)\n"
        + applied(mover, "a", "b")
        + "r = QuantizeLinear (b, s, z) y = DequantizeLinear (r, s, z)"
    )
    source = model(body, kind)
    ours = Context(target=target(name), evaluator=context.evaluator)
    made = support.run_passes(source, PIPELINE, ours)
    ops = support.op_types(made)
    assert (ops.count("QuantizeLinear"), ops.count("DequantizeLinear")) == (1, 1)
    assert ops[-1] == "DequantizeLinear"
    assert_kept(source, support.final(made))


@pytest.mark.parametrize("name", ["onnx", "ort-cpu-x86"])
@pytest.mark.parametrize("mover", MOVERS)
def test_int8_activations_keep_their_pairs(
    mover: str, name: str, context: Context, tmp_path: Path
) -> None:
    """On x86 ONNX Runtime makes uint8 of a pair, and fuses nothing where it is apart."""
    body = (
        "q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z)\n"
        + applied(mover, "a", "b")
        + "r = QuantizeLinear (b, s, z) y = DequantizeLinear (r, s, z)"
    )
    source = model(body, "int8")
    ours = Context(target=target(name), evaluator=context.evaluator)
    made = support.run_passes(source, PIPELINE, ours)
    ops = support.op_types(made)
    assert (ops.count("QuantizeLinear"), ops.count("DequantizeLinear")) == (2, 2)


CONV = """q = QuantizeLinear (x, s, z)
 a = DequantizeLinear (q, s, z)
 w = DequantizeLinear <axis = 0> (w_q, w_s)
 c = Conv <pads = [1, 1, 1, 1]> (a, w)
"""
UP = sorted({*MOVERS} - {"pool", "concat"})


@pytest.mark.parametrize("mover", UP)
def test_a_convolution_before_it_fuses(
    mover: str, context: Context, tmp_path: Path
) -> None:
    """QuantizeLinear goes up to the Conv, which ONNX Runtime then runs on integers."""
    body = CONV + applied(mover, "c", "b")
    body += "r = QuantizeLinear (b, s2, z) y = DequantizeLinear (r, s2, z)"
    source = model(body)
    ours = Context(target=target("ort-cpu-x86"), evaluator=context.evaluator)
    made = support.run_passes(source, PIPELINE, ours)
    proto = support.final(made)
    assert "QLinearConv" in optimized(proto, tmp_path)
    assert_kept(source, proto)


def test_convolutions_before_a_concat_fuse(context: Context, tmp_path: Path) -> None:
    """Each gets a quantizer of its own; so does what has one already."""
    body = (
        CONV
        + """p = Conv <pads = [1, 1, 1, 1], dilations = [1, 1]> (a, w)
    b = Concat <axis = 1> (c, p, a)
    r = QuantizeLinear (b, s, z)
    y = DequantizeLinear (r, s, z)"""
    )
    source = model(body)
    ours = Context(target=target("ort-cpu-x86"), evaluator=context.evaluator)
    made = support.run_passes(source, PIPELINE, ours)
    proto = support.final(made)
    assert optimized(proto, tmp_path).count("QLinearConv") == 2
    assert_kept(source, proto)


@pytest.mark.parametrize("mover", sorted({*MOVERS} - {"resize", "expand", "tile"}))
def test_a_sigmoid_behind_it_fuses(mover: str, context: Context, tmp_path: Path) -> None:
    """DequantizeLinear goes down to it, unless there is more to compute then."""
    body = "q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z)\n"
    body += applied(mover, "a", "b")
    body += (
        "c = Sigmoid (b) r = QuantizeLinear (c, s2, z) y = DequantizeLinear (r, s2, z)"
    )
    source = model(body)
    ours = Context(target=target("ort-cpu-x86"), evaluator=context.evaluator)
    proto = support.final(support.run_passes(source, PIPELINE, ours))
    grows = mover in ("pad", "reflect")
    assert ("QLinearSigmoid" in optimized(proto, tmp_path)) != grows
    assert_kept(source, proto)


@pytest.mark.parametrize("name", ["tensorrt", "ort-cuda"])
@pytest.mark.parametrize("mover", MOVERS)
def test_pairs_stay_for_other_targets(mover: str, name: str, context: Context) -> None:
    """TensorRT wants the pairs, and CUDA has no integer kernels."""
    body = CONV + applied(mover, "c", "b")
    body += "r = QuantizeLinear (b, s2, z) y = DequantizeLinear (r, s2, z)"
    ours = Context(target=target(name), evaluator=context.evaluator)
    assert support.run_passes(model(body), PIPELINE, ours).ledger.edits == 0


def test_a_transposed_weight_fuses(context: Context, tmp_path: Path) -> None:
    """As linear layers are exported: the weight behind DequantizeLinear and Transpose."""
    rng = np.random.default_rng(0)
    source = support.model_of(
        """main (float[N,8] x) => (float[N,5] y) <float s = {0.05}, uint8 z = {128}> {
        q = QuantizeLinear (x, s, z)
        a = DequantizeLinear (q, s, z)
        w = DequantizeLinear <axis = 0> (w_q, w_s, w_z)
        t = Transpose <perm = [1, 0]> (w)
        m = MatMul (a, t)
        r = QuantizeLinear (m, s, z)
        y = DequantizeLinear (r, s, z)
        }"""
    )
    source.graph.initializer.extend(
        [
            from_array(rng.integers(-60, 60, (5, 8)).astype(np.int8), "w_q"),
            from_array(rng.uniform(0.01, 0.02, 5).astype(np.float32), "w_s"),
            from_array(np.zeros(5, np.int8), "w_z"),
        ]
    )
    made = support.final(support.run_passes(source, "move-qdq", context))
    assert "QLinearMatMul" in optimized(made, tmp_path)
    assert "Transpose" not in [node.op_type for node in made.graph.node]
    assert made.ByteSize() <= source.ByteSize()
    assert_kept(source, made)


SHAPES = {
    (0, 2, 1): (3, 5, 4),
    (1, 0, 2): (4, 3, 5),
    (2, 0, 1): (5, 3, 4),
    (2, 1, 0): (5, 4, 3),
}


@pytest.mark.parametrize("perm", SHAPES)
@pytest.mark.parametrize("axis", [-3, -2, -1, 0, 1, 2])
def test_scales_follow_their_axis(
    perm: tuple[int, ...], axis: int, context: Context
) -> None:
    """Through every Transpose, from either end; the sizes tell the axes apart."""
    channels = (3, 4, 5)[axis]
    source = support.model_of(
        f"""main (float[1] x) => (float{list(SHAPES[perm])} y) {{
        w = DequantizeLinear <axis = {axis}> (w_q, w_s, w_z)
        t = Transpose <perm = {list(perm)}> (w)
        y = Add (t, x)
        }}"""
    )
    rng = np.random.default_rng(0)
    source.graph.initializer.extend(
        [
            from_array(rng.integers(-99, 99, (3, 4, 5)).astype(np.int8), "w_q"),
            from_array(rng.uniform(0.01, 0.02, channels).astype(np.float32), "w_s"),
            from_array(rng.integers(-9, 9, channels).astype(np.int8), "w_z"),
        ]
    )
    made = support.run_passes(source, "move-qdq", context)
    assert support.op_types(made) == ["DequantizeLinear", "Add"]
    assert_kept(source, support.final(made))


RESHAPES = list(
    itertools.chain.from_iterable(
        [(old, new, axis) for axis in range(len(old))]
        for old, new in [
            ((4, 6), (4, 2, 3)),
            ((4, 6), (2, 2, 6)),
            ((4, 6), (6, 4)),
            ((4, 6), (1, 4, 6, 1)),
            ((2, 3, 4), (6, 4)),
            ((2, 3, 4), (2, 12)),
            ((4, 1, 4), (1, 4, 4)),
            ((2, 2, 2), (2, 2, 2, 1)),
        ]
    )
)


@pytest.mark.parametrize(("old", "new", "axis"), RESHAPES)
def test_scales_follow_a_reshape(
    old: tuple[int, ...], new: tuple[int, ...], axis: int, context: Context
) -> None:
    """Where their axis survives, equal sizes beside it or not; else it is declined."""
    source = support.model_of(
        f"""main (float[1] x) => (float{list(new)} y) <int64[{len(new)}] shape =
        {{{", ".join(map(str, new))}}}> {{
        w = DequantizeLinear <axis = {axis}> (w_q, w_s, w_z)
        t = Reshape (w, shape)
        y = Add (t, x)
        }}"""
    )
    rng = np.random.default_rng(0)
    source.graph.initializer.extend(
        [
            from_array(rng.integers(-99, 99, old).astype(np.int8), "w_q"),
            from_array(rng.uniform(0.01, 0.02, old[axis]).astype(np.float32), "w_s"),
            from_array(rng.integers(-9, 9, old[axis]).astype(np.int8), "w_z"),
        ]
    )
    made = support.run_passes(source, "move-qdq", context)
    assert bool(made.ledger.edits) != bool(support.skips(made))
    assert_kept(source, support.final(made))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["transpose", "pool", "slice", "pad", "tile", "concat"]),
            st.sampled_from(["", "q", "q2", "conv", "sigmoid"]),
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["onnx", "ort-cpu-x86", "tensorrt"]),
)
def test_chains(context: Context, steps: list[tuple[str, str]], name: str) -> None:
    """Movers with pairs of equal and of other parameters, and layers, in between."""
    lines, value = [CONV], "c"
    for number, (mover, between) in enumerate(steps):
        lines.append(applied(mover, value, f"m{number}"))
        value = f"m{number}"
        if between.startswith("q"):
            scale = "s2" if between == "q2" else "s"
            lines.append(f"q{number} = QuantizeLinear ({value}, {scale}, z)")
            lines.append(f"d{number} = DequantizeLinear (q{number}, {scale}, z)")
            value = f"d{number}"
        elif between == "sigmoid":
            lines.append(f"g{number} = Sigmoid ({value})")
            value = f"g{number}"
    lines.append(f"y = Neg ({value})")
    source = model("\n".join(lines))
    ours = Context(target=target(name), evaluator=context.evaluator)
    made = support.run_passes(source, PIPELINE, ours)
    proto = support.final(made)
    assert_kept(source, proto)
    assert support.run_passes(proto, PIPELINE, ours).ledger.edits == 0
