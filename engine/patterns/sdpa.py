"""F.scaled_dot_product_attention → ops.attention, where it has no mask, dropout or causality."""

import torch.nn.functional as F
from torch.fx import Node

from .. import ops
from .nodes import arguments, calls, emit, method, number, put, same_shape, value, written

NAMES = "query key value attn_mask dropout_p is_causal scale enable_gqa"


def rewrite(node: Node) -> Node | str | None:
    if not calls(node, F.scaled_dot_product_attention):
        return None
    given = arguments(node, NAMES, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None)
    if given is None or value(node) is None:
        return None
    heads = [given[name] for name in NAMES.split()[:3]]
    q, k, v = (value(t) for t in heads)
    if q is None or k is None or v is None:
        return None
    if given["attn_mask"] is not None:
        return "it has a mask"
    if given["dropout_p"] != 0 or given["is_causal"] or given.get("enable_gqa"):
        return "it has dropout, is causal, or shares heads"
    if not q.dim() == k.dim() == v.dim() == 4:
        return f"q is {tuple(q.shape)}, expected (N, heads, S, D)"
    fits = same_shape(k.shape, v.shape) and same_shape(q.shape[:2], k.shape[:2])
    if not fits or not same_shape(q.shape[3:], k.shape[3:]):
        return f"q, k, v are {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if any(written(t, after=node) for t in heads):
        return "q, k or v is written in place later, and must be kept as it was"
    scale = number(given["scale"])
    if scale is None and given["scale"] is not None:
        return "its scale is computed in the graph"
    dtype = value(node).dtype  # under autocast the lower one
    heads = [t if value(t).dtype == dtype else method(node, t, "to", dtype) for t in heads]
    kwargs = {"scale": scale}
    return put(emit(node, node, "call_function", ops.attention, heads, kwargs), node)
