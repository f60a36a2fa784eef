"""Train our own models and export them.

    python -m models.train [--data FOLDER] [--work FOLDER] [STAGE ...]

Run by hand, from the root of the repository, with the `dev` extra (torch, CPU).  The
stages, each of which reads the checkpoint of the one before it from `--work`:

    samples   models/data/*.npz
    float     train the float network                     -> float.pt
    qat       fold BatchNorm, train with fake quantizers  -> qat.pt
    export    models/fashion_*.onnx

Checkpoints are not committed: the seed and this script make them again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from models.dataset import DEBIAN_FOLDER, load, write_samples
from models.export import export_float, export_qat_dynamo, export_qat_legacy
from models.fit import Schedule, accuracy, fit
from models.network import FashionNet
from models.quantize import freeze_ranges, quantized

HERE = Path(__file__).parent
SEED = 20240
THREADS = 2  # part of the recipe: sums are split by thread, and rounding with them
FLOAT_SCHEDULE = Schedule(epochs=10, rate=0.1)
QAT_SCHEDULE = Schedule(epochs=3, rate=2e-3, weight_decay=1e-4)
OBSERVED_STEPS = 900  # of the 1,404 of QAT_SCHEDULE; after them the ranges stand still


def write_data(data: Path, work: Path) -> None:
    write_samples(data, HERE / "data", SEED)


def train_float(data: Path, work: Path) -> None:
    # channels_last: the same network, about four times as fast on a CPU.
    model = FashionNet().to(memory_format=torch.channels_last)
    fit(model, load(data, "train"), FLOAT_SCHEDULE, SEED)
    print(f"float: {accuracy(model, load(data, 't10k')):.4f}")
    torch.save(model.state_dict(), work / "float.pt")


def load_float(work: Path) -> FashionNet:
    model = FashionNet()
    model.load_state_dict(torch.load(work / "float.pt"))
    return model


def train_qat(data: Path, work: Path) -> None:
    model = quantized(load_float(work)).to(memory_format=torch.channels_last)

    def freeze(step: int) -> None:
        if step == OBSERVED_STEPS:
            freeze_ranges(model)

    fit(model, load(data, "train"), QAT_SCHEDULE, SEED + 1, freeze)
    print(f"qat: {accuracy(model, load(data, 't10k')):.4f}")
    torch.save(model.state_dict(), work / "qat.pt")


def load_qat(work: Path) -> FashionNet:
    model = quantized(FashionNet())
    model.load_state_dict(torch.load(work / "qat.pt"))
    return model


def export(data: Path, work: Path) -> None:
    export_float(load_float(work), HERE / "fashion_float.onnx")
    export_qat_legacy(load_qat(work), HERE / "fashion_qat_legacy.onnx")
    export_qat_dynamo(load_qat(work), HERE / "fashion_qat_dynamo.onnx")


STAGES = {
    "samples": write_data,
    "float": train_float,
    "qat": train_qat,
    "export": export,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and export our own models.")
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER)
    parser.add_argument("--work", type=Path, default=Path("build/models"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    for stage in options.stages or STAGES:
        torch.manual_seed(SEED)
        STAGES[stage](options.data, options.work)


if __name__ == "__main__":
    main()
