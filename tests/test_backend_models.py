"""Whole models of other libraries, untouched and accelerated: what is replaced, and is it right.

Random weights, float32 and bfloat16, output and the gradient of all parameters together: some
(to_k.bias) are zero by construction, and their own relative error means nothing. The same through
Inductor: test_inductor_diffusers.py and test_inductor_models.py.
"""

import foreign_models
import pytest
import torch
from torch import nn
from whole_models import (
    DTYPES,
    UNETS,
    autoencoder_kl,
    both_ways,
    check,
    expected_in,
    random_weights,
    sample,
    unet_2d,
    unet_2d_condition,
)

import engine
from engine import ops


@DTYPES
@pytest.mark.parametrize("name", UNETS)
def test_unet_2d(name, dtype):
    model, inputs = unet_2d(name)
    nested = 7 if name == "checkpointed" else 0
    report = check(model, inputs, sample, dtype, expected_in(model), nested=nested)
    assert {entry.why for entry in report.left} <= {
        "the concatenation has other readers beside the norm: it stays"
    }


@DTYPES
def test_unet_2d_condition(dtype):
    model, inputs = unet_2d_condition()
    check(model, inputs, sample, dtype, expected_in(model))


@DTYPES
def test_autoencoder_kl(dtype):
    model, inputs = autoencoder_kl()
    check(model, inputs, both_ways, dtype, expected_in(model), graphs=2)


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
