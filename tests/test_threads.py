"""The CPU kernels give the same bits on one thread and on two."""

import pytest
import torch

import engine
from engine import ops, schedules


def reverse_step():
    x, out = torch.randn(2, 64, 1, 28, 28).unbind()
    rows = torch.tensor([[1.1, -0.5, 0.3, 0.7, 0.2]])
    return (ops.reverse_step(x, out, rows, 0, key=7, impl="native"),)


def dynamic_threshold():
    x, out = torch.randn(2, 5, 3, 40, 40).unbind()
    rows = torch.tensor([[1.1, -0.5, 0.3, 0.7, 0.2, 0, 0, 0, 0, 0]])
    more = {"dynamic_threshold": 0.9, "uncond": x, "guidance": 2.0}
    return (ops.reverse_step(x, out, rows, 0, key=7, impl="native", **more),)


def forward_noise():
    x0, out = torch.randn(2, 32, 3, 28, 28).unbind()
    rows = engine.Diffusion(schedules.betas("cosine", 100)).forward_rows().float()
    t = torch.arange(32)
    out.requires_grad_()
    x_t = ops.forward_noise(x0, rows, t, key=7, impl="native")
    losses = ops.forward_noise_loss(out, x0, rows, t, key=7, impl="native")
    return x_t, losses, *torch.autograd.grad(losses, out, torch.rand(32))


def noise():
    return (ops.noise(7, 3, 0, (50001,), impl="native"),)


@pytest.mark.parametrize("call", [reverse_step, dynamic_threshold, forward_noise, noise])
def test_same_bits_on_two_threads(call):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            results.append([t.detach().clone() for t in call()])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
