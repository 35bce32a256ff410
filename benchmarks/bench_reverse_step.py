"""The fused reverse step on the CPU against the sequence of PyTorch calls, noise included.

Bytes that must move: read x and model_out, write x_next: 12 per element in float32.
"""

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
    row = rows[500].tolist()
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
