"""The forward process and its loss on the CPU against the sequence of PyTorch calls.

One training step's share: uint8 pictures → x_t, and the loss with its gradient at the network's
output. Bytes that must move: 1 + 4 per element for x_t; 1 + 2·4 for the loss (x0 read, model_out
read, its gradient written).
"""

import pytest
import torch
import torch.nn.functional as F
from measure import compare

import engine
from engine import ops, schedules

SHAPES = [(32, 1, 28, 28), (128, 3, 32, 32), (16, 3, 64, 64)]


def sequence(x0, model_out, rows, t):
    """A training step as usually written: scale, draw, mix, the loss of ε and its gradient."""
    x0 = x0.float() / 127.5 - 1
    noise = torch.randn_like(x0)
    a, b = (rows[t, k].reshape(-1, 1, 1, 1) for k in (0, 1))
    x_t = a * x0 + b * noise
    loss = F.mse_loss(model_out, noise)
    return x_t, *torch.autograd.grad(loss, model_out)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def bench_forward_noise(benchmark, shape):
    torch.manual_seed(0)
    x0 = torch.randint(256, shape, dtype=torch.uint8)
    out = torch.randn(shape, requires_grad=True)
    t = torch.randint(1000, shape[:1])
    process = engine.Diffusion(schedules.betas("linear", 1000), prediction="eps", loss="l2")
    rows = process.forward_rows().float()
    key, step = torch.tensor(7), torch.tensor(3)

    def ours():
        x_t = ops.forward_noise(x0, rows, t, key=key, step=step, impl="native")
        loss = ops.forward_noise_loss(
            out, x0, rows, t, key=key, step=step, reduction="mean", impl="native"
        )
        return x_t, *torch.autograd.grad(loss, out)

    z = ops.noise(7, 3, ops.TRAINING_NOISE, shape)
    x_t, gradient = ours()
    assert torch.allclose(x_t, process.q_sample(x0.float() / 127.5 - 1, t, z), atol=1e-5)
    assert torch.allclose(gradient, 2 * (out - z).detach() / z.numel(), rtol=1e-4, atol=1e-9)
    torch.compiler.reset()
    compiled = torch.compile(sequence, dynamic=False)
    functions = {
        "ours": ours,
        "eager": lambda: sequence(x0, out, rows, t),
        "compile": lambda: compiled(x0, out, rows, t),
    }
    compare(benchmark, functions, x0.numel() * (5 + 9))
