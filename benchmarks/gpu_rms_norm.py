"""Channel RMS norm + SiLU on a GPU, forward and backward: shapes of denoising-diffusion-pytorch.

Bytes that must move: forward 2 (x, y) per element, backward 3 (x, dy, dx), times the element size.
Baselines: what its block does in PyTorch, and torch.compile of that.
"""

from functools import partial

import torch
import torch.nn.functional as F
from engine.kernels import reference
from gpu_group_norm import AUTOTUNE, DTYPES, LAYOUTS, backward, compiled, forward, leaves, truth
from gpu_measure import Case

from engine import ops

# The levels of its U-Net (dim 64, 1-2-4-8) on 128x128 pictures, 32 at a time; of one picture.
SHAPES = {
    "LUC-a": (32, 64, 128, 128),
    "LUC-b": (32, 128, 64, 64),
    "LUC-c": (32, 256, 32, 32),
    "LUC-d": (32, 512, 16, 16),
    "LUC1-a": (1, 64, 128, 128),
}
TINY = {"tiny": (2, 64, 4, 4)}
HEADLINE = ("LUC-a", "tiny")


def eager(x, weight, scale, shift):
    h = F.normalize(x, dim=1) * weight[None, :, None, None] * x.shape[1] ** 0.5
    return F.silu(h * (scale[:, :, None, None] + 1) + shift[:, :, None, None])


def exact(x, weight, scale, shift):
    return reference.rms_norm_silu(x, weight, scale=scale, shift=shift)


def ours(impl, x, weight, scale, shift):
    return ops.rms_norm_silu(x, weight, scale=scale, shift=shift, impl=impl)


def inputs(device, shape, dtype, layout, grad, seed):
    """→ (x, weight, scale, shift), dy. Fresh random values."""
    g = torch.Generator(device.device).manual_seed(seed)

    def normal(*size, at=0.0, by=1.0):
        return (torch.randn(size, generator=g, device=device.device) * by + at).to(dtype)

    def image():
        return normal(*shape, at=0.5, by=2.0).contiguous(memory_format=LAYOUTS[layout])

    n, c = shape[:2]
    operands = [image(), normal(c, at=1.0, by=0.5), normal(n, c, by=0.6), normal(n, c, by=0.6)]
    dy = image() if grad else None
    if grad:
        for t in leaves(operands):
            t.requires_grad_()
    return operands, dy


def case(device, name, shape, layout, dtype, direction, mode) -> Case:
    grad = direction == "bwd"
    prepare = backward if grad else forward
    contenders = {impl: partial(prepare, partial(ours, impl)) for impl in ("triton", "native")}
    contenders["eager"] = partial(prepare, eager)
    contenders["compile"] = partial(compiled, device, None, prepare, eager)
    if mode == "full":
        contenders["compile-max"] = partial(compiled, device, AUTOTUNE, prepare, eager)
    n, c, h, w = shape
    size = (3 if grad else 2) * n * c * h * w * DTYPES[dtype].itemsize
    return Case(
        f"rms_norm_silu-{direction} {name}-{layout}-{dtype}",
        f"rms_norm_silu {direction}",
        {
            "op": "rms_norm_silu",
            "direction": direction,
            "shape": list(shape),
            "layout": layout,
            "dtype": dtype,
        },
        size,
        size,
        partial(inputs, device, shape, DTYPES[dtype], layout, grad),
        contenders,
        partial(prepare, eager),
        partial(truth, exact, direction),
        grad=grad,
        headline=name in HEADLINE and (layout, dtype, direction) == ("nchw", "bf16", "fwd"),
    )


def cases(device, mode: str = "default") -> list[Case]:
    """Its own code runs contiguous: that first."""
    shapes = TINY if device.stand_in else SHAPES
    first = list(shapes)[:1]
    return [
        case(device, name, shapes[name], layout, dtype, direction, mode)
        for dtype, names in (("bf16", shapes), ("fp32", first))
        for direction in ("fwd", "bwd")
        for layout in ("nchw", "nhwc")
        for name in names
    ]
