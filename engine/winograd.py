"""3×3 convolutions by Winograd's F(2×2, 3×3), on the CPU: float32, and bfloat16 for inference.

y = Aᵀ [Σ_c (G w Gᵀ) ⊙ (Bᵀ d B)] A for every 2×2 pixels of y (Lavin & Gray 2016, eq. 8–11): 16
products a channel where the sum has 36, and 9 after nearest ×2 upsampling, of which the kernel
(csrc/cpu/conv2d_winograd.cpp) reads the small image. Float32 throughout; with fewer terms a sum it
is closer to the exact result than the direct convolution of oneDNN.

bfloat16 is served where the CPU has AVX512_BF16 and no AMX, which has the products done before the
transforms would be. Bᵀ d B, added in float32, and G w Gᵀ are rounded to bfloat16, their products
summed in float32: a layer's error is 1.9 times that of oneDNN's bfloat16, 0.0043 of the norm for
0.0023. Of bench_unet.py's small U-Net: 0.0147, by oneDNN 0.0116, diffusers' in bfloat16 0.0152.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import dispatch

OP = "conv2d_winograd"
SETS = ("AVX2", "AVX512")  # where it was measured against oneDNN; both heed ATEN_CPU_CAPABILITY

# What the channels of x, and of each of a pair, are multiples of.
CHANNELS = {torch.float32: 16, torch.bfloat16: 32}

# Below, oneDNN computes dw faster: 16 C K sums are written and read, however few their terms.
MIN_TILES = 24


def serves(layer: nn.Conv2d, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernel computes this layer's convolution in this dtype, as far as it does not
    depend on x."""
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    return (
        geometry == ((3, 3), (1, 1), (1, 1), (1, 1))
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and layer.in_channels % CHANNELS.get(dtype, layer.in_channels + 1) == 0
        and layer.out_channels % 32 == 0
        and torch.backends.cpu.get_cpu_capability() in SETS
        and dispatch.requested("auto") in ("auto", "native")
        and not dispatch.absence(OP, "native")
        and (dtype == torch.float32 or _without_amx())
    )


def _without_amx() -> bool:
    """Whether bfloat16 is the business of AVX512_BF16 here."""
    return dispatch.module(OP, "native").conv2d_bf16_level() == 2


def takes(*images: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernel reads these, x or a residual, as they lie."""
    return all(
        t.dtype == dtype
        and t.shape[1] % CHANNELS[dtype] == 0
        and t.is_contiguous(memory_format=torch.channels_last)
        for t in images
        if t is not None
    )


def tiles(y: Tensor) -> int:
    """Of 2×2 pixels."""
    return y.shape[0] * ((y.shape[2] + 1) // 2) * ((y.shape[3] + 1) // 2)


def packed(weight: Tensor, transposed: bool = False) -> Tensor:
    """(K, C, 3, 3) → (K / 16, 16, C, 16): the 4×4 entries of G w Gᵀ, each (C, K), in the order in
    which the kernel reads them, rounded once. transposed: K and C exchanged, the taps reversed,
    which is the convolution that takes a gradient dy to dx."""
    weight = weight.detach()
    if weight.stride(2) != 3 * weight.stride(3):  # the kernel wants evenly spaced taps
        weight = weight.contiguous()
    return dispatch.function(OP, "weight", "native")(weight, transposed)


def packed_bf16(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) → (K / 16, 16, C / 2, 16, 2): the same in bfloat16, in pairs of channels. Of 32
    channels the kernel has the even ones first: the pairs are (0, 2), (4, 6), … (1, 3), (5, 7) …"""
    entries = packed(weight.float())
    blocks, channels = entries.shape[0], entries.shape[2]
    pairs = entries.view(blocks, 16, channels // 32, 8, 2, 2, 16).permute(0, 1, 2, 5, 3, 6, 4)
    return pairs.reshape(blocks, 16, channels // 2, 16, 2).to(torch.bfloat16)


def conv2d(
    x: Tensor | tuple[Tensor, Tensor],  # (N, C, H, W) channels_last; a pair: C₁ + C₂ = C
    weight: Tensor,  # packed, or of bfloat16 x packed_bf16
    bias: Tensor | None = None,  # (K,) float32
    add: Tensor | None = None,  # like the result
    *,
    upsample: bool = False,  # convolve the picture in which each pixel of x is 2×2
) -> Tensor:
    """→ w ∗ x + bias + add, (N, K, H, W) channels_last; (N, K, 2 H, 2 W) with `upsample`."""
    x, x2 = x if isinstance(x, tuple) else (x, None)
    return dispatch.function(OP, "fwd", "native")(x, x2, weight, bias, add, upsample)


def trains(layer: nn.Conv2d, x: Tensor, weight: Tensor, add: Tensor | None) -> bool:
    """Whether `convolve` may compute it with this weight, the layer's or that of a part of its
    input: in float32, neither compiled nor traced, no derivative but backward's."""
    return (
        x.dtype == torch.float32 == weight.dtype
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and serves(layer)
        and takes(x, add)
        and x.shape[1] == weight.shape[1]
        and (add is None or add.shape == (len(x), layer.out_channels, *x.shape[2:]))
        and not dispatch.has_tangent((x, weight, layer.bias, add))
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    """w ∗ x + bias + add of weights as they are, with gradients: dx is such a convolution too, and
    dw is Gᵀ [Σ_tiles (A dy Aᵀ) ⊙ (Bᵀ d B)] G (csrc/cpu/conv2d_winograd_bwd.cpp)."""
    return _Conv2d.apply(x, weight, bias, add)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, add):
        ctx.save_for_backward(x, weight)
        return conv2d(x, packed(weight), bias, add)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs, grads = list(ctx.needs_input_grad[:3]), [None, None, None]
        served = takes(dy) and not torch.is_grad_enabled()  # gradients of gradients are PyTorch's
        if needs[0] and served and weight.shape[1] % 32 == 0:
            grads[0], needs[0] = conv2d(dy, packed(weight, transposed=True)), False
        if needs[1] and served and tiles(dy) >= MIN_TILES:
            last = weight.stride(1) == 1
            grads[1:] = dispatch.function(OP, "bwd_weight", "native")(dy, x, last, needs[2])
            grads[2] = grads[2] if needs[2] else None
            needs[1:] = False, False
        if any(needs):
            geometry = (1, 1), (1, 1), (1, 1), False, (0, 0), 1
            rest = torch.ops.aten.convolution_backward(
                dy, x, weight, (weight.shape[0],), *geometry, needs
            )
            grads = [rest[i] if needs[i] else grads[i] for i in range(3)]
        return *grads, dy if ctx.needs_input_grad[3] else None
