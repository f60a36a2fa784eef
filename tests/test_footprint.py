"""The least memory of a run against sums by hand, and refusals before anything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import onnxopt
from onnxopt.errors import WorkerMemoryError
from onnxopt.runtime import Session
from onnxopt.validation import footprint
from onnxopt.validation.footprint import Footprint

KIB = 256
"""Elements of float32 in a KiB."""


def of(folder: Path, body: str) -> Footprint:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{body}')
    path = folder / "model.onnx"
    onnx.save(model, path)
    return Footprint(path)


def peak(folder: Path, body: str, *shape: int) -> int:
    """Of a run on one float input `x` of so many elements."""
    return of(folder, body).peak({"x": np.zeros(shape, np.float32)})


# --- sums by hand ----------------------------------------------------------------------


def test_a_chain_writes_over_itself(tmp_path: Path) -> None:
    """Inputs are the caller's; of three values of the same size one room is enough."""
    body = "g (float[256] x) => (float[256] y) { a = Exp (x) b = Exp (a) y = Exp (b) }"
    assert peak(tmp_path, body, KIB) == 1024


def test_a_value_that_others_read_stays(tmp_path: Path) -> None:
    body = "g (float[256] x) => (float[256] y) { a = Exp (x) b = Exp (a) y = Add (a, b) }"
    assert peak(tmp_path, body, KIB) == 2048


def test_values_of_other_sizes_need_rooms_of_their_own(tmp_path: Path) -> None:
    """1 KiB grows to 2 of doubles: both are there while the one becomes the other."""
    body = """g (float[256] x) => (double[256] y) {
      a = Exp (x) y = Cast <to = 11> (a) }"""
    assert peak(tmp_path, body, KIB) == 1024 + 2048


def test_outputs_live_on(tmp_path: Path) -> None:
    body = """g (float[256] x) => (float[256] a, float[256] b, float[256] c) {
      a = Exp (x) b = Exp (a) c = Exp (b) }"""
    assert peak(tmp_path, body, KIB) == 3 * 1024


@pytest.mark.parametrize(
    ("body", "kib"),
    [
        ("v = Reshape (x, s) y = Identity (v)", 0),
        ("a = Exp (x) v = Reshape (a, s) y = Identity (v)", 1),
        ("a = Exp (x) v = Reshape (a, s) b = Exp (v) y = Add (b, a)", 2),
        # A view of a view, while the value itself is still read.
        ("a = Exp (x) v = Reshape (a, s) w = Identity (v) y = Add (w, a)", 1),
    ],
    ids=["input", "last", "other", "twice"],
)
def test_views_take_no_memory(tmp_path: Path, body: str, kib: int) -> None:
    body = f"g (float[256] x) => (float[256] y) <int64[1] s = {{256}}> {{ {body} }}"
    assert peak(tmp_path, body, KIB) == kib * 1024


def test_symbolic_dims_take_the_sizes_of_the_feed(tmp_path: Path) -> None:
    made = of(
        tmp_path,
        """g (float[N, 4] x, float[M] z) => (float[N, N] y) {
          t = Transpose <perm = [1, 0]> (x) m = MatMul (x, t) y = Exp (m) }""",
    )
    for n in (1, 3, 100):
        feed = {"x": np.zeros((n, 4), np.float32), "z": np.zeros(9, np.float32)}
        assert made.peak(feed) == 4 * (4 * n + n * n)


def test_subgraphs_count_nothing_and_what_they_read_stays(tmp_path: Path) -> None:
    body = """g (float[256] x, bool c) => (float[256] y) {
      a = Exp (x) b = Sin (a) d = Cos (b)
      y = If (c) <
        then_branch = p () => (float[256] t) {
          t1 = Exp (a) t2 = Exp (d) t3 = Sin (d) t4 = Add (t1, t2) t = Add (t3, t4) },
        else_branch = q () => (float[256] e) { e = Exp (a) }
      > }"""
    assert peak(tmp_path, body, KIB) == 2 * 1024


def test_unknown_shapes_count_nothing(tmp_path: Path) -> None:
    body = "g (float[N] x) => (int64[1, M] y) { a = Exp (x) y = NonZero (a) }"
    assert peak(tmp_path, body, KIB) == 1024


def test_branches_that_onnxruntime_finishes_one_by_one(tmp_path: Path) -> None:
    """All large values come first in the file; ONNX Runtime holds one at a time."""
    large = " ".join(f"e{i} = Expand (x, s)" for i in range(6))
    small = " ".join(f"r{i} = ReduceSum <keepdims = 1> (e{i})" for i in range(6))
    names = ", ".join(f"r{i}" for i in range(6))
    body = f"""g (float[1] x) => (float[6] y) <int64[1] s = {{25600}}> {{
      {large} {small} y = Concat <axis = 0> ({names}) }}"""
    # Five sums of earlier branches, the last large value, and its sum.
    assert peak(tmp_path, body, 1) == 25600 * 4 + 6 * 4


def test_the_estimate_is_never_more_than_a_run_takes(tmp_path: Path) -> None:
    """Held to the peak of a real process."""
    body = """g (float[N] x) => (float[N] y) {
      a = Exp (x) b = Sin (x) c = Cos (x)
      d = Add (a, b) e = Add (c, a) y = Mul (d, e) }"""
    made = of(tmp_path, body)
    feed = {"x": np.ones(16 << 20, np.float32)}
    assert made.peak(feed) == 4 * (48 << 20)
    with onnxopt.runtime.Worker() as worker:
        session = worker.load(made.path)
        took = session.time(feed, 1).peak
    assert took is not None
    assert session.bare is not None
    assert made.peak(feed) < took - session.bare


# --- work ------------------------------------------------------------------------------


def test_multiply_accumulates_of_a_feed(tmp_path: Path) -> None:
    made = of(
        tmp_path,
        """g (float[N, K] x, float[K, 5] w) => (float[N, 5] y) {
          m = MatMul (x, w) y = Relu (m) }""",
    )
    w = np.zeros((7, 5), np.float32)
    for n in (1, 11):
        assert made.macs({"x": np.zeros((n, 7), np.float32), "w": w}) == n * 7 * 5


def test_what_cannot_be_read_is_not_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    made, feed = Footprint(path), {"x": np.zeros(1, np.float32)}
    assert (made.peak(feed), made.macs(feed)) == (0, 0)
    made.refuse_above(0, feed)


# --- refusals --------------------------------------------------------------------------


def test_a_feed_too_large_is_refused_with_its_sizes(tmp_path: Path) -> None:
    body = "g (float[N] x) => (float[N] y) { a = Exp (x) b = Exp (a) y = Add (a, b) }"
    made = of(tmp_path, body)
    feed = {"x": np.zeros(1 << 20, np.float32)}
    made.refuse_above(8 << 20, feed)
    with pytest.raises(WorkerMemoryError) as caught:
        made.refuse_above((8 << 20) - 1, feed)
    assert str(caught.value) == (
        "not run: its activations take at least 0.01 GiB at once (limit 0.01 GiB) with "
        "inputs x [1048576]"
    )


OUTER = """g (float[N] x) => (float y) <int64[1] a = {1}, int64[1] b = {0}> {
  c = Unsqueeze (x, a) d = Unsqueeze (x, b) e = Mul (c, d)
  y = ReduceSum <keepdims = 0> (e) }"""
"""Half a MiB of input becomes 64 GiB."""


def test_validation_refuses_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []
    monkeypatch.setattr(Session, "run", lambda *args: ran.append(args))
    path = of(tmp_path, OUTER).path
    shapes = {"x": [1 << 17]}
    verdict = onnxopt.validate(path, path, input_shapes=shapes, memory_limit=1 << 30)
    assert verdict.status == "not_run"
    assert "at least 64.00 GiB at once (limit 1.00 GiB)" in (verdict.reason or "")
    assert ran == []


def test_the_users_own_feeds_are_refused_one_by_one(tmp_path: Path) -> None:
    path = of(tmp_path, OUTER).path
    feeds = [{"x": np.ones(size, np.float32)} for size in (1 << 17, 8)]
    verdict = onnxopt.validate(path, path, data=feeds, memory_limit=1 << 30)
    assert verdict.status == "passed"
    assert verdict.feeds == 1
    refused = next(note for note in verdict.notes if "rejected 1 feeds" in note)
    assert "inputs x [131072]" in refused


def test_the_limit_without_one_is_that_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(footprint, "machine_memory", lambda: 1000)
    assert (footprint.limit(None), footprint.limit(70)) == (900, 70)
