"""norm · (1 + scale) + shift → norm(scale=, shift=), AdaGN's conditioning; either may be alone.

scale and shift are (N, C, 1, 1): the op reads the (N, C) that they are a view of.
"""

from torch.fx import Node

from .nodes import (
    as_rows,
    barrier,
    is_norm,
    operands,
    other,
    per_channel,
    sole_user,
    value,
    widen,
    written,
)


def rewrite(node: Node) -> Node | str | None:
    if not _plain(node):
        return None
    last, scale, shift = node, None, None
    user = sole_user(node)
    for reader in node.users:
        factor = other(operands(reader, "mul") or (None, None), node)
        if factor is None or not per_channel(factor, node):
            continue
        scale = _one_plus(factor)
        if scale is None:
            return "it is multiplied by something else than 1 + scale"
        if user is None:
            return "the norm's result has other readers beside its scale"
        last, user = user, sole_user(user)
        break
    if user is not None:
        term = other(operands(user, "add") or (None, None), last)
        if term is not None and per_channel(term, node):
            last, shift = user, term
    if last is node:
        return None
    if value(last).dtype != value(node).dtype:
        return f"its conditioning is {value(last).dtype}, the norm's result {value(node).dtype}"
    given = {"scale": scale, "shift": shift}
    if any(t is not None and written(t, after=last) for t in given.values()):
        return "its conditioning is written in place later, and must be kept as it was"
    if why := barrier(node, last) or (scale is not None and barrier(factor, last)):
        return why
    rows = {name: as_rows(t, last) for name, t in given.items() if t is not None}
    return widen(node, last, **rows)


def _plain(node: Node) -> bool:
    kwargs = node.kwargs
    if not is_norm(node) or value(node) is None or kwargs["activation"] != "none":
        return False
    return kwargs.get("scale") is None and kwargs.get("shift") is None


def _one_plus(node: Node) -> Node | None:
    """scale of 1 + scale."""
    pair = operands(node, "add")
    if pair is None:
        return None
    for one, scale in (pair, pair[::-1]):
        if isinstance(one, (int, float)) and one == 1 and isinstance(scale, Node):
            t = value(scale)
            return scale if t is not None and t.is_floating_point() else None
    return None
