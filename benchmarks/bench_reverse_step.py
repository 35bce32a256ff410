"""The fused reverse step on the CPU against the sequence of PyTorch calls, noise included.

Bytes that must move: read x and model_out, write x_next: 12 per element in float32. Where diffusers
is installed, its schedulers' steps are timed as well: the same schedule, clipping and variance.
"""

import importlib.util

import pytest
import torch
from measure import compare

import engine
from engine import ops, samplers, schedules

SHAPES = [(64, 1, 28, 28), (16, 3, 32, 32), (128, 3, 32, 32), (4, 3, 256, 256)]


def sequence(x, out, row):
    """A sampler's step as it is usually written: predict x0, clip, posterior mean, add noise."""
    a, b, c, d, s = row
    x0 = (a * x + b * out).clamp(-1, 1)
    return c * x0 + d * x + s * torch.randn_like(x)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def bench_reverse_step(benchmark, shape):
    torch.manual_seed(0)
    x, out = torch.randn(shape), torch.randn(shape)
    process = engine.Diffusion(schedules.betas("linear", 1000))
    rows = samplers.coefficients(process)[1].float()
    row = rows[500, :5].tolist()
    step, key = torch.tensor(500), torch.tensor(7)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, out: sequence(x, out, row), dynamic=False)
    z = ops.noise(7, 500, ops.STEP_NOISE, shape)
    with torch.inference_mode():
        functions = {
            "ours": lambda: ops.reverse_step(x, out, rows, step, key=key, impl="native"),
            "eager": lambda: sequence(x, out, row),
            "compile": lambda: compiled(x, out),
        }
        a, b, c, d, s = row
        truth = c * (a * x + b * out).clamp(-1, 1) + d * x + s * z
        assert torch.allclose(functions["ours"](), truth, atol=1e-5)
        compare(benchmark, functions, 3 * x.numel() * 4)


SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler"}
VARIANTS = ("guidance", "2M", "learned_range", "dynamic_threshold")


@pytest.mark.skipif(not importlib.util.find_spec("diffusers"), reason="diffusers is not installed")
@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda s: "x".join(map(str, s)))
def bench_scheduler_step(benchmark, shape, sampler):
    """diffusers' step of ddpm, and of ddim without noise: it stands where `eager` does."""
    import diffusers

    torch.manual_seed(0)
    x, out, t = torch.randn(shape), torch.randn(shape), 500
    scheduler = getattr(diffusers, SCHEDULERS[sampler])(1000, clip_sample=True)
    scheduler.set_timesteps(1000)
    more = {"use_clipped_model_output": True} if sampler == "ddim" else {}
    process = engine.Diffusion(schedules.betas("linear_unscaled", 1000))
    rows = samplers.coefficients(process, sampler)[1].float()
    step, key = torch.tensor(999 - t), torch.tensor(7)
    with torch.inference_mode():
        z = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        generator = torch.Generator().manual_seed(5)
        theirs = scheduler.step(out, t, x, generator=generator, **more).prev_sample
        mine = ops.reverse_step(x, out, rows, step, noise=z, impl="native")
        assert torch.allclose(mine, theirs, atol=1e-5)
        functions = {
            "ours": lambda: ops.reverse_step(x, out, rows, step, key=key, impl="native"),
            "eager": lambda: scheduler.step(out, t, x, **more).prev_sample,
        }
        compare(benchmark, functions, 3 * x.numel() * 4)


@pytest.mark.skipif(not importlib.util.find_spec("diffusers"), reason="diffusers is not installed")
@pytest.mark.parametrize("kind", ("DDPM", "DDIM", "DPMSolverMultistep"))
def bench_engine_scheduler(benchmark, kind, shape=(16, 3, 32, 32)):
    """A whole `step` of ours, torch's noise and the host's work included, against diffusers'."""
    import diffusers

    torch.manual_seed(0)
    x, out = torch.randn(shape), torch.randn(shape)
    theirs = getattr(diffusers, f"{kind}Scheduler")()
    mine = getattr(engine, f"Engine{kind}Scheduler").from_config(theirs.config)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(50)
        scheduler.step(out, scheduler.timesteps[0], x)  # its history: DPM-Solver's is of two steps
    t = theirs.timesteps[1]

    def step(scheduler, generator=None):
        scheduler._step_index = 1  # DPM-Solver counts its steps
        return scheduler.step(out, t, x, generator=generator).prev_sample

    with torch.inference_mode():
        a, b = (step(s, torch.Generator().manual_seed(5)) for s in (mine, theirs))
        assert torch.allclose(a, b, atol=1e-4)
        compare(
            benchmark,
            {"ours": lambda: step(mine), "eager": lambda: step(theirs)},
            4 * x.numel() * 4,
        )


@pytest.mark.parametrize("variant", VARIANTS)
def bench_variant(benchmark, variant, shape=(128, 3, 32, 32)):
    """A variant in the kernel against the same steps of PyTorch, with the same given noise."""
    torch.manual_seed(0)
    x, out, other, z = (torch.randn(shape) for _ in range(4))
    rows, step = torch.rand(4, 10) - 2, torch.tensor(2)
    more, operands = {
        "guidance": (dict(uncond=other, guidance=2.0), 5),
        "2M": (dict(x0_prev=other, return_x0=True), 6),
        "learned_range": (dict(learned_range=True), 5),
        "dynamic_threshold": (dict(dynamic_threshold=0.995), 4),
    }[variant]
    out = torch.cat([out, other], 1) if variant == "learned_range" else out
    with torch.inference_mode():

        def run(impl):
            found = ops.reverse_step(x, out, rows, step, noise=z, impl=impl, **more)
            return found if isinstance(found, tuple) else (found,)

        for mine, theirs in zip(run("native"), run("eager"), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)
        functions = {"ours": lambda: run("native"), "eager": lambda: run("eager")}
        compare(benchmark, functions, operands * x.numel() * 4)


@pytest.mark.parametrize("count", [2**14, 2**20], ids=["16K", "1M"])
def bench_noise(benchmark, count):
    key, step = torch.tensor(7), torch.tensor(3)
    z = ops.noise(key, step, 0, (count,), impl="native")
    assert torch.equal(z, ops.noise(key, step, 0, (count,), impl="eager"))
    functions = {
        "ours": lambda: ops.noise(key, step, 0, (count,), impl="native"),
        "eager": lambda: torch.randn(count),
    }
    compare(benchmark, functions, count * 4)
