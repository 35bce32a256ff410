"""Models of other idioms than diffusers' through Inductor: forward and backward, two dtypes."""

import foreign_models
import pytest
import torch
from torch import nn
from whole_models import DTYPES, check, random_weights

GUIDED = {
    "add, (heads, 3, D)": {},
    "checkpointed, scale and shift, (3, heads, D)": dict(
        adaptive=True, legacy=False, checkpointed=True
    ),
}
X, T = torch.randn(2, 2, 8, 8), torch.tensor([7, 931])


@DTYPES
@pytest.mark.parametrize("name", GUIDED)
def test_guided_diffusion(name, dtype):
    torch.manual_seed(0)
    model = random_weights(foreign_models.GuidedDiffusion(**GUIDED[name]))
    check(
        *(model, (X, T), nn.Module.__call__, dtype, model.expected()),
        cast=foreign_models.cast,
        inner="inductor",
        nested=3 if model.down.checkpointed else 0,
    )


@DTYPES
def test_denoising_diffusion(dtype):
    torch.manual_seed(0)
    model = random_weights(foreign_models.DenoisingDiffusion())
    check(model, (X, T), nn.Module.__call__, dtype, model.expected(), inner="inductor")


@DTYPES
def test_sequential(dtype):
    torch.manual_seed(0)
    model = random_weights(foreign_models.Plain())
    inputs = (torch.randn(2, 2, 6, 6),)
    check(model, inputs, nn.Module.__call__, dtype, model.expected(), inner="inductor")
