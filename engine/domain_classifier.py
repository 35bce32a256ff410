"""A small classifier of a labelled data set, whose features stand in for Inception's.

Inception was trained on photographs; of 28×28 grey clothes it knows little. This network is trained
on the data set itself, in minutes on a CPU, and cached: Fréchet distance and KID compare its pooled
features, the Inception Score its class probabilities.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cache, data
from .dealing import copy_weights
from .device import autocast, choose_precision
from .distributed import ALONE, Processes

# Another value here is another key in the cache, and so another training.
RECIPE = {
    "version": 1,  # of the code below, where it changes the outcome
    "widths": (32, 64, 128, 128),
    "epochs": 5,
    "batch": 128,
    "lr": 5e-3,
    "weight_decay": 0.02,
    "flip": False,
    "seed": 0,
}


class DomainClassifier(nn.Module):
    """x (N, C, H, W) in [−1, 1] → features (N, widths[-1]), logits (N, classes), float32.

    Blocks of conv 3×3, max-pool by 2 (the first two), batch norm, ReLU; features are the mean over
    what is left of the picture.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        layers, c = [], channels
        for i, width in enumerate(widths):
            layers.append(nn.Conv2d(c, width, 3, padding=1, bias=False))
            if i < 2:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            c = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(c, classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x.contiguous(memory_format=torch.channels_last)).mean((2, 3)).float()
        return features, self.head(features).float()


def train(images: data.Images, recipe: dict, device: torch.device) -> DomainClassifier:
    """Trains by cross entropy, AdamW and one cycle of the learning rate; seeded, in eval mode."""
    from tqdm import trange

    steps = max(1, recipe["epochs"] * len(images) // recipe["batch"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        model = DomainClassifier(images.channels, len(images.classes), recipe["widths"])
    model.to(device).train()
    rate, decay = recipe["lr"], recipe["weight_decay"]
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    precision = choose_precision("auto", device)
    stream = data.batches(images, recipe["batch"], seed=recipe["seed"], flip=recipe["flip"])
    progress = trange(steps, desc="training the domain classifier", unit="step", leave=False)
    for _, (x, y) in zip(progress, stream, strict=False):
        with autocast(device, precision):
            logits = model(x.to(device))[1]
        loss = F.cross_entropy(logits, y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    stream.close()
    return model.eval().requires_grad_(False)


def accuracy(model: DomainClassifier, images: data.Images, device: torch.device) -> float:
    """Share of pictures whose label is the most probable class."""
    found = [
        model(to_input(pixels).to(device))[1].argmax(1).cpu()
        for pixels in data.in_order(images, torch.arange(len(images)), 500)
    ]
    return float((torch.cat(found) == images.labels).float().mean())


def to_input(pixels: Tensor) -> Tensor:
    """(N, C, H, W) uint8 → float32 in [−1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def obtain(
    images: data.Images,
    test: data.Images,
    folder: Path,
    device: torch.device,
    recipe: dict | None = None,
    processes: Processes = ALONE,
) -> tuple[DomainClassifier, dict]:
    """The classifier of this training set, from the cache or trained and put there.

    → model in eval mode on `device`, info with "key" and "accuracy" on `test`. The key covers
    recipe and data. Of several processes rank 0 alone looks into the cache or trains, while the
    others wait. Raises ValueError, one sentence, when the data set has no labels.
    """
    recipe = RECIPE if recipe is None else recipe
    if images.labels is None or len(images.classes) < 2:
        raise ValueError(
            f"{images.name} has no labels to train a domain classifier on: use --features inception"
        )
    model = DomainClassifier(images.channels, len(images.classes), recipe["widths"])
    info = None
    if processes.first:
        state, info = cached(images, test, folder, device, recipe)
        model.load_state_dict(state)
    info = processes.broadcast(info)
    copy_weights(processes, model)
    return model.eval().requires_grad_(False).to(device), info


def cached(
    images: data.Images, test: data.Images, folder: Path, device: torch.device, recipe: dict
) -> tuple[dict[str, Tensor], dict]:
    """Weights and info of `obtain`."""
    key = cache.digest(recipe, cache.fingerprint(images), list(images.classes))
    path = folder / f"domain-classifier-{key}.safetensors"
    found = cache.load(path)
    if found is not None:
        return found
    print(f"training the domain classifier of {images.name}, once: {path}", file=sys.stderr)
    model = train(images, recipe, device)
    info = {
        "key": key,
        "accuracy": accuracy(model, test, device),
        "data": images.name,
        "recipe": recipe,
        "test_images": len(test),
    }
    cache.store(path, model.state_dict(), info)
    return model.state_dict(), info
