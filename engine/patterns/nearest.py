"""F.interpolate(x, 2, mode="nearest") → a broadcast copy, for Inductor.

    y[n, c, i, j] = x[n, c, i // f, j // g]        dx = Σ dy over each f × g block

Inductor takes it apart into an indexed read whose gradient is a scatter of single elements, and
torch 2.13 may run the kernel that reads the gradient ahead of the scatter (seen in bfloat16 on the
CPU, tests/test_inductor_models.py; 2.11 does not): every weight before the upsampling then gets a
gradient of zero, without a word. The gradient of a broadcast is a plain sum, which fuses. Factors
that are powers of two, for which i // f is what PyTorch's scales in float32 give.
"""

import torch.nn.functional as F
from torch import Tensor, channels_last
from torch.fx import Node

from .nodes import arguments, calls, emit, number, put, value, where

NAMES = "input size scale_factor mode align_corners recompute_scale_factor antialias"
NAME = "nearest upsampling without a scatter"


def upsampled(x: Tensor, f: int, g: int) -> Tensor:  # (N, C, H, W) → (N, C, f·H, g·W), x's layout
    n, c, h, w = x.shape
    if f == g == 1:  # the model may write into it, and x is needed after
        return x.clone()
    if x.is_contiguous(memory_format=channels_last) and not x.is_contiguous():
        rows = x.permute(0, 2, 3, 1)[:, :, None, :, None]
        return rows.expand(n, h, f, w, g, c).reshape(n, h * f, w * g, c).permute(0, 3, 1, 2)
    return x[:, :, :, None, :, None].expand(n, c, h, f, w, g).reshape(n, c, h * f, w * g)


def rewrite(node: Node) -> Node | None:
    if not calls(node, F.interpolate):
        return None
    given = arguments(node, NAMES, size=None, scale_factor=None, mode="nearest", antialias=False)
    if given is None or given["mode"] not in ("nearest", "nearest-exact") or given["antialias"]:
        return None
    x = given["input"]
    if value(x) is None or value(x).dim() != 4 or value(node) is None:
        return None
    factors = _factors(given, value(x).shape[2:])
    if factors is None:
        return None
    made = emit(node, node, "call_function", upsampled, (x, *factors))
    made.meta["engine_where"] = where(node)
    return put(made, node)


def _factors(given: dict, sizes) -> tuple[int, int] | None:
    """The two factors, where they are powers of two whatever the sizes."""
    scale, size = given["scale_factor"], given["size"]
    if scale is not None:
        both = scale if isinstance(scale, (tuple, list)) else (scale, scale)
        found = [number(factor) for factor in both]
    elif size is not None:
        both = size if isinstance(size, (tuple, list)) else (size, size)
        if not all(isinstance(side, int) and side for side in (*both, *sizes)):
            return None
        found = [new / old for new, old in zip(both, sizes, strict=True)]
    else:
        return None
    if len(found) != 2 or any(f is None or f < 1 or f != int(f) for f in found):
        return None
    whole = int(found[0]), int(found[1])
    return None if any(f & (f - 1) for f in whole) else whole
