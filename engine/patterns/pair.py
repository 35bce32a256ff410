"""norm(cat((a, b), 1)) → norm((a, b)), GroupNorm alone: the halves are read where they lie.

Only where nothing else reads the concatenation: a convolutional shortcut needs it anyway.
"""

import torch
from torch.fx import Node

from .. import ops
from .nodes import arguments, barrier, calls, value, widen, written


def rewrite(node: Node) -> Node | str | None:
    if not calls(node, ops.group_norm_silu):
        return None
    joined = node.args[0]
    if not calls(joined, torch.cat, torch.concat) or value(joined) is None:
        return None
    given = arguments(joined, "tensors dim", dim=0)
    if given is None or given["dim"] not in (1, 1 - value(joined).dim()):
        return None
    halves = given["tensors"]
    if len(halves) != 2:
        return f"{len(halves)} tensors are concatenated: the op reads a pair"
    a, b = (value(half) for half in halves)
    if a is None or b is None or a.dtype != b.dtype:
        return "the halves have different dtypes"
    if len(joined.users) > 1:
        return "the concatenation has other readers beside the norm: it stays"
    if any(written(half) for half in halves):
        return "one half is written in place, and must be kept as it was"
    if why := barrier(joined, node):
        return why
    return widen(node, node, args=(tuple(halves), *node.args[1:]))
