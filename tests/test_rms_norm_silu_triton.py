"""Triton's rms_norm_silu where a tile does not hold all channels, or a program takes several."""

import pytest
import torch
from conftest import DEVICE
from test_group_norm_silu import as_layout
from test_rms_norm_silu import DTYPES, LAYOUTS, VARIANTS, check, make_inputs

from engine import dispatch

OP = "rms_norm_silu"


@pytest.fixture
def tiles(monkeypatch):
    """Triton's plan, and the means to change it."""
    pytest.importorskip("triton")
    x = torch.ones(1, 1, 1, 1, device=DEVICE)
    if dispatch.refusals(OP, "triton", (x, None, None, None, 1.0, True)):
        pytest.skip("neither a GPU nor the interpreter")
    from engine.kernels import rms_norm_silu_bwd, rms_norm_silu_tiles

    def change(**values):
        for name, value in values.items():
            holder = rms_norm_silu_bwd if name == "PROGRAMS" else rms_norm_silu_tiles
            monkeypatch.setattr(holder, name, value)
        return rms_norm_silu_tiles.plan

    return change


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [20, 37])
def test_triton_walks_over_channels_that_no_tile_holds(tiles, layout, channels, dtype):
    last = layout == "channels_last"
    plan = tiles(LIMIT={"fwd": 16, "bwd": 16}, WALK=16 if last else 64)
    inputs = make_inputs((2, channels, 1, 3), dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    assert plan("bwd", channels, 3, inputs["x"].element_size(), (last, last)).chunks > 1
    check("triton", inputs, dy_layout=layout)


@pytest.mark.parametrize("variant", ["weight", "shift", "scale shift"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_takes_several_tiles_a_program(tiles, layout, variant):
    """And several programs a sample, whose sums are merged."""
    tiles(TILE=256, PROGRAMS=4)
    inputs = make_inputs((2, 24, 7, 11), torch.float32, VARIANTS[variant])
    inputs["x"] = as_layout(inputs["x"], layout)
    check("triton", inputs, VARIANTS[variant], dy_layout=layout)
