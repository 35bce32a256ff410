"""Samples as the command lines ask for them, and the pictures of a run: of its averaged weights,
while it trains and at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import plots
from .samplers import sample as draw_samples
from .unet import UNet

if TYPE_CHECKING:
    from .metrics import Log
    from .trainer import Trainer


def numbered(config, network, diffusion, model, start: int, steps, labels, device, **more):
    """Samples number start … of the config.n that a command draws, config.batch at most.

    config  its options, which name the sampler's
    model   the network's U-Net; labels (n,) are those of all, or None
    """
    count = min(config.batch, config.n - start)
    channels, size = model.config["in_channels"], model.config["image_size"]
    return draw_samples(
        network,
        diffusion,
        (count, channels, size, size),
        sampler=config.sampler,
        steps=steps,
        spacing=config.spacing,
        eta=config.eta,
        seed=config.seed,
        clip=config.clip,
        y=None if labels is None else labels[start : start + count].to(device),
        guidance=config.guidance,
        offset=start,
        **more,
    )


def sample(trainer: Trainer, n: int, averages: dict[str, Tensor], **options):
    """n samples of the averaged weights, given whole."""
    config = trainer.model.config
    shape = (n, config["in_channels"], config["image_size"], config["image_size"])
    classes = config.get("num_classes")
    y = torch.arange(n, device=trainer.device) % classes if classes else None
    model = trainer.model
    if trainer.parallel.sharded:  # the other processes are not there to lend their parts
        model = trainer.execution.prepared(UNet(**config))
    parameters = dict(model.named_parameters())
    trained = {name: p.detach().clone() for name, p in parameters.items()}
    model.eval()
    copy_weights(averages, parameters)
    try:
        with trainer.execution.autocast():
            return draw_samples(
                model,
                trainer.diffusion,
                shape,
                # Few training steps: ddpm's fresh noise mends what ddim would carry along.
                sampler="ddpm",
                steps=min(trainer.config.sample_steps, trainer.diffusion.T),
                seed=trainer.config.seed,
                y=y,
                **options,
            )
    finally:
        copy_weights(trained, parameters)


@torch.no_grad()
def copy_weights(source: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    for name, p in parameters.items():
        p.copy_(source[name])


def grid(trainer: Trainer, log: Log | None) -> None:
    """16 samples of this step. All processes must call it; the first draws."""
    averages = trainer.parallel.whole(trainer.ema)
    path = trainer.folder / "samples" / f"step_{trainer.step:06d}.png"

    def draw() -> None:
        images = sample(trainer, 16, averages)
        with log.spared("grids of samples"):
            plots.grid(images, path)
            log.image(trainer.step, path)

    trainer.processes.on_first(draw)


def final(trainer: Trainer) -> None:
    """samples.png, strip.png, loss.png. All processes must call it; the first draws."""
    n, folder = trainer.config.samples, trainer.folder
    averages = trainer.parallel.whole(trainer.ema) if n else {}

    def draw() -> None:
        if n:
            trainer.say(f"drawing {n} samples …")
            images, states = sample(trainer, n, averages, trajectory=10)
            plots.grid(images, folder / "samples.png")
            plots.strip([state[:8] for state in states], folder / "strip.png")
        plots.loss_curve(folder)

    trainer.processes.on_first(draw)
