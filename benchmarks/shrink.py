"""What is gone of our masked models, and what that is worth in time.

    python benchmarks/shrink.py [--batch 16] [--rounds 40] [--json FILE]

`onnxopt.optimize` on the float and the quantized masked model: channels and blocks that
are gone, against the mask that they were trained with; parameters and weight bytes
against those of the dense model (`fashion_float`); accuracy and agreement on the 10,000
test images. Then the time of one run in ONNX Runtime (all optimizations, one thread),
CPU time, interleaved: the median of the ratios, with a bootstrap interval of 95 %.
Exits with 1 where one of the figures that the project promises does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

import onnxopt
from onnxopt import cost
from onnxopt.model import Model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import masks  # noqa: E402
from models.evaluate import initializer_bytes, predictions, test_set  # noqa: E402

DENSE = ROOT / "models" / "fashion_float.onnx"
CALIBRATION = ROOT / "models" / "data" / "fashion_calib.npz"
MAX_PARAMETERS = 0.55
MAX_QUANTIZED_BYTES = 0.16
MIN_CONSTANT = 0.95
MAX_DROP = 0.0005
MIN_AGREEMENT = 0.999
MAX_LATENCY = 0.65


@dataclass(frozen=True)
class Row:
    """One model after the rewrite; ratios are to the dense float model."""

    name: str
    zero: str
    constant: str
    blocks: int
    live_removed: int
    parameters: float
    weight_bytes: float
    accuracy_before: float
    accuracy_after: float
    agreement: float
    verdict: str
    latency: float
    interval: tuple[float, float]


def optimized(name: str, folder: Path) -> tuple[Path, onnxopt.Report]:
    """The result of the default recipe on one of our models."""
    target = folder / f"{name}.onnx"
    source = ROOT / "models" / f"{name}.onnx"
    result = onnxopt.optimize(source, data=CALIBRATION, batch_size=64)
    result.save(target)
    return target, result.report


def compare(name: str, folder: Path, batch: int, rounds: int) -> Row:
    """Rewrite one model and measure it."""
    target, report = optimized(name, folder)
    gone = masks.compare(onnx.load(target))
    labels = test_set()[1]
    before = predictions(ROOT / "models" / f"{name}.onnx")
    after = predictions(target)
    ratio, interval = latency(DENSE, target, batch, rounds)
    assert report.validation is not None
    return Row(
        name=name,
        zero=f"{min(gone.removed, gone.zero)} of {gone.zero}",
        constant=f"{gone.constant_removed} of {gone.constant}",
        blocks=gone.blocks,
        live_removed=gone.live_removed,
        parameters=_parameters(target) / _parameters(DENSE),
        weight_bytes=initializer_bytes(target) / initializer_bytes(DENSE),
        accuracy_before=float((before == labels).mean()),
        accuracy_after=float((after == labels).mean()),
        agreement=float((before == after).mean()),
        verdict=report.validation.status,
        latency=ratio,
        interval=interval,
    )


def _parameters(path: Path) -> int:
    return cost.parameters(Model.open(path))


def latency(
    first: Path, second: Path, batch: int, rounds: int
) -> tuple[float, tuple[float, float]]:
    """CPU time of `second` over that of `first`: median, and a 95 % interval."""
    images = test_set()[0][:batch]
    sessions = [_session(first), _session(second)]
    times = np.array(
        [[_seconds(session, images) for session in sessions] for _ in range(rounds + 3)]
    )[3:]
    ratios = times[:, 1] / times[:, 0]
    rng = np.random.default_rng(0)
    drawn = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(np.median(ratios)), (float(low), float(high))


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def _seconds(
    session: ort.InferenceSession, images: np.ndarray, repeat: int = 10
) -> float:
    start = time.process_time()
    for _ in range(repeat):
        session.run(None, {"image": images})
    return time.process_time() - start


def problems(row: Row) -> list[str]:
    """What the project promises and this row does not keep."""
    zero, _, all_zero = row.zero.split()
    constant, _, all_constant = row.constant.split()
    is_float = row.name == "fashion_masked"
    checks = {
        "a zero channel stays": zero == all_zero,
        "constant channels stay": not is_float
        or int(constant) >= MIN_CONSTANT * int(all_constant),
        "a dead block stays": row.blocks == len(masks.dead_blocks()),
        "a live channel went": row.live_removed == 0,
        "parameters": not is_float or row.parameters <= MAX_PARAMETERS,
        "weight bytes": is_float or row.weight_bytes <= MAX_QUANTIZED_BYTES,
        "accuracy": row.accuracy_before - row.accuracy_after <= MAX_DROP,
        "agreement": row.agreement >= MIN_AGREEMENT,
        "validation": row.verdict == "passed",
        "latency": not is_float or row.latency <= MAX_LATENCY,
    }
    return [f"{row.name}: {what}" for what, holds in checks.items() if not holds]


def show(row: Row, batch: int) -> None:
    """Print one model's figures."""
    low, high = row.interval
    print(f"{row.name}")
    print(f"  zero channels gone      {row.zero}")
    print(f"  constant channels gone  {row.constant}")
    print(f"  dead blocks gone        {row.blocks} of {len(masks.dead_blocks())}")
    print(f"  parameters              {row.parameters:.3f} of the dense model's")
    print(f"  weight bytes            {row.weight_bytes:.3f} of the dense model's")
    print(
        f"  top-1                   {row.accuracy_before:.2%} -> "
        f"{row.accuracy_after:.2%}, agreement {row.agreement:.2%}, {row.verdict}"
    )
    print(
        f"  time at batch {batch:<9} {row.latency:.3f} of the dense model's "
        f"[{low:.3f}, {high:.3f}]"
    )


def main() -> int:
    """Print the figures; 0 where every promise holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("fashion_masked", "fashion_masked_qat"):
            row = compare(name, Path(folder), options.batch, options.rounds)
            show(row, options.batch)
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    missed = [problem for row in rows for problem in problems(row)]
    for problem in missed:
        print(f"NOT MET: {problem}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
