"""Fashion-MNIST as numpy arrays, read from the files of a local folder.

The Debian package `dataset-fashion-mnist` installs that folder; nothing is downloaded.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class Split(NamedTuple):
    images: NDArray[np.uint8]  # [N, 28, 28]
    labels: NDArray[np.uint8]  # [N]


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of bytes: two zeros, type 8, the rank, the dimensions, the data."""
    raw = gzip.decompress(path.read_bytes())
    zeros, kind, rank = struct.unpack_from(">HBB", raw)
    if zeros != 0 or kind != 8:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    shape = struct.unpack_from(f">{rank}I", raw, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load(folder: Path, name: str) -> Split:
    """`name` is "train" (60,000 images) or "t10k" (10,000)."""
    return Split(
        read_idx(folder / f"{name}-images-idx3-ubyte.gz"),
        read_idx(folder / f"{name}-labels-idx1-ubyte.gz"),
    )


def as_input(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the network reads: float32 [N, 1, 28, 28] in [0, 1]."""
    return images[:, None].astype(np.float32) / np.float32(255)


def write_samples(folder: Path, target: Path, seed: int, calibration: int = 512) -> None:
    """The committed data: the whole test split, and unlabelled training images.

    The calibration images are stored as the library's `--data` reads them: one array
    for each input, under its name and with its dtype, axis 0 the samples.
    """
    target.mkdir(parents=True, exist_ok=True)
    test = load(folder, "t10k")
    np.savez_compressed(
        target / "fashion_test.npz", images=test.images, labels=test.labels
    )
    train = load(folder, "train").images
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(train), calibration, replace=False))
    np.savez_compressed(target / "fashion_calib.npz", image=as_input(train[chosen]))
