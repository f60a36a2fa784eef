"""Memory and disk of looking inside models: bounded by lots, and never by the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from onnxopt.runtime import Session, Worker
from onnxopt.validation import noise
from onnxopt.validation.localise import localise
from onnxopt.validation.taps import TapModel
from onnxopt.validation.verdict import Question

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Runs one task in a process of its own, whose temporary folder is watched. Peaks of
# resident memory: ru_maxrss would start with the parent's.
_MEASURE = """
import json, re, sys, tempfile, threading, time
from pathlib import Path
import numpy as np
import onnxopt
from onnxopt import runtime
from onnxopt.validation.localise import localise
from onnxopt.validation.verdict import Question

task, folder, shape, *paths = sys.argv[1:]
paths = [Path(path) for path in paths]
tempfile.tempdir = folder
peaks, disk, done = [], [0], threading.Event()

def high_water(pid):
    state = open(f"/proc/{pid}/status").read()
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", state)[1]) * 1024

def size_of(path):
    try:
        return path.stat().st_size
    except OSError:
        return 0

def watch():
    while not done.wait(0.05):
        disk[0] = max(disk[0], sum(map(size_of, Path(folder).rglob("*"))))

kill = runtime._Process.kill

def killed(process):
    if process.popen.poll() is None:
        peaks.append(high_water(process.popen.pid))
    kill(process)

runtime._Process.kill = killed
threading.Thread(target=watch, daemon=True).start()
random = np.random.default_rng(1)
feeds = [{"x": random.standard_normal(json.loads(shape), np.float32)} for _ in range(3)]
question = Question(*paths)
told = None
if task == "run":
    with question.worker() as left, question.worker() as right:
        spec = question.spec("cpu", "disable_all")
        pairs = zip((left, right), paths)
        sessions = [worker.load(path, spec) for worker, path in pairs]
        values = [session.run(feeds[0]) for session in sessions]
elif task == "localise":
    found = localise(question, feeds[0], Path(folder))
    told = found and [found.drift.value, found.drift.compared]
else:
    verdict = onnxopt.validate(*paths, data=feeds)
    told = [verdict.status, str(verdict.reason), verdict.notes]
done.set()
print(json.dumps([told, high_water("self"), peaks, disk[0]]))
"""


@dataclass
class Measured:
    """Peaks in bytes; what the task answered."""

    told: Any
    caller: int
    workers: list[int]
    disk: int

    @property
    def total(self) -> int:
        """The caller and the two workers of the check."""
        return self.caller + sum(sorted(self.workers)[-2:])


def measure(task: str, folder: Path, shape: list[int], *paths: Path) -> Measured:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, "-c", _MEASURE, task, str(scratch), json.dumps(shape)]
    ran = subprocess.run(
        [*command, *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert list(scratch.iterdir()) == []
    return Measured(*json.loads(ran.stdout))


def chain(
    path: Path,
    count: int,
    dims: list[int],
    wrong: int | None = None,
    differently: bool = False,
) -> Path:
    """`count` values, one made from the other; made `differently` in name only."""
    random, width = np.random.default_rng(0), dims[1]
    kernel = random.standard_normal((width, width, 1, 1)) / np.sqrt(width)
    arrays = {"k": kernel, "b": random.standard_normal((1, width, 1, 1))}
    nodes: list[NodeProto] = []
    before = "x"
    for index in range(count):
        name = "y" if index == count - 1 else f"v{index}"
        if differently:
            nodes.append(helper.make_node("Identity", [before], [f"same{index}"]))
            before = f"same{index}"
        alpha = 0.501 if index == wrong else 0.5
        nodes.append(
            [
                helper.make_node("Conv", [before, "k"], [name]),
                helper.make_node("Add", [before, "b"], [name]),
                helper.make_node("LeakyRelu", [before], [name], alpha=alpha),
            ][index % 3]
        )
        before = name
    weights = [
        numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()
    ]
    return save(path, nodes, dims, weights)


def save(
    path: Path, nodes: list[NodeProto], dims: list[int], weights: list[TensorProto]
) -> Path:
    ends = [helper.make_tensor_value_info(name, 1, dims) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


LARGE = [1, 16, 256, 256]  # 4 MiB a value: 1.2 GB of 300


@pytest.mark.slow
@pytest.mark.parametrize("differently", [False, True])
def test_300_values_in_twice_the_memory_of_a_run(
    tmp_path: Path, differently: bool
) -> None:
    one = chain(tmp_path / "one.onnx", 300, LARGE)
    two = chain(tmp_path / "two.onnx", 300, LARGE, 287, differently)
    plain = measure("run", tmp_path, LARGE, one, two)
    found = measure("localise", tmp_path, LARGE, one, two)
    assert found.told == ["v287", 300 if differently else 1]
    assert found.total < 2 * plain.total, (plain, found)
    assert found.disk < 10 << 20, found


@pytest.mark.slow
def test_a_verdict_on_many_values_takes_no_more(tmp_path: Path) -> None:
    """Validation looks inside on several feeds at once."""
    one = chain(tmp_path / "one.onnx", 60, LARGE)
    two = chain(tmp_path / "two.onnx", 60, LARGE, differently=True)
    plain = measure("run", tmp_path, LARGE, one, two)
    found = measure("validate", tmp_path, LARGE, one, two)
    assert found.told[0] == "passed"
    assert any("each compared by itself: 60" in note for note in found.told[2])
    assert found.total < 2 * plain.total, (plain, found)


def test_the_work_grows_with_the_number_of_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of thousands made differently, each node is looked at a bounded number of times."""
    dims, looks = [1, 4, 4, 4], Counter[str]()
    sources, load = TapModel.sources, Worker.load

    def counted(self: TapModel, node: onnx.NodeProto) -> set[str]:
        looks["nodes"] += 1
        return sources(self, node)

    def loaded(self: Worker, *args: Any) -> Session:
        looks["sessions"] += 1
        return load(self, *args)

    monkeypatch.setattr(TapModel, "sources", counted)
    monkeypatch.setattr(Worker, "load", loaded)
    one = chain(tmp_path / "one.onnx", 2000, dims)
    two = chain(tmp_path / "two.onnx", 2000, dims, 1985, differently=True)
    feed = {"x": np.random.default_rng(1).standard_normal(dims).astype(np.float32)}
    found = localise(Question(one, two), feed, tmp_path)
    assert found is not None
    assert (found.drift.value, found.drift.compared) == ("v1985", 2000)
    assert looks["nodes"] < 200 * 2000, looks
    assert looks["sessions"] < 100, looks


# ---- large weights ----


def external(folder: Path, count: int, size: int) -> Path:
    """Products with `count` weights of [size, size] in a data file, written in pieces."""
    folder.mkdir()
    data = folder / "weights" / "all.bin"
    data.parent.mkdir()
    random = np.random.default_rng(0)
    with open(data, "wb") as file:
        for _ in range(count * size // 256):
            piece = random.standard_normal((256, size), np.float32)
            file.write((piece / np.float32(size**0.5)).tobytes())
    nodes, weights = [], []
    for index in range(count):
        before = f"v{index - 1}" if index else "x"
        name = "y" if index == count - 1 else f"v{index}"
        nodes.append(helper.make_node("MatMul", [before, f"w{index}"], [name]))
        tensor = TensorProto(name=f"w{index}", data_type=1, dims=[size, size])
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": "weights/all.bin", "offset": str(index * size * size * 4)}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
        weights.append(tensor)
    return save(folder / "model.onnx", nodes, [1, size], weights)


def edited(source: Path, target: Path, factor: float) -> None:
    """The model with one value multiplied in between."""
    proto = onnx.load(source, load_external_data=False)
    graph, at = proto.graph, len(proto.graph.node) // 2
    reader = graph.node[at]
    before = reader.input[0]
    scale = numpy_helper.from_array(np.float32([factor]), "factor")
    graph.initializer.append(scale)
    nodes = list(graph.node)
    nodes[at - 1].output[0] = "early"
    made = helper.make_node("Mul", ["early", "factor"], [before])
    del graph.node[:]
    graph.node.extend([*nodes[:at], made, *nodes[at:]])
    onnx.save(proto, target)


def test_sizes_count_what_lies_outside_without_a_length(tmp_path: Path) -> None:
    path = external(tmp_path / "one", 3, 256)
    model = onnx.load(path, load_external_data=False)
    assert noise.facts(model, path).size == 3 * 256 * 256 * 4 + path.stat().st_size


def test_external_data_in_two_folders(tmp_path: Path) -> None:
    one = external(tmp_path / "one", 3, 256)
    two = external(tmp_path / "two", 3, 256)
    for factor, status in ((1.0, "passed"), (1.001, "failed")):
        edited(one, two, factor)
        verdict = measure("validate", tmp_path, [1, 256], one, two)
        assert verdict.told[0] == status, verdict


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "status"), [(1.0, "passed"), (1.001, "failed")])
def test_over_2_gib_without_a_copy_in_memory(
    tmp_path: Path, factor: float, status: str
) -> None:
    size, count = 4096, 36
    one = external(tmp_path / "one", count, size)
    two = one.with_name("two.onnx")
    edited(one, two, factor)
    weights = count * size * size * 4
    assert weights > 1 << 31
    plain = measure("run", tmp_path, [1, size], one, two)
    found = measure("validate", tmp_path, [1, size], one, two)
    assert found.told[0] == status, found
    assert found.caller < 600 << 20, found
    assert found.disk < 2.2 * weights, found
    assert max(found.workers) < 1.3 * max(plain.workers), (plain, found)
