"""Train our own models and export them.

    python -m models.train [--data FOLDER] [--work FOLDER] [STAGE ...]

Run by hand, from the root of the repository, with the `dev` extra (torch, CPU).  The
stages, each of which reads the checkpoint of the one before it from `--work`:

    samples   models/data/*.npz
    float     train the float network                     -> float.pt
    qat       fold BatchNorm, train with fake quantizers  -> qat.pt
    masked    half of the channels masked, trained on     -> masked.pt
    sparse    quantization-aware training of that         -> sparse.pt
    export    models/fashion_{float,qat_legacy,qat_dynamo}.onnx
    export-masked   models/fashion_masked{,_qat}.onnx and the mask

Checkpoints are not committed: the seed and this script make them again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from models.dataset import DEBIAN_FOLDER, load, write_samples
from models.export import export_float, export_qat_dynamo, export_qat_legacy
from models.fit import Schedule, accuracy, fit
from models.mask import apply, apply_folded, draw_masks, start, write
from models.network import FashionNet
from models.quantize import freeze_ranges, quantized

HERE = Path(__file__).parent
SEED = 20240
THREADS = 2  # part of the recipe: sums are split by thread, and rounding with them
FLOAT_SCHEDULE = Schedule(epochs=10, rate=0.1)
QAT_SCHEDULE = Schedule(epochs=3, rate=2e-3, weight_decay=1e-4)
MASKED_SCHEDULE = Schedule(epochs=8, rate=0.05)
SPARSE_RANGE = 1e-3  # below the largest weight of any filter that is not all zero
OBSERVED_STEPS = 900  # of the 1,404 of QAT_SCHEDULE; after them the ranges stand still


def write_data(data: Path, work: Path) -> None:
    write_samples(data, HERE / "data", SEED)


def train_float(data: Path, work: Path) -> None:
    # channels_last: the same network, about four times as fast on a CPU.
    model = FashionNet().to(memory_format=torch.channels_last)
    fit(model, load(data, "train"), FLOAT_SCHEDULE, SEED)
    print(f"float: {accuracy(model, load(data, 't10k')):.4f}")
    torch.save(model.state_dict(), work / "float.pt")


def load_float(work: Path, name: str = "float.pt") -> FashionNet:
    model = FashionNet()
    model.load_state_dict(torch.load(work / name))
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


def train_masked(data: Path, work: Path) -> None:
    model = load_float(work).to(memory_format=torch.channels_last)
    masks = draw_masks(model, SEED)
    start(model, masks)
    fit(
        model,
        load(data, "train"),
        MASKED_SCHEDULE,
        SEED + 2,
        lambda step: apply(model, masks),
    )
    print(f"masked: {accuracy(model, load(data, 't10k')):.4f}")
    torch.save(model.state_dict(), work / "masked.pt")


def train_sparse(data: Path, work: Path) -> None:
    source = load_float(work, "masked.pt")
    masks = draw_masks(source, SEED)
    model = quantized(source, SPARSE_RANGE).to(memory_format=torch.channels_last)

    def after_step(step: int) -> None:
        apply_folded(model, masks)
        if step == OBSERVED_STEPS:
            freeze_ranges(model)

    after_step(0)
    fit(model, load(data, "train"), QAT_SCHEDULE, SEED + 3, after_step)
    print(f"sparse: {accuracy(model, load(data, 't10k')):.4f}")
    torch.save(model.state_dict(), work / "sparse.pt")


def export(data: Path, work: Path) -> None:
    export_float(load_float(work), HERE / "fashion_float.onnx")
    export_qat_legacy(load_qat(work), HERE / "fashion_qat_legacy.onnx")
    export_qat_dynamo(load_qat(work), HERE / "fashion_qat_dynamo.onnx")


def load_sparse(work: Path) -> FashionNet:
    model = quantized(FashionNet(), SPARSE_RANGE)
    model.load_state_dict(torch.load(work / "sparse.pt"))
    return model


def export_masked(data: Path, work: Path) -> None:
    export_float(load_float(work, "masked.pt"), HERE / "fashion_masked.onnx")
    export_qat_legacy(load_sparse(work), HERE / "fashion_masked_qat.onnx")
    write(draw_masks(FashionNet(), SEED), HERE / "fashion_masked.json")


STAGES = {
    "samples": write_data,
    "float": train_float,
    "qat": train_qat,
    "masked": train_masked,
    "sparse": train_sparse,
    "export": export,
    "export-masked": export_masked,
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
