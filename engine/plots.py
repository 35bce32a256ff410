"""Pictures: grids, strips and films of samples, curves of schedules, losses and bounds; atomically.

`python -m engine.plots schedules | forward | reverse | gif | vlb` draws one from the command line.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from . import cli

if TYPE_CHECKING:  # late, so that --help and a wrong option are answered without waiting for torch
    import numpy as np
    from torch import Tensor

try:
    from tyro.conf import Positional
except ImportError:  # cli.parse says so; the functions need no tyro
    Positional = None

PROG = "python -m engine.plots"


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1], any float dtype → (N, H, W, C) uint8."""
    import torch

    scaled = images.detach().float().add(1).mul(127.5).round_().clamp_(0, 255)
    return scaled.nan_to_num_(0).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def sheet(images: Tensor, *, columns: int | None = None, scale: int = 2) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] in rows of `columns` → (height, width, C) uint8.

    The default is as square as can be. Each pixel becomes scale × scale pixels; C is 1 or 3.
    """
    import numpy as np

    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"a grid needs images (N, 1 or 3, H, W), N ≥ 1, not {tuple(images.shape)}")
    pixels = to_bytes(images)
    n, h, w, c = pixels.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    gap = 1
    drawn = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (h + gap) + gap, i % columns * (w + gap) + gap
        drawn[top : top + h, left : left + w] = image
    return drawn.repeat(scale, 0).repeat(scale, 1)


def to_picture(pixels: np.ndarray):
    """(H, W, 1 or 3) uint8 → a Pillow picture, grey or RGB."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def grid(
    images: Tensor, path: str | os.PathLike, *, columns: int | None = None, scale: int = 2
) -> Path:
    """Draws images (N, C, H, W) in [-1, 1] as a `sheet`."""
    picture = to_picture(sheet(images, columns=columns, scale=scale))
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG")
    return Path(path)


def strip(states: Sequence[Tensor], path: str | os.PathLike, *, scale: int = 2) -> Path:
    """Draws the reverse process, one row per image: states x_T … x_0, each (N, C, H, W)."""
    import torch

    if not len(states):
        raise ValueError("a strip needs at least one state")
    table = torch.stack([state.float() for state in states], dim=1)  # (N, states, C, H, W)
    return grid(table.flatten(0, 1), path, columns=len(states), scale=scale)


def film(
    states: Sequence[Tensor], path: str | os.PathLike, *, seconds: float = 4.0, scale: int = 2
) -> Path:
    """Draws the states x_T … x_0, each (N, C, H, W), as an endless GIF; the last one stays 2 s."""
    if not len(states):
        raise ValueError("a film needs at least one state")
    first, *others = (to_picture(sheet(state, scale=scale)) for state in states)
    moment = max(20, round(1000 * seconds / len(states)))  # ms; browsers slow shorter ones down
    with atomic(path) as temporary:
        first.save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=others,
            duration=[moment] * len(others) + [2000],
            loop=0,
        )
    return Path(path)


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


def loss_curve(run: str | os.PathLike, path: str | os.PathLike | None = None) -> Path:
    """Draws the loss of a run from its metrics.jsonl → run/loss.png (or `path`)."""
    from .metrics import read_metrics

    rows = [row for row in read_metrics(run) if row.get("loss") is not None]
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
                    label=f"{name}: {total:.3f} bits/dim" if key == "vb" else name,
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


# --- the command line ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedules:
    """Draw ᾱ_t, SNR and β_t of all noise schedules."""

    out: Path = Path("schedules.png")
    """Picture to write, PNG."""
    timesteps: int = 1000
    """Diffusion steps T."""

    def draw(self) -> None:
        schedule_curves(self.out, at_least(1, self, "timesteps"))


@dataclass(frozen=True)
class Forward:
    """Draw the forward process of one picture under each noise schedule."""

    out: Path = Path("forward.png")
    """Picture to write, PNG."""
    dataset: str = "fashion-mnist"
    """Where the picture comes from, as for engine.train."""
    data_dir: Annotated[
        Path | None, cli.left_out("Debian's dataset-fashion-mnist, or download")
    ] = None
    """Folder with Fashion-MNIST's four IDX files."""
    index: int = 0
    """Number of the picture in the data set."""
    size: Annotated[int | None, cli.left_out("28 for fashion-mnist, else 64")] = None
    """Height and width in pixels."""
    timesteps: int = 1000
    """Diffusion steps T."""
    states: int = 11
    """Pictures in a row, from t = 0 to T - 1."""
    seed: int = 0
    """Seed of the noise."""

    def draw(self) -> None:
        from . import data

        T = at_least(1, self, "timesteps")
        states = at_least(2, self, "states")
        grey = self.dataset == "fashion-mnist"
        images = data.open_dataset(
            self.dataset,
            size=(28 if grey else 64) if self.size is None else self.size,
            channels=1 if grey else 3,
            data_dir=self.data_dir,
        )
        if not 0 <= self.index < len(images):
            raise ValueError(f"--index {self.index} must lie in 0 … {len(images) - 1}")
        pixels = images.read(self.index) if images.pixels is None else images.pixels[self.index]
        import torch

        image = torch.as_tensor(pixels).float() / 127.5 - 1
        forward_strips(image, self.out, T=T, states=states, seed=self.seed)


@dataclass(frozen=True)
class Reverse:
    """Draw samples of a run on their way from x_T to x_0, a row each."""

    run: Annotated[Path, Positional]
    """Folder of a run, or its checkpoint file."""
    out: Path = Path("reverse.png")
    """Picture to write, PNG."""
    n: int = 8
    """Samples."""
    states: int = 10
    """Pictures of each, x_T and x_0 among them."""
    sampler: Literal["ddpm", "ddim", "dpm++"] = "ddpm"
    """Sampler."""
    steps: int = 100
    """Steps of the reverse process, at most the T that the model was trained with."""
    seed: int = 0
    """Seed of the noise."""
    device: Annotated[str | None, cli.left_out("cuda where there is one, else cpu", "NAME")] = None
    """Device to sample on: cpu, cuda, cuda:1 …"""

    def draw(self) -> None:
        strip(self.trajectory(self.states, "states"), self.out)

    def trajectory(self, count: int, option: str) -> list[Tensor]:
        """`count` states (n, C, H, W) of the run's EMA weights, from x_T to x_0."""
        import torch

        from .checkpoint import load
        from .device import autocast, choose_device, choose_precision
        from .samplers import sample

        for name, low in (("n", 1), ("steps", 1), (option, 2)):
            at_least(low, self, name)
        device = choose_device(self.device)
        model, diffusion, _ = load(self.run, device=device)
        c = model.config
        classes = c.get("num_classes")
        with autocast(device, choose_precision("auto", device)):
            return sample(
                model,
                diffusion,
                (self.n, c["in_channels"], c["image_size"], c["image_size"]),
                sampler=self.sampler,
                steps=min(self.steps, diffusion.T),
                seed=self.seed,
                y=torch.arange(self.n, device=device) % classes if classes else None,
                progress=True,
                trajectory=count,
            )[1]


@dataclass(frozen=True)
class Gif(Reverse):
    """Draw samples of a run on their way from x_T to x_0 as an endless film."""

    out: Path = Path("reverse.gif")
    """Picture to write, GIF."""
    n: int = 16
    """Samples."""
    states: int = 50
    """Frames, x_T and x_0 among them; at most --steps + 1."""
    seconds: float = 4.0
    """Length of the film, without the 2 s for which x_0 stays."""

    def draw(self) -> None:
        if not 0 < self.seconds <= 600:
            raise ValueError(f"--seconds must lie in 0 … 600, not {self.seconds}")
        film(self.trajectory(self.states, "states"), self.out, seconds=self.seconds)


@dataclass(frozen=True)
class Vlb:
    """Draw the terms of the variational bound over t, of the last bits/dim of each run."""

    runs: Annotated[tuple[Path, ...], Positional]
    """Folders of runs that `python -m engine.evaluate RUN --metrics nll` has evaluated."""
    out: Path = Path("vlb.png")
    """Picture to write, PNG."""

    def draw(self) -> None:
        if not self.runs:
            raise ValueError("give the folder of a run at least")
        vlb_terms({str(run): evaluated_terms(run) for run in self.runs}, self.out)


COMMANDS = {"schedules": Schedules, "forward": Forward, "reverse": Reverse, "gif": Gif, "vlb": Vlb}


def at_least(low: int, config, name: str) -> int:
    """The option's value. Raises ValueError, one sentence, if it is less."""
    value = getattr(config, name)
    if value < low:
        raise ValueError(f"{cli.option(name)} must be at least {low}, not {value}")
    return value


def evaluated_terms(run: Path) -> dict:
    """The "terms" of the last bits/dim in RUN/evaluation.json."""
    path = (run.expanduser() if run.is_dir() else run.parent) / "evaluation.json"
    try:
        records = json.loads(path.read_text()) if path.is_file() else []
        found = [record["nll"]["terms"] for record in records if "nll" in record]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} is not what engine.evaluate writes: move it away") from None
    if not found:
        hint = "" if run.exists() else cli.neighbour(run)
        raise ValueError(
            f"{run} has no bits/dim yet{hint}: run python -m engine.evaluate {run} --metrics nll"
        )
    return found[-1]


def command(args: Sequence[str] | None) -> None:
    config = cli.parse_command(COMMANDS, PROG, args)
    suffix = ".gif" if isinstance(config, Gif) else ".png"
    if config.out.suffix.lower() != suffix or config.out.is_dir():
        raise ValueError(f"--out {config.out}: give the name of a {suffix} file")
    cli.make_writable(config.out.absolute().parent, "--out")
    config.draw()
    print(config.out)


def main(args: Sequence[str] | None = None) -> int:
    return cli.main(command, args)


if __name__ == "__main__":
    sys.exit(main())
