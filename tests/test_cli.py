"""The command line: every row of the outcome table, and what each verb prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxopt.cli import cli

ROOT = Path(__file__).resolve().parent.parent
NORM = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n,3,8,8] x) => (float[n,4,8,8] y)
<float[4] gamma = {1.1, 0.7, 0.3, 1.9}, float[4] beta = {0.1, 0.2, 0.3, 0.4},
 float[4] mean = {0.3, 0.1, 0.7, 0.9}, float[4] variance = {1.3, 0.9, 0.7, 1.7}> {
    c = Conv<pads = [1, 1, 1, 1]>(x, W)
    i = Identity(c)
    y = BatchNormalization(i, gamma, beta, mean, variance)
}"""
CUSTOM = """<ir_version: 8, opset_import: ["" : 17, "acme" : 1]>
g (float[n,3] x) => (float[n,3] y) { i = Identity(x) y = acme.Rocket(i) }"""


@dataclass
class Ran:
    """What a command came to."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Ran:
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = left.value.code
        assert isinstance(code, int)
        return Ran(code, captured.out, captured.err)

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(NORM)
    random = np.random.default_rng(0)
    weight = random.standard_normal((4, 3, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "W"))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture
def custom(tmp_path: Path) -> Path:
    path = tmp_path / "custom.onnx"
    onnx.save(onnx.parser.parse_model(CUSTOM), path)
    return path


def is_one_line(text: str) -> bool:
    lines = text.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("onnxopt: error: ")


def report(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text())
    assert found["schema"] == 1
    return found


# ---- the outcome table ----


def test_done_and_proven(run: Run, model: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "out.onnx", tmp_path / "report.json"
    ran = run("optimize", model, "-o", out, "--report", made)
    assert (ran.code, ran.err) == (0, "")
    assert [node.op_type for node in onnx.load(out).graph.node] == ["Conv"]
    found = report(made)
    assert found["validation"]["status"] == "passed"  # type: ignore[index]
    assert "passed" in ran.out
    assert "fold-batch-norm" in ran.out


def test_nothing_to_do_is_done(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    ran = run("optimize", model, "-o", out, "--passes", "")
    assert ran.code == 0
    assert onnx.load(out) == onnx.load(model)


def test_validation_failed(run: Run, model: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "out.onnx", tmp_path / "report.json"
    ran = run("optimize", model, "-o", out, "--report", made, "--rtol", 0, "--atol", 0)
    assert ran.code == 1
    assert not out.exists()
    assert is_one_line(ran.err)
    assert report(made)["validation"]["status"] == "failed"  # type: ignore[index]


def test_forced_it_is_written_and_still_1(run: Run, model: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "out.onnx", tmp_path / "report.json"
    ran = run(
        *("optimize", model, "-o", out, "--report", made),
        *("--rtol", 0, "--atol", 0, "--force"),
    )
    assert ran.code == 1
    assert out.exists()
    assert made.exists()


def test_rollback_keeps_the_right_edits(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    ran = run(
        *("optimize", model, "-o", out, "--rtol", 0, "--atol", 0),
        *("--on-failure", "rollback"),
    )
    assert ran.code == 0
    kept = [node.op_type for node in onnx.load(out).graph.node]
    assert kept == ["Conv", "BatchNormalization"]
    assert "rolled back" in ran.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("optimize", "{model}"),
        ("optimize", "{folder}/missing.onnx", "-o", "{folder}/out.onnx"),
        ("optimize", "{model}", "-o", "{folder}/no/such/out.onnx"),
        ("optimize", "{model}", "-o", "{folder}/out.onnx", "--passes", "nonsense"),
        ("optimize", "{model}", "-o", "{folder}/out.onnx", "--passes", "cse{{x=1}}"),
        ("optimize", "{model}", "-o", "{folder}/out.onnx", "--recipe", "nonsense"),
        ("optimize", "{model}", "-o", "{folder}/out.onnx", "--target", "toaster"),
        ("optimize", "{model}", "-o", "{folder}/out.onnx", "--data", "{folder}/no.npz"),
        ("optimize", "{model}", "-o", "{folder}/out.onnx", "--data", "{folder}/bad.npz"),
        ("optimize", "{model}", "-o", "{folder}/out.onnx", "--opset", "7"),
        ("optimize", "{model}", "-o", "{folder}/out.onnx", "--fix-shape", "z:1"),
        ("optimize", "{model}", "-o", "{folder}/out.onnx", "--max-drop", "1"),
        ("optimize", "{model}", "-o", "{folder}/out.onnx", "--bogus"),
        ("bogus",),
        ("validate", "{model}"),
        ("inspect", "{folder}/missing.onnx"),
    ],
)
def test_wrong_usage(
    run: Run, model: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    np.savez(tmp_path / "bad.npz", wrong=np.zeros((1, 3, 8, 8), np.float32))
    ran = run(*(text.format(model=model, folder=tmp_path) for text in arguments))
    assert ran.code == 2
    assert is_one_line(ran.err)
    assert not (tmp_path / "out.onnx").exists()


def test_a_folder_that_cannot_be_written(run: Run, model: Path) -> None:
    ran = run("optimize", model, "-o", "/proc/out.onnx")
    assert ran.code == 2
    assert is_one_line(ran.err)


def test_invalid_model(run: Run, tmp_path: Path) -> None:
    bad, out, made = (tmp_path / name for name in ("bad.onnx", "o.onnx", "r.json"))
    bad.write_bytes(b"this is no model")
    before = sorted(tmp_path.iterdir())
    for verb in ("optimize", "simplify"):
        ran = run(verb, bad, "-o", out, "--report", made)
        assert ran.code == 3
        assert is_one_line(ran.err)
    assert run("inspect", bad).code == 3
    assert run("validate", bad, bad).code == 3
    assert sorted(tmp_path.iterdir()) == before


def test_absent_provider(run: Run, model: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "out.onnx", tmp_path / "report.json"
    ran = run("optimize", model, "-o", out, "--report", made, "--provider", "rocm")
    assert ran.code == 4
    assert not out.exists()
    assert report(made)["validation"]["status"] == "not_run"  # type: ignore[index]


def test_one_absent_provider_of_two_is_told(
    run: Run, model: Path, tmp_path: Path
) -> None:
    out, made = tmp_path / "out.onnx", tmp_path / "report.json"
    both = ("--provider", "cpu", "--provider", "rocm")
    ran = run("optimize", model, "-o", out, "--report", made, *both)
    assert ran.code == 0
    assert "not run" in ran.err
    checks = report(made)["validation"]["checks"]  # type: ignore[index]
    assert {check["status"] for check in checks} == {"passed", "not_run"}


def test_a_required_provider_that_is_absent(
    run: Run, model: Path, tmp_path: Path
) -> None:
    out, made = tmp_path / "out.onnx", tmp_path / "report.json"
    required = ("--provider", "cpu", "--require-provider", "rocm")
    ran = run("optimize", model, "-o", out, "--report", made, *required)
    assert ran.code == 4
    assert not out.exists()
    assert made.exists()


def test_worker_timed_out(run: Run, model: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "out.onnx", tmp_path / "report.json"
    ran = run("optimize", model, "-o", out, "--report", made, "--timeout", 0.001)
    assert ran.code == 5
    assert not out.exists()
    assert made.exists()
    assert is_one_line(ran.err)


def test_a_reference_that_runs_nowhere(run: Run, custom: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "out.onnx", tmp_path / "report.json"
    ran = run("optimize", custom, "-o", out, "--report", made)
    assert ran.code == 0
    assert ran.err.startswith("onnxopt: warning: ")
    assert [node.op_type for node in onnx.load(out).graph.node] == ["Rocket"]
    assert report(made)["validation"]["status"] == "not_run"  # type: ignore[index]


def test_validation_required_of_it(run: Run, custom: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "out.onnx", tmp_path / "report.json"
    ran = run("optimize", custom, "-o", out, "--report", made, "--require-validation")
    assert ran.code == 5
    assert not out.exists()
    assert made.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "feeds.py"
    script.write_text(
        "import time, numpy as np\n"
        "def feeds():\n"
        "    yield {'x': np.zeros((1, 3, 8, 8), np.float32)}\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(60)\n"
    )
    before = sorted(tmp_path.iterdir())
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "onnxopt", "optimize", str(model)),
            *("-o", str(tmp_path / "out.onnx"), "--data", f"{script}:feeds"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    assert process.stdout is not None
    assert "waiting" in process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert len(err.strip().splitlines()) == 1
    left = [path for path in tmp_path.iterdir() if path.name != "__pycache__"]
    assert sorted(left) == before
    assert not _workers_of(process.pid)


def _workers_of(pid: int) -> list[str]:
    """Processes still alive whose parent was `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(stat.parent.name)
    return found


# ---- files ----


def test_the_output_may_replace_the_input(run: Run, model: Path) -> None:
    assert run("optimize", model, "-o", model).code == 0
    assert [node.op_type for node in onnx.load(model).graph.node] == ["Conv"]
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]


def test_a_dry_run_writes_nothing(run: Run, model: Path) -> None:
    before = model.read_bytes()
    assert run("optimize", model, "--dry-run").code == 0
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]
    assert model.read_bytes() == before


def test_equal_runs_give_equal_bytes(run: Run, model: Path, tmp_path: Path) -> None:
    pairs = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        out, made = folder / "out.onnx", folder / "report.json"
        assert run("optimize", model, "-o", out, "--report", made).code == 0
        pairs.append((out.read_bytes(), made.read_bytes()))
    assert pairs[0] == pairs[1]


def test_report_on_stdout_is_only_json(run: Run, model: Path) -> None:
    ran = run("optimize", model, "--dry-run", "--report", "-")
    assert json.loads(ran.out)["schema"] == 1
    assert "passed" in ran.err


# ---- verbs ----


def test_validate_says_yes_and_no(run: Run, model: Path, tmp_path: Path) -> None:
    other = onnx.load(model)
    weight = next(t for t in other.graph.initializer if t.name == "W")
    array = numpy_helper.to_array(weight).copy()
    array[2, 1, 1, 1] += 0.001
    weight.CopyFrom(numpy_helper.from_array(array, "W"))
    wrong = tmp_path / "wrong.onnx"
    onnx.save(other, wrong)
    assert run("validate", model, model).code == 0
    ran = run("validate", model, wrong, "--json", "-")
    assert ran.code == 1
    assert json.loads(ran.out)["status"] == "failed"
    assert run("validate", model, wrong, "--min-sqnr", 20).code == 0
    assert run("validate", model, wrong, "--atol", 0.1).code == 0


def test_metric(run: Run, model: Path, tmp_path: Path) -> None:
    script = tmp_path / "metric.py"
    script.write_text(
        "import numpy as np\n"
        "def mean(run):\n"
        "    return run({'x': np.ones((2, 3, 8, 8), np.float32)})['y'].mean()\n"
    )
    metric = ("--metric", f"{script}:mean", "--max-drop", 0.001)
    ran = run("optimize", model, "--dry-run", *metric)
    assert ran.code == 0
    assert "mean" in ran.out


def test_freeze_and_fix_shape(run: Run, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,3] x, float[3] b) => (float[n,3] y) <float[3] b = {1, 2, 3}> {
        t = Neg(b) y = Add(x, t) }"""
    source, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(onnx.parser.parse_model(text), source)
    assert run("optimize", source, "-o", out).code == 0
    assert [value.name for value in onnx.load(out).graph.input] == ["x", "b"]
    ran = run("optimize", source, "-o", out, "--freeze-inputs", "--fix-shape", "x:2,3")
    assert ran.code == 0
    made = onnx.load(out)
    assert [value.name for value in made.graph.input] == ["x"]
    assert [node.op_type for node in made.graph.node] == ["Add"]
    assert made.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    assert "constants now" in ran.out


def test_opset(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert run("optimize", model, "-o", out, "--opset", 19).code == 0
    assert onnx.load(out).opset_import[0].version == 19


def test_inspect(run: Run, model: Path) -> None:
    ran = run("inspect", model, "--json", "-")
    found = json.loads(ran.out)
    assert ran.code == 0
    assert found["parameters"] == 108 + 16
    text = run("inspect", model).out
    assert "BatchNormalization 1" in text


def test_inspect_finds_zero_channels_and_fake_quantization(
    run: Run, tmp_path: Path
) -> None:
    weight = np.ones((4, 3, 1, 1), np.float32)
    weight[1] = 0
    weight[:, 2] = 0
    nodes = [
        helper.make_node("QuantizeLinear", ["W", "s", "z"], ["q"], axis=0),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w"], ["y"], name="conv"),
    ]
    initializers = [
        numpy_helper.from_array(weight, "W"),
        numpy_helper.from_array(np.ones(4, np.float32), "s"),
        numpy_helper.from_array(np.zeros(4, np.int8), "z"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name, dims in (("x", [1, 3, 8, 8]), ("y", [1, 4, 8, 8]))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    path = tmp_path / "m.onnx"
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    text = run("inspect", path).out
    assert "fake-quantized, still float: 1" in text
    assert "1 of 4" in text
    assert "1 of 3" in text


def test_passes(run: Run) -> None:
    ran = run("passes")
    assert ran.code == 0
    for name in ("dead-code", "fold-qdq-weights", "max_growth", "default"):
        assert name in ran.out
    assert json.loads(run("passes", "--json", "-").out)


def test_bisect_limit_and_print_after(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    ran = run("optimize", model, "-o", out, "--bisect-limit", 0)
    assert ran.code == 0
    assert len(onnx.load(out).graph.node) == 3
    ran = run("optimize", model, "--dry-run", "--print-after", "fold-batch-norm")
    assert "after fold-batch-norm" in ran.out
    assert "Conv" in ran.out
    ran = run("optimize", model, "--dry-run", "--time-passes", "--verify-each")
    assert ran.code == 0


def test_recipe_file(run: Run, model: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "out.onnx"
    recipe.write_text("passes:\n  - identity\n  - fold-constants: {max_growth: 0}\n")
    assert run("optimize", model, "-o", out, "--recipe", recipe).code == 0
    assert len(onnx.load(out).graph.node) == 2
    recipe.write_text("passes: [identity]\nspeed: 11\n")
    ran = run("optimize", model, "-o", out, "--recipe", recipe)
    assert ran.code == 2
    assert "speed" in ran.err


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"this is no model")
    assert "Traceback" not in run("inspect", bad).err
    ran = run("inspect", bad, "--debug")
    assert "Traceback" in ran.err


def test_disk_full(model: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: one line, no debris."""
    big = onnx.load(model)
    extra = numpy_helper.from_array(np.ones(300_000, np.float32), "extra")
    big.graph.initializer.append(extra)
    big.graph.node.append(helper.make_node("ReduceSum", ["extra"], ["z"]))
    big.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))
    onnx.save(big, model)
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "from onnxopt.cli import cli\n"
        "cli.main(sys.argv[1:])\n"
    )
    out = tmp_path / "out.onnx"
    ran = subprocess.run(
        [
            *(sys.executable, "-c", code, "optimize", model, "-o", out),
            *("--passes", "", "--no-validate"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert ran.returncode == 2
    assert is_one_line(ran.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
