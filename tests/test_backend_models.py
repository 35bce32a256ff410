"""Whole models of other libraries, untouched and accelerated: what is replaced, and is it right.

Random weights, float32 and bfloat16, output and the gradient of all parameters together: some
(to_k.bias) are zero by construction, and their own relative error means nothing.
"""

from functools import partial

import foreign_models
import pytest
import torch
from rewriting import check_model, fused
from torch import nn

import engine
from engine import ops

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


def to(model, dtype):
    return model.to(dtype)


def sample(model, *inputs):
    return model(*inputs).sample


def check(model, inputs, call, dtype, expected, cast=to, inner="eager", nested=0):
    handle = check_model(model, inputs, call, dtype, cast, partial(engine.accelerate, inner=inner))
    report = handle.report
    assert fused(report) == expected, report
    assert report.graphs == 1 and report.nested == nested, report  # no graph break
    return report


@DTYPES
@pytest.mark.parametrize("name", UNETS)
def test_unet_2d(name, dtype):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = random_weights(diffusers.UNet2DModel(**UNET, **UNETS[name]))
    if name == "checkpointed":
        model.enable_gradient_checkpointing()
    inputs = (torch.randn(2, 2, 8, 8), torch.tensor([7, 931]))
    nested = 7 if name == "checkpointed" else 0
    report = check(model, inputs, sample, dtype, expected_in(model), nested=nested)
    assert {entry.why for entry in report.left} <= {
        "the concatenation has other readers beside the norm: it stays"
    }


@DTYPES
def test_unet_2d_condition(dtype):
    """As Stable Diffusion's: cross-attention, each transformer with a norm of its own."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    model = random_weights(model)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([7, 931]), torch.randn(2, 5, 12))
    check(model, inputs, sample, dtype, expected_in(model))


@DTYPES
def test_autoencoder_kl(dtype):
    """Taken by its halves: encode and decode do not pass through forward."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=2,
    )
    model = random_weights(model)

    def both_ways(model, x):
        return model.decode(model.encode(x).latent_dist.mode()).sample

    handle = check_model(model, (torch.randn(2, 3, 8, 8),), both_ways, dtype, to, engine.accelerate)
    assert fused(handle.report) == expected_in(model), handle.report
    assert handle.report.graphs == 2


GUIDED = {
    "add, (heads, 3, D)": {},
    "scale and shift, (3, heads, D)": dict(adaptive=True, legacy=False),
    "checkpointed": dict(adaptive=True, checkpointed=True),
}


@DTYPES
@pytest.mark.parametrize("name", GUIDED)
def test_guided_diffusion(name, dtype):
    torch.manual_seed(0)
    model = random_weights(foreign_models.GuidedDiffusion(**GUIDED[name]))
    inputs = (torch.randn(2, 2, 8, 8), torch.tensor([7, 931]))
    nested = 3 if name == "checkpointed" else 0
    check(
        *(model, inputs, nn.Module.__call__, dtype, model.expected()),
        cast=foreign_models.cast,
        nested=nested,
    )


@pytest.mark.skipif(not hasattr(ops, "rms_norm_silu"), reason="ops.rms_norm_silu is not there")
@DTYPES
def test_denoising_diffusion(dtype):
    torch.manual_seed(0)
    model = random_weights(foreign_models.DenoisingDiffusion())
    inputs = (torch.randn(2, 2, 8, 8), torch.tensor([7, 931]))
    report = check(model, inputs, nn.Module.__call__, dtype, model.expected())
    assert not report.left, report


@DTYPES
def test_sequential(dtype):
    torch.manual_seed(0)
    model = random_weights(foreign_models.Plain())
    inputs = (torch.randn(2, 2, 6, 6),)
    check(model, inputs, nn.Module.__call__, dtype, model.expected())


def test_inductor():
    """The same through Inductor, which traces our ops: forward and backward."""
    torch.manual_seed(0)
    model = random_weights(foreign_models.Plain())
    inputs = (torch.randn(2, 2, 6, 6),)
    check(model, inputs, nn.Module.__call__, torch.float32, model.expected(), inner="inductor")


def test_inductor_unet_2d_condition():
    """Cross-attention, norms with an addend, a skip: whatever a small U-Net of diffusers has."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
    )
    model = random_weights(model)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([7, 931]), torch.randn(2, 5, 12))
    check(model, inputs, sample, torch.float32, expected_in(model), inner="inductor")


def test_checkpointed_dropout_draws_the_same_numbers_twice():
    """A block that is computed again in the backward pass must drop what it dropped before."""
    torch.manual_seed(0)
    model = random_weights(foreign_models.GuidedDiffusion(checkpointed=True, dropout=0.5))
    inputs = (torch.randn(2, 2, 8, 8), torch.tensor([7, 931]))

    def gradient(model):
        torch.manual_seed(5)
        model.zero_grad()
        (model(*inputs) ** 2).mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradient(model)
    torch.compiler.reset()
    engine.accelerate(model, channels_last=False)  # dropout draws in the order of the memory
    assert torch.allclose(gradient(model), expected, rtol=1e-4, atol=1e-6)
