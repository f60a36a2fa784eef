"""Workers: values, refusals, providers, and every way in which a worker can die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest

from onnxopt import runtime
from onnxopt.errors import (
    ProviderError,
    SessionError,
    UsageError,
    WorkerCrashedError,
    WorkerMemoryError,
    WorkerTimeoutError,
)
from onnxopt.runtime import SessionSpec, Worker

LOOP = """<ir_version: 8, opset_import: ["": 17]>
g (int64 n, bool c, float[k] x) => (float[m] y) {
  y = Loop (n, c, x) <body = b (int64 i, bool cc, float[p] v) => (bool co, float[q] w) {
    co = Identity (cc)
    w = STEP
  }>
}"""
SPIN = LOOP.replace("STEP", "Identity (v)")
GROW = LOOP.replace("STEP", "Concat <axis = 0> (v, v)")
FOREVER = {
    "n": np.array(2**60, np.int64),
    "c": np.array(True),
    "x": np.ones(1000, np.float32),
}


def model_bytes(text: str) -> bytes:
    return onnx.parser.parse_model(text).SerializeToString()


def simple(body: str, opset: int = 17, ir: int = 8) -> bytes:
    return model_bytes(f'<ir_version: {ir}, opset_import: ["": {opset}]>\n{body}')


ADD = "g (float[N, 2] x) => (float[N, 2] y) <float[2] b = {1, 2}> { y = Add (x, b) }"


# --- values --------------------------------------------------------------------------


def test_run_gives_named_outputs_and_describes_itself() -> None:
    with Worker() as worker:
        session = worker.load(simple(ADD))
        assert [(v.name, v.kind, v.shape) for v in session.inputs] == [
            ("x", "tensor(float)", ("N", 2))
        ]
        assert session.providers == ("CPUExecutionProvider",)
        result = session.run({"x": np.zeros((3, 2), np.float32)})
        assert np.array_equal(result["y"], np.tile(np.float32([1, 2]), (3, 1)))


def test_model_file_with_external_data_beside_it(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{ADD}')
    path = tmp_path / "m.onnx"
    onnx.save(
        model, path, save_as_external_data=True, location="w.data", size_threshold=0
    )
    with Worker() as worker:
        assert worker.load(path).run({"x": np.zeros((1, 2), np.float32)})["y"][0, 1] == 2


def test_several_sessions_live_in_one_worker() -> None:
    with Worker() as worker:
        one, two = (
            worker.load(simple(ADD)),
            worker.load(simple(ADD.replace("Add", "Sub"))),
        )
        x = np.ones((1, 2), np.float32)
        assert one.run({"x": x})["y"][0, 0] == 2
        assert two.run({"x": x})["y"][0, 0] == 0
        one.close()
        one.close()
        assert two.run({"x": x})["y"][0, 1] == -1


@pytest.mark.parametrize(
    ("onnx_name", "dtype"),
    [
        ("bfloat16", ml_dtypes.bfloat16),
        ("float8e4m3fn", ml_dtypes.float8_e4m3fn),
        ("float8e5m2", ml_dtypes.float8_e5m2),
        ("float16", np.float16),
        ("bool", np.bool_),
        ("uint64", np.uint64),
    ],
)
def test_element_types_come_back_as_they_went(onnx_name: str, dtype: type) -> None:
    model = simple(
        f"g ({onnx_name}[3] x) => ({onnx_name}[3] y) {{ y = Identity (x) }}", 21
    )
    x = np.array([0, 1, 3]).astype(dtype)
    with Worker() as worker:
        y = worker.load(model).run({"x": x})["y"]
    assert y.dtype == x.dtype
    assert np.array_equal(x, y)


def test_four_bit_values_are_packed_and_unpacked() -> None:
    model = simple(
        """g (int4[3] x, float s, float[3] z) => (float[3] y, int4[3] w) <int4 zp = {0}> {
          y = DequantizeLinear (x, s)
          w = QuantizeLinear (z, s, zp)
        }""",
        21,
        10,
    )
    feed = {
        "x": np.array([-8, 7, -1], ml_dtypes.int4),
        "s": np.array(1, np.float32),
        "z": np.array([-3, 4, 7], np.float32),
    }
    with Worker() as worker:
        result = worker.load(model).run(feed)
    assert result["y"].tolist() == [-8, 7, -1]
    assert result["w"].dtype == ml_dtypes.int4
    assert result["w"].astype(int).tolist() == [-3, 4, 7]


def test_sequences_strings_and_empty_optionals() -> None:
    model = simple(
        """g (seq(float[N]) s, string[2] t, optional(float[1]) o)
           => (seq(float[N]) s2, string[2] t2, bool has, optional(float[1]) o2) {
          s2 = Identity (s)
          t2 = Identity (t)
          has = OptionalHasElement (o)
          o2 = Identity (o)
        }"""
    )
    feed = {
        "s": [np.ones(3, np.float32), np.zeros(1, np.float32)],
        "t": np.array(["ä", ""], dtype=object),
        "o": None,
    }
    with Worker() as worker:
        result = worker.load(model).run(feed)
    assert [a.tolist() for a in result["s2"]] == [[1, 1, 1], [0]]
    assert result["t2"].tolist() == ["ä", ""]
    assert not result["has"]
    assert result["o2"] is None


def test_maps_come_as_dicts() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 3]>'
        "g (float[1, 2] x) => (seq(float[1]) y)"
        "{ y = ai.onnx.ml.ZipMap <classlabels_int64s = [4, 9]> (x) }"
    )
    element = model.graph.output[0].type
    element.Clear()
    element.sequence_type.elem_type.map_type.key_type = onnx.TensorProto.INT64
    value = element.sequence_type.elem_type.map_type.value_type.tensor_type
    value.elem_type = onnx.TensorProto.FLOAT
    with Worker() as worker:
        session = worker.load(model.SerializeToString())
        result = session.run({"x": np.array([[0.25, np.inf]], np.float32)})
    assert result["y"] == [{4: 0.25, 9: float("inf")}]


# --- refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "feed", "said"),
    [
        (b"not a model", {}, "INVALID_PROTOBUF"),
        (simple("g (float[1] x) => (float[1] y) { y = NoSuchOp (x) }"), {}, "NoSuchOp"),
        (simple(ADD), {"x": np.zeros((1, 3), np.float32)}, "Expected: 2"),
        (simple(ADD), {"x": np.zeros((1, 2), np.float64)}, "tensor(double)"),
        (simple(ADD), {}, "'x'"),
    ],
)
def test_refusals_are_one_clear_line(model: bytes, feed: dict, said: str) -> None:
    with Worker() as worker, pytest.raises(SessionError) as caught:
        worker.load(model).run(feed)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_worker_serves_on_after_a_refusal() -> None:
    with Worker() as worker:
        session = worker.load(simple(ADD))
        with pytest.raises(SessionError):
            session.run({"x": np.zeros(1, np.float32)})
        assert session.run({"x": np.zeros((1, 2), np.float32)})["y"].shape == (1, 2)


# --- providers -----------------------------------------------------------------------


def test_provider_names_and_options() -> None:
    assert runtime.provider_name("cuda") == "CUDAExecutionProvider"
    assert runtime.provider_name("cuda:device_id=1") == "CUDAExecutionProvider"
    assert runtime.provider_name("MyExecutionProvider") == "MyExecutionProvider"
    assert runtime.provider_options("cuda:device_id=1,x=2") == (
        ("device_id", "1"),
        ("x", "2"),
    )
    with pytest.raises(UsageError, match="'gpu' is unknown"):
        runtime.provider_name("gpu")
    with pytest.raises(UsageError, match="key=value"):
        runtime.provider_options("cuda:device_id")


def test_available_providers_are_asked_in_a_worker() -> None:
    assert "CPUExecutionProvider" in runtime.available_providers()


def test_absent_provider_is_named() -> None:
    with Worker() as worker, pytest.raises(ProviderError) as caught:
        worker.load(simple(ADD), SessionSpec(provider="QNNExecutionProvider"))
    assert "QNNExecutionProvider asked for but not used" in str(caught.value)


def test_silent_fallback_is_never_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As onnxruntime-gpu without a GPU: it lists CUDA, then makes a CPU session."""
    fake = tmp_path / "sitecustomize.py"
    fake.write_text(
        textwrap.dedent("""
        import onnxruntime
        present = onnxruntime.get_available_providers()
        onnxruntime.get_available_providers = lambda: ["CUDAExecutionProvider", *present]
        plain = onnxruntime.InferenceSession
        def session(*args, providers, **options):
            return plain(*args, providers=["CPUExecutionProvider"], **options)
        onnxruntime.InferenceSession = session
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Worker() as worker, pytest.raises(ProviderError) as caught:
        worker.load(simple(ADD), SessionSpec(provider="cuda"))
    assert str(caught.value) == (
        "CUDAExecutionProvider asked for but not used: the session runs on "
        "CPUExecutionProvider"
    )


def test_missing_onnxruntime_gives_the_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('no such module')")
    # Before everything else on the worker's path, behind the package's own folder.
    monkeypatch.syspath_prepend(str(tmp_path))
    with Worker() as worker, pytest.raises(ProviderError) as caught:
        worker.load(simple(ADD))
    assert "pip install 'onnxopt[cpu]'" in str(caught.value)
    assert caught.value.exit_code == 4


# --- how a worker dies -----------------------------------------------------------------


def test_hang_is_a_timeout_and_the_worker_can_be_used_again() -> None:
    with Worker(timeout=1.0) as worker:
        session = worker.load(model_bytes(SPIN))
        pid = worker.pid
        started = time.monotonic()
        with pytest.raises(WorkerTimeoutError, match="within 1 s"):
            session.run(FOREVER)
        assert time.monotonic() - started < 5
        assert not alive(pid)
        with pytest.raises(WorkerCrashedError, match="gone"):
            session.run(FOREVER)
        again = worker.load(model_bytes(SPIN))
        assert again.run({**FOREVER, "n": np.array(1)})["y"].shape == (1000,)


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_crash_names_the_signal(which: signal.Signals) -> None:
    with Worker() as worker:
        session = worker.load(model_bytes(SPIN))
        assert worker.pid is not None
        threading.Timer(0.2, os.kill, (worker.pid, which)).start()
        with pytest.raises(WorkerCrashedError, match=which.name):
            session.run(FOREVER)


def test_crash_of_an_idle_worker_is_noticed() -> None:
    with Worker() as worker:
        session = worker.load(simple(ADD))
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerCrashedError, match="SIGKILL"):
            session.run({"x": np.zeros((1, 2), np.float32)})


def test_run_that_allocates_without_end_is_out_of_memory() -> None:
    with Worker(memory_limit=1 << 29) as worker:
        session = worker.load(model_bytes(GROW))
        with pytest.raises(WorkerMemoryError, match="memory"):
            session.run(FOREVER)


def test_resident_memory_is_watched_where_the_address_space_is_not() -> None:
    """What a CUDA worker gets: its address space cannot be limited."""
    with Worker() as worker:
        session = worker.load(model_bytes(GROW))
        assert worker.process is not None
        worker.process.limit = 1 << 29
        with pytest.raises(WorkerMemoryError, match=r"limit 0\.50 GiB"):
            session.run(FOREVER)


def test_output_on_stdout_does_not_garble_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, threading, time\n"
        "def chat():\n"
        "    while True:\n"
        "        os.write(1, b'chatter' * 100); time.sleep(0.001)\n"
        "threading.Timer(0.3, chat).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Worker() as worker:
        session = worker.load(simple(ADD))
        for _ in range(300):
            time.sleep(0.002)
            session.run({"x": np.zeros((1, 2), np.float32)})


def test_no_worker_outlives_its_object_or_the_interpreter(tmp_path: Path) -> None:
    worker = Worker()
    worker.load(simple(ADD))
    pid = worker.pid
    del worker
    assert not alive(pid)
    script = tmp_path / "leave.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        from onnxopt.runtime import Worker
        kept = Worker()
        kept.load({simple(ADD)!r})
        print(kept.pid, flush=True)
        raise KeyboardInterrupt
        """)
    )
    result = run_script(script)
    assert not alive(int(result.stdout))


def test_worker_leaves_when_the_caller_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "die.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, threading
        import numpy as np
        from onnxopt.runtime import Worker
        worker = Worker()
        session = worker.load({model_bytes(SPIN)!r})
        print(worker.pid, flush=True)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        session.run({{"n": np.array(2**60), "c": np.array(True),
                      "x": np.ones(1, np.float32)}})
        """)
    )
    result = run_script(script)
    assert result.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while alive(int(result.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(result.stdout))


def test_interrupt_in_a_run_kills_the_worker() -> None:
    with Worker() as worker:
        session = worker.load(model_bytes(SPIN))
        pid = worker.pid
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            session.run(FOREVER)
        assert not alive(pid)


def test_worker_imports_neither_onnx_nor_protobuf() -> None:
    code = (
        "import sys, onnxopt._worker; "
        "print(*sorted({m.split('.')[0] for m in sys.modules} & {'onnx', 'google'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


def run_script(script: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(runtime.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root}
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


def alive(pid: int | None) -> bool:
    """Whether the process runs; a zombie that nobody reaped counts."""
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.cuda
def test_cuda_session_runs_on_cuda() -> None:
    with Worker() as worker:
        session = worker.load(simple(ADD), SessionSpec(provider="cuda"))
        assert session.providers[0] == "CUDAExecutionProvider"
        result = session.run({"x": np.zeros((3, 2), np.float32)})
        assert np.array_equal(result["y"], np.tile(np.float32([1, 2]), (3, 1)))


@pytest.mark.cuda
def test_cuda_out_of_memory_is_told_apart() -> None:
    with Worker() as worker:
        session = worker.load(
            model_bytes(GROW), SessionSpec(provider="cuda:gpu_mem_limit=1073741824")
        )
        with pytest.raises(WorkerMemoryError):
            session.run(FOREVER)


@pytest.mark.cuda
def test_cuda_matmul_is_not_rounded_to_tf32() -> None:
    model = simple("g (float[N, N] x) => (float[N, N] y) { y = MatMul (x, x) }")
    x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    with Worker() as worker:
        y = worker.load(model, SessionSpec(provider="cuda")).run({"x": x})["y"]
    exact = x.astype(np.float64) @ x.astype(np.float64)
    assert np.abs(y - exact).max() < 1e-4 * np.abs(exact).max()
