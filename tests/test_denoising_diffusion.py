"""denoising-diffusion-pytorch's own U-Nets, untouched and accelerated.

Float32, and bfloat16 under autocast, which is how it trains (its time embedding is float32 in any
case).
"""

from functools import partial

import pytest
import torch
from denoising_library import PACKAGE, from_file
from rewriting import check_model, fused
from torch import nn

import engine

MODES = pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
SMALL = dict(dim=8, dim_mults=(1, 2), channels=2, attn_dim_head=8, attn_heads=2)
UNETS = {
    "plain": {},
    "flash": dict(flash_attn=True),
    "self-conditioned": dict(self_condition=True),
    "full attention, learned variance": dict(full_attn=(True, True), learned_variance=True),
}


def check(library, model, inputs, autocast, inner="eager", **kwargs):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() == 1 else 0.05))

    def call(model, *inputs):
        low = autocast and inputs[0].dtype != torch.float64  # that is the truth
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return model(*inputs, **kwargs)

    to = nn.Module.to
    accelerate = partial(engine.accelerate, inner=inner)
    handle = check_model(model, inputs, call, torch.float32, to, accelerate)

    def number(name):
        return sum(isinstance(m, getattr(library, name)) for m in model.modules())

    blocks, report = number("ResnetBlock"), handle.report
    assert fused(report) == {
        "RMS norm → scale and shift → SiLU": blocks,
        "RMS norm → SiLU": blocks,
        "RMS norm": number("RMSNorm") - 2 * blocks,
        "attention": number("Attention"),
    }, report
    assert report.graphs == 1 and report.nested == 0
    assert {entry.pattern for entry in report.left} <= ({"cast"} if autocast else set()), report


X, T = torch.randn(2, 2, 8, 8), torch.tensor([7.0, 931.0])


@MODES
def test_class_conditional_unet(autocast):
    library = from_file("classifier_free_guidance")
    torch.manual_seed(0)
    model = library.Unet(num_classes=3, **SMALL)
    check(library, model, (X, T, torch.tensor([2, 0])), autocast, cond_drop_prob=0.0)


@MODES
@pytest.mark.parametrize("name", UNETS)
def test_unet(name, autocast):
    library = from_file(PACKAGE)
    torch.manual_seed(0)
    model = library.Unet(**SMALL, **UNETS[name])
    condition = (torch.randn_like(X),) if name == "self-conditioned" else ()
    check(library, model, (X, T, *condition), autocast)


@MODES
def test_inductor(autocast):
    library = from_file(PACKAGE)
    torch.manual_seed(0)
    model = library.Unet(**{**SMALL, "dim_mults": (1,)})
    check(library, model, (X, T), autocast, inner="inductor")
