"""Convolutions and projections in bfloat16 by our kernel (csrc/cpu/conv2d_bf16.cpp), for inference.

On the CPU in bfloat16; prepacked.py takes it where `takes` and `projects` say so, and oneDNN
elsewhere. Of few pictures it is the faster one by far (AMX, 128 channels of 8×8: 29 against 59 µs,
of which oneDNN's call takes 40 before it computes); of many, level with AMX, and with AVX512_BF16
2-10 % slower (benchmarks/bench_conv2d_bf16.py). Those are its own too, as a step of oneDNN's
convolutions cannot be recorded (program.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import dispatch

# Geometries of nn.Conv2d that the kernel has: kernel, stride, padding.
GEOMETRIES = ((3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0))


def available() -> bool:
    """Whether the kernel is there and may be taken: ENGINE_BACKEND and this CPU allow it."""
    if dispatch.requested("auto") not in ("auto", "native"):
        return False
    return not dispatch.absence("conv2d_bf16", "native") and _native().conv2d_bf16_level() > 0


def _native():
    return dispatch.module("conv2d_bf16", "native")


def serves(layer: nn.Conv2d) -> bool:
    """Whether the kernel has this convolution."""
    k, s, p = layer.kernel_size, layer.stride, layer.padding
    square = isinstance(p, tuple) and k == k[::-1] and s == s[::-1] and p == p[::-1]
    plain = layer.groups == 1 and layer.dilation == (1, 1)
    return square and plain and (k[0], s[0], p[0]) in GEOMETRIES


def takes(x: Tensor, x2: Tensor | None = None, add: Tensor | None = None) -> bool:
    """Whether these pictures lie as it reads them."""
    for t in (x, x2, add):
        if t is not None and not (
            t.dtype == torch.bfloat16 and t.is_contiguous(memory_format=torch.channels_last)
        ):
            return False
    return x.numel() > 0 and x.shape[2] > 1 and x.shape[3] > 1


def projects(x: Tensor, add: Tensor | None) -> bool:
    """The same of the rows of a projection."""
    if x.dtype != torch.bfloat16 or not x.is_contiguous() or x.dim() > 4 or not x.numel():
        return False
    return add is None or (add.dtype == torch.bfloat16 and add.is_contiguous())


class Tiles:
    """A layer's weights in the kernel's order, for each way in which its input is split."""

    def __init__(self, layer: nn.Module) -> None:
        self.weight, self.packed = layer.weight.detach(), {}
        self.bias = None if layer.bias is None else layer.bias.detach().to(torch.float32, copy=True)
        self.channels = self.weight.shape[0]
        if isinstance(layer, nn.Conv2d):
            self.geometry = layer.kernel_size[0], layer.stride[0], layer.padding[0]
        self.convolve = dispatch.function("conv2d_bf16", "fwd", "native")
        self.linear = dispatch.function("linear_bf16", "fwd", "native")

    def pack(self, *channels: int) -> Tensor:
        pack = _native().pack_conv2d_bf16
        pieces = self.weight.split(channels, dim=1)
        packed = torch.cat([pack(piece) for piece in pieces], dim=1)
        self.packed[channels] = packed
        return packed

    def __call__(
        self,
        x: Tensor,  # (N, C, H, W) bfloat16 channels_last
        x2: Tensor | None = None,  # (N, C2, H, W)
        add: Tensor | None = None,  # like the result
        upsample: bool = False,
    ) -> Tensor:
        split = (x.shape[1],) if x2 is None else (x.shape[1], x2.shape[1])
        weight = self.packed.get(split)
        if weight is None:
            weight = self.pack(*split)
        return self.convolve(
            *(x, x2, None, None, weight, self.bias, add, self.channels, *self.geometry, upsample)
        )

    def project(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        weight = self.packed.get(())
        if weight is None:
            weight = self.packed[()] = _native().pack_conv2d_bf16(self.weight)
        return self.linear(x, weight, self.bias, add, self.channels)
