"""Channel RMS norm + SiLU on the CPU: ours (native) against eager and torch.compile.

Eager is what denoising-diffusion-pytorch's block does: F.normalize over the channels, gain, √C,
scale and shift, SiLU. Bytes that must move: forward 2 (x, y) per element, backward 3 (x, dy, dx).
"""

import pytest
import torch
import torch.nn.functional as F
from bench_group_norm_silu import KINDS, close, ids
from measure import compare

from engine import ops

# N, C, H, W of its U-Net (dim 64, 32x32 pictures) at three levels; batch 1.
SHAPES = [(32, 64, 32, 32), (32, 128, 16, 16), (32, 512, 4, 4), (1, 64, 64, 64)]


def eager(x, weight, scale, shift):
    h = F.normalize(x, dim=1) * weight[None, :, None, None] * x.shape[1] ** 0.5
    return F.silu(h * (scale[:, :, None, None] + 1) + shift[:, :, None, None])


def setup(shape, kind, grad=False):
    torch.manual_seed(0)
    dtype, memory_format = KINDS[kind]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(shape[1]).to(dtype)
    scale, shift = torch.randn(shape[0], 2 * shape[1]).mul(0.3).to(dtype).chunk(2, dim=1)
    leaves = [t.requires_grad_(grad) for t in (x, weight, scale.clone(), shift.clone())]
    torch.compiler.reset()
    return leaves, torch.compile(eager, dynamic=False)


def ours(x, weight, scale, shift):
    return ops.rms_norm_silu(x, weight, scale=scale, shift=shift, impl="native")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def bench_rms_forward(benchmark, shape, kind):
    leaves, compiled = setup(shape, kind)
    x = leaves[0]
    with torch.inference_mode():
        functions = {
            "ours": lambda: ours(*leaves),
            "eager": lambda: eager(*leaves),
            "compile": lambda: compiled(*leaves),
        }
        for name in ("ours", "compile"):
            assert close(functions[name](), functions["eager"](), x.dtype), name
        compare(benchmark, functions, 2 * x.numel() * x.element_size())


@pytest.mark.parametrize("kind", ["bf16-channels_last", "fp32-contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def bench_rms_backward(benchmark, shape, kind):
    leaves, compiled = setup(shape, kind, grad=True)
    x = leaves[0]
    outputs = {"ours": ours(*leaves), "eager": eager(*leaves), "compile": compiled(*leaves)}
    dy = torch.randn_like(x)

    def backward(name):
        return torch.autograd.grad(outputs[name], leaves, dy, retain_graph=True)

    for name in ("ours", "compile"):
        for a, b in zip(backward(name), backward("eager"), strict=True):
            assert close(a, b, x.dtype), name
    functions = {name: lambda name=name: backward(name) for name in outputs}
    compare(benchmark, functions, 3 * x.numel() * x.element_size())
