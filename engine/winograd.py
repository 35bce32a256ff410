"""3×3 convolutions in float32 by Winograd's F(2×2, 3×3), on the CPU.

y = Aᵀ [Σ_c (G w Gᵀ) ⊙ (Bᵀ d B)] A for every 2×2 pixels of y (Lavin & Gray 2016, eq. 8–11): 16
products a channel where the sum has 36, and 9 after nearest ×2 upsampling, of which the kernel
(csrc/cpu/conv2d_winograd.cpp) reads the small image. Float32 throughout; with fewer terms a sum it
is closer to the exact result than the direct convolution of oneDNN. bfloat16 is not served: AMX has
the products done before the transforms would be.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import dispatch

OP = "conv2d_winograd"
G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def serves(layer: nn.Conv2d) -> bool:
    """Whether the kernel computes this layer's convolution, as far as it does not depend on x."""
    plain = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return (
        plain == ((3, 3), (1, 1), (1, 1), (1, 1))
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and layer.in_channels % 16 == 0
        and layer.out_channels % 32 == 0
        and dispatch.requested("auto") in ("auto", "native")
        and not dispatch.absence(OP, "native")
    )


def takes(*parts: Tensor) -> bool:
    """Whether the kernel reads these images, a pair's halves or a residual, as they lie."""
    return all(
        part.dtype == torch.float32
        and part.shape[1] % 16 == 0
        and part.is_contiguous(memory_format=torch.channels_last)
        for part in parts
    )


def packed(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) → (K / 16, 16, C, 16) float32: the 4×4 entries of G w Gᵀ, each (C, K), in the
    order in which the kernel reads them. Rounded once, from float64."""
    g = torch.tensor(G, dtype=torch.float64)
    k, c = weight.shape[:2]
    entries = torch.einsum("ai,kcij,bj->abkc", g, weight.detach().double(), g)
    return entries.reshape(16, k // 16, 16, c).permute(1, 0, 3, 2).float().contiguous()


def conv2d(
    x: Tensor | tuple[Tensor, Tensor],  # (N, C, H, W) channels_last; a pair: C₁ + C₂ = C
    weight: Tensor,  # packed
    bias: Tensor | None = None,  # (K,) float32
    add: Tensor | None = None,  # like the result
    *,
    upsample: bool = False,  # convolve the picture in which each pixel of x is 2×2
) -> Tensor:
    """→ w ∗ x + bias + add, (N, K, H, W) channels_last; (N, K, 2 H, 2 W) with `upsample`."""
    x, x2 = x if isinstance(x, tuple) else (x, None)
    function = dispatch.function(OP, "fwd", "native")
    return function(x, x2, weight, bias, add, upsample)
