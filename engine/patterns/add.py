"""norm(h + temb[:, :, None, None]) → norm(h, add=temb), GroupNorm alone: DDPM's time embedding."""

import operator

from torch.fx import Node

from .. import ops
from .nodes import (
    as_rows,
    barrier,
    broadcasts,
    calls,
    operands,
    per_channel,
    same_shape,
    value,
    widen,
    written,
)


def rewrite(node: Node) -> Node | str | None:
    if not calls(node, ops.group_norm_silu) or node.kwargs.get("add") is not None:
        return None
    total = node.args[0]
    pair = operands(total, "add")
    if value(total) is None or value(node) is None:
        return None
    if calls(total, operator.iadd, method="add_"):
        terms = (*total.args, *total.kwargs.values())[1:]
        return "the sum is written in place" if any(per_channel(t, node) for t in terms) else None
    if pair is None:
        return None
    for h, temb in (pair, pair[::-1]):
        x = value(h)
        if x is None or x.dim() < 3 or not broadcasts(temb, node) or broadcasts(h, node):
            continue
        if not per_channel(temb, node):
            return (
                f"the addend is {tuple(value(temb).shape)}, not one number per sample and channel"
            )
        if len(total.users) > 1:
            return "the sum has other readers beside the norm"
        if not same_shape(x.shape, value(total).shape):
            return f"the sum is {tuple(value(total).shape)}, its first operand {tuple(x.shape)}"
        if x.dtype != value(total).dtype:
            return f"the sum is {value(total).dtype}, its first operand {x.dtype}"
        if written(h) or written(temb, after=node):
            return "an operand of the sum is written in place, and must be kept as it was"
        if why := barrier(total, node):
            return why
        return widen(node, node, args=(h, *node.args[1:]), add=as_rows(temb, node))
    return None
