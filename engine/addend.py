"""A convolution and what is added to it in one pass of oneDNN's, with a gradient.

A residual added to a convolution is one more pass over the image: 12 of a training step's 510 ms
(U-Net 64/128/128, batch 32, bfloat16, two cores). oneDNN's kernels take it as their last operation,
which PyTorch calls but does not differentiate. In float32 those kernels are other, slower ones.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .device import cannot_pack

BF16 = torch.bfloat16


def fits(layer: nn.Conv2d, x: Tensor, weight: Tensor, add: Tensor) -> bool:
    """Whether the layer computes in bfloat16, on a CPU with kernels for it, what is added is of the
    result's shape, and neither a graph is being traced nor a transform under way: those know
    PyTorch's own convolution."""
    if not x.is_cpu or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if forward_ad._current_level >= 0 or add.shape != _result(layer, x):
        return False
    if torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu") == BF16
    else:
        low = x.dtype == weight.dtype == BF16
    if not low or add.dtype != BF16 or type(x) is not Tensor or x.numel() == 0:
        return False
    return not torch._C._are_functorch_transforms_active() and not cannot_pack(BF16)


def _result(layer: nn.Conv2d, x: Tensor) -> tuple[int, ...] | None:
    """The shape of the layer's result; None where `convolution` has no such layer or x."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or x.dim() != 4:
        return None
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    sides = [
        (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for size, taps, stride, padding, dilation in zip(x.shape[2:], *geometry, strict=True)
    ]
    return x.shape[0], layer.out_channels, *sides


def convolution(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # of a convolution with zeros for padding, like bias
    bias: Tensor | None,
    add: Tensor,  # bfloat16, of the result's shape
    padding: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """W x + b + add in bfloat16, where `fits` says so; rounded once."""
    bias = None if bias is None else bias.to(BF16)
    geometry = padding, stride, dilation, groups
    return _Convolution.apply(x.to(BF16), weight.to(BF16), bias, add, *geometry)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, add, *geometry):
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, add, weight, bias, *geometry, "add", 1.0, None, [], None
        )

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        padding, stride, dilation, groups = ctx.geometry
        geometry = stride, padding, dilation, False, (0, 0), groups
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            dy, x, weight, [len(weight)], *geometry, ctx.needs_input_grad[:3]
        )
        return dx, dweight, dbias, dy, None, None, None, None
