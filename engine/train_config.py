"""What `python -m engine.train` can be told: its options, what they stand for, what they make."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from . import cli


@dataclass(frozen=True)
class TrainConfig:
    """Train a diffusion model.

    The run's folder gets checkpoint.safetensors (weights, EMA, optimiser; beside it the one before,
    should it be damaged), metrics.jsonl, a TensorBoard log, sample grids and, at the end,
    samples.png, strip.png and loss.png; events.jsonl names the pictures of steps that were skipped
    for a NaN, or whose loss was far above what is usual. Ctrl-C saves and stops; --resume goes on.
    """

    dataset: str = "fashion-mnist"
    """What to train on: fashion-mnist, a folder of pictures, or a Hugging Face data set's name."""
    out: Annotated[Path | None, cli.left_out("runs/DATASET")] = None
    """Folder of the run. It is made if need be; one that holds files of a run is refused."""
    resume: Annotated[Path | None, cli.left_out("start a new run", "RUN")] = None
    """Folder of a run to go on with, under its saved options; --steps may be raised."""
    changed_pictures: bool = False
    """With --resume: go on although the data set has more, fewer or other pictures than before."""
    data_dir: Annotated[
        Path | None, cli.left_out("Debian's dataset-fashion-mnist, or download")
    ] = None
    """Folder with Fashion-MNIST's four IDX files."""
    preset: Annotated[str | None, cli.left_out("fashion-mnist", "NAME")] = None
    """U-Net with its recipe: fashion-mnist (1 M weights, for a CPU too), cifar10 (36 M), or with
    cifar10's recipe images-64 (56 M), for folders of larger pictures."""
    width: Annotated[int | None, cli.left_out("the preset's")] = None
    """Base channels of the U-Net."""
    image_size: Annotated[
        int | None, cli.left_out("the preset's; without --preset 28 for fashion-mnist, else 32")
    ] = None
    """Height and width in pixels to which pictures are centre-cropped and resized."""
    channels: Annotated[
        int | None, cli.left_out("1 for fashion-mnist; else the preset's, or 3 without --preset")
    ] = None
    """Colours of the pictures: 1 grey, 3 RGB."""
    classes: bool = False
    """Train a class-conditional model; in a folder of pictures, the sub-folders are the classes."""
    label_dropout: float = 0.0
    """Share of labels left out, with --classes: classifier-free guidance needs it; 0.1 is usual."""
    flip: bool = False
    """Mirror half of the pictures, left to right."""
    cache: bool = True
    """Keep a large folder's pictures decoded, in $XDG_CACHE_HOME/diffusion-engine or under
    ~/.cache, for this run and later ones; what changes in the folder is decoded anew."""

    schedule: Literal["linear", "linear_unscaled", "cosine", "quadratic", "sigmoid"] = "cosine"
    """Noise schedule β_t."""
    timesteps: int = 1000
    """Diffusion steps T."""
    prediction: Literal["eps", "x0", "v"] = "v"
    """What the U-Net predicts: noise, picture, or v = √ᾱ ε − √(1−ᾱ) x_0, which learns fastest."""
    variance: Literal["small", "large", "learned_range"] = "small"
    """Variance σ² of the reverse process: β̃_t, β_t, or between them as the U-Net learns."""
    loss: Literal["l1", "l2", "huber", "hybrid", "l2_vlb", "vlb", "rescaled_vlb"] = "l2"
    """Distance between prediction and target; or with the log-likelihood's bound: hybrid and l2_vlb
    for a learned variance, vlb and rescaled_vlb (T times as large) for any."""
    t_sampler: Literal["uniform", "loss-aware"] = "uniform"
    """How t is drawn; loss-aware, for vlb: after a warm-up, the more often the larger its loss."""

    steps: Annotated[
        int | None, cli.left_out("2000, with another --preset than fashion-mnist 100000")
    ] = None
    """Optimiser steps in all, those before a --resume included."""
    batch: Annotated[int | None, cli.left_out("32, with another --preset 128")] = None
    """Pictures per optimiser step, of all processes together."""
    accumulate: int = 1
    """Pieces in which a batch is computed, to save memory; must divide --batch."""
    lr: Annotated[float | None, cli.left_out("0.002, with another --preset 0.0002")] = None
    """Learning rate of AdamW after the warm-up."""
    warmup: Annotated[int | None, cli.left_out("100, with another --preset 5000")] = None
    """Steps over which the learning rate rises from 0."""
    decay: Annotated[float | None, cli.left_out("0.6, with another --preset 0")] = None
    """Last fraction of --steps, over which the learning rate falls to 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, per step and unit of learning rate."""
    clip: float = 1.0
    """Largest norm of the gradient; longer ones are scaled down to it."""
    ema: Annotated[float | None, cli.left_out("0.995, with another --preset 0.9999")] = None
    """Decay per step of the averaged weights (EMA) that draw the samples."""
    seed: int = 0
    """Seed of the initial weights, the order of the pictures, t and the noise."""

    device: Annotated[str | None, cli.left_out("cuda where there is one, else cpu", "NAME")] = None
    """Device to train on: cpu, cuda, cuda:1 …"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the forward and backward pass; auto is bf16 where the device has it. fp16,
    for GPUs without it, scales the loss so that small gradients stay above zero."""
    layout: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Memory layout of images and weights; auto is channels_last."""
    compile: bool = False
    """Train through torch.compile: more than a minute before the first step."""
    fsdp: bool = False
    """Under torchrun, share out weights, moments and EMA between the processes (FSDP2), where they
    do not fit each one's memory; else each has them whole (DDP)."""
    log_every: int = 10
    """Steps between two lines in metrics.jsonl and TensorBoard."""
    save_every: int = 500
    """Steps between two checkpoints; the end and Ctrl-C save in any case."""
    keep_last: int = 2
    """Newest checkpoints kept in RUN; where the last is damaged, the one before it serves."""
    keep_every: int = 0
    """Steps between two checkpoints that stay, in RUN/checkpoints, to score a run's stages; 0 keeps
    the last alone."""
    sample_every: int = 500
    """Steps between two grids of 16 samples; 0 draws none while training."""
    samples: int = 64
    """Samples in the final grid; 0 draws none."""
    sample_steps: int = 100
    """DDPM steps for all these samples, evenly spaced over T; at most T."""
    tensorboard: bool = True
    """Write a TensorBoard log, if tensorboard is installed."""


# What None stands for; the help says so too. fashion-mnist: the best pictures that five minutes on
# two CPU cores gave. cifar10: Ho et al. 2020, app. B, less long.
RECIPES = {
    "fashion-mnist": {
        "steps": 2000,
        "batch": 32,
        "lr": 2e-3,
        "warmup": 100,
        "decay": 0.6,
        "ema": 0.995,
    },
    "cifar10": {
        "steps": 100_000,
        "batch": 128,
        "lr": 2e-4,
        "warmup": 5000,
        "decay": 0.0,
        "ema": 0.9999,
    },
}


def validate(config: TrainConfig) -> None:
    """Raises ValueError, one sentence, for a number that makes no sense."""
    positive = ("timesteps", "steps", "batch", "accumulate", "log_every", "save_every")
    for name in (*positive, "keep_last", "sample_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{cli.option(name)} must be at least 1, not {getattr(config, name)}")
    for name in ("warmup", "keep_every", "sample_every", "samples", "weight_decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{cli.option(name)} must be 0 or more, not {getattr(config, name)}")
    for name in ("lr", "clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{cli.option(name)} must be positive, not {getattr(config, name)}")
    for name in ("ema", "decay"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{cli.option(name)} must lie in 0 … 1, not {getattr(config, name)}")
    if not -(2**63) <= config.seed < 2**63:
        raise ValueError(f"--seed must fit 64 bits, not {config.seed}")
    if config.label_dropout and not (config.classes and 0 < config.label_dropout <= 1):
        raise ValueError(
            f"--label-dropout {config.label_dropout} must lie in 0 … 1 and needs --classes: it "
            "leaves out that share of the labels"
        )
    simple, mixed = ("l1", "l2", "huber"), ("hybrid", "l2_vlb")
    if config.variance == "learned_range" and config.loss in simple:
        raise ValueError(
            f"--variance learned_range needs a loss that trains it, not {config.loss}: "
            "give --loss hybrid, l2_vlb, vlb or rescaled_vlb"
        )
    if config.variance != "learned_range" and config.loss in mixed:
        raise ValueError(
            f"--loss {config.loss} trains a learned variance: give --variance learned_range too"
        )
    if config.batch % config.accumulate:
        raise ValueError(f"--accumulate {config.accumulate} does not divide --batch {config.batch}")


def complete(config: TrainConfig) -> TrainConfig:
    """The configuration with the preset's recipe in the place of every None."""
    recipe = RECIPES.get(preset_name(config), RECIPES["cifar10"])
    missing = {k: v for k, v in recipe.items() if getattr(config, k) is None}
    return dataclasses.replace(config, **missing)


def preset_name(config: TrainConfig) -> str:
    return config.preset or "fashion-mnist"


def picture_shape(config: TrainConfig) -> tuple[int, int]:
    """Size and channels of the pictures to train on."""
    from .unet import PRESETS

    name = preset_name(config)
    if name not in PRESETS:
        raise ValueError(f"--preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    channels, size = PRESETS[name]["in_channels"], PRESETS[name]["image_size"]
    if config.dataset == "fashion-mnist":
        channels = 1
    elif config.preset is None:
        channels, size = 3, 32
    return (
        size if config.image_size is None else config.image_size,
        channels if config.channels is None else config.channels,
    )


def new_model(config: TrainConfig, size: int, channels: int, classes: int | None):
    """The U-Net that the configuration describes; its weights depend on the seed alone."""
    import torch

    from .unet import UNet

    options = {} if config.width is None else {"model_channels": config.width}
    options["out_channels"] = channels * (2 if config.variance == "learned_range" else 1)
    if config.label_dropout:
        options["label_dropout"] = config.label_dropout
    torch.manual_seed(config.seed)
    try:
        return UNet.from_preset(
            preset_name(config),
            image_size=size,
            in_channels=channels,
            num_classes=classes,
            **options,
        )
    except ValueError as error:
        sentence = str(error)
        for theirs, ours in (("model_channels", "--width"), ("image_size", "--image-size")):
            sentence = sentence.replace(theirs, ours)
        raise ValueError(sentence) from None


def new_diffusion(config: TrainConfig):
    from .diffusion import Diffusion
    from .schedules import betas

    return Diffusion(
        betas(config.schedule, config.timesteps),
        prediction=config.prediction,
        variance=config.variance,
        loss=config.loss,
    )
