"""On a GPU, with onnxruntime-gpu: placement, verdicts, comparable settings, failures.

Without one these are reported as not run (`-m cuda` selects them).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxopt
from onnxopt.errors import OnnxoptError, ProviderError
from onnxopt.report import Placement, Validation
from onnxopt.runtime import SessionSpec, Worker

pytestmark = pytest.mark.cuda

MODELS = Path(__file__).parents[1] / "models"
FLOAT = MODELS / "fashion_float.onnx"
QDQ = MODELS / "fashion_qat_legacy.onnx"
CUDA = "CUDAExecutionProvider"


def spoiled(path: Path, target: Path) -> Path:
    """One filter of one layer is a tenth larger."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
    array = numpy_helper.to_array(tensor).copy()
    array[0] *= 1.1
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, target)
    return target


def statuses(verdict: Validation) -> dict[tuple[str, str], str]:
    return {(check.provider, check.level): check.status for check in verdict.checks}


def placed(verdict: Validation, provider: str) -> list[Placement]:
    return [place for place in verdict.placements if place.provider == provider]


def test_a_model_equals_itself_on_the_gpu_and_there_it_runs() -> None:
    verdict = onnxopt.validate(FLOAT, FLOAT, providers=["cpu", "cuda"])
    assert verdict.status == "passed", verdict.reason
    found = statuses(verdict)
    for name in ("cpu", "cuda", "cuda against cpu"):
        for level in ("disable_all", "enable_all"):
            assert found[name, level] == "passed"
    places = placed(verdict, "cuda")
    assert {(p.model, p.level) for p in places} == {
        (side, level)
        for side in ("reference", "candidate")
        for level in ("disable_all", "enable_all")
    }
    for place in places:
        assert place.nodes[CUDA] > 0
        assert place.memcpy is not None


def test_how_the_gpu_repeats_itself_is_told() -> None:
    verdict = onnxopt.validate(FLOAT, FLOAT, providers=["cuda"])
    told = [note for note in verdict.notes if note.startswith("cuda disable_all: ")]
    assert any("repeats itself" in n or "differ from each other" in n for n in told)


def test_a_wrong_model_fails_on_the_gpu(tmp_path: Path) -> None:
    wrong = spoiled(FLOAT, tmp_path / "wrong.onnx")
    verdict = onnxopt.validate(FLOAT, wrong, providers=["cuda"])
    found = statuses(verdict)
    assert verdict.status == "failed"
    assert found["cuda", "disable_all"] == "failed"
    assert found["cuda", "enable_all"] == "failed"


@pytest.mark.parametrize("recipe", ["default", "simplify"])
def test_what_we_make_is_right_on_the_gpu(recipe: str) -> None:
    model = MODELS / "fashion_masked.onnx"
    result = onnxopt.optimize(model, recipe, providers=["cpu", "cuda"])
    assert result.report.validation is not None
    assert result.report.validation.status == "passed", result.report.validation.reason


def test_int8_on_the_gpu_runs_as_float_and_the_report_says_so() -> None:
    verdict = onnxopt.validate(QDQ, QDQ, providers=["cuda"])
    assert verdict.status == "passed", verdict.reason
    assert any("ran as float" in note for note in verdict.notes)


def determinants(path: Path) -> Path:
    """A node on the GPU, then one that CUDA has no kernel for."""
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("Det", ["square"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])
    graph = helper.make_graph(nodes, "g", [x], [y])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_what_falls_to_the_cpu_is_told(tmp_path: Path) -> None:
    model = determinants(tmp_path / "model.onnx")
    verdict = onnxopt.validate(model, model, providers=["cuda"])
    assert verdict.status == "passed", verdict.reason
    assert any("Det" in note and "CPUExecutionProvider" in note for note in verdict.notes)
    for place in placed(verdict, "cuda"):
        assert place.operators == {
            CUDA: {"Mul": 1},
            "CPUExecutionProvider": {"Det": 1},
        }
        assert place.memcpy


def test_a_required_provider_runs_everything_or_is_refused(tmp_path: Path) -> None:
    model = determinants(tmp_path / "model.onnx")
    with pytest.raises(ProviderError, match="Det"):
        onnxopt.validate(model, model, providers=["cuda"], require_providers=["cuda"])


def test_tf32_is_off() -> None:
    """Of 10 bits of mantissa a sum of 4096 products would be off by 1e-3."""
    random = np.random.default_rng(0)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 4096])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 512])
    w = numpy_helper.from_array(random.normal(size=(4096, 512)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [w]
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    feed = {"x": random.normal(size=(64, 4096)).astype(np.float32)}

    def off(provider: str) -> float:
        with Worker() as worker:
            data = model.SerializeToString()
            found = worker.load(data, SessionSpec(provider=provider)).run(feed)["y"]
        exact = feed["x"].astype(np.float64) @ numpy_helper.to_array(w).astype(np.float64)
        return float(np.abs(found - exact).max() / np.abs(exact).max())

    assert off("cuda") < 2e-6
    assert off("cuda:use_tf32=1") > 2e-5, "the option makes no difference here"


def test_a_gpu_without_memory_is_no_agreement() -> None:
    """With room for 1 MiB on the device nothing can have run."""
    provider = "cuda:gpu_mem_limit=1048576"
    random = np.random.default_rng(0)
    feeds = [{"image": random.random((64, 1, 28, 28), np.float32)}]
    assert "memory" in told_of(provider, feeds)


def told_of(provider: str, feeds: list[dict[str, np.ndarray]]) -> str:
    """The reason why nothing was judged; "" where it was."""
    try:
        verdict = onnxopt.validate(FLOAT, FLOAT, providers=[provider], data=feeds)
    except OnnxoptError as error:
        return str(error)
    return "" if verdict.status == "passed" else verdict.reason or ""


def test_the_share_of_time_is_told() -> None:
    told = []
    onnxopt.validate(FLOAT, FLOAT, providers=["cuda"], time_observer=told.append)
    assert any(time.runs_on == CUDA and time.seconds > 0 for time in told)
    for level in ("disable_all", "enable_all"):
        mine = [t for t in told if t.level == level and t.model == "candidate"]
        assert sum(time.share for time in mine) == pytest.approx(1)


def test_bench_on_the_gpu() -> None:
    found = onnxopt.bench([FLOAT, FLOAT], provider="cuda", rounds=8)
    assert [timing.providers[0] for timing in found.models] == [CUDA, CUDA]
    ratio = found.models[1].ratio
    assert ratio is not None
    assert ratio.low <= ratio.value <= ratio.high
    assert all(timing.wall > 0 for timing in found.models)


def command(*args: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "onnxopt", *args], capture_output=True, text=True
    )
    return done.returncode, done.stdout


def test_command_on_the_gpu(tmp_path: Path) -> None:
    both = ["--provider", "cpu", "--provider", "cuda", "--json", "-"]
    code, out = command("validate", str(FLOAT), str(FLOAT), *both)
    assert code == 0
    assert json.loads(out)["status"] == "passed"
    wrong = spoiled(FLOAT, tmp_path / "wrong.onnx")
    code, out = command("validate", str(FLOAT), str(wrong), *both)
    assert code == 1
    assert json.loads(out)["status"] == "failed"


def test_codes_that_flip_on_the_gpu_are_no_errors() -> None:
    """Also against the CPU, where the reference happens to give the very same codes."""
    model = MODELS / "fashion_masked_qat.onnx"
    result = onnxopt.optimize(model, providers=["cpu", "cuda"], on_failure="return")
    assert result.report.validation is not None
    assert result.report.validation.status == "passed", result.report.validation.reason
