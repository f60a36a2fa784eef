"""Feeds: every form of data, every way in which it can be wrong, and made-up feeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from onnxopt.data import (
    Feeds,
    InputSpec,
    candidate_bindings,
    generate_feeds,
    input_specs,
    load_feeds,
    parse_shape,
)
from onnxopt.errors import UsageError

X = InputSpec("x", T.FLOAT, ("N", 3))
IDS = InputSpec("ids", T.INT64, ("N",))


def floats(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def parsed(body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{body}')


# --- inputs --------------------------------------------------------------------------


def test_input_specs_leave_out_what_has_a_default() -> None:
    model = parsed(
        """g (float[N, 3, 2] x, float[3] w, seq(int64[?]) s, optional(bool[2]) o)
           => (float[N, 3, 2] y) { y = Identity (x) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(floats(3), "w"))
    assert input_specs(model) == [
        InputSpec("x", T.FLOAT, ("N", 3, 2)),
        InputSpec("s", T.INT64, (None,), "sequence"),
        InputSpec("o", T.BOOL, (2,), "optional"),
    ]


@pytest.mark.parametrize(
    "text", ["x:1,3,224,224", "x:[1,3,224,224]", "x:[1, 3, 224, 224]"]
)
def test_parse_shape(text: str) -> None:
    assert parse_shape(text) == ("x", (1, 3, 224, 224))


def test_parse_shape_of_names_with_colons_and_of_scalars() -> None:
    assert parse_shape("input:0:2,3") == ("input:0", (2, 3))
    assert parse_shape("x:[]") == ("x", ())


@pytest.mark.parametrize("text", ["x", "x:a", "x:1,,2", ":1", "x:[1", "x:-1", "x:1.5"])
def test_parse_shape_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="is no shape"):
        parse_shape(text)


# --- forms of data -------------------------------------------------------------------


def test_npz_is_cut_along_axis_0(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=floats(5, 3), ids=np.arange(5))
    feeds = load_feeds(tmp_path / "d.npz", [X, IDS])
    assert [feed["x"].tolist() for feed in feeds] == [
        [row] for row in floats(5, 3).tolist()
    ]
    feeds = load_feeds(str(tmp_path / "d.npz"), [X, IDS], batch_size=2)
    assert [len(feed["ids"]) for feed in feeds] == [2, 2, 1]


def test_npz_follows_a_fixed_batch_and_serves_scalars_to_all(tmp_path: Path) -> None:
    fixed = InputSpec("x", T.FLOAT, (2, 3))
    rate = InputSpec("sr", T.INT64, ())
    np.savez(tmp_path / "d.npz", x=floats(4, 3), sr=np.array(16000))
    feeds = list(load_feeds(tmp_path / "d.npz", [fixed, rate]))
    assert [feed["x"].shape for feed in feeds] == [(2, 3), (2, 3)]
    assert [int(feed["sr"]) for feed in feeds] == [16000, 16000]
    with pytest.raises(UsageError, match=r"batch size 3, but input 'x' takes \[2,3\]"):
        load_feeds(tmp_path / "d.npz", [fixed, rate], batch_size=3)


def test_npz_with_one_axis_more_holds_a_feed_per_index(tmp_path: Path) -> None:
    state = InputSpec("state", T.FLOAT, (2, "N", 4))
    np.savez(tmp_path / "d.npz", x=floats(3, 3), state=floats(3, 2, 1, 4))
    shapes = [feed["state"].shape for feed in load_feeds(tmp_path / "d.npz", [X, state])]
    assert shapes == [(2, 1, 4)] * 3


def test_npz_keeps_bfloat16_and_strings(tmp_path: Path) -> None:
    specs = [InputSpec("b", T.BFLOAT16, ("N",)), InputSpec("t", T.STRING, ("N",))]
    np.savez(
        tmp_path / "d.npz",
        b=np.array([1.5], ml_dtypes.bfloat16),
        t=np.array(["word"]),
    )
    (feed,) = load_feeds(tmp_path / "d.npz", specs)
    assert feed["b"].dtype == ml_dtypes.bfloat16
    assert float(feed["b"][0]) == 1.5
    assert feed["t"].tolist() == ["word"]
    assert feed["t"].dtype == object


def test_folder_is_read_file_by_file(tmp_path: Path) -> None:
    for index in range(3):
        np.savez(tmp_path / f"{index}.npz", x=floats(2, 3) + index)
    feeds = load_feeds(tmp_path, [X])
    assert [feed["x"][0, 0] for feed in feeds] == [0, 1, 2]
    iterator = iter(feeds)
    next(iterator)
    (tmp_path / "1.npz").unlink()
    with pytest.raises(UsageError, match=r"1\.npz"):
        next(iterator)


def test_onnx_test_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "test_data_set_0"
    folder.mkdir()
    save(folder / "input_0.pb", numpy_helper.from_array(floats(1, 3)))
    save(folder / "input_1.pb", numpy_helper.from_array(np.array([7]), "ids"))
    sequence = numpy_helper.from_list([floats(2)])
    save(folder / "input_2.pb", sequence)
    specs = [X, IDS, InputSpec("s", T.FLOAT, (None,), "sequence")]
    for place in (folder, tmp_path):
        (feed,) = load_feeds(place, specs)
        assert feed["x"].shape == (1, 3)
        assert feed["ids"].tolist() == [7]
        assert feed["s"][0].tolist() == [0, 1]


def save(path: Path, proto: Any) -> None:
    path.write_bytes(proto.SerializeToString())


def test_script_function_is_called_afresh(tmp_path: Path) -> None:
    script = tmp_path / "calib.py"
    script.write_text(
        "import numpy as np\nimport beside\n"
        "def feeds():\n"
        "    for i in range(beside.COUNT):\n"
        "        yield {'x': np.full((1, 3), i, np.float32)}\n"
        "def broken():\n    yield {'x': 1 / 0}\n"
    )
    (tmp_path / "beside.py").write_text("COUNT = 2")
    feeds = load_feeds(f"{script}:feeds", [X])
    assert [feed["x"][0, 0] for feed in feeds] == [0, 1]
    assert [feed["x"][0, 0] for feed in feeds] == [0, 1]
    with pytest.raises(UsageError, match="broken raised ZeroDivisionError"):
        load_feeds(f"{script}:broken", [X])


def test_python_iterables_readers_and_generators() -> None:
    feed = {"x": floats(1, 3)}

    class Reader:
        left = 2

        def get_next(self) -> dict | None:
            self.left -= 1
            return feed if self.left >= 0 else None

    def generator() -> Iterator[dict]:
        yield feed
        yield feed

    for data in ([feed, feed], (f for f in [feed, feed]), Reader(), generator):
        feeds = load_feeds(data, [X])
        assert len(list(feeds)) == 2
        assert len(list(feeds)) == 2
    assert len(list(load_feeds(feed, [X]))) == 1
    assert len(list(load_feeds(load_feeds([feed], [X]), [X]))) == 1


# --- what is wrong with data -----------------------------------------------------------


@pytest.mark.parametrize(
    ("feed", "said"),
    [
        ({"y": floats(1, 3)}, "'y' is no input of the model (it has 'x')"),
        ({"x": floats(1, 3), "label": floats(1)}, "'label' is no input"),
        ({}, "input 'x' is missing"),
        (
            {"x": floats(1, 3).astype(np.float64)},
            "'x' is float64, the model takes float32",
        ),
        ({"x": floats(3)}, "'x' has shape [3], the model takes [N,3]"),
        ({"x": floats(1, 4)}, "'x' has shape [1,4], the model takes [N,3]"),
        ({"x": floats(0, 3)}, "'x' is empty (shape [0,3])"),
        ({"x": [[1.0, 2.0, 3.0]]}, "'x' is a list, not a numpy array"),
        ([floats(1, 3)], "a feed is a dict of input name to array, not list"),
    ],
)
def test_wrong_feeds_name_the_input(feed: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_feeds([feed], [X])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_later_feeds_are_checked_on_the_way() -> None:
    feeds = load_feeds([{"x": floats(1, 3)}, {"x": floats(1, 2)}], [X])
    iterator = iter(feeds)
    next(iterator)
    with pytest.raises(UsageError, match=r"data\[1\]: input 'x'"):
        next(iterator)


def test_nan_is_refused_only_where_asked() -> None:
    feed = {"x": np.full((1, 3), np.nan, np.float32)}
    load_feeds([feed], [X])
    with pytest.raises(UsageError, match="'x' holds NaN"):
        load_feeds([feed], [X], allow_nan=False)


def test_no_feeds_at_all() -> None:
    with pytest.raises(UsageError, match="holds no feeds"):
        load_feeds([], [X])


def test_unreadable_data(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.txt").write_text("x")
    (tmp_path / "code.py").write_text("raise OSError('no')")
    folder = tmp_path / "test_data_set_0"
    folder.mkdir()
    (folder / "input_0.pb").write_bytes(b"\xff\xff\xff")
    for spec, said in {
        "bad.npz": "not a readable .npz",
        "absent.npz": "no such file",
        "empty": "neither .npz nor input_",
        "data.txt": "give a .npz file",
        "code.py:f": "code.py raised OSError",
        "absent.py:f": "no file",
        "test_data_set_0": "input_0.pb",
    }.items():
        with pytest.raises(UsageError) as caught:
            load_feeds(str(tmp_path / spec), [X])
        assert said in str(caught.value), spec
        assert "\n" not in str(caught.value)


def test_npz_with_pickles_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UsageError, match="not a readable"):
        load_feeds(tmp_path / "d.npz", [X])


def test_arrays_of_different_lengths(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=floats(4, 3), ids=np.arange(3))
    with pytest.raises(UsageError, match="'x' 4, 'ids' 3"):
        load_feeds(tmp_path / "d.npz", [X, IDS])


def test_one_shot_iterator_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxopt.data.load._DRAIN_LIMIT", 100)
    with pytest.raises(UsageError, match="fresh iterator"):
        load_feeds(iter([{"x": floats(10, 3)}]), [X])


# --- made-up feeds -------------------------------------------------------------------


def test_feeds_depend_on_seed_name_and_index_alone() -> None:
    alone = list(generate_feeds([X]))
    with_ids = list(generate_feeds([IDS, X]))
    for one, two in zip(alone, with_ids, strict=True):
        assert np.array_equal(one["x"], two["x"])
    again = generate_feeds([X])
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(alone, again, strict=True))
    assert not np.array_equal(alone[0]["x"], next(iter(generate_feeds([X], seed=1)))["x"])
    assert not np.array_equal(alone[0]["x"][0], alone[1]["x"][0])


def test_symbols_are_shared_and_take_one_and_more() -> None:
    specs = [
        InputSpec("a", T.FLOAT, ("N", "L", 4)),
        InputSpec("b", T.INT32, ("N", "L")),
        InputSpec("c", T.FLOAT, ("N", "N + L", None)),
    ]
    seen = set()
    for feed in generate_feeds(specs):
        count, length, _ = feed["a"].shape
        assert feed["b"].shape == (count, length)
        assert feed["c"].shape[:2] == (count, count + length)
        seen.add((count, length))
    assert {1} < {count for count, _ in seen}
    assert {1} < {length for _, length in seen}


def test_first_binding_tells_axes_apart() -> None:
    (spec,) = [InputSpec("x", T.FLOAT, ("N", 3, "H", "W"))]
    first = candidate_bindings([spec])[0]
    assert len(set(first.values())) == 3


def test_given_shapes_bind_symbols_everywhere() -> None:
    specs = [X, InputSpec("mask", T.INT64, ("N", 2))]
    for feed in generate_feeds(specs, shapes={"x": (6, 3)}):
        assert feed["x"].shape == (6, 3)
        assert feed["mask"].shape == (6, 2)
    with pytest.raises(UsageError, match=r"'x' takes \[N,3\], not \[6,4\]"):
        generate_feeds(specs, shapes={"x": (6, 4)})
    with pytest.raises(UsageError, match="'z' is no input"):
        generate_feeds(specs, shapes={"z": (1,)})


def table(name: str, *dims: int) -> onnx.TensorProto:
    return numpy_helper.from_array(floats(*dims), name)


@pytest.mark.parametrize(
    ("body", "high"),
    [
        ("y = Gather (t, i)", 5),
        ("y = Gather <axis = 1> (t, i)", 4),
        ("c = Cast <to = 6> (i) \n y = Gather (t, c)", 5),
        ("a = Constant <value = int64[1] {0}> () \n u = Unsqueeze (i, a) \n"
         "v = Squeeze (u, a) \n y = Gather (t, v)", 5),
        ("s = Constant <value = int64[2] {-1, 1}> () \n r = Reshape (i, s) \n"
         "y = GatherND (t, r)", 5),
        ("d = Identity (t) \n y = Gather (d, i)", 5),
        ("d = Transpose <perm = [1, 0]> (t) \n y = Gather (d, i)", 4),
        ("d = Constant <value = int64 {3}> () \n"
         "v = Constant <value = float[2] {0, 1}> () \n y = OneHot (i, d, v)", 3),
        ("y = Gather (t, i) \n z = Gather <axis = 1> (t, i)", 4),
    ],
)  # fmt: skip
def test_integers_stay_in_the_range_of_what_they_index(body: str, high: int) -> None:
    model = parsed(f"g (int64[N] i) => (float[?] y) {{ {body} }}")
    model.graph.initializer.append(table("t", 5, 4))
    feeds = generate_feeds(input_specs(model), model=model, count=40)
    values = np.concatenate([feed["i"] for feed in feeds])
    assert values.min() == 0
    assert values.max() == high - 1


def test_range_is_traced_into_subgraphs_and_symbols() -> None:
    model = parsed(
        """g (bool c, int64[K] i, float[L, 2] t) => (float[?] y) {
          y = If (c) <
            then_branch = a () => (float[?] p) { p = Gather (t, i) },
            else_branch = b () => (float[?] q) { q = Identity (t) }
          >
        }"""
    )
    for feed in generate_feeds(input_specs(model), model=model, count=20):
        assert feed["i"].max() < feed["t"].shape[0]


def test_names_and_types_shape_the_values() -> None:
    specs = [
        InputSpec("attention_mask", T.INT64, (2, 6)),
        InputSpec("float_mask", T.FLOAT, (2, 6)),
        InputSpec("sr", T.INT64, ()),
        InputSpec("flag", T.BOOL, (50,)),
        InputSpec("pixels", T.UINT8, (500,)),
        InputSpec("text", T.STRING, (9,)),
        InputSpec("half", T.FLOAT16, (5,)),
        InputSpec("brain", T.BFLOAT16, (5,)),
        InputSpec("nibble", T.INT4, (500,)),
        InputSpec("many", T.FLOAT, (2,), "sequence"),
    ]
    for feed in generate_feeds(specs):
        for name in ("attention_mask", "float_mask"):
            assert set(np.unique(feed[name])) <= {0, 1}
            assert feed[name][:, 0].all()
        assert feed["sr"] in (16000, 8000)
        assert set(feed["flag"]) == {False, True}
        assert feed["pixels"].max() > 200
        assert all(isinstance(word, str) for word in feed["text"])
        assert feed["half"].dtype == np.float16
        assert feed["brain"].dtype == ml_dtypes.bfloat16
        nibbles = feed["nibble"].astype(int)
        assert (nibbles.min(), nibbles.max()) == (-8, 7)
        assert isinstance(feed["many"], list)


def test_inputs_that_cannot_be_made_up() -> None:
    with pytest.raises(UsageError, match="'m' is a map"):
        generate_feeds([InputSpec("m", 0, None, "map")])


def test_generated_feeds_pass_their_own_check() -> None:
    value = helper.make_tensor_value_info("x", T.FLOAT, ["N", None, 3])
    graph = helper.make_graph([], "g", [value], [])
    specs = input_specs(helper.make_model(graph))
    feeds = generate_feeds(specs)
    assert isinstance(feeds, Feeds)
    assert len(list(load_feeds(feeds, specs))) == 8
