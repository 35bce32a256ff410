"""GN+SiLU on the CPU: ours (native) against eager and torch.compile, forward and backward.

Bytes that must move: forward 2 (x, y) per element, backward 3 (x, dy, dx), times the element size.
"""

import time

import pytest
import torch
import torch.nn.functional as F
from measure import compare

from engine import ops

SETTLE_S = 0.3  # after a change of threads

# N, C, H, W of U-Nets: CIFAR-10 at three levels, batch 1, the Fashion-MNIST model.
SHAPES = [
    (32, 128, 32, 32),
    (32, 256, 16, 16),
    (32, 256, 4, 4),
    (1, 128, 32, 32),
    (32, 32, 28, 28),
]
KINDS = {
    "bf16-channels_last": (torch.bfloat16, torch.channels_last),
    "bf16-contiguous": (torch.bfloat16, torch.contiguous_format),
    "fp32-channels_last": (torch.float32, torch.channels_last),
    "fp32-contiguous": (torch.float32, torch.contiguous_format),
}


def eager(x, weight, bias):
    return F.silu(F.group_norm(x, 32, weight, bias))


def setup(shape, kind, grad=False):
    torch.manual_seed(0)
    dtype, memory_format = KINDS[kind]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    weight, bias = (torch.randn(shape[1]).to(dtype) for _ in range(2))
    leaves = [t.requires_grad_(grad) for t in (x, weight, bias)]
    torch.compiler.reset()
    return leaves, torch.compile(eager, dynamic=False)


def close(a, b, dtype):
    tolerance = {torch.bfloat16: 4e-2, torch.float32: 1e-4}[dtype]
    scale = b.abs().max().item()
    return (a.float() - b.float()).abs().max().item() <= tolerance * max(scale, 1.0)


def ids(shape):
    return "x".join(map(str, shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def bench_forward(benchmark, shape, kind):
    (x, weight, bias), compiled = setup(shape, kind)
    with torch.inference_mode():
        functions = {
            "ours": lambda: ops.group_norm_silu(x, weight, bias, 32, impl="native"),
            "eager": lambda: eager(x, weight, bias),
            "compile": lambda: compiled(x, weight, bias),
        }
        for name in ("ours", "compile"):
            assert close(functions[name](), functions["eager"](), x.dtype), name
        compare(benchmark, functions, 2 * x.numel() * x.element_size())


@pytest.mark.parametrize("kind", ["bf16-channels_last", "fp32-contiguous"])
@pytest.mark.parametrize("shape", [(1, 128, 64, 64), (1, 256, 64, 64)], ids=ids)
def bench_batch_1(benchmark, shape, kind):
    """All threads against one, at batch 1: one thread stands where `eager` does."""
    (x, weight, bias), _ = setup(shape, kind)
    threads = torch.get_num_threads()

    def run(calls):
        for _ in range(calls):
            y = ops.group_norm_silu(x, weight, bias, 32, impl="native")
        return y

    def on(count):
        # Other threads are new threads, and the scheduler takes a while to give each its core: with
        # 30 ms to settle the ratio of 1x128x64x64 was 1.4, with 0.3 s it is 1.8. A program sets its
        # threads once.
        torch.set_num_threads(count)
        end = time.perf_counter() + SETTLE_S
        while time.perf_counter() < end:
            y = run(1)
        return y

    try:
        with torch.inference_mode():
            assert torch.equal(on(1), on(threads))
            functions = {"ours": lambda: run(200), "eager": lambda: run(200)}
            before = {"ours": lambda: on(threads), "eager": lambda: on(1)}
            compare(benchmark, functions, 2 * x.numel() * x.element_size(), 200, before)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["bf16-channels_last", "fp32-contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def bench_backward(benchmark, shape, kind):
    leaves, compiled = setup(shape, kind, grad=True)
    x, weight, bias = leaves
    outputs = {
        "ours": ops.group_norm_silu(x, weight, bias, 32, impl="native"),
        "eager": eager(x, weight, bias),
        "compile": compiled(x, weight, bias),
    }
    dy = torch.randn_like(x)

    def backward(name):
        return torch.autograd.grad(outputs[name], leaves, dy, retain_graph=True)

    for name in ("ours", "compile"):
        for a, b in zip(backward(name), backward("eager"), strict=True):
            assert close(a, b, x.dtype), name
    functions = {name: lambda name=name: backward(name) for name in outputs}
    compare(benchmark, functions, 3 * x.numel() * x.element_size())
