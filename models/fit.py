"""The training loop, shared by every stage: images in memory, SGD, one cycle."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.dataset import Split, as_input

Hook = Callable[[int], None]


@dataclass(frozen=True)
class Schedule:
    epochs: int
    rate: float
    batch: int = 128
    weight_decay: float = 5e-4
    warmup: float = 0.2
    smoothing: float = 0.05


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image by chance, then shift the batch by up to two pixels.

    One shift for the batch instead of one for each image: it costs a slice, and the
    batches are many.
    """
    mirror = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirror, images.flip(-1), images)
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    return nn.functional.pad(images, (2, 2, 2, 2))[
        ..., down : down + 28, right : right + 28
    ]


def fit(
    model: nn.Module,
    split: Split,
    schedule: Schedule,
    seed: int,
    after_step: Hook | None = None,
) -> None:
    """Train in place.  `after_step` gets the step's number once the weights moved:
    it is where a mask is applied again, or where observers are frozen.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(as_input(split.images))
    labels = torch.tensor(split.labels, dtype=torch.long)
    steps = schedule.epochs * (len(images) // schedule.batch)
    optimizer, cycle = _optimizer(model, schedule, steps)
    step = 0
    for epoch in range(schedule.epochs):
        model.train()
        start, total = time.monotonic(), 0.0
        order = torch.randperm(len(images), generator=generator)
        for rows in order.split(schedule.batch):
            if len(rows) < schedule.batch:
                break
            batch = augment(images[rows], generator)
            loss = nn.functional.cross_entropy(
                model(batch), labels[rows], label_smoothing=schedule.smoothing
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            cycle.step()
            step += 1
            if after_step is not None:
                after_step(step)
            total += loss.item()
        seconds = time.monotonic() - start
        mean = total * schedule.batch / len(images)
        print(f"epoch {epoch + 1}: loss {mean:.4f}, {seconds:.0f} s", flush=True)


def _optimizer(
    model: nn.Module, schedule: Schedule, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=schedule.rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=schedule.weight_decay,
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.rate, total_steps=steps, pct_start=schedule.warmup
    )
    return optimizer, cycle


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    images = torch.from_numpy(as_input(split.images))
    labels = torch.tensor(split.labels, dtype=torch.long)
    found = torch.cat([model(rows).argmax(1) for rows in images.split(500)])
    return (found == labels).float().mean().item()
