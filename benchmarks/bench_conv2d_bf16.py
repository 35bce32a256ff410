"""Convolutions and projections in bfloat16: our kernels against oneDNN's.

`eager` has its weights in oneDNN's own layout, packed for the shape, as ours has in its own. Both
through one call of PyTorch's dispatcher each. Bytes: x, weights and y once each. `direct` is our
direct convolution beside our Winograd's, which is there without AMX alone.
"""

import pytest
import torch
import torch.nn.functional as F
from measure import compare

from engine import conv2d_bf16, winograd
from engine.blocks import Conv2d, Linear

# N, C, K, H and W.
TAPS = [(1, 128, 128, 8), (1, 128, 128, 16), (1, 256, 128, 16), (1, 64, 64, 32), (1, 192, 64, 32)]
TAPS += [(4, 128, 128, 8), (4, 128, 128, 16), (4, 64, 64, 32), (32, 128, 128, 16)]
MANY = [(32, 64, 64, 32), (32, 192, 64, 32), (32, 256, 128, 16), (32, 128, 128, 8)]
MANY += [(8, 256, 256, 16), (8, 512, 256, 16), (8, 256, 256, 4)]
ONE = [(1, 256, 128, 8), (1, 256, 128, 16), (1, 192, 64, 32)]
ROWS = [(64, 128, 384), (256, 128, 384), (256, 128, 128), (1024, 128, 384)]  # rows, C, K
BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(not conv2d_bf16.available(), reason="neither AMX nor AVX512_BF16")


def ids(shape) -> str:
    return "x".join(map(str, shape))


def convolutions(
    kernel: int, n: int, c: int, k: int, size: int, by_winograd: bool = False
) -> tuple[dict, int]:
    torch.manual_seed(0)
    layer = Conv2d(c, k, kernel, padding=kernel // 2).to(BF16).requires_grad_(False)
    x = torch.randn(n, c, size, size).to(BF16, memory_format=torch.channels_last)
    geometry = layer.padding, (1, 1), (1, 1), 1
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(layer.weight.to_mkldnn(), *geometry, x.shape)
    pointwise = torch.ops.mkldnn._convolution_pointwise
    mine = conv2d_bf16.Tiles(layer)
    functions = {
        "ours": lambda: mine(x),
        "eager": lambda: pointwise(x, weight, layer.bias, *geometry, "none", [], ""),
    }
    if by_winograd:
        packed, bias = winograd.packed_bf16(layer.weight), layer.bias.float()
        functions["direct"] = functions["ours"]
        functions["ours"] = lambda: winograd.conv2d(x, packed, bias)
    exact = [t.double() for t in (x, layer.weight, layer.bias)]
    agree(functions, F.conv2d(*exact, padding=kernel // 2), 5e-3 if by_winograd else 3e-3)
    return functions, 2 * (x.numel() + layer.weight.numel() + n * k * size * size)


def projections(rows: int, c: int, k: int) -> tuple[dict, int]:
    torch.manual_seed(0)
    layer = Linear(c, k).to(BF16).requires_grad_(False)
    x = torch.randn(1, rows, c).to(BF16)
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight, rows)
    mine = conv2d_bf16.Tiles(layer)
    functions = {
        "ours": lambda: mine.project(x),
        "eager": lambda: torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], ""),
    }
    agree(functions, F.linear(x.double(), layer.weight.double(), layer.bias.double()))
    return functions, 2 * (x.numel() + layer.weight.numel() + rows * k)


def agree(functions: dict, truth: torch.Tensor, bound: float = 3e-3) -> None:
    for name, function in functions.items():
        error = (function().double() - truth).norm() / truth.norm()
        assert error < bound, f"{name}: {error}"


@pytest.mark.parametrize("shape", TAPS, ids=ids)
def bench_conv2d_bf16_3x3(benchmark, shape):
    with torch.inference_mode():
        compare(benchmark, *convolutions(3, *shape))


@pytest.mark.parametrize("shape", ONE, ids=ids)
def bench_conv2d_bf16_1x1(benchmark, shape):
    with torch.inference_mode():
        compare(benchmark, *convolutions(1, *shape))


@pytest.mark.skipif(
    not winograd.serves(Conv2d(32, 32, 3, padding=1), BF16), reason="no AVX512_BF16 without AMX"
)
@pytest.mark.parametrize("shape", TAPS + MANY, ids=ids)
def bench_conv2d_winograd_bf16(benchmark, shape):
    with torch.inference_mode():
        compare(benchmark, *convolutions(3, *shape, by_winograd=True))


@pytest.mark.parametrize("shape", ROWS, ids=ids)
def bench_linear_bf16(benchmark, shape):
    with torch.inference_mode():
        compare(benchmark, *projections(*shape))
