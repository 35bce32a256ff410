"""Pictures, whole or not there: all that draws them, and `python -m engine.plots`.

schedules | forward | reverse | gif | vlb: each draws one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from . import cli
from .curves import forward_strips, loss_curve, schedule_curves, vlb_terms
from .evaluation import terms_of
from .pictures import atomic, film, grid, strip, to_bytes

if TYPE_CHECKING:  # late, so that --help and a wrong option are answered without waiting for torch
    from torch import Tensor

try:
    from tyro.conf import Positional
except ImportError:  # cli.parse says so; the functions need no tyro
    Positional = None

__all__ = [
    "atomic",
    "film",
    "forward_strips",
    "grid",
    "loss_curve",
    "schedule_curves",
    "strip",
    "to_bytes",
    "vlb_terms",
]

PROG = "python -m engine.plots"


@dataclass(frozen=True)
class Schedules:
    """Draw ᾱ_t, SNR and β_t of all noise schedules."""

    out: Path = Path("schedules.png")
    """Picture to write, PNG."""
    timesteps: int = 1000
    """Diffusion steps T."""

    def prepare(self) -> Callable[[], object]:
        check_schedules(at_least(2, self, "timesteps"))  # of a single t there is no curve
        return partial(schedule_curves, self.out, self.timesteps)


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

    def prepare(self) -> Callable[[], object]:
        from . import data

        T = at_least(1, self, "timesteps")
        states = at_least(2, self, "states")
        check_schedules(T)
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
        return partial(forward_strips, image, self.out, T=T, states=states, seed=self.seed)


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
    """Pictures of each, x_T and x_0 among them; no more than --steps + 1 are there to be drawn."""
    sampler: Literal["ddpm", "ddim", "dpm++", "heun"] = "ddpm"
    """Sampler; heun calls the network twice a step."""
    steps: Annotated[int | None, cli.left_out("100, 18 for heun; all T if that is less")] = None
    """Steps of the reverse process, at most the T that the model was trained with."""
    seed: int = 0
    """Seed of the noise."""
    device: Annotated[str | None, cli.left_out("cuda where there is one, else cpu", "NAME")] = None
    """Device to sample on: cpu, cuda, cuda:1 …"""

    def prepare(self) -> Callable[[], object]:
        states = self.trajectory()
        return lambda: strip(states(), self.out)

    def trajectory(self) -> Callable[[], list[Tensor]]:
        """Opens the run → what draws its states (n, C, H, W), from x_T to x_0."""
        import torch

        from .checkpoint import check_range, load
        from .device import autocast, choose_device, choose_precision
        from .samplers import sample

        for name, low in (("n", 1), ("states", 2)):
            at_least(low, self, name)
        if self.steps is not None:
            at_least(1, self, "steps")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed must fit 64 bits, not {self.seed}")
        device = choose_device(self.device)
        model, diffusion, info = load(self.run, device=device)
        check_range(info, self.run)
        steps = self.steps or min(18 if self.sampler == "heun" else 100, diffusion.T)
        if steps > diffusion.T:
            raise ValueError(
                f"--steps {steps} is more than the {diffusion.T} steps that the model was trained "
                "with"
            )
        c = model.config
        classes = c.get("num_classes")

        def states() -> list[Tensor]:
            with autocast(device, choose_precision("auto", device)):
                return sample(
                    model,
                    diffusion,
                    (self.n, c["in_channels"], c["image_size"], c["image_size"]),
                    sampler=self.sampler,
                    steps=steps,
                    seed=self.seed,
                    y=torch.arange(self.n, device=device) % classes if classes else None,
                    progress=True,
                    trajectory=self.states,
                )[1]

        return states


@dataclass(frozen=True)
class Gif(Reverse):
    """Draw samples of a run on their way from x_T to x_0 as an endless film."""

    out: Path = Path("reverse.gif")
    """Picture to write, GIF."""
    n: int = 16
    """Samples."""
    states: int = 50
    """Frames, x_T and x_0 among them; no more than --steps + 1 are there to be drawn."""
    seconds: float = 4.0
    """Length of the film, without the 2 s for which x_0 stays."""

    def prepare(self) -> Callable[[], object]:
        if not 0 < self.seconds <= 600:
            raise ValueError(f"--seconds must lie in 0 … 600, not {self.seconds}")
        states = self.trajectory()
        return lambda: film(states(), self.out, seconds=self.seconds)


@dataclass(frozen=True)
class Vlb:
    """Draw the terms of the variational bound over t, of the last bits/dim of each run."""

    runs: Annotated[tuple[Path, ...], Positional]
    """Runs, or checkpoints, that `python -m engine.evaluate RUN --metrics nll` has evaluated."""
    out: Path = Path("vlb.png")
    """Picture to write, PNG."""

    def prepare(self) -> Callable[[], object]:
        if not self.runs:
            raise ValueError("give the folder of a run at least")
        return partial(vlb_terms, {str(run): terms_of(run) for run in self.runs}, self.out)


# A command's `prepare` opens and checks all that it needs and returns what draws; between the two
# the folder of --out is made.
COMMANDS = {"schedules": Schedules, "forward": Forward, "reverse": Reverse, "gif": Gif, "vlb": Vlb}


def at_least(low: int, config, name: str) -> int:
    """The option's value. Raises ValueError, one sentence, if it is less."""
    value = getattr(config, name)
    if value < low:
        raise ValueError(f"{cli.option(name)} must be at least {low}, not {value}")
    return value


def check_schedules(T: int) -> None:
    """Raises ValueError, one sentence, if a schedule does not exist for so few steps."""
    from . import schedules

    for name in schedules.NAMES:
        schedules.betas(name, T)


def command(args: Sequence[str] | None) -> None:
    config = cli.parse_command(COMMANDS, PROG, args)
    cli.alone(PROG)
    suffix = ".gif" if isinstance(config, Gif) else ".png"
    if config.out.suffix.lower() != suffix or config.out.is_dir():
        raise ValueError(f"--out {config.out}: give the name of a {suffix} file")
    draw = config.prepare()
    cli.make_writable(config.out.absolute().parent, "--out")
    draw()
    print(config.out)


def main(args: Sequence[str] | None = None) -> int:
    return cli.main(command, args)


if __name__ == "__main__":
    sys.exit(main())
