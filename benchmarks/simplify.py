"""onnxopt simplify beside the other tools: nodes, bytes, time, memory, correctness."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import outcome, process, rivals  # noqa: E402

CACHE = Path.home() / ".cache" / "onnxopt"


@dataclass
class Run:
    """One tool on one model; time above that of a bare import."""

    tool: str
    cpu: float | None = None
    peak: float | None = None
    bare_cpu: float = 0.0
    bare_peak: float = 0.0
    error: str = ""
    result: outcome.Outcome | None = None
    rounds: list[process.Cost] = field(default_factory=list)
    bares: list[process.Cost] = field(default_factory=list)

    def close(self) -> None:
        """Medians of the rounds."""
        if not self.rounds:
            return
        median = statistics.median
        self.bare_cpu = median(item.cpu_seconds for item in self.bares)
        self.bare_peak = median(item.peak_mb for item in self.bares)
        self.cpu = median(item.cpu_seconds for item in self.rounds) - self.bare_cpu
        self.peak = median(item.peak_mb for item in self.rounds)


def models() -> dict[str, Path]:
    """Every model that is there, by name."""
    light = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    files = [
        *sorted(CACHE.glob("*.onnx")),
        ROOT / "models" / "fashion_float.onnx",
        *sorted(light.glob("*.onnx")),
        *sorted((CACHE / "exports").glob("*.onnx")),
        *sorted((CACHE / "exports").glob("*/*.onnx")),
    ]
    return {path.stem: path for path in files}


def compare(
    name: str, path: Path, tools: list[rivals.Tool], rounds: int, keep: Path | None
) -> dict[str, Run]:
    """Run every tool, interleaved."""
    runs = {tool.name: Run(tool.name) for tool in tools}
    expected = outcome.Expected(path, name)
    for number in range(rounds):
        for tool in tools:
            run = runs[tool.name]
            if run.error:
                continue
            last = number == rounds - 1
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / f"{name}.onnx"
                try:
                    run.bares.append(process.measure("import onnx", tool.bare()))
                    command = tool.command(path, target)
                    run.rounds.append(process.measure(tool.name, command, 900))
                    if last:
                        run.result = outcome.of(path, target, expected)
                except (process.FailedError, OSError) as error:
                    run.error = str(error)[-600:]
                if last and keep is not None and target.exists():
                    (keep / tool.name).mkdir(parents=True, exist_ok=True)
                    for file in Path(folder).iterdir():
                        shutil.copy(file, keep / tool.name / file.name)
    for run in runs.values():
        run.close()
    return runs


def show(name: str, before: int, size: int, runs: dict[str, Run]) -> None:
    """Print a model's table."""
    print(f"\n{name}: {before} nodes, {size / 1e6:.2f} MB")
    for run in runs.values():
        if run.result is None:
            print(f"  {run.tool:17} failed: {run.error.splitlines()[-1:]}")
            continue
        made = run.result
        words = [
            "" if made.equal else f"WRONG {made.difference}",
            "" if made.standard else "not standard",
            "" if made.small else "too large",
            f"checker: {made.checker.splitlines()[0]}" if made.checker else "",
        ]
        print(
            f"  {run.tool:17} {made.nodes:6} nodes {made.bytes / 1e6:9.2f} MB "
            f"{run.cpu:8.2f} s {run.peak:7.0f} MB  "
            + "; ".join(word for word in words if word)[:150],
            flush=True,
        )


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", help="names, comma-separated")
    parser.add_argument("--tools", help="names, comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="keep the files in DIR/TOOL/MODEL.onnx")
    parser.add_argument("--no-build", action="store_true")
    options = parser.parse_args()
    chosen = models()
    if options.models:
        chosen = {name: chosen[name] for name in options.models.split(",")}
    names = options.tools.split(",") if options.tools else list(rivals.TOOLS)
    tools = [rivals.TOOLS[name] for name in names]
    if not options.no_build:
        for tool in tools:
            tool.build()
    table = {}
    for name, path in chosen.items():
        model = onnx.load(path, load_external_data=False)
        before, size = outcome.count(model), outcome.size(path, model)
        runs = compare(name, path, tools, options.rounds, options.keep)
        show(name, before, size, runs)
        table[name] = {
            "nodes": before,
            "bytes": size,
            "tools": {key: asdict(run) for key, run in runs.items()},
        }
        if options.json:
            options.json.write_text(json.dumps(table, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
