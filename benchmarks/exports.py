"""Models to simplify, as torch's two exporters write them, with random weights.

    python benchmarks/exports.py [NAME ...] [--env DIR] [--folder DIR] [--force] [--list]

BERT, GPT-2, Llama (grouped queries) and ViT with four layers, and Swin-T in full: each
by the exporter that traces (`legacy`, opset 17), by the one that captures (`dynamo`)
and by the latter without its optimizer (`dynamo-raw`); the text models also with
`sdpa` attention. Batch and sequence are dynamic. `large` is a chain with 2.25 GiB of
external data, written without torch. Torch and transformers live in an environment of
their own, made on the first call with the versions below (some 2 GB).

What is there already stays, unless the versions changed or with `--force`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import environments, memory  # noqa: E402

PACKAGES = (
    "torch==2.13.0",
    "transformers==5.24.0",
    "onnx==1.23.2",
    "onnxscript==0.7.2",
)
ENVIRONMENT = environments.CACHE / "rivals" / "torch"
FOLDER = environments.CACHE / "exports"
LARGE = "large"
LARGE_GIB = 2.25
EXPORTERS = ("legacy", "dynamo", "dynamo-raw")
NAMES = (
    *(f"{m}-{e}" for m in ("bert", "gpt2", "llama", "vit", "swin") for e in EXPORTERS),
    *(f"{m}-{e}-sdpa" for m in ("bert", "gpt2", "llama") for e in EXPORTERS[::2]),
    LARGE,
)


def place(name: str, folder: Path = FOLDER) -> Path:
    """Where a model lies; the large one has data beside it, and so its own folder."""
    return folder / LARGE / "large.onnx" if name == LARGE else folder / f"{name}.onnx"


def write(
    names: Sequence[str], folder: Path, environment: Path, force: bool = False
) -> None:
    """Make the models that are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp, versions = folder / "versions.txt", "\n".join(PACKAGES) + "\n"
    if stamp.exists() and stamp.read_text() != versions:
        for old in folder.glob("*.onnx"):
            old.unlink()
    stamp.write_text(versions)
    wanted = [name for name in names if force or not place(name, folder).exists()]
    if LARGE in wanted:
        place(LARGE, folder).parent.mkdir(exist_ok=True)
        memory.write_model(place(LARGE, folder), LARGE_GIB)
    by_torch = [name for name in wanted if name != LARGE]
    if by_torch:
        python = environments.build(environment, PACKAGES)
        script = Path(__file__).with_name("torch_models.py")
        subprocess.run(
            [str(python), "-W", "ignore", str(script), str(folder), *by_torch], check=True
        )


def main() -> None:
    """Write the models that are asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--env", type=Path, default=ENVIRONMENT)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--force", action="store_true", help="make them again")
    parser.add_argument("--list", action="store_true", help="print the names only")
    given = parser.parse_args()
    unknown = set(given.names) - set(NAMES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if given.list:
        print(*NAMES, sep="\n")
        return
    write(given.names or NAMES, given.folder, given.env, given.force)


if __name__ == "__main__":
    main()
