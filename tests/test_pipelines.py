"""diffusers' DDPM and DDIM pipelines, untouched and accelerated: pictures and gradients.

Their noise is drawn in the U-Net's dtype, so that float64 would draw other pictures than bfloat16:
here all three draw in float32 and round. (A pipeline in bfloat16 fails at its very end, with us and
without, where it asks for NumPy's bfloat16; its pictures are there by then.)
"""

import contextlib
import copy
from functools import partial

import pytest
import torch
from budget import FORWARD, GRADIENT, assert_within_budget
from rewriting import cast_inputs, fused, run_model
from whole_models import DTYPES, expected_in, sample, unet_2d

import engine

diffusers = pytest.importorskip("diffusers")

from diffusers.pipelines.ddim import pipeline_ddim  # noqa: E402
from diffusers.pipelines.ddpm import pipeline_ddpm  # noqa: E402
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm  # noqa: E402

PIPELINES = {
    "ddpm": (diffusers.DDPMPipeline, diffusers.DDPMScheduler),
    "ddim": (diffusers.DDIMPipeline, diffusers.DDIMScheduler),
}


@pytest.fixture(autouse=True)
def float32_noise(monkeypatch):
    def draw(shape, generator=None, device=None, dtype=None, layout=None):
        return torch.randn(shape, generator=generator).to(dtype)

    for module in (pipeline_ddim, pipeline_ddpm, scheduling_ddim, scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", draw)


def pictures(pipeline):
    """Two of them after two steps, before they are made bytes; the same noise each time."""
    found = []
    untouched = pipeline.scheduler.step
    pipeline.scheduler.step = lambda *a, **k: found.append(untouched(*a, **k)) or found[-1]
    pipeline.set_progress_bar_config(disable=True)
    try:
        generator = torch.Generator().manual_seed(1)
        failing = [TypeError] if pipeline.unet.dtype == torch.bfloat16 else []
        with contextlib.suppress(*failing):
            pipeline(2, generator, num_inference_steps=2, output_type="np")
    finally:
        pipeline.scheduler.step = untouched
    assert len(found) == 2
    return found[-1].prev_sample


@DTYPES
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name, inner, dtype):
    kind, scheduler = PIPELINES[name]
    unet, inputs = unet_2d("plain", (8,))
    unet, inputs = unet.to(dtype), cast_inputs(inputs, dtype)
    make = lambda unet: kind(unet, scheduler(num_train_timesteps=10))  # noqa: E731
    plain, exact = make(copy.deepcopy(unet)), make(copy.deepcopy(unet).double())
    pipeline = make(unet)
    torch.compiler.reset()
    with engine.accelerate(pipeline, inner=inner) as handle:
        within = partial(assert_within_budget, factor=FORWARD, what="pictures")
        within(*(pictures(each) for each in (pipeline, exact, plain)))
        found = fused(handle.report)
        assert found == expected_in(unet) and handle.report.graphs == 1, handle.report
        if (name, inner) == ("ddpm", "inductor"):
            return  # the same U-Net as with ddim, whose gradients take another compilation
        got, low = (run_model(each.unet, inputs, sample) for each in (pipeline, plain))
        truth = run_model(exact.unet, cast_inputs(inputs, torch.float64), sample)
        assert_within_budget(got[1], truth[1], low[1], factor=GRADIENT, what="gradient")
