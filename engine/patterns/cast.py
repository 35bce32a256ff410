"""norm(x.float()).type(x.dtype) → norm(x): the kernels compute in float32 and round once anyway.

Two forms: a norm in float32 that casts back (guided-diffusion's GroupNorm32), and autocast, which
computes the norm in float32 and lets the convolutions behind it cast their input.
"""

from torch.fx import Node

from .nodes import LOWERED, barrier, calls, cast_source, emit, is_norm, put, value, where, written


def rewrite(node: Node) -> Node | str | None:
    if not is_norm(node) or not isinstance(node.args[0], Node):
        return None
    cast = node.args[0]
    source = cast_source(cast)
    if source is None or value(source).dtype == value(cast).dtype:
        return None
    low, high = value(source).dtype, value(node).dtype
    if low.itemsize >= high.itemsize or not node.users:
        return None
    for user in node.users:
        if not _reads_in(user, node, low):
            return f"{user.name} reads the norm's {high} result, so that {low} would lose digits"
    if written(source, after=node):
        return "its input is written in place later, and must be kept as it was"
    if why := barrier(cast, node):
        return why
    example = value(node).to(low)
    args = (source, *node.args[1:])
    made = emit(node, node, "call_function", node.target, args, node.kwargs, example)
    made.meta["engine_where"] = where(node)
    return put(made, node)


def _reads_in(user: Node, node: Node, dtype) -> bool:
    """Whether the user rounds the norm's result to `dtype` before it does anything else."""
    if cast_source(user) is node:
        return value(user).dtype == dtype
    lowered = calls(user, *LOWERED, method="matmul") and value(user) is not None
    return lowered and value(user).dtype == dtype
