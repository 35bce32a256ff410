"""`python -m engine.sample`: draw samples from a trained run."""

from __future__ import annotations

import inspect
import math
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from . import cli

if TYPE_CHECKING:
    import torch

    from .distributed import Processes

if __name__ != "__main__":  # the command line answers --help and wrong options without torch
    from .samplers import sample

try:
    from tyro.conf import Positional
except ImportError:  # cli.parse says so; `engine.sample(model, …)` needs no tyro
    Positional = None

__all__ = ["sample"]  # what help(engine.sample) shows

PROG = "python -m engine.sample"


@dataclass(frozen=True)
class SampleConfig:
    """Draw samples from a trained run into one picture."""

    run: Annotated[Path, Positional]
    """Folder of a run, or its checkpoint file."""
    out: Path = Path("samples.png")
    """Picture to write, PNG; an existing one is replaced, a missing folder made."""
    n: Annotated[int, cli.also("-n")] = 64
    """Number of samples."""
    sampler: Literal["ddpm", "ddim", "dpm++", "heun"] = "ddim"
    """Sampler: ddpm is ancestral; ddim is deterministic with --eta 0; dpm++ needs fewest calls of
    the network; heun calls it twice a step."""
    steps: Annotated[
        str | None, cli.left_out("50 for ddim, 20 for dpm++, 18 for heun, all T for ddpm")
    ] = None
    """Steps of the reverse process: a number, at most the T that the model was trained with;
    10,10,30 for so many of each third of the T; or ddimN for N at an even stride."""
    spacing: Annotated[
        Literal["uniform", "karras"] | None, cli.left_out("karras for heun, else uniform")
    ] = None
    """How the steps are spread: evenly over t, or as Karras et al. 2022 do, denser at low noise."""
    eta: float = 0.0
    """Noise of ddim, from 0, none, to 1, as much as ddpm's."""
    seed: int = 0
    """Seed of the noise: the same one draws the same samples, whatever --batch, up to rounding."""
    clip: bool = True
    """Clip x0 to [-1, 1] in every step."""
    label: Annotated[int | None, cli.left_out("all classes in turn")] = None
    """Number of the class to draw, of a class-conditional model."""
    guidance: Annotated[float | None, cli.left_out("none")] = None
    """Scale of classifier-free guidance, of a class-conditional model that was trained with label
    dropout: 1 is the model as it is, more gives clearer classes and less variety."""
    classifier: Annotated[Path | None, cli.left_out("none", "RUN")] = None
    """Run of a noisy classifier that guides to the labels; the model may be unconditional."""
    classifier_scale: Annotated[float | None, cli.left_out("1")] = None
    """Scale of the classifier's gradient."""
    strip: Annotated[Path | None, cli.left_out("no strip")] = None
    """Picture to write, PNG, with the way x_T … x_0 of the first 8 samples."""
    batch: int = 64
    """Samples computed at a time."""
    device: Annotated[str | None, cli.left_out("cuda where there is one, else cpu", "NAME")] = None
    """Device to sample on: cpu, cuda, cuda:1 …"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the U-Net; auto is bf16 where the device has it."""
    layout: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Memory layout of images and weights; auto is channels_last."""
    compile: bool = False
    """Run the U-Net through torch.compile: more than a minute before the first step."""
    prepack: bool = True
    """On the CPU, bring the weights into oneDNN's own layout before the first step; not with
    --compile."""


def command(args: Sequence[str] | None) -> None:
    config = cli.parse(SampleConfig, PROG, args)
    check(config)

    from .dealing import together

    with together(config.device) as (processes, device):
        draw(config, processes, device)


def draw(config: SampleConfig, processes: Processes, device: torch.device) -> None:
    """Draws this process's batches; rank 0 makes the pictures of all."""
    from . import dealing, drawing, plots
    from .execution import choose, describe

    asked = config.precision, config.layout, config.compile
    execution = choose(device, *asked, sampling=config.prepack)
    model, classifier, diffusion, steps, labels = opened(config, device)
    if processes.first:
        for name, path in (("out", config.out), ("strip", config.strip)):
            if path is not None:
                cli.make_writable(path.absolute().parent, f"--{name}")
    networks = [model] if classifier is None else [model, classifier]
    dealing.check_alike(processes, networks, precision=str(execution.precision))
    model = execution.prepared(model)
    many = f"; {processes.world} processes" if processes.world > 1 else ""
    print(describe(model, execution) + many, file=sys.stderr)
    network = execution.network(model)
    scale = 1.0 if config.classifier_scale is None else config.classifier_scale
    states = []  # of the first batch, which is rank 0's

    def batches(mine: range):
        for start in (i * config.batch for i in mine):
            wanted = 10 if config.strip is not None and start == 0 else 0
            with execution.autocast():
                images = drawing.numbered(
                    config,
                    *(network, diffusion, model, start, steps, labels, device),
                    classifier=classifier,
                    classifier_scale=scale,
                    progress=True,
                    prepack="auto" if config.prepack else False,
                    trajectory=wanted,
                )
            if wanted:
                images, states[:] = images
            yield (images.cpu(),)

    drawn = dealing.deal(processes, -(-config.n // config.batch), batches)
    if drawn is None:
        return
    plots.grid(drawn[0], config.out)
    print(f"{config.n} samples    {config.out}")
    if states:
        plots.strip([state[:8] for state in states], config.strip)
        print(f"x_T … x_0     {config.strip}")


def opened(config: SampleConfig, device: torch.device):
    """→ model, classifier or None, diffusion, steps, labels (n,) or None. Raises ValueError, one
    sentence, where they and the options do not fit each other."""
    import torch

    from .checkpoint import check_range, load
    from .coefficients import asked_steps

    model, diffusion, info = load(config.run, device=device)
    check_range(info, config.run)
    steps = asked_steps(config.steps, config.sampler, config.spacing, diffusion.T)
    classifier, classes = None, model.config.get("num_classes")
    if config.guidance is not None and classes is None:
        raise ValueError(
            "--guidance needs a class-conditional model; this one was trained without --classes"
        )
    if config.classifier is not None:
        from .checkpoint import load_classifier

        classifier = load_classifier(config.classifier, device=device)
        classes = check_classifier(config, model.config, classifier.config)
        if not torch.equal(classifier.diffusion.betas, diffusion.betas):
            raise ValueError(
                f"--classifier {config.classifier} was trained on another noise schedule than the "
                "model: train it with the same --schedule and --timesteps"
            )
    labels = choose_labels(config, classes, info.get("classes", []))
    return model, classifier, diffusion, steps, labels


def check(config: SampleConfig) -> None:
    """Raises ValueError, one sentence, before anything is computed."""
    for name in ("n", "batch"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(config, name)}")
    if not 0 <= config.eta <= 1:
        raise ValueError(f"--eta must lie in 0 … 1, not {config.eta}")
    if config.eta and config.sampler != "ddim":
        raise ValueError(f"--eta {config.eta} goes with --sampler ddim only: leave it out")
    for name in ("guidance", "classifier_scale"):
        value = getattr(config, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{cli.option(name)} must be a finite number, not {value}")
    if config.classifier is None and config.classifier_scale is not None:
        raise ValueError("--classifier-scale goes with --classifier only: leave it out")
    if not -(2**63) <= config.seed < 2**63:
        raise ValueError(f"--seed must fit 64 bits, not {config.seed}")
    for name, path in (("out", config.out), ("strip", config.strip)):
        if path is None:
            continue
        if path.suffix.lower() != ".png" or path.is_dir():
            raise ValueError(f"--{name} {path}: give the name of a .png file")
    if config.strip is not None and config.strip.resolve() == config.out.resolve():
        raise ValueError(f"--strip {config.strip} is --out too: give the strip a name of its own")


def check_classifier(config: SampleConfig, model: dict, classifier: dict) -> int:
    """How many classes the classifier knows. Raises ValueError if its images are not the model's,
    or its classes not those of a class-conditional one."""
    for name in ("image_size", "in_channels", "num_classes"):
        mine, its = model.get(name), classifier.get(name)
        if mine != its and not (name == "num_classes" and mine is None):
            raise ValueError(
                f"--classifier {config.classifier} was trained with {name} {its}, "
                f"the model with {mine}: use one of the same data"
            )
    return classifier["num_classes"]


def choose_labels(config: SampleConfig, classes: int | None, names: Sequence[str]):
    """y (n,) int64 for a class-conditional model or a classifier, else None."""
    import torch

    if classes is None:
        if config.label is not None:
            raise ValueError(
                "--label needs a class-conditional model or a --classifier; "
                "this model was trained without --classes"
            )
        return None
    if config.label is None:
        return torch.arange(config.n) % classes
    if not 0 <= config.label < classes:
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        raise ValueError(f"--label {config.label} is none of the {classes} classes ({listed})")
    return torch.full((config.n,), config.label)


if __name__ == "__main__":
    sys.exit(cli.main(command))


class _CallableModule(types.ModuleType):
    """`engine.sample` is a function of the API and, as `python -m engine.sample`, this module.

    Importing a submodule makes it an attribute of its package, over the function of that name: so
    the module forwards calls, and shows the function's signature and documentation.
    """

    __signature__ = inspect.signature(sample)

    def __call__(self, *args, **kwargs):
        return sample(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
