"""Figures of numbers: losses, noise schedules, the forward process, the variational bound."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .pictures import atomic, sheet

if TYPE_CHECKING:  # late: the command lines answer --help without torch
    from torch import Tensor


def loss_curve(run: str | os.PathLike, path: str | os.PathLike | None = None) -> Path:
    """Draws the loss of a run from its metrics.jsonl → run/loss.png (or `path`)."""
    from .metrics import read_metrics

    rows = [row for row in read_metrics(run) if number(row.get("loss"))]
    path = Path(run) / "loss.png" if path is None else Path(path)
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth, average, weight = [], 0.0, 0.0
    for loss in losses:  # over the weights so far: a start at the first loss would show for long
        average, weight = 0.95 * average + 0.05 * loss, 0.95 * weight + 0.05
        smooth.append(average / weight)
    with figure(path) as (_, axes):
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="a batch's loss")
        axes.plot(steps, smooth, color="tab:blue", linewidth=1.5, label="moving average")
        if losses and min(losses) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.set(xlabel="optimiser step", ylabel="loss", title=str(Path(run).name))
        axes.grid(alpha=0.3)
        axes.legend()
    return path


def number(value: object) -> bool:
    """Whether this can be drawn; a file may hold anything."""
    return isinstance(value, int | float) and abs(value) < 1e300  # NaN is not


def schedule_curves(path: str | os.PathLike, T: int = 1000) -> Path:
    """Draws ᾱ_t, the signal-to-noise ratio ᾱ_t/(1 − ᾱ_t) and β_t of every noise schedule."""
    from . import schedules

    curves = {name: schedules.betas(name, T) for name in schedules.NAMES}
    with figure(path, columns=3, size=(12, 3.6)) as (drawn, (left, middle, right)):
        for i, (name, beta) in enumerate(curves.items()):
            alpha_bar = schedules.alpha_bar(beta)
            # At T = 1000 two schedules are the same: dashes show both.
            style = {"label": name, "linestyle": (0, (4, 3)) if i == 1 else "-"}
            left.plot(alpha_bar, **style)
            middle.plot(alpha_bar / (1 - alpha_bar), **style)
            right.plot(beta, **style)
        left.set(title="signal left: ᾱ_t", xlabel="t")
        middle.set(title="signal-to-noise ratio: ᾱ_t / (1 − ᾱ_t)", xlabel="t", yscale="log")
        right.set(title="noise added: β_t", xlabel="t", yscale="log")
        for axes in (left, middle, right):
            axes.grid(alpha=0.3)
        drawn.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return Path(path)


def forward_strips(
    image: Tensor, path: str | os.PathLike, *, T: int = 1000, states: int = 11, seed: int = 0
) -> Path:
    """Draws x_t of one image (C, H, W) in [-1, 1], a row per schedule, all with the same noise."""
    import torch

    from . import schedules
    from .diffusion import Diffusion

    if states < 2:
        raise ValueError(f"states is {states}, expected at least 2, from t = 0 to T − 1")
    t = torch.linspace(0, T - 1, states).round().long()
    x0 = image.float().expand(states, *image.shape)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)).expand_as(x0)
    rows = {
        name: Diffusion(schedules.betas(name, T)).q_sample(x0, t, noise) for name in schedules.NAMES
    }
    height, width = image.shape[1] + 1, image.shape[2] + 1  # with the gap
    size = (1.2 + 0.9 * states, 0.4 + 0.9 * len(rows) * height / width)
    with figure(path, rows=len(rows), size=size) as (_, axes):
        for row, (name, x_t) in zip(axes, rows.items(), strict=True):
            pixels = sheet(x_t, columns=states, scale=1)
            row.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            row.set(xticks=[], yticks=[])
            row.set_ylabel(name, rotation=0, ha="right", va="center")
            row.spines[:].set_visible(False)
        centres = [width * (i + 0.5) for i in range(states)]
        axes[0].set_xticks(centres, [f"t = {i}" for i in t.tolist()])
        axes[0].tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    return Path(path)


def vlb_terms(terms: dict[str, dict[str, Sequence[float]]], path: str | os.PathLike) -> Path:
    """Draws, over t, terms of the variational bound, and errors of ε that they come from.

    terms  name of a run → "vb" (T,) bits/dim and "mse" (T,) of the predicted noise
    """
    with figure(path, columns=2, size=(11, 4)) as (_, (left, right)):
        for name, term in terms.items():
            total = math.fsum(term["vb"])
            for axes, key in ((left, "vb"), (right, "mse")):
                # A curve on two logarithms has no place for a 0.
                axes.plot(
                    range(1, len(term[key]) + 1),
                    [max(value, 1e-12) for value in term[key]],
                    label=f"{name}: {total:.3f} bits/dim and the prior's" if key == "vb" else name,
                    linewidth=1,
                )
        left.set(title="terms of the variational bound, bits/dim")
        right.set(title="mean squared error of ε")
        for axes in (left, right):
            axes.set(xlabel="t + 1", xscale="log", yscale="log")
            axes.grid(alpha=0.3)
            axes.legend()
    return Path(path)


@contextlib.contextmanager
def figure(path: str | os.PathLike, rows: int = 1, columns: int = 1, size=(7, 4)):
    """A matplotlib figure and its axes, written to `path` as PNG, atomically, at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(rows, columns, figsize=size, dpi=120, layout="constrained")
    try:
        yield drawn, axes
        with atomic(path) as temporary:
            drawn.savefig(temporary, format="png")
    finally:
        pyplot.close(drawn)
