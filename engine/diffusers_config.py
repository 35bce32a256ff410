"""A UNet2DModel's configuration as UNet's options, and back; what has no counterpart is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping

# Options of UNet2DModel (diffusers 0.42) and their defaults: old files lack the newer ones.
DEFAULTS = dict(
    sample_size=None,
    in_channels=3,
    out_channels=3,
    center_input_sample=False,
    time_embedding_type="positional",
    time_embedding_dim=None,
    freq_shift=0,
    flip_sin_to_cos=True,
    down_block_types=["DownBlock2D", *["AttnDownBlock2D"] * 3],
    mid_block_type="UNetMidBlock2D",
    up_block_types=[*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    block_out_channels=[224, 448, 672, 896],
    layers_per_block=2,
    mid_block_scale_factor=1,
    downsample_padding=1,
    downsample_type="conv",
    upsample_type="conv",
    dropout=0.0,
    act_fn="silu",
    attention_head_dim=8,
    norm_num_groups=32,
    attn_norm_num_groups=None,
    norm_eps=1e-5,
    resnet_time_scale_shift="default",
    add_attention=True,
    class_embed_type=None,
    num_class_embeds=None,
    num_train_timesteps=None,  # read for learned time embeddings only
)
# The values that this U-Net has.
HAVE = dict(
    center_input_sample=(False,),
    time_embedding_type=("positional",),
    mid_block_type=("UNetMidBlock2D",),
    mid_block_scale_factor=(1,),
    downsample_padding=(0, 1),
    downsample_type=("conv", "resnet"),
    upsample_type=("conv", "resnet"),
    act_fn=("silu", "swish"),
    resnet_time_scale_shift=("default", "scale_shift"),
    add_attention=(True,),
    class_embed_type=(None,),
)
# block type → (has attention, how it resamples; None: as the option says)
BLOCKS = {
    "DownBlock2D": (False, "conv"),
    "ResnetDownsampleBlock2D": (False, "resnet"),
    "AttnDownBlock2D": (True, None),
    "UpBlock2D": (False, "conv"),
    "ResnetUpsampleBlock2D": (False, "resnet"),
    "AttnUpBlock2D": (True, None),
}


# The last class means no class, and this share of labels was left out. diffusers passes over keys
# that begin with an underscore.
NULL_LABEL = "_label_dropout"


class Inexpressible(ValueError):
    """One sentence: the option that one of the two U-Nets does not have."""


def from_diffusers(config: Mapping) -> dict:
    """UNet's options. Raises Inexpressible for those of UNet2DModel that it has not."""
    name = config.get("_class_name", "UNet2DModel")
    if name != "UNet2DModel":
        raise Inexpressible(f"_class_name is {name!r}, expected 'UNet2DModel'")
    given = {k: v for k, v in config.items() if not k.startswith("_")}
    if unknown := given.keys() - DEFAULTS.keys():
        raise Inexpressible(f"{', '.join(sorted(unknown))} is no option that is known here")
    c = {**DEFAULTS, **given}
    for key, values in HAVE.items():
        if c[key] not in values:
            expected = " or ".join(map(repr, values))
            raise Inexpressible(f"{key} is {c[key]!r}; this U-Net has {expected} only")
    widths = list(c["block_out_channels"])
    sinusoids = (bool(c["flip_sin_to_cos"]), c["freq_shift"])
    if sinusoids not in ((True, 0), (False, 1)):
        raise Inexpressible(
            f"flip_sin_to_cos is {sinusoids[0]} with freq_shift {sinusoids[1]}; this U-Net has "
            "True with 0, or False with 1"
        )
    if c["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise Inexpressible(
            f"time_embedding_dim is {c['time_embedding_dim']}; this U-Net has four times its first "
            f"width, {4 * widths[0]}"
        )
    adaptive = c["resnet_time_scale_shift"] == "scale_shift"
    mid_groups = c["attn_norm_num_groups"] or (None if adaptive else c["norm_num_groups"])
    if mid_groups != c["norm_num_groups"]:
        raise Inexpressible(
            f"attn_norm_num_groups is {c['attn_norm_num_groups']}, so the attention in the middle "
            f"has {'no norm' if mid_groups is None else 'groups of its own'}; this U-Net has "
            f"norm_num_groups {c['norm_num_groups']} everywhere"
        )
    attends, resample = _blocks(c)
    dropout = config.get(NULL_LABEL) or 0.0  # of a folder that this engine wrote
    size = c["sample_size"]
    size = size[0] if isinstance(size, (list, tuple)) else size
    size = 8 << (len(widths) - 1) if size is None else size  # it names the levels, no more
    return dict(
        image_size=size,
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        model_channels=widths[0],
        channel_mult=tuple(_multiple(width, widths[0]) for width in widths),
        num_res_blocks=c["layers_per_block"],
        attention_resolutions=tuple(size >> i for i, attends in enumerate(attends) if attends),
        head_channels=c["attention_head_dim"],
        num_groups=c["norm_num_groups"],
        norm_eps=c["norm_eps"],
        dropout=c["dropout"],
        conditioning="scale_shift" if adaptive else "add",
        resample={"conv": "conv", "resnet": "biggan"}[resample],
        num_classes=c["num_class_embeds"] - 1 if dropout else c["num_class_embeds"],
        label_dropout=dropout,
        embedding="cos_sin" if sinusoids[0] else "sin_cos",
        asymmetric_padding=c["downsample_padding"] == 0,
    )


def _blocks(c: Mapping) -> tuple[list[bool], str]:
    """Whether each level attends, from the top, and how all levels resample."""
    down, up = list(c["down_block_types"]), list(c["up_block_types"])[::-1]
    for name in down + up:
        if name not in BLOCKS:
            raise Inexpressible(f"block type {name} is none that this U-Net has")
    attends = [BLOCKS[name][0] for name in down]
    if attends != [BLOCKS[name][0] for name in up] or len(down) != len(c["block_out_channels"]):
        raise Inexpressible(
            f"down_block_types are {', '.join(down)} and up_block_types from the top "
            f"{', '.join(up)}; this U-Net attends at the same levels on both ways"
        )
    kinds = {BLOCKS[name][1] or c["downsample_type"] for name in down[:-1]}  # the last has none
    kinds |= {BLOCKS[name][1] or c["upsample_type"] for name in up[1:]}
    if len(kinds) > 1:
        raise Inexpressible(
            "some levels resample by a convolution and others in a residual block; this U-Net has "
            "one way for all"
        )
    return attends, kinds.pop() if kinds else "conv"


def _multiple(width: int, base: int) -> float:
    """m with int(m · base) = width."""
    if width % base == 0:
        return width // base
    m = width / base
    return m if int(m * base) == width else math.nextafter(m, math.inf)


def to_diffusers(c: Mapping) -> dict:
    """A UNet2DModel's configuration. Raises Inexpressible for options that it has not."""
    widths = [int(mult * c["model_channels"]) for mult in c["channel_mult"]]
    if widths[0] != c["model_channels"]:
        raise Inexpressible(
            f"the first level has {widths[0]} channels and the time embedding "
            f"model_channels={c['model_channels']}; UNet2DModel has one number for both"
        )
    attends = [c["image_size"] >> i in c["attention_resolutions"] for i in range(len(widths))]
    heads = c["head_channels"]
    if heads is None and c["num_heads"] > 1:
        per_head = {w // c["num_heads"] for w, a in zip(widths, attends, strict=True) if a}
        per_head.add(widths[-1] // c["num_heads"])
        if len(per_head) > 1:
            raise Inexpressible(
                f"num_heads={c['num_heads']} gives heads of {', '.join(map(str, sorted(per_head)))}"
                " channels; UNet2DModel has one attention_head_dim for all levels"
            )
        heads = per_head.pop()
    resnet, adaptive = c["resample"] == "biggan", c["conditioning"] == "scale_shift"
    names = {False: "Resnet{}sampleBlock2D" if resnet else "{}Block2D", True: "Attn{}Block2D"}
    down = [names[a].format("Down") for a in attends]
    up = [names[a].format("Up") for a in reversed(attends)]
    flip = c["embedding"] == "cos_sin"
    return {"_class_name": "UNet2DModel"} | dict(
        DEFAULTS,
        sample_size=c["image_size"],
        in_channels=c["in_channels"],
        out_channels=c["out_channels"] or c["in_channels"],
        freq_shift=0 if flip else 1,
        flip_sin_to_cos=flip,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=widths,
        layers_per_block=c["num_res_blocks"],
        downsample_padding=0 if c["asymmetric_padding"] else 1,
        downsample_type="resnet" if resnet else "conv",
        upsample_type="resnet" if resnet else "conv",
        dropout=c["dropout"],
        attention_head_dim=heads,
        norm_num_groups=c["num_groups"],
        attn_norm_num_groups=c["num_groups"] if adaptive else None,
        norm_eps=c["norm_eps"],
        resnet_time_scale_shift=c["conditioning"] if adaptive else "default",
        num_class_embeds=c["num_classes"] + bool(c["label_dropout"]) if c["num_classes"] else None,
        **({NULL_LABEL: c["label_dropout"]} if c["label_dropout"] else {}),
    )
