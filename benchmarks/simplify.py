"""onnxopt simplify beside the other tools: nodes, bytes, time, memory, correctness.

    python benchmarks/simplify.py [--models A,B] [--tools A,B] [--rounds 3] [--json FILE]
                                  [--keep DIR] [--no-build]

Models: the catalogue's (`models/fetch.py`), `models/fashion_float.onnx`, onnx's light
models, torch's exports and the 2.25 GiB one (`benchmarks/exports.py`); those that are
not there are left out. Tools and their versions: `benchmarks/rivals.py`.

Every run is a process of its own, from a file to a file, without validation; tools take
turns, and the median of the rounds stands. CPU seconds are of the process and its
children, less those of a bare `import onnx` in the same environment, measured beside
it; peak memory is that of the largest process. A result counts (is eligible) where
onnx.checker takes it, its outputs in ONNX Runtime without optimizations are those of
the original on feeds of different sizes, it has no other operator set or version, and
it is not larger than max(1 MB, 1.02 times the original). Exits with 1 where a figure
that the project promises is not met.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import environments, exports, outcome, process, rivals  # noqa: E402

OURS = "onnxopt"
LARGE_TOOLS = (OURS, "onnxsim", "onnxscript", "ort-basic")
"""The others read the whole model into one message, which 2 GiB do not fit in."""
TIMEOUT = 900
MAX_CPU = 0.6
MAX_MEDIAN_CPU = 0.4
SLOW_SECONDS = 1.0
"""CPU time is promised where the fastest of the others takes longer than this."""
LARGE_MAX_MB = 150.0
LARGE_MAX_CPU = 2.0


@dataclass
class Run:
    """One tool on one model; `cpu` is above that of a bare import."""

    tool: str
    cpu: float = 0.0
    peak: float = 0.0
    bare_cpu: float = 0.0
    bare_peak: float = 0.0
    error: str = ""
    result: outcome.Outcome | None = None
    rounds: list[process.Cost] = field(default_factory=list)
    bares: list[process.Cost] = field(default_factory=list)

    @property
    def correct(self) -> bool:
        return self.result is not None and self.result.correct

    @property
    def eligible(self) -> bool:
        return self.result is not None and self.result.eligible

    def close(self) -> None:
        """Medians of the rounds."""
        if self.error:
            return
        median = statistics.median
        self.bare_cpu = median(item.cpu_seconds for item in self.bares)
        self.bare_peak = median(item.peak_mb for item in self.bares)
        self.cpu = median(item.cpu_seconds for item in self.rounds) - self.bare_cpu
        self.peak = median(item.peak_mb for item in self.rounds)


@dataclass
class Row:
    """All tools on one model."""

    model: str
    nodes: int
    bytes: int
    runs: dict[str, Run]

    @property
    def ours(self) -> Run:
        return self.runs[OURS]

    def best(self) -> Run | None:
        """The eligible rival with the fewest nodes."""
        others = [run for run in self._others() if run.eligible]
        return min(
            others, key=lambda run: run.result.nodes if run.result else 0, default=None
        )

    def fastest(self) -> Run | None:
        """The fastest correct one of the tools that time is compared with."""
        return min(self._leaders(), key=lambda run: run.cpu, default=None)

    def leanest(self) -> Run | None:
        """The one with the least memory, of the same tools."""
        return min(self._leaders(), key=lambda run: run.peak, default=None)

    def cpu_ratio(self) -> float | None:
        """Our CPU time over the fastest one's; None where that is next to nothing."""
        fastest = self.fastest()
        if fastest is None or fastest.cpu < 0.05 or self.ours.result is None:
            return None
        return self.ours.cpu / fastest.cpu

    def _others(self) -> Iterator[Run]:
        return (run for name, run in self.runs.items() if name != OURS)

    def _leaders(self) -> list[Run]:
        return [run for run in self._others() if _leads(run) and run.correct]


def _leads(run: Run) -> bool:
    return rivals.TOOLS[run.tool].leader


# ---- measuring ----


def models() -> dict[str, Path]:
    """Every model that is there, by name."""
    light = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    files = {path.stem: path for path in sorted(environments.CACHE.glob("*.onnx"))}
    files["fashion_float"] = ROOT / "models" / "fashion_float.onnx"
    files |= {path.stem: path for path in sorted(light.glob("*.onnx"))}
    files |= {name: exports.place(name) for name in exports.NAMES}
    return {name: path for name, path in files.items() if path.exists()}


def compare(
    name: str,
    path: Path,
    tools: Sequence[rivals.Tool],
    rounds: int,
    keep: Path | None = None,
) -> Row:
    """Run every tool, in turns, and judge what the last round wrote."""
    proto = onnx.load(path, load_external_data=False)
    row = Row(name, outcome.count(proto), outcome.size(path, proto), {})
    row.runs = {tool.name: Run(tool.name) for tool in tools}
    expected = outcome.Expected(path, name, most=2 if name == exports.LARGE else 3)
    for number in range(rounds):
        for tool in tools:
            run = row.runs[tool.name]
            if run.error:
                continue
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / f"{name}.onnx"
                os.sync()  # no run pays for what the one before it has written
                try:
                    run.bares.append(process.measure("import onnx", tool.bare()))
                    command = tool.command(path, target)
                    run.rounds.append(process.measure(tool.name, command, TIMEOUT))
                    if number == rounds - 1:
                        run.result = outcome.of(path, target, expected)
                        _keep(target, keep and keep / tool.name)
                except (process.FailedError, OSError) as error:
                    run.error = str(error)[-600:]
    for run in row.runs.values():
        run.close()
    return row


def _keep(target: Path, folder: Path | None) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in target.parent.iterdir():
            shutil.copy(file, folder / file.name)


# ---- what is promised ----


def problems(rows: Sequence[Row]) -> list[str]:
    """What the project promises and these rows do not keep."""
    found = [f"{row.model}: {words}" for row in rows for words in _missed(row)]
    ratios = [r for row in rows if _is_compared(row) and (r := row.cpu_ratio())]
    if ratios and statistics.median(ratios) > MAX_MEDIAN_CPU:
        median = statistics.median(ratios)
        found.append(f"median CPU ratio {median:.2f} > {MAX_MEDIAN_CPU}")
    return found


def _missed(row: Row) -> Iterator[str]:
    made = row.ours.result
    if made is None:
        yield f"failed: {row.ours.error}"
        return
    if not made.eligible:
        yield f"not eligible: {_flaws(made)}"
    best, fastest, leanest = row.best(), row.fastest(), row.leanest()
    if best is not None and best.result is not None and made.nodes > best.result.nodes:
        yield f"{made.nodes} nodes, {best.tool} {best.result.nodes}"
    if row.model == exports.LARGE:
        yield from _missed_large(row)
        return
    if fastest is not None and fastest.cpu > SLOW_SECONDS:
        ratio = row.ours.cpu / fastest.cpu
        if ratio > MAX_CPU:
            yield f"CPU {ratio:.2f} of {fastest.tool}"
    if leanest is not None and row.ours.peak > leanest.peak:
        yield f"{row.ours.peak:.0f} MB, {leanest.tool} {leanest.peak:.0f} MB"


def _missed_large(row: Row) -> Iterator[str]:
    if row.ours.peak > LARGE_MAX_MB:
        yield f"{row.ours.peak:.0f} MB, more than {LARGE_MAX_MB:.0f}"
    lazy = row.runs.get("onnxscript")
    if lazy is not None and lazy.correct and row.ours.cpu > LARGE_MAX_CPU * lazy.cpu:
        yield f"CPU {row.ours.cpu / lazy.cpu:.2f} of onnxscript"


def _slow_ratios(rows: Sequence[Row]) -> list[float]:
    pairs = [(row.fastest(), row.cpu_ratio()) for row in rows if _is_compared(row)]
    return [r for run, r in pairs if run is not None and r and run.cpu > SLOW_SECONDS]


def _is_compared(row: Row) -> bool:
    return row.model != exports.LARGE


def _flaws(made: outcome.Outcome) -> str:
    words = [
        "" if made.equal else f"WRONG {made.difference}",
        "" if made.standard else "not standard",
        "" if made.small else "too large",
        f"checker: {made.checker}" if made.checker else "",
    ]
    return "; ".join(" ".join(word.split()) for word in words if word)


# ---- words ----


def show(row: Row) -> None:
    """Print a model's table."""
    print(f"\n{row.model}: {row.nodes} nodes, {row.bytes / 1e6:.2f} MB")
    for run in row.runs.values():
        if run.result is None:
            last = run.error.strip().splitlines()[-1:]
            print(f"  {run.tool:17} failed: {''.join(last)[:110]}")
            continue
        size = run.result.bytes / 1e6
        print(
            f"  {run.tool:17} {run.result.nodes:6} nodes {size:9.2f} MB "
            f"{run.cpu:7.2f} s {run.peak:6.0f} MB  {_flaws(run.result)[:100]}"
        )
    sys.stdout.flush()


def summarize(rows: Sequence[Row]) -> None:
    """Print one line a model, and the medians."""
    print(
        f"\n{'model':22} {'nodes':>5} {'ours':>5}  {'best rival':20} {'CPU':>5}  "
        f"{'fastest':16} {'peak':>5}  leanest"
    )
    for row in rows:
        made, best = row.ours.result, row.best()
        fastest, leanest, ratio = row.fastest(), row.leanest(), row.cpu_ratio()
        rival = f"{best.result.nodes} {best.tool}" if best and best.result else "-"
        quick = f"{fastest.cpu:.2f} s {fastest.tool}" if fastest else "-"
        lean = f"{leanest.peak:.0f} MB {leanest.tool}" if leanest else "-"
        peak = f"{row.ours.peak / leanest.peak:.2f}" if leanest else "-"
        print(
            f"{row.model:22} {row.nodes:5} {made.nodes if made else '-':>5}  {rival:20} "
            f"{'-' if ratio is None else format(ratio, '.2f'):>5}  {quick:16} {peak:>5}  "
            f"{lean}"
        )
    ratios = [r for row in rows if _is_compared(row) and (r := row.cpu_ratio())]
    for what, values in (("all", ratios), (f"over {SLOW_SECONDS} s", _slow_ratios(rows))):
        if values:
            median = statistics.median(values)
            print(f"median CPU ratio, {what}: {median:.2f} of {len(values)} models")


def _tools(given: str | None, model: str) -> list[rivals.Tool]:
    names = given.split(",") if given else list(rivals.TOOLS)
    if model == exports.LARGE:
        names = [name for name in names if name in LARGE_TOOLS]
    return [rivals.TOOLS[name] for name in names]


def main() -> int:
    """Print the tables; 0 where every promise holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", help="names, comma-separated; default: all")
    parser.add_argument("--tools", help="names, comma-separated; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="keep the files in DIR/TOOL/MODEL.onnx")
    parser.add_argument("--no-build", action="store_true", help="environments are there")
    options = parser.parse_args()
    chosen = models()
    if options.models:
        chosen = {name: chosen[name] for name in options.models.split(",")}
    if not options.no_build:
        for tool in _tools(options.tools, ""):
            tool.build()
    rows = []
    for name, path in chosen.items():
        tools = _tools(options.tools, name)
        rows.append(compare(name, path, tools, options.rounds, options.keep))
        show(rows[-1])
        if options.json:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if OURS not in (options.tools or OURS).split(","):
        return 0
    summarize(rows)
    missed = problems(rows)
    for problem in missed:
        print(f"NOT MET: {problem}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
