"""Made-up feeds reach what hides: other branches, padding, large sizes, no variance."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto as T
from onnx import numpy_helper

from onnxopt.data import GeneratedFeeds, InputSpec, generate_feeds, input_specs
from onnxopt.data.generate import ragged, realistic
from onnxopt.data.ranges import telling_values
from onnxopt.report import Validation
from onnxopt.validation.hard import hard_feed
from onnxopt.validation.judge import judge
from onnxopt.validation.samples import numbered


def parsed(body: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{body}')
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def made(model: onnx.ModelProto, count: int = 8) -> GeneratedFeeds:
    return generate_feeds(input_specs(model), model=model, count=count)


def judged(
    folder: Path, reference: onnx.ModelProto, candidate: onnx.ModelProto
) -> Validation:
    paths = folder / "reference.onnx", folder / "candidate.onnx"
    for model, path in zip((reference, candidate), paths, strict=True):
        onnx.save(model, path)
    return judge(*paths, feeds=made(reference))


# --- values beside what they are compared with -----------------------------------------


@pytest.mark.parametrize(
    ("body", "values"),
    [
        ("y = Equal (i, five)", [5, 6]),
        ("y = Less (i, five)", [4, 5, 6]),
        ("y = GreaterOrEqual (five, i)", [4, 5, 6]),
        ("f = Cast <to = 1> (i) \n y = Greater (f, half)", [0, 1]),
        ("a = Constant <value_ints = [0]> () \n u = Unsqueeze (i, a) \n"
         "s = Squeeze (u, a) \n d = Identity (s) \n c = Identity (five) \n"
         "y = Equal (d, c)", [5, 6]),
        ("c = Constant <value_int = 3> () \n y = Equal (i, c)", [3, 4]),
        ("y = Cast <to = 9> (i)", [0, 1]),
        ("c = Clip (i, , five) \n y = Cast <to = 1> (c)", [4, 5, 6]),
        ("c = Constant <value = int64 {9223372036854775807}> () \n y = Less (i, c)", []),
        ("y = Equal (i, i)", []),
    ],
)  # fmt: skip
def test_integers_are_traced_to_what_they_are_compared_with(
    body: str, values: list[int]
) -> None:
    model = parsed(
        f"g (int64 i) => (bool y) {{ {body} }}",
        five=np.array(5),
        half=np.array(0.5, np.float32),
    )
    assert telling_values(model, ["i"]).get("i", []) == values


def test_floats_stay_clear_of_the_constant() -> None:
    model = parsed(
        "g (float x) => (bool y) { y = Less (x, c) }", c=np.array(4, np.float32)
    )
    assert telling_values(model, [], ["x"]) == {"x": [2.0, 6.0]}
    assert {float(feed["x"]) for feed in made(model)} == {2.0, 6.0}


def test_a_table_of_constants_is_thinned_and_keeps_its_ends() -> None:
    model = parsed(
        "g (int64[N] i) => (bool[N] y) { y = Equal (i, c) }", c=np.arange(9000)
    )
    values = telling_values(model, ["i"])["i"]
    assert (values[0], values[-1]) == (0, 9000)
    assert len(values) < 1100


def branching(scale: float = 1.0) -> onnx.ModelProto:
    """Twice x in one mode; in another, known inside that branch only, `scale` times."""
    return parsed(
        f"""g (float[N] x, int64 mode) => (float[N] y)
          <int64 three = {{3}}, int64 seven = {{7}}, float two = {{2}},
           float scale = {{{scale}}}> {{
          is3 = Equal (mode, three)
          y = If (is3) <
            then_branch = a () => (float[N] p) {{ p = Mul (x, two) }},
            else_branch = b () => (float[N] q) {{
              m = Identity (mode)
              is7 = Equal (m, seven)
              q = If (is7) <
                then_branch = c () => (float[N] r) {{ r = Mul (x, scale) }},
                else_branch = d () => (float[N] s) {{ s = Neg (x) }}
              >
            }}
          >
        }}"""
    )


def test_a_branch_of_a_branch_is_reached(tmp_path: Path) -> None:
    assert made(branching()).settings() == [{"mode[]": mode} for mode in (3, 4, 7, 8)]
    assert judged(tmp_path, branching(), branching()).status == "passed"
    verdict = judged(tmp_path, branching(), branching(1.1))
    assert verdict.status == "failed"


def test_a_setting_gets_the_sizes_that_it_allows(tmp_path: Path) -> None:
    reference = parsed(
        """g (float[2, L] x, int64 sr) => (float y)
          <int64 fast = {16000}, int64[1] eight = {8}, int64[1] seven = {7}> {
          is16 = Equal (sr, fast)
          y = If (is16) <
            then_branch = a () => (float p) {
              c = ConstantOfShape (seven) \n r = Add (x, c) \n p = ReduceSum (r)
            },
            else_branch = b () => (float q) {
              d = ConstantOfShape (eight) \n t = Add (x, d) \n q = ReduceMax (t)
            }
          >
        }"""
    )
    wrong = copy.deepcopy(reference)
    wrong.graph.node[1].attribute[1].g.node[2].op_type = "ReduceMin"
    assert judged(tmp_path, reference, reference).status == "passed"
    verdict = judged(tmp_path, reference, wrong)
    assert verdict.status == "failed"
    assert any("sr=8000" in note and "sr=16000" in note for note in verdict.notes)


def test_flags_take_all_combinations() -> None:
    flags = [InputSpec(name, T.BOOL, ()) for name in ("a", "b")]
    feeds = generate_feeds(flags)
    assert len(feeds.settings()) == 4
    feeds = feeds.with_bindings(feeds.settings())
    assert len({(bool(f["a"]), bool(f["b"])) for f in feeds}) == 4
    many = generate_feeds([InputSpec(f"f{i}", T.BOOL, (1,)) for i in range(9)]).settings()
    assert len(many) == 8
    assert all(len({row[name] for row in many}) == 2 for name in many[0])


def test_rates_are_round_numbers() -> None:
    model = parsed("g (int64 sr) => (bool y) { y = Equal (sr, c) }", c=np.array(22050))
    assert [s["sr[]"] for s in made(model).settings()] == [16000, 8000, 22050]


def test_elements_of_an_array_lie_on_both_sides() -> None:
    """A padding id, of which a table of thousands would rarely give one."""
    model = parsed(
        """g (int64[2, 40] ids) => (float[2, 40, 1] y, bool[2, 40] pad) {
          y = Gather (table, ids)
          pad = Equal (ids, one)
        }""",
        table=np.zeros((9000, 1), np.float32),
        one=np.array(1),
    )
    for feed in made(model):
        ids = feed["ids"]
        assert (ids == 1).any()
        assert (ids != 1).any()
    everything = np.concatenate([feed["ids"] for feed in made(model)])
    assert (everything.min(), everything.max()) == (0, 8999)


def test_values_that_the_reference_refuses_are_made_anew(tmp_path: Path) -> None:
    """300 is compared with, and no row of the table that shape inference cannot see."""
    model = parsed(
        """g (int64[6] ids) => (int64[6] y, bool[6] z) <int64[1] n = {20}> {
          zeros = ConstantOfShape (n)
          ones = Equal (zeros, zeros)
          found = NonZero (ones)
          table = Reshape (found, open)
          y = Gather (table, ids)
          z = Equal (ids, odd)
        }""",
        odd=np.array(300),
        open=np.array([-1]),
    )
    feeds = made(model)
    assert any((feed["ids"] >= 20).any() for feed in feeds)
    verdict = judged(tmp_path, model, model)
    assert (verdict.status, verdict.feeds) == ("passed", 8)


# --- sizes -----------------------------------------------------------------------------


def test_bindings_meet_every_kind_of_values() -> None:
    feeds = generate_feeds([InputSpec("x", T.FLOAT, ("N",))])
    for size in (1, 2, 3, 4, 5):
        feeds = feeds.with_bindings([{"N": n} for n in range(size)])
        met = [(feeds.binding(i)["N"], i % 4) for i in range(4 * size)]
        assert len(set(met)) == len(met)
        assert {n for n, _ in met[: max(size, 4)]} == set(range(size))


def test_ragged_sizes() -> None:
    sound = [InputSpec("x", T.FLOAT, ("N", "L"))]
    assert ragged(sound, {"N": 2, "L": 512}) == [{"N": 1, "L": 576}, {"N": 1, "L": 641}]
    image = [InputSpec("x", T.FLOAT, ("N", 3, "H", "W"))]
    for binding in ragged(image, {"N": 1, "H": 64, "W": 96}):
        assert binding["H"] % 16
        assert binding["W"] % 8
    assert ragged([InputSpec("x", T.FLOAT, ("N", 3))], {"N": 2}) == []


def test_realistic_sizes() -> None:
    image = [InputSpec("x", T.FLOAT, ("N", 3, "H", "W"))]
    assert realistic(image)[0] == {"N": 1, "H": 224, "W": 224}
    assert realistic([InputSpec("x", T.FLOAT, ("N", 3))]) == []


def padded(mode: str) -> onnx.ModelProto:
    """The padding at the end is read where half a stride is left over, as at 576."""
    return parsed(
        f"""g (float[1, 1, L] x) => (float[1, 1, M] y)
          <int64[6] pads = {{0, 0, 0, 0, 0, 64}}> {{
          p = Pad <mode = "{mode}"> (x, pads)
          y = Conv <strides = [128]> (p, w)
        }}""",
        w=np.ones((1, 1, 256), np.float32),
    )


def test_padding_is_read(tmp_path: Path) -> None:
    verdict = judged(tmp_path, padded("reflect"), padded("edge"))
    assert verdict.status == "failed"
    assert "feed" in (verdict.reason or "")


def pooled(kernel: int) -> onnx.ModelProto:
    """A pooling window that covers all that 32 leaves of a small image."""
    return parsed(
        f"""g (float[N, 3, H, W] x) => (float[N, 3, P, Q] y) {{
          s = AveragePool <kernel_shape = [32, 32], strides = [32, 32]> (x)
          y = MaxPool <kernel_shape = [{kernel}, {kernel}], strides = [1, 1],
                       pads = [{kernel // 2}, {kernel // 2}, {kernel // 2},
                               {kernel // 2}]> (s)
        }}"""
    )


def test_a_realistic_size_tells_windows_apart(tmp_path: Path) -> None:
    verdict = judged(tmp_path, pooled(9), pooled(7))
    assert verdict.status == "failed"


def test_a_realistic_size_that_costs_too_much_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parsed(
        "g (float[N, 3, H, W] x) => (float[N, 8, P, Q] y) { y = Conv (x, w) }",
        w=np.ones((8, 3, 3, 3), np.float32),
    )
    notes = judged(tmp_path, model, model).notes
    assert any("H=224" in note for note in notes)
    monkeypatch.setattr(
        "onnxopt.validation.judge._REALISTIC_MACS", 222 * 222 * 8 * 27 - 1
    )
    notes = judged(tmp_path, model, model).notes
    assert any("H=64" in note and "H=224" not in note for note in notes)


# --- hard cases ------------------------------------------------------------------------


def test_constant_case_leaves_masks_alone() -> None:
    feed = {
        "ids": np.array([[3, 5]]),
        "x": np.array([0.5, 2.0], np.float32),
        "attention_mask": np.array([[1, 0]]),
        "text": np.array(["a", "b"], dtype=object),
        "sr": np.array(8000),
    }
    hard = hard_feed("constant", feed)
    assert hard is not None
    assert hard["ids"].tolist() == [[3, 3]]
    assert hard["x"].tolist() == [0.5, 0.5]
    assert hard["attention_mask"].tolist() == [[1, 0]]
    assert hard["text"].tolist() == ["a", "a"]
    assert hard["sr"] == 8000
    assert hard_feed("constant", {"sr": np.array(8000)}) is None


def test_lowest_and_highest_keep_to_known_ranges() -> None:
    model = parsed(
        """g (int64[2, 6] ids, int64[2, 6] free, uint8[3] pixels)
           => (float[2, 6, 4] y) { y = Gather (table, ids) }""",
        table=np.zeros((50, 4), np.float32),
    )
    cases = {at.kind: at.feed for at in numbered(made(model), hard=True)}
    for kind, index, byte in (("lowest", 0, 0), ("highest", 49, 255)):
        assert set(cases[kind]["ids"].flat) == {index}
        assert set(cases[kind]["pixels"]) == {byte}
        assert np.array_equal(cases[kind]["free"], next(iter(made(model)))["free"])


def test_hard_cases_of_every_setting_and_of_one_sample() -> None:
    feeds = made(branching())
    feeds = feeds.with_bindings([{"N": 5, "mode[]": mode} for mode in (3, 7)])
    zeros = [at.feed["mode"] for at in numbered(feeds, hard=True) if at.kind == "zeros"]
    assert [int(mode) for mode in zeros] == [3, 7]
    plain = generate_feeds([InputSpec("x", T.FLOAT, ("N", 9))])
    plain = plain.with_bindings([{"N": 2}, {"N": 1}])
    shapes = [at.feed["x"].shape for at in numbered(plain, True) if at.kind == "constant"]
    assert shapes == [(2, 9), (1, 9)]
    numbers = [at.index for at in numbered(plain, hard=True)]
    assert numbers == list(range(len(numbers)))


def test_no_variance_at_all_is_met(tmp_path: Path) -> None:
    """x / |x - mean|, guarded or not: NaN where all ids are alike, and nowhere else."""

    def model(guard: float) -> onnx.ModelProto:
        return parsed(
            f"""g (int64[N, 6] ids) => (float[N, 1] y) <float guard = {{{guard}}}> {{
              e = Cast <to = 1> (ids)
              m = ReduceMean <axes = [1]> (e)
              d = Sub (e, m)
              a = Abs (d)
              s = ReduceMax <axes = [1]> (a)
              n = ReduceSumSquare <axes = [1]> (d)
              t = Max (s, guard)
              y = Div (n, t)
            }}"""
        )

    verdict = judged(tmp_path, model(1e-6), model(0.0))
    assert verdict.status == "failed"
    assert "hard case 'constant'" in (verdict.reason or "")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("y = Abs (i)", "y = Identity (i)"),
        ("c = Cast <to = 3> (i) \n y = Cast <to = 7> (c)", "y = Identity (i)"),
        ("y = Mod <fmod = 0> (i, three)", "y = Mod <fmod = 1> (i, three)"),
    ],
    ids=["negative", "more-than-a-byte", "sign-of-a-remainder"],
)
def test_integers_of_which_nothing_is_known_go_far(
    tmp_path: Path, right: str, wrong: str
) -> None:
    one, two = (
        parsed(f"g (int64[N, 8] i) => (int64[N, 8] y) {{ {body} }}", three=np.array(3))
        for body in (right, wrong)
    )
    assert judged(tmp_path, one, one).status == "passed"
    assert judged(tmp_path, one, two).status == "failed"
