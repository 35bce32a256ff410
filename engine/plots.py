"""Pictures: grids of samples, strips of the reverse process, loss curves; PNG, atomically."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1], any float dtype → (N, H, W, C) uint8."""
    scaled = images.detach().float().add(1).mul(127.5).round_().clamp_(0, 255)
    return scaled.nan_to_num_(0).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(
    images: Tensor, path: str | os.PathLike, *, columns: int | None = None, scale: int = 2
) -> Path:
    """Draws images (N, C, H, W) in [-1, 1] in rows of `columns` (default: as square as can be).

    Each pixel becomes scale × scale pixels; C is 1 (grey) or 3 (RGB).
    """
    from PIL import Image

    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"a grid needs images (N, 1 or 3, H, W), N ≥ 1, not {tuple(images.shape)}")
    pixels = to_bytes(images)
    n, h, w, c = pixels.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    gap = 1
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (h + gap) + gap, i % columns * (w + gap) + gap
        sheet[top : top + h, left : left + w] = image
    sheet = sheet.repeat(scale, 0).repeat(scale, 1)
    with atomic(path) as temporary:
        Image.fromarray(sheet[..., 0] if c == 1 else sheet).save(temporary, format="PNG")
    return Path(path)


def strip(states: Sequence[Tensor], path: str | os.PathLike, *, scale: int = 2) -> Path:
    """Draws the reverse process, one row per image: states x_T … x_0, each (N, C, H, W)."""
    if not len(states):
        raise ValueError("a strip needs at least one state")
    table = torch.stack([state.float() for state in states], dim=1)  # (N, states, C, H, W)
    return grid(table.flatten(0, 1), path, columns=len(states), scale=scale)


def loss_curve(run: str | os.PathLike, path: str | os.PathLike | None = None) -> Path:
    """Draws the loss of a run from its metrics.jsonl → run/loss.png (or `path`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from .metrics import read_metrics

    rows = [row for row in read_metrics(run) if row.get("loss") is not None]
    path = Path(run) / "loss.png" if path is None else Path(path)
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth, average, weight = [], 0.0, 0.0
    for loss in losses:  # over the weights so far: a start at the first loss would show for long
        average, weight = 0.95 * average + 0.05 * loss, 0.95 * weight + 0.05
        smooth.append(average / weight)
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="loss of a batch")
    axes.plot(steps, smooth, color="tab:blue", linewidth=1.5, label="moving average")
    if losses and min(losses) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel="optimiser step", ylabel="loss", title=str(Path(run).name))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png")
    finally:
        pyplot.close(figure)
    return path


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when all went well and removed when not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
