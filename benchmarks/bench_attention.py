"""Attention on the CPU, ours (native) against PyTorch's SDPA: forward, backward, packed qkv.

Both read q, k, v as a U-Net has them, memory (N, S, heads, D). Of packed qkv eager is the usual
sequence: split, SDPA on views, merge. torch.compile calls the same SDPA: no third contender. Bytes
that must move, of N·S·heads·D elements each: forward 4 (q, k, v, out), backward 8 (q, k, v, out,
dout, dq, dk, dv).
"""

import pytest
import torch
import torch.nn.functional as F
from measure import compare

from engine import ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
# N, heads, S, D: heads of 8 as in diffusers' UNet2DModel at 16x16 and 8x8, of 64, 32 and 256 as in
# ADM, DiT and DDPM, of 40 as in Stable Diffusion at 32x32; batch 1.
SHAPES = [
    (32, 16, 256, 8),
    (32, 16, 64, 8),
    (32, 2, 256, 64),
    (32, 2, 64, 64),
    (32, 4, 256, 32),
    (8, 1, 256, 256),
    (4, 8, 1024, 40),
    (1, 16, 256, 8),
    (1, 2, 64, 64),
]
# N, heads, S, D of U-Nets' attention, batches cut: CIFAR-10, ADM at 16×16 and 8×8, SD at 16×16.
QKV_SHAPES = [(4, 1, 256, 256), (2, 9, 256, 64), (8, 12, 64, 64), (1, 8, 256, 160)]


def ids(shape):
    return "x".join(map(str, shape))


def heads(shape, dtype, count):
    torch.manual_seed(0)
    n, h, s, d = shape
    return [torch.randn(n, s, h, d).to(dtype).transpose(1, 2) for _ in range(count)]


def close(a, b):
    tolerance = TOLERANCE[a.dtype]
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


def ours(q, k, v):
    return ops.attention(q, k, v, impl="native")


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def bench_attention_forward(benchmark, shape, kind):
    q, k, v = heads(shape, DTYPES[kind], 3)
    with torch.inference_mode():
        functions = {
            "ours": lambda: ours(q, k, v),
            "eager": lambda: F.scaled_dot_product_attention(q, k, v),
        }
        assert close(functions["ours"](), functions["eager"]())
        compare(benchmark, functions, 4 * q.numel() * q.element_size())


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def bench_attention_backward(benchmark, shape, kind):
    *leaves, dout = heads(shape, DTYPES[kind], 4)
    leaves = [t.requires_grad_() for t in leaves]
    outputs = {"ours": ours(*leaves), "eager": F.scaled_dot_product_attention(*leaves)}

    def backward(name):
        return torch.autograd.grad(outputs[name], leaves, dout, retain_graph=True)

    for a, b in zip(backward("ours"), backward("eager"), strict=True):
        assert close(a, b)
    functions = {name: lambda name=name: backward(name) for name in outputs}
    compare(benchmark, functions, 8 * dout.numel() * dout.element_size())


def sequence(qkv, heads):
    n, s, channels = qkv.shape
    q, k, v = (t.reshape(n, s, heads, -1).transpose(1, 2) for t in qkv.chunk(3, dim=2))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(n, s, channels // 3)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", QKV_SHAPES, ids=ids)
def bench_attention_qkv(benchmark, shape, kind):
    torch.manual_seed(0)
    n, heads, s, d = shape
    qkv = torch.randn(n, s, 3 * heads * d).to(DTYPES[kind])
    with torch.inference_mode():
        functions = {
            "ours": lambda: ops.attention_qkv(qkv, heads),
            "eager": lambda: sequence(qkv, heads),
        }
        assert close(functions["ours"](), functions["eager"]())
        compare(benchmark, functions, 4 * n * s * heads * d * qkv.element_size())
