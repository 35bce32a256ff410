"""F.normalize(x, dim=1) · g · √C → ops.rms_norm_silu(x, g, activation="none"), then widened.

denoising-diffusion-pytorch's norm; g is (1, C, 1, 1), and the factors come in any order. A norm
without √C is left alone.
"""

import math

import torch.nn.functional as F
from torch.fx import Node

from .. import ops
from .group_norm import DTYPES
from .nodes import (
    arguments,
    barrier,
    calls,
    emit,
    method,
    number,
    operands,
    other,
    put,
    same,
    sole_user,
    value,
    where,
    written,
)


def rewrite(node: Node) -> Node | str | None:
    if not hasattr(ops, "rms_norm_silu") or not calls(node, F.normalize):
        return None
    given = arguments(node, "input p dim eps", p=2.0, dim=1, eps=1e-12)
    x = value(given and given["input"])
    if x is None or x.dim() < 3 or given["dim"] not in (1, 1 - x.dim()):
        return None
    if given["p"] != 2:
        return f"it divides by the {given['p']}-norm, not the 2-norm"
    if (eps := number(given["eps"])) is None:
        return "its eps is computed in the graph"
    if x.dtype not in DTYPES or value(node).dtype not in DTYPES:
        return f"x is {x.dtype}: the kernels take float32, bfloat16 and float16"
    if eps <= 0:
        return f"its eps is {eps}"
    c, last, weight, factor = x.shape[1], node, None, 1.0
    while (user := sole_user(last)) is not None:
        term = other(operands(user, "mul") or (None, None), last)
        if (times := number(term)) is not None:
            factor *= times
        elif weight is None and _weight(term, x):
            weight = term
        else:
            break
        last = user
    if not isinstance(c, int) or not math.isclose(factor, math.sqrt(c), rel_tol=1e-6):
        return f"its factor is {factor:g}, not the square root of its {c} channels"
    if weight is not None and written(weight, after=last):
        return "its weight is written in place later, and must be kept as it was"
    if why := barrier(node, last):
        return why
    result = value(last)
    source = given["input"]
    if result.dtype != x.dtype:
        source = method(last, source, "to", result.dtype)
    if weight is not None:
        weight = method(last, weight, "flatten")
    kwargs = {"eps": eps, "activation": "none"}
    made = emit(last, last, "call_function", ops.rms_norm_silu, (source, weight), kwargs)
    made.meta["engine_where"] = where(node)
    return put(made, last)


def _weight(node, x) -> bool:
    """Whether the node is one number per channel, (1, C, 1, 1) or (C, 1, 1)."""
    g = value(node)
    if g is None or not x.dim() - 1 <= g.dim() <= x.dim() or not same(g.numel(), x.shape[1]):
        return False
    return same(g.shape[1 - x.dim()], x.shape[1])
