"""`python -m engine.verify`: a model against its accelerated self, and the time of both."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from . import cli

if __name__ != "__main__":  # the command line answers --help and wrong options without torch
    from .verification import verify

try:
    from tyro.conf import Positional
except ImportError:  # cli.parse says so; `engine.verify(model, …)` needs no tyro
    Positional = None

__all__ = ["verify"]  # what help(engine.verify) shows

PROG = "python -m engine.verify"
TOKENS = 77  # of a text, as Stable Diffusion has them
WRITE_ONE = "write a function that returns (model, *inputs), and give module:function"


@dataclass(frozen=True)
class VerifyConfig:
    """Compare a model with its accelerated self: outputs, gradients, time.

    The model's own rounding is the measure. The exit code is 1 where the accelerated one is wrong
    by more than twice that, or three times for gradients.
    """

    target: Annotated[str, Positional]
    """module:function, whose result is (model, *inputs), with a dict at the end for inputs by name;
    or a folder that diffusers saved: a U-Net, an autoencoder, or a pipeline with a U-Net."""
    inner: Literal["eager", "inductor"] = "eager"
    """What runs the rewritten graph: PyTorch as it is, or torch.compile's inductor."""
    channels_last: bool = True
    """Lay the weights of convolutions channels_last."""
    gradients: bool = True
    """Compare gradients too, and time training."""
    repeats: int = 5
    """How often both are timed, in turns."""
    seed: int = 0
    """Seed of the inputs and of what the model draws."""

    batch: Annotated[int | None, cli.left_out("2")] = None
    """Inputs at a time, for a folder."""
    size: Annotated[int | None, cli.left_out("the model's own sample_size")] = None
    """Height and width of the inputs, for a folder."""
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, cli.left_out("fp32")] = None
    """Of a folder's model."""
    device: Annotated[str | None, cli.left_out("cuda where there is one, else cpu", "NAME")] = None
    """Of a folder's model: cpu, cuda, cuda:1 …"""


def command(args: Sequence[str] | None) -> None:
    config = cli.parse(VerifyConfig, PROG, args)
    cli.alone(PROG)
    if config.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, not {config.repeats}")
    for name in ("batch", "size"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(config, name)}")
    if not -(2**63) <= config.seed < 2**63:
        raise ValueError(f"--seed must fit 64 bits, not {config.seed}")
    model, inputs, named = load(config)

    from .verification import verify

    def accelerate(model):
        import engine

        return engine.accelerate(model, config.inner, config.channels_last)

    options = {"gradients": config.gradients, "repeats": config.repeats, "seed": config.seed}
    found = verify(model, *inputs, accelerate=accelerate, **options, **named)
    print(found)
    if not found.ok:
        raise cli.Failed(f"{PROG}: the accelerated model is not verified", 1)


def load(config: VerifyConfig) -> tuple:
    """→ model, inputs, inputs by name."""
    if Path(config.target).is_dir():
        return from_folder(config)
    if ":" not in config.target:
        near = cli.neighbour(config.target)
        raise ValueError(f"{config.target} is no folder{near} and not like module:function")
    for name in ("batch", "size", "precision", "device"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"--{name} goes with a folder: {config.target} makes its model and inputs itself"
            )
    return from_function(config)


def from_function(config: VerifyConfig) -> tuple:
    import torch

    module, _, name = config.target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):  # and not a module that it imports
            raise ValueError(
                f"{config.target}: there is no module {error.name}, here or on PYTHONPATH"
            ) from None
        raise
    if not callable(function):
        raise ValueError(f"{config.target}: {module} has no function {name}")
    needed = _needed(function)
    if needed:
        raise ValueError(f"{config.target} is called without arguments, but needs {needed}")
    torch.manual_seed(config.seed)
    found = function()
    if not isinstance(found, tuple) or not found or not isinstance(found[0], torch.nn.Module):
        what = type(found).__name__
        raise ValueError(f"{config.target} returned {what}, expected a tuple (model, *inputs)")
    model, *inputs = found
    named = inputs.pop() if inputs and isinstance(inputs[-1], dict) else {}
    return model, inputs, named


def _needed(function) -> str:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of some that are written in C
        return ""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return ", ".join(p.name for p in parameters if p.default is p.empty and p.kind not in optional)


def from_folder(config: VerifyConfig) -> tuple:
    folder = Path(config.target)
    if (folder / "model_index.json").is_file():
        folder = folder / "unet"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a diffusers model")
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    if name not in INPUTS:
        known = ", ".join(INPUTS)
        raise ValueError(
            f"{folder} is a {name}, whose inputs are not known here ({known} are): {WRITE_ONE}"
        )

    import diffusers
    import torch

    from .device import usable_device

    device = "cuda" if torch.cuda.is_available() else "cpu"
    device = usable_device(config.device or device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision, torch.float32)
    # Not by from_pretrained's option, whose name has changed, nor by diffusers' `to`, which warns.
    # low_cpu_mem_usage wants a package of its own, and complains at length where that is not there.
    model = getattr(diffusers, name).from_pretrained(folder, low_cpu_mem_usage=False)
    torch.nn.Module.to(model, device, dtype)
    generator = torch.Generator().manual_seed(config.seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    return model, *INPUTS[name](model.config, config.batch or 2, config.size, normal, device)


def _picture(config, n: int, size: int | None, normal):
    size = size or config.sample_size or 32
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    return normal(n, config.in_channels, *sizes)


def _steps(n: int, device):
    import torch

    return torch.linspace(10, 900, n).long().to(device)


def _labels(config, n: int, device) -> dict:
    import torch

    classes = config.get("num_class_embeds")
    if config.get("class_embed_type") not in (None, "timestep"):
        raise ValueError(f"class_embed_type {config.class_embed_type!r} is not known: {WRITE_ONE}")
    if config.get("class_embed_type") == "timestep":
        return {"class_labels": _steps(n, device)}
    return {"class_labels": torch.arange(n, device=device) % classes} if classes else {}


def unet2d(config, n: int, size: int | None, normal, device) -> tuple:
    factor = 2 ** (len(config.block_out_channels) - 1)
    if size and size % factor:
        raise ValueError(f"--size {size} is not a multiple of {factor}, which this U-Net needs")
    x = _picture(config, n, size, normal)
    return [x, _steps(n, device)], _labels(config, n, device)


def unet2d_condition(config, n: int, size: int | None, normal, device) -> tuple:
    if config.get("addition_embed_type") or not isinstance(config.cross_attention_dim, int):
        raise ValueError(f"this U-Net takes more than a picture, a step and a text: {WRITE_ONE}")
    x, text = _picture(config, n, size, normal), normal(n, TOKENS, config.cross_attention_dim)
    return [x, _steps(n, device), text], _labels(config, n, device)


def autoencoder(config, n: int, size: int | None, normal, device) -> tuple:
    return [_picture(config, n, size, normal)], {}


INPUTS = {
    "UNet2DModel": unet2d,
    "UNet2DConditionModel": unet2d_condition,
    "AutoencoderKL": autoencoder,
}


if __name__ == "__main__":
    sys.exit(cli.main(command))


class _CallableModule(types.ModuleType):
    """`engine.verify` is a function of the API and, as `python -m engine.verify`, this module, as
    in sample.py."""

    __signature__ = inspect.signature(verify)

    def __call__(self, *args, **kwargs):
        return verify(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
