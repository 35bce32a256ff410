"""What tests of whole models share: models of diffusers, small, and what is to be found in them."""

from functools import partial

import pytest
import torch
from rewriting import check_model, fused
from torch import nn

import engine

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
UNET = dict(
    sample_size=8,
    in_channels=2,
    out_channels=2,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=8,
)
DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
UNETS = {
    "plain": dict(
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
    ),
    "attention": dict(down_block_types=DOWN, up_block_types=UP, dropout=0.0),
    "checkpointed": dict(down_block_types=DOWN, up_block_types=UP),
    "scale_shift": dict(
        down_block_types=DOWN,
        up_block_types=UP,
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=4,
    ),
    "resnet up and down": dict(
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        attn_norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ),
}


def random_weights(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() == 1 else 0.05))
    return model


def expected_in(model: nn.Module) -> dict[str, int]:
    """What is there to replace in a model of diffusers, counted by its modules."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers import Transformer2DModel

    found = dict.fromkeys(
        (
            "GroupNorm → SiLU",
            "add → GroupNorm → SiLU",
            "GroupNorm → scale and shift → SiLU",
            "GroupNorm",
            "attention",
        ),
        0,
    )
    for name, module in model.named_modules():
        if isinstance(module, ResnetBlock2D):
            found["GroupNorm → SiLU"] += 1
            second = "add → GroupNorm → SiLU"
            if module.time_emb_proj is None:
                second = "GroupNorm → SiLU"
            elif module.time_embedding_norm == "scale_shift":
                second = "GroupNorm → scale and shift → SiLU"
            found[second] += 1
        elif isinstance(module, Attention):
            found["attention"] += 1
            found["GroupNorm"] += module.group_norm is not None
        elif isinstance(module, Transformer2DModel):
            found["GroupNorm"] += 1
        elif name.endswith("conv_norm_out"):
            found["GroupNorm → SiLU"] += 1
    return {pattern: n for pattern, n in found.items() if n}


def unet_2d(name: str, widths=(8, 16)):
    """diffusers' UNet2DModel, one of UNETS; `widths` of one level or two."""
    diffusers = pytest.importorskip("diffusers")
    options = {**UNET, **UNETS[name], "block_out_channels": widths}
    options["down_block_types"] = options["down_block_types"][-len(widths) :]
    options["up_block_types"] = options["up_block_types"][: len(widths)]
    torch.manual_seed(0)
    model = random_weights(diffusers.UNet2DModel(**options))
    if name == "checkpointed":
        model.enable_gradient_checkpointing()
    return model, (torch.randn(2, 2, 8, 8), torch.tensor([7, 931]))


def unet_2d_condition(**changes):
    """As Stable Diffusion's: cross-attention, each transformer with a norm of its own."""
    diffusers = pytest.importorskip("diffusers")
    options = dict(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    torch.manual_seed(0)
    model = random_weights(diffusers.UNet2DConditionModel(**{**options, **changes}))
    return model, (torch.randn(2, 4, 8, 8), torch.tensor([7, 931]), torch.randn(2, 5, 12))


def autoencoder_kl(widths=(8, 16)):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=4,
        latent_channels=2,
    )
    return random_weights(model), (torch.randn(2, 3, 8, 8),)


def both_ways(model, x):
    """An autoencoder's halves: encode and decode do not pass through forward."""
    return model.decode(model.encode(x).latent_dist.mode()).sample


def to(model, dtype):
    return model.to(dtype)


def sample(model, *inputs):
    return model(*inputs).sample


def check(model, inputs, call, dtype, expected, cast=to, inner="eager", nested=0, graphs=1):
    handle = check_model(model, inputs, call, dtype, cast, partial(engine.accelerate, inner=inner))
    report = handle.report
    assert fused(report) == expected, report
    assert report.graphs == graphs and report.nested == nested, report  # no graph break
    return report
