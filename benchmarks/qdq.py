"""What `onnxopt optimize` makes of quantized exports, beside ONNX Runtime's quantizer.

    python benchmarks/qdq.py [NAME ...] [--batch 8] [--rounds 40] [--json FILE]

For each model: the bytes of the result over those of the export; of Conv, MatMul and
Gemm that ONNX Runtime's CPU provider could run in integers, how many it does; and the
time of a run (all optimizations, one thread, CPU time) over that of the export and
over that of the same float model as onnxruntime.quantization quantizes it: pre-processed,
QDQ, uint8 activations and int8 weights per channel, in 7 bits where the CPU has no VNNI,
calibrated on `models/data/fashion_calib.npz`. Models take turns in fresh processes
(`onnxopt.bench`); medians with a bootstrap interval of 95 %. Models of the catalogue
(`python models/fetch.py`) have no float twin. Exits with 1 where a promise does not hold.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnxopt
from onnxopt.data.inputs import Feed, Feeds
from onnxopt.latency import Bench, Plan, Ratio, compare
from onnxopt.quantization.calibration import Calibration
from onnxopt.quantization.kernels import integer_kernels
from onnxopt.quantization.ranges import Range, min_max

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import encoder  # noqa: E402

CALIBRATION = ROOT / "models" / "data" / "fashion_calib.npz"
CATALOGUE = Path.home() / ".cache" / "onnxopt"
LAYERS = ("Conv", "MatMul", "Gemm")
"""Operators with one of these words in their names are counted."""
MAX_BYTES = 0.27
SAMPLES = 128


@dataclass(frozen=True)
class Case:
    """An export, the float model that it stands for (if there is one), and data."""

    name: str
    export: Path
    twin: Path | None
    data: Callable[[int], Feeds] | None


@dataclass(frozen=True)
class Row:
    """What was measured: layers that run in integers of those that could, times.

    What is the tool's is None without a float twin.
    """

    name: str
    bytes: float
    before: tuple[int, int]
    after: tuple[int, int]
    by_tool: tuple[int, int] | None
    of_export: Ratio
    of_tool: Ratio | None


# ---- the models ----


def cases(folder: Path) -> Iterator[Case]:
    """Those that are there; the encoder is made in `folder`."""
    models = ROOT / "models"
    for name in ("fashion_qat_legacy", "fashion_qat_dynamo"):
        twin = models / "fashion_float.onnx"
        yield Case(name, models / f"{name}.onnx", twin, _images)
    yield _encoder(folder)
    for name in ("smart-turn", "ddddocr-old"):
        path = CATALOGUE / f"{name}.onnx"
        if path.exists():
            yield Case(name, path, None, None)


def _encoder(folder: Path) -> Case:
    """The transformer, with scales from the ranges of its own values."""
    twin, export = folder / "encoder_float.onnx", folder / "encoder_qat.onnx"
    model = encoder.encoder()
    onnx.save(model, twin)
    seen = Calibration(_tokens(8)).run(twin, encoder.quantized(model))
    found = {name: min_max(each) for name, each in seen.items()}
    found["x"] = Range(-4, 4)
    onnx.save(encoder.encoder(found), export)
    return Case("encoder", export, twin, _tokens)


def _images(batch: int) -> Feeds:
    with np.load(CALIBRATION) as stored:
        (name,) = stored.files
        images = stored[name][:SAMPLES]
    return _batches(name, images, batch)


def _tokens(batch: int) -> Feeds:
    shape = (SAMPLES, encoder.TOKENS, encoder.FEATURES)
    values = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return _batches("x", np.clip(values, -4, 4), batch)


def _batches(name: str, values: Any, batch: int) -> Feeds:
    def make() -> Iterator[Feed]:
        for start in range(0, len(values), batch):
            yield {name: values[start : start + batch]}

    return Feeds(make, "calibration data")


# ---- the tool ----


def by_tool(case: Case, folder: Path) -> Path:
    """The float twin as onnxruntime.quantization quantizes it at its best."""
    from onnxruntime import quantization as tool
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.getLogger().setLevel(logging.ERROR)  # it warns that it was told to do so
    assert case.twin is not None
    assert case.data is not None
    prepared, result = folder / "prepared.onnx", folder / f"{case.name}_tool.onnx"
    quant_pre_process(str(case.twin), str(prepared))
    tool.quantize_static(
        str(prepared),
        str(result),
        _reader(tool.CalibrationDataReader, case.data(8)),
        quant_format=tool.QuantFormat.QDQ,
        activation_type=tool.QuantType.QUInt8,
        weight_type=tool.QuantType.QInt8,
        per_channel=True,
        reduce_range=not _has_vnni(),
    )
    return result


def _reader(base: Any, feeds: Feeds) -> Any:
    """The tool's own kind of iterator."""

    class Reader(base):
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self.feeds, None)

    return Reader()


def _has_vnni() -> bool:
    """Whether the CPU adds products of 8 bits without saturating in between."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# ---- measuring ----


def measure(case: Case, folder: Path, batch: int, rounds: int) -> Row:
    """Optimize one export and compare."""
    result = folder / f"{case.name}_result.onnx"
    data = list(case.data(batch)) if case.data else None
    onnxopt.optimize(case.export, data=data, target="ort-cpu").save(result)
    models = [result, case.export]
    if case.twin is not None:
        models.append(by_tool(case, folder))
    fused = [_fused(path) for path in models]
    times = onnxopt.bench(models, data, rounds=rounds)
    has_tool = case.twin is not None
    return Row(
        name=case.name,
        bytes=result.stat().st_size / case.export.stat().st_size,
        before=fused[1],
        after=fused[0],
        by_tool=fused[2] if has_tool else None,
        of_export=_ratio(times, 1),
        of_tool=_ratio(times, 2) if has_tool else None,
    )


def _fused(path: Path) -> tuple[int, int]:
    """How many layers run in integers, of how many that could."""
    found = [
        layer
        for layer in integer_kernels(path).layers
        if layer.fusable and any(kind in layer.op for kind in LAYERS)
    ]
    return sum(layer.runs != "float" for layer in found), len(found)


def _ratio(times: Bench, other: int) -> Ratio:
    """The time of the first model over that of another one."""
    plan = Plan(times.rounds, times.starts, times.runs)
    pairs = [
        (getattr(theirs, times.clock), getattr(ours, times.clock))
        for theirs, ours in zip(
            times.models[other].blocks, times.models[0].blocks, strict=True
        )
    ]
    starts = [plan.start_of(number) for number in range(len(pairs))]
    return compare(pairs, starts if plan.starts > 1 else None, times.seed)


def problems(row: Row) -> list[str]:
    """What is promised and this row does not keep."""
    checks = {
        f"more than {MAX_BYTES} of the bytes": row.of_tool is None
        or row.bytes <= MAX_BYTES,
        "larger": row.bytes <= 1.0,
        "a layer that could run in integers is float": row.after[0] == row.after[1],
        "slower than the export": row.of_export.verdict != "slower",
        "slower than the tool's": row.of_tool is None or row.of_tool.verdict != "slower",
    }
    return [f"{row.name}: {what}" for what, holds in checks.items() if not holds]


COLUMNS = (
    "model",
    "bytes",
    "integer layers before",
    "after",
    "the tool's",
    "time, of the export's",
    "of the tool's",
)


def line(row: Row) -> str:
    """One row of the table."""
    counts = (row.before, row.after, row.by_tool)
    cells = (
        row.name,
        f"{row.bytes:.3f}",
        *("" if count is None else f"{count[0]} of {count[1]}" for count in counts),
        _told(row.of_export),
        _told(row.of_tool),
    )
    return f"| {' | '.join(cells)} |"


def _told(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; 0 where every promise holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
        for case in cases(folder):
            if not given.names or case.name in given.names:
                rows.append(measure(case, folder, given.batch, given.rounds))
                print(line(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps([_plain(row) for row in rows], indent=2))
    missed = [problem for row in rows for problem in problems(row)]
    for problem in missed:
        print(f"NOT MET: {problem}")
    return 1 if missed else 0


def _plain(row: Row) -> dict[str, Any]:
    found = asdict(row)
    for key in ("of_export", "of_tool"):
        ratio = getattr(row, key)
        found[key] = None if ratio is None else [ratio.value, ratio.low, ratio.high]
    return found


if __name__ == "__main__":
    sys.exit(main())
