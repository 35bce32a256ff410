"""Weights of other projects: OpenAI's, the original DDPM's and diffusers' U-Nets as ours, and back.

What a file leaves open (the order of qkv's channels, the architecture) must be named; what does not
fit is refused in one sentence. No code of a file is ever run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from . import diffusers_config, layouts
from .checkpoint_file import CheckpointError
from .classifier import Classifier
from .cli import neighbour
from .presets import QKV_ORDER
from .unet import UNet

WEIGHTS = "diffusion_pytorch_model.safetensors"  # in a folder of diffusers
ORDERS = {"3hd": "(3, heads, D)", "h3d": "(heads, 3, D)", "hd3": "(heads, D, 3)"}
AVERAGE = "/ExponentialMovingAverage"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What a name looks like in each layout → how to load it.
SIGNS = {
    "/": "the original DDPM's TensorFlow layout: use load_ddpm_tf",
    "input_blocks.": "OpenAI's layout: use load_openai",
    "down_blocks.": "diffusers' layout: use load_diffusers",
    "enc.": "EDM's layout, which this engine does not read",
    "mid_block_1.": "this engine's own layout: use load",
}


def load_openai(
    source: str | os.PathLike | Mapping[str, Tensor],
    preset: str | Mapping,
    qkv_order: str | None = None,
) -> UNet:
    """The U-Net of a guided-diffusion or improved-diffusion checkpoint, float32, in eval mode.

    source     a .pt, .safetensors or .npz file, or its state dict
    preset     name of an architecture in PRESETS, or UNet's options
    qkv_order  what the channels of qkv are, slowest first: "h3d" (heads, 3, D), legacy; "3hd"
               (3, heads, D), use_new_attention_order; "hd3" (heads, D, 3), EDM's. Every published
               preset has its own ("adm-64" 3hd, the others h3d); it must be named for the rest,
               since the wrong one loads without complaint and draws noise.

    The models of Nichol & Dhariwal 2021 ("iddpm-…") know t as t·1000/T: sample them with
    Diffusion(betas("cosine", 4000), variance="learned_range", rescale_timesteps=True).

    Raises CheckpointError (a ValueError), one sentence, for a file that cannot be read or does not
    fit, and for an order that is unknown or not the preset's.
    Sources: Nichol & Dhariwal 2021; Dhariwal & Nichol 2021; Karras et al. 2022.
    """
    known = QKV_ORDER.get(preset) if isinstance(preset, str) else None
    return _load_openai(UNet, source, preset, _order(preset, qkv_order, known), "load_openai")


def load_openai_classifier(
    source: str | os.PathLike | Mapping[str, Tensor],
    preset: str | Mapping,
    qkv_order: str | None = None,
) -> Classifier:
    """The noisy classifier of a guided-diffusion checkpoint; as load_openai.

    preset     name of an architecture in CLASSIFIERS, or Classifier's options
    qkv_order  of the attention blocks, "h3d" in the published ones; the pool's is always 3hd
    """
    known = "h3d" if isinstance(preset, str) and preset.startswith("adm-") else None
    order = _order(preset, qkv_order, known)
    return _load_openai(Classifier, source, preset, order, "load_openai_classifier")


def _load_openai(kind: type, source, preset, order: str, loader: str):
    tensors, called = read_tensors(source)
    model = _empty(preset, kind)
    pairs = layouts.table(model, layouts.openai(model), layouts.OPENAI)

    def arrange(*each):
        return layouts.from_openai(*each, order)

    return _fill(model, pairs, tensors, called, arrange, loader)


def _order(preset: str | Mapping, named: str | None, known: str | None) -> str:
    """The preset's order of qkv, or the named one. CheckpointError for neither or a conflict."""
    if known is None and named is None:
        raise CheckpointError(
            f"qkv_order is not known for {_called(preset)}: name the order of its qkv channels, "
            + ", ".join(f'"{name}" {shape}' for name, shape in ORDERS.items())
        )
    if named is not None and named not in ORDERS:
        raise CheckpointError(
            f"qkv_order is {named!r}, expected one of {', '.join(ORDERS)} or None"
        )
    if None not in (known, named) and known != named:
        raise CheckpointError(
            f"qkv_order is {named!r}, but the checkpoints of {preset!r} have {known!r}: leave it "
            "out, or for a model of your own give its options in the preset's place"
        )
    return named or known


def load_ddpm_tf(source: str | os.PathLike | Mapping[str, Tensor], preset: str | Mapping) -> UNet:
    """The U-Net of the original DDPM's TensorFlow variables, float32, in eval mode.

    source  a .npz, .pt or .safetensors file, or a dict, of variables under their TensorFlow names
            (model/conv_in/W …) in TensorFlow's layout: convolutions HWIO, dense and NIN (in, out).
            Where there are moving averages (…/ExponentialMovingAverage), these alone are taken.
    preset  "cifar10", "ddpm-256", or UNet's options

    Raises CheckpointError (a ValueError), one sentence, for what cannot be read or does not fit.
    Source: Ho et al. 2020.
    """
    tensors, called = read_tensors(source)
    if any(name.endswith(AVERAGE) for name in tensors):
        tensors = {
            name.removesuffix(AVERAGE): value
            for name, value in tensors.items()
            if name.endswith(AVERAGE)
        }
    model = _empty(preset)
    if any(getattr(module, "num_heads", 1) != 1 for module in model.modules()):
        raise CheckpointError(
            f"{_called(preset)} has attention of several heads, DDPM's TensorFlow layout has one: "
            "choose num_heads=1 and head_channels=None"
        )
    pairs = layouts.table(model, layouts.ddpm_tf(model), layouts.DDPM_TF, "/")
    return _fill(model, pairs, tensors, called, layouts.from_ddpm_tf, "load_ddpm_tf")


def load_diffusers(source: str | os.PathLike | nn.Module) -> UNet:
    """The U-Net of a diffusers UNet2DModel, or of its folder, float32, in eval mode.

    source  a UNet2DModel, a folder with config.json and its weights, or a pipeline's folder, of
            which `unet` is taken

    model(x, t, y) then returns what UNet2DModel(x, t, y).sample is.
    Raises CheckpointError (a ValueError), one sentence, for what cannot be read, does not fit, or
    has an option that this U-Net does not have.
    """
    if isinstance(source, nn.Module):
        config, (tensors, called) = (
            getattr(source, "config", None),
            read_tensors(source.state_dict(), type(source).__name__),
        )
        if not isinstance(config, Mapping):
            raise CheckpointError(f"{called} has no config: give diffusers' UNet2DModel")
        config = {"_class_name": called, **config}
    else:
        config, (tensors, called) = _read_folder(Path(source).expanduser())
    old = re.compile(rf"(\.attentions\.\d+)\.({'|'.join(OLD_NAMES)})\.")
    tensors = {
        old.sub(lambda m: f"{m[1]}.{OLD_NAMES[m[2]]}.", name): value
        for name, value in tensors.items()
    }
    try:
        options = diffusers_config.from_diffusers(config)
        blocks = len(options["channel_mult"]) * options["num_res_blocks"]
        if blocks > len(tensors):
            raise ValueError(f"its config has {blocks} blocks, and its file {len(tensors)} tensors")
        model = _empty(options)
    except Exception as error:  # options of wrong kinds lead to all kinds
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{called} cannot be loaded: {reason}") from None
    pairs = layouts.table(model, layouts.diffusers(model), layouts.DIFFUSERS)
    return _fill(model, pairs, tensors, called, layouts.from_diffusers, "load_diffusers")


def save_diffusers(model: UNet, folder: str | os.PathLike) -> None:
    """Writes the folder of a UNet2DModel: config.json and safetensors; files there are replaced.

    diffusers' UNet2DModel.from_pretrained(folder) computes the same, a null label being one more
    class there; load_diffusers knows it again. Raises CheckpointError (a ValueError), one sentence
    that names what UNet2DModel cannot express.
    """
    from safetensors.torch import save_file

    try:
        config = diffusers_config.to_diffusers(model.config)
    except diffusers_config.Inexpressible as error:
        raise CheckpointError(f"UNet2DModel cannot express this model: {error}") from None
    weights = dict(model.state_dict())
    pairs = layouts.table(model, layouts.diffusers(model), layouts.DIFFUSERS)
    tensors = {}
    for ours, theirs in pairs.items():
        for name, value in zip(theirs, weights[ours].chunk(len(theirs)), strict=True):
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# --- files --------------------------------------------------------------------------------------


def read_tensors(
    source: str | os.PathLike | Mapping, called: str = "the state dict"
) -> tuple[dict[str, Tensor], str]:
    """The tensors of a state dict or file, on the CPU, and what to call it in a message."""
    if not isinstance(source, Mapping):
        path = Path(source).expanduser()
        if not path.is_file():
            what = "is a folder: give its file" if path.is_dir() else "does not exist"
            raise CheckpointError(f"{path} {what}{neighbour(path)}")
        called = str(path)
        try:
            source = _read_file(path)
        except Exception as error:  # a dozen kinds: pickle, zip, header, end of file
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{path} cannot be read as tensors alone, {path.suffix or 'no suffix'} "
                f"({path.stat().st_size} bytes): {reason}"
            ) from None
    if not isinstance(source, Mapping):
        raise CheckpointError(f"{called} holds a {type(source).__name__}, expected a state dict")
    tensors = {}
    for name, value in source.items():
        what = type(value).__name__ if isinstance(name, str) else "name that is no text"
        if type(value).__module__ == "numpy" and isinstance(name, str):
            try:
                value = torch.from_numpy(value)
            except TypeError:  # a scalar, texts, dates
                what = f"{what} of {getattr(value, 'dtype', 'nothing')}"
        if not isinstance(value, Tensor) or not isinstance(name, str):
            raise CheckpointError(
                f"{called} has under {name!r} a {what}, expected a tensor: give the state dict "
                "itself"
            )
        if why := _no_weight(value):
            raise CheckpointError(f"{called} has under {name!r} {why}, expected weights")
        tensors[name] = value.detach().cpu()
    return tensors, called


def _no_weight(value: Tensor) -> str:
    """Why a tensor of a file cannot be weights, or nothing; one that is larger than the file would
    take more memory than that."""
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        return "a sparse, nested or quantized tensor"
    if value.is_meta:
        return "a tensor without numbers"
    if value.is_complex():
        return "complex numbers"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"a tensor of shape {tuple(value.shape)} that repeats fewer numbers"
    return ""


def _read_file(path: Path) -> Mapping:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_folder(folder: Path) -> tuple[dict, tuple[dict[str, Tensor], str]]:
    if not (folder / "config.json").is_file() and (folder / "unet" / "config.json").is_file():
        folder = folder / "unet"
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError:
        raise CheckpointError(
            f"{folder} has no config.json: give the folder of a UNet2DModel{neighbour(folder)}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} is no JSON object")
    files = [folder / WEIGHTS, folder / "diffusion_pytorch_model.bin"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} has no {WEIGHTS}")
    return config, read_tensors(file)


def _called(preset: str | Mapping) -> str:
    return f"preset {preset!r}" if isinstance(preset, str) else "a model of these options"


def _empty(preset: str | Mapping, kind: type = UNet):
    """The model without weights: half a billion random numbers would take longer than the file."""
    with torch.device("meta"):
        if isinstance(preset, str):
            return kind.from_preset(preset)
        try:
            return kind(**preset)
        except TypeError as error:
            raise CheckpointError(f"these are no options of a {kind.__name__}: {error}") from None


def _fill(model, pairs: dict, tensors: dict, called: str, arrange, loader: str):
    """The model with `tensors`; CheckpointError names the first few that are too few or too many.

    pairs    our parameter → the names of theirs
    arrange  (model, our parameter, their tensors) → the values in our layout
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    theirs = {name for names in pairs.values() for name in names}
    complaints = []
    for what, names in (("lacks", theirs - tensors.keys()), ("has", tensors.keys() - theirs)):
        if names:
            first = ", ".join(sorted(names)[:3])
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            complaints.append(f"{what} {first}{rest}")
    if complaints:
        raise CheckpointError(
            f"{called} does not fit this model: it {', and it '.join(complaints)}"
            f"{_kind(tensors, loader)}"
        )
    if unnamed := shapes.keys() - pairs.keys():
        raise CheckpointError(
            f"{loader} has no names for this model's {', '.join(sorted(unnamed)[:3])}: choose "
            "another preset"
        )
    weights = {}
    for ours, names in pairs.items():
        try:
            value = arrange(model, ours, [tensors[name] for name in names])
        except (IndexError, RuntimeError):  # of another number of dimensions
            value = torch.empty(0)
        if tuple(value.shape) != shapes[ours]:
            found = ", ".join(str(tuple(tensors[name].shape)) for name in names)
            raise CheckpointError(
                f"{called} does not fit this model: {', '.join(names)} is {found}, which gives "
                f"{tuple(value.shape)}, expected {shapes[ours]}"
            )
        weights[ours] = value
    model = model.to_empty(device="cpu")
    model.load_state_dict(weights)
    return model.eval()


def _kind(tensors: dict, loader: str) -> str:
    for sign, sentence in SIGNS.items():
        if any(sign in name for name in tensors) and not sentence.endswith(loader):
            return f"; its names are of {sentence}"
    return ""
