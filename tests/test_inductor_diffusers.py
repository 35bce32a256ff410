"""diffusers' models through Inductor, which traces our ops: forward and backward, two dtypes.

As test_backend_models.py has them with inner="eager", but of one level where that has everything:
a graph takes ten to thirty seconds to compile.
"""

import pytest
from whole_models import (
    DTYPES,
    autoencoder_kl,
    both_ways,
    check,
    expected_in,
    sample,
    unet_2d,
    unet_2d_condition,
)

WIDTHS = {"plain": (8,), "attention": (8,), "checkpointed": (8,), "resnet up and down": (8, 8)}


@DTYPES
@pytest.mark.parametrize("name", WIDTHS)
def test_unet_2d(name, dtype):
    model, inputs = unet_2d(name, WIDTHS[name])
    nested = 4 if name == "checkpointed" else 0
    check(model, inputs, sample, dtype, expected_in(model), inner="inductor", nested=nested)


@DTYPES
def test_unet_2d_condition(dtype):
    model, inputs = unet_2d_condition(
        block_out_channels=(8,),
        mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    check(model, inputs, sample, dtype, expected_in(model), inner="inductor")


@DTYPES
def test_autoencoder_kl(dtype):
    model, inputs = autoencoder_kl((8,))
    check(model, inputs, both_ways, dtype, expected_in(model), inner="inductor", graphs=2)
