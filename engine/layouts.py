"""Names of the U-Net's weights in other projects' files, and how their numbers are arranged.

A layout is a function of our model that yields rows (our module, kind, their module); `table`
expands them, by the layout's PARTS, to pairs: our parameter and those of theirs that hold it.
Sources: guided-diffusion and improved-diffusion unet.py, EDM networks.py (orders of qkv), DDPM
diffusion_tf/models/unet.py, diffusers models/unets/unet_2d.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

Rows = Iterator[tuple[str, str, str]]

OPENAI = {
    "": {"": [""]},
    "res": {
        "norm1": ["in_layers.0"],
        "conv1": ["in_layers.2"],
        "temb_proj": ["emb_layers.1"],
        "norm2": ["out_layers.0"],
        "conv2": ["out_layers.3"],
        "shortcut": ["skip_connection"],
    },
    "attention": {"norm": ["norm"], "qkv": ["qkv"], "proj_out": ["proj_out"]},
}
DIFFUSERS = {
    "": {"": [""]},
    "res": {
        "norm1": ["norm1"],
        "conv1": ["conv1"],
        "temb_proj": ["time_emb_proj"],
        "norm2": ["norm2"],
        "conv2": ["conv2"],
        "shortcut": ["conv_shortcut"],
    },
    "attention": {
        "norm": ["group_norm"],
        "qkv": ["to_q", "to_k", "to_v"],
        "proj_out": ["to_out.0"],
    },
}
DDPM_TF = {
    "": {"": [""]},
    "res": {
        "norm1": ["norm1"],
        "conv1": ["conv1"],
        "temb_proj": ["temb_proj"],
        "norm2": ["norm2"],
        "conv2": ["conv2"],
        "shortcut": ["nin_shortcut"],
    },
    "attention": {"norm": ["norm"], "qkv": ["q", "k", "v"], "proj_out": ["proj_out"]},
}


def openai(model: nn.Module) -> Rows:
    """guided-diffusion and improved-diffusion: the blocks are numbered through all levels."""
    yield "time_embed.dense_0", "", "time_embed.0"
    yield "time_embed.dense_1", "", "time_embed.2"
    yield "label_embed", "", "label_emb"
    yield "conv_in", "", "input_blocks.0.0"
    n = 0
    for i, level in enumerate(model.down):
        for j in range(len(level.blocks)):
            n += 1
            yield f"down.{i}.blocks.{j}", "res", f"input_blocks.{n}.0"
            yield f"down.{i}.attentions.{j}", "attention", f"input_blocks.{n}.1"
        if level.resample is not None:
            n += 1
            yield _resample(level, f"down.{i}", f"input_blocks.{n}.0", ".op")
    yield "mid_block_1", "res", "middle_block.0"
    yield "mid_attention", "attention", "middle_block.1"
    yield "mid_block_2", "res", "middle_block.2"
    yield "norm_out", "", "out.0"
    if hasattr(model, "pool"):  # a classifier
        yield "pool.position", "", "out.2.positional_embedding"
        yield "pool.qkv", "", "out.2.qkv_proj"
        yield "pool.proj_out", "", "out.2.c_proj" if hasattr(model.pool, "qkv") else "out.3"
        return
    n = -1
    for i, level in enumerate(model.up):
        for j in range(len(level.blocks)):
            n += 1
            yield f"up.{i}.blocks.{j}", "res", f"output_blocks.{n}.0"
            yield f"up.{i}.attentions.{j}", "attention", f"output_blocks.{n}.1"
        if level.resample is not None:
            after = 1 if isinstance(level.attentions[-1], nn.Identity) else 2
            yield _resample(level, f"up.{i}", f"output_blocks.{n}.{after}", ".conv")
    yield "conv_out", "", "out.2"


def diffusers(model: nn.Module) -> Rows:
    """UNet2DModel: a block per level, up_blocks.0 the lowest, as ours."""
    yield "time_embed.dense_0", "", "time_embedding.linear_1"
    yield "time_embed.dense_1", "", "time_embedding.linear_2"
    yield "label_embed", "", "class_embedding"
    yield "conv_in", "", "conv_in"
    yield "mid_block_1", "res", "mid_block.resnets.0"
    yield "mid_attention", "attention", "mid_block.attentions.0"
    yield "mid_block_2", "res", "mid_block.resnets.1"
    for side in ("down", "up"):
        for i, level in enumerate(getattr(model, side)):
            for j in range(len(level.blocks)):
                yield f"{side}.{i}.blocks.{j}", "res", f"{side}_blocks.{i}.resnets.{j}"
                place = f"{side}_blocks.{i}.attentions.{j}"
                yield f"{side}.{i}.attentions.{j}", "attention", place
            if level.resample is not None:
                place = f"{side}_blocks.{i}.{side}samplers.0"
                yield _resample(level, f"{side}.{i}", place, ".conv")
    yield "norm_out", "", "conv_norm_out"
    yield "conv_out", "", "conv_out"


def ddpm_tf(model: nn.Module) -> Rows:
    """The original DDPM's TensorFlow variables; levels are numbered from the top on both ways."""
    yield "time_embed.dense_0", "", "model/temb/dense0"
    yield "time_embed.dense_1", "", "model/temb/dense1"
    yield "conv_in", "", "model/conv_in"
    yield "mid_block_1", "res", "model/mid/block_1"
    yield "mid_attention", "attention", "model/mid/attn_1"
    yield "mid_block_2", "res", "model/mid/block_2"
    for side in ("down", "up"):
        levels = getattr(model, side)
        for i, level in enumerate(levels):
            scope = f"model/{side}_{i if side == 'down' else len(levels) - 1 - i}"
            for j in range(len(level.blocks)):
                yield f"{side}.{i}.blocks.{j}", "res", f"{scope}/block_{j}"
                yield f"{side}.{i}.attentions.{j}", "attention", f"{scope}/attn_{j}"
            if level.resample is not None:
                yield _resample(level, f"{side}.{i}", f"{scope}/{side}sample", "/conv")
    yield "norm_out", "", "model/norm_out"
    yield "conv_out", "", "model/conv_out"


def _resample(level: nn.Module, ours: str, theirs: str, conv: str) -> tuple[str, str, str]:
    if hasattr(level.resample, "conv"):
        return f"{ours}.resample.conv", "", theirs + conv
    return f"{ours}.resample", "res", theirs  # in a residual block


def table(
    model: nn.Module, rows: Rows, parts: dict, joint: str = "."
) -> dict[str, tuple[str, ...]]:
    """Our parameter → theirs, in the order q, k, v where there are three. `joint`: "/" is TF's."""
    shapes = {name: p.dim() for name, p in model.named_parameters()}
    pairs = {}
    for ours, kind, theirs in rows:
        if ours in shapes:
            pairs[ours] = (theirs,)
            continue
        for part, places in parts[kind].items():
            module = ".".join(filter(None, (ours, part)))
            for leaf in ("weight", "bias"):
                if f"{module}.{leaf}" not in shapes:
                    continue  # no attention at this level, no shortcut, no labels
                name = leaf
                if joint == "/":
                    norm = shapes[f"{module}.weight"] == 1
                    name = {"weight": ("W", "gamma"), "bias": ("b", "beta")}[leaf][norm]
                pairs[f"{module}.{leaf}"] = tuple(
                    joint.join(filter(None, (theirs, place, name))) for place in places
                )
    return pairs


# --- numbers: their tensors of one parameter → ours ---------------------------------------------


def from_openai(model: nn.Module, ours: str, theirs: Sequence[Tensor], order: str) -> Tensor:
    """1×1 convolutions become linear maps; qkv's channels, in `order`, become (3, heads, D)."""
    (value,) = theirs
    module, _, leaf = ours.rpartition(".")
    if leaf == "position":
        return value.T
    if not isinstance(model.get_submodule(module), nn.Linear):
        return value
    value = _matrix(value) if leaf == "weight" else value
    block, _, part = module.rpartition(".")
    order = "3hd" if block == "pool" else order  # in every published classifier
    return to_3hd(value, model.get_submodule(block).num_heads, order) if part == "qkv" else value


def to_3hd(value: Tensor, heads: int, order: str) -> Tensor:
    """Rows of a qkv map (3·heads·D, …), slowest first in `order`, as (3, heads, D)."""
    if value.shape[0] % (3 * heads):
        return value  # the wrong shape, which is told elsewhere
    d = value.shape[0] // (3 * heads)
    shape, axes = {
        "3hd": ((3, heads, d), (0, 1, 2)),
        "h3d": ((heads, 3, d), (1, 0, 2)),
        "hd3": ((heads, d, 3), (2, 0, 1)),
    }[order]
    rest = value.shape[1:]
    permuted = value.reshape(*shape, *rest).permute(*axes, *range(3, 3 + len(rest)))
    return permuted.reshape(value.shape)


def from_diffusers(model: nn.Module, ours: str, theirs: Sequence[Tensor]) -> Tensor:
    linear = isinstance(model.get_submodule(ours.rpartition(".")[0]), nn.Linear)
    matrix = linear and ours.endswith("weight")
    return torch.cat([_matrix(value) if matrix else value for value in theirs])


def from_ddpm_tf(model: nn.Module, ours: str, theirs: Sequence[Tensor]) -> Tensor:
    """Convolutions are HWIO, dense and NIN weights (in, out)."""
    convolves = isinstance(model.get_submodule(ours.rpartition(".")[0]), nn.Conv2d)
    values = []
    for value in theirs:
        if value.dim() == 4:
            value = value.permute(3, 2, 0, 1)
        elif value.dim() == 2:
            value = value.T[:, :, None, None] if convolves else value.T
        values.append(value)
    return torch.cat(values)


def _matrix(value: Tensor) -> Tensor:
    """(out, in, 1, …) → (out, in): linear maps are stored as 1×1 convolutions too."""
    return value.flatten(1) if value.dim() > 2 and value[0, 0].numel() == 1 else value
