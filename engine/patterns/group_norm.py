"""F.group_norm → ops.group_norm_silu(activation="none"), which the other patterns then widen.

Refused: float64 (only eager serves it) and operands whose shape or device the op does not take.
"""

import torch
import torch.nn.functional as F
from torch.fx import Node

from .. import ops
from .nodes import arguments, calls, emit, method, number, put, value, where

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = "input num_groups weight bias eps cudnn_enabled"


def rewrite(node: Node) -> Node | str | None:
    if not calls(node, F.group_norm, torch.group_norm):
        return None
    given = arguments(node, NAMES, weight=None, bias=None, eps=1e-5)
    x, y = value(given and given["input"]), value(node)
    if x is None or y is None:
        return None
    if x.dtype not in DTYPES or y.dtype not in DTYPES:
        return f"x is {x.dtype}: the kernels take float32, bfloat16 and float16"
    eps = number(given["eps"])
    if x.dim() < 2 or not isinstance(given["num_groups"], int) or eps is None or not eps > 0:
        return f"x is {tuple(x.shape)} in {given['num_groups']} groups with eps {given['eps']}"
    source = given["input"]
    if y.dtype != x.dtype:  # autocast computes it in float32
        source = method(node, source, "to", y.dtype)
    args = (source, given["weight"], given["bias"], given["num_groups"], eps)
    kwargs = {"activation": "none"}
    made = emit(node, node, "call_function", ops.group_norm_silu, args, kwargs)
    made.meta["engine_where"] = where(node)
    return put(made, node)
