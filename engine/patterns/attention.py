"""softmax(q kᵀ · scale) v written by hand → ops.attention.

Two products, each einsum, matmul, bmm or baddbmm(beta=0), around a softmax over the keys; sequence
and channels in either order, with one or two leading dimensions. Numbers may multiply q, k and the
scores; casts around the softmax, dropout of nothing and transpositions of its result are looked
through. Each product is read as an einsum, so that a form of writing is a line in `_product`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import Node

from .. import ops
from .group_norm import DTYPES
from .nodes import (
    arguments,
    barrier,
    calls,
    cast_source,
    emit,
    method,
    node_method,
    number,
    operands,
    put,
    same,
    same_shape,
    value,
    viewed,
    written,
)


@dataclass
class Product:
    """out[labels] = Σ a[…] · b[…] · scale, the sum over the labels that out does not have."""

    node: Node
    a: Node
    b: Node
    labels_a: str
    labels_b: str
    labels: str
    scale: float = 1.0


def rewrite(node: Node) -> Node | str | None:
    if not calls(node, torch.softmax, F.softmax, method="softmax") or value(node) is None:
        return None
    given = arguments(node, "input dim dtype _stacklevel", dim=None, dtype=None)
    if given is None or given["dim"] not in (-1, value(node).dim() - 1):
        return None  # over something else than the keys, as linear attention's
    scores, scale = _back(given["input"])
    first, (second, order, weights) = _product(scores), _forward(node)
    if first is None and second is None:
        return None
    if first is None:
        terms = [_product(_back(t)[0]) for t in scores.all_input_nodes]
        return "something is added to its scores, or masks them" if any(terms) else None
    if second is None:
        return "its weights are dropped out, changed, or read more than once"
    return _fuse(first, second, _moved(first.labels, order), weights, scale)


def _fuse(first: Product, second: Product, labels: str, weights: Node, scale: float):
    """labels: of the weights as the second product reads them, in the first's letters."""
    v, labels_p, labels_v = _beside(second, weights)
    if v is None or len(labels_p) != len(labels):
        return "its weights are multiplied by themselves"
    *batch, i, j = first.labels
    q, k, labels_q, labels_k = first.a, first.b, first.labels_a, first.labels_b
    if i not in labels_q:
        q, k, labels_q, labels_k = k, q, labels_k, labels_q
    names = dict(zip(labels_p, labels, strict=True))
    labels_v, out = ("".join(names.get(x, "*") for x in t) for t in (labels_v, second.labels))
    d = "".join(set(labels_q) - set(first.labels))
    wanted = [(*batch, i, d), (*batch, j, d), (*batch, j, "*"), (*batch, i, "*")]
    found = [labels_q, labels_k, labels_v, out]
    fits = all(sorted(a) == sorted(b) for a, b in zip(wanted, found, strict=True))
    if not fits or len(batch) not in (1, 2):
        return f"its products are not those of attention: {', '.join(found)}"
    last, starts = second.node, [first.node]
    (q, scale_q), (k, scale_k) = _scalar(q), _scalar(k)
    starts += [t for t in (first.a, first.b) if t not in (q, k)]
    if second.scale != 1:
        return f"its result is multiplied by {second.scale:g}"
    scale *= first.scale * scale_q * scale_k
    why = _misfit((q, k, v), found, wanted, value(last).dtype)
    why = why or _coarser((q, k), value(first.node).dtype, value(last).dtype)
    why = why or next(filter(None, (barrier(start, last) for start in starts)), "")
    if not why and any(written(t, after=last) for t in (q, k, v)):
        why = "q, k or v is written in place later, and must be kept as it was"
    return why or _replace(last, (q, k, v), found, wanted, scale)


def _misfit(tensors, found, wanted, dtype) -> str:
    """Why ops.attention does not take them; "" where it does."""
    if dtype not in DTYPES:
        return f"it computes in {dtype}: the kernels take float32, bfloat16 and float16"
    if any(
        value(t) is None or value(t).dim() != len(x) for t, x in zip(tensors, wanted, strict=False)
    ):
        return "its operands' shapes are unknown"
    q, k, v = (
        dict(zip(x, value(t).shape, strict=True)) for t, x in zip(tensors, found, strict=False)
    )
    d = wanted[0][-1]
    if not same(q[d], v["*"]):
        return f"v has {v['*']} channels a head, q and k have {q[d]}"
    j = wanted[1][-2]
    if any(not (same(q[x], k[x]) and same(q[x], v[x])) for x in wanted[0][:-2]):
        return "its leading dimensions broadcast"
    if not same(q[d], k[d]) or not same(k[j], v[j]):
        return "a size of 1 broadcasts in its products"
    return ""


def _coarser(tensors, scores, dtype) -> str:
    """Why q and k may not be rounded to `dtype`: the scores are made from wider ones."""
    for t in tensors:
        wider = min(value(t).dtype.itemsize, scores.itemsize) > dtype.itemsize
        if wider and not _exact(t, dtype):
            return f"q or k is {value(t).dtype}, the result {dtype}: it would lose digits"
    return ""


def _exact(t: Node | None, dtype) -> bool:
    """Whether the node is a cast of something in `dtype`, or a view of one."""
    while value(t) is not None and value(t).dtype != dtype:
        t = cast_source(t) or viewed(t)
    return value(t) is not None


def _replace(last: Node, tensors, found, wanted, scale: float) -> Node:
    dtype, heads = value(last).dtype, []
    for t, labels, order in zip(tensors, found, wanted, strict=False):
        if value(t).dtype != dtype:
            t = method(last, t, "to", dtype)
        t = _permuted(last, t, labels, order)
        if labels[-1] != order[-1]:  # no fused attention, PyTorch's included, reads a stride there
            t = method(last, t, "contiguous")
        heads.append(t if len(order) == 4 else method(last, t, "unsqueeze", 1))
    example = torch.empty_like(value(heads[0]))
    out = emit(last, last, "call_function", ops.attention, heads, {"scale": scale}, example)
    if len(wanted[3]) == 3:
        out = method(last, out, "squeeze", 1)
    out = _permuted(last, out, "".join(wanted[3]), found[3])
    return put(out, last)


def _permuted(before: Node, t: Node, labels: str, order) -> Node:
    moves = [labels.index(label) for label in order]
    return t if moves == sorted(moves) else method(before, t, "permute", *moves)


def _back(node: Node) -> tuple[Node, float]:
    """The product behind the scores, and the number that multiplies it."""
    scale = 1.0
    while True:
        if (source := cast_source(node)) is not None:
            node = source
            continue
        source, factor = _scalar(node)
        if source is node:
            return node, scale
        node, scale = source, scale * factor


def _scalar(node: Node) -> tuple[Node, float]:
    """(x, c) of x · c or x / c with a number c; else (node, 1)."""
    if pair := operands(node, "div"):
        if (c := number(pair[1])) and _keeps_dtype(node, pair[0]):
            return pair[0], 1.0 / c
    elif pair := operands(node, "mul"):
        for x, c in (pair, pair[::-1]):
            if _keeps_dtype(node, x) and (c := number(c)) is not None:
                return x, float(c)
    return node, 1.0


def _keeps_dtype(node, source) -> bool:
    a, b = value(node), value(source)
    return a is not None and b is not None and a.dtype == b.dtype


def _forward(node: Node):
    """The product that reads the weights; where each dimension of them came from; their node."""
    order = list(range(value(node).dim()))
    while len(node.users) == 1:
        user = next(iter(node.users))
        if (product := _product(user)) is not None:
            return product, order, node
        if cast_source(user) is node or calls(user, F.dropout):
            if calls(user, F.dropout) and not _drops_nothing(user):
                return None, None, None
        elif (moves := _moves(user)) is not None:
            order = [order[m] for m in moves]
        else:
            return None, None, None
        node = user
    return None, None, None


def _drops_nothing(node: Node) -> bool:
    given = arguments(node, "input p training inplace", p=0.5, training=True)
    return given is not None and (given["p"] == 0 or given["training"] is False)


def _moves(node: Node) -> list[int] | None:
    """The permutation that a transpose or permute is."""
    if value(node) is None:
        return None
    n = value(node).dim()
    name = node_method(node)
    if node.kwargs:
        return None
    if name == "transpose" or calls(node, torch.transpose):
        a, b = (int(d) % n for d in node.args[1:3])
        moves = list(range(n))
        moves[a], moves[b] = b, a
        return moves
    if name == "permute" or calls(node, torch.permute):
        dims = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return [int(d) % n for d in dims]
    return None


def _moved(labels: str, order: list[int]) -> str:
    return "".join(labels[i] for i in order)


def _product(node) -> Product | None:
    """The node as an einsum of two operands."""
    if not isinstance(node, Node) or value(node) is None:
        return None
    if calls(node, torch.einsum, torch.functional.einsum):
        return _einsum(node)
    if calls(node, torch.baddbmm):
        given = arguments(node, "input batch1 batch2 beta alpha", beta=1, alpha=1)
        alpha = number(given and given["alpha"])
        if given is None or given["beta"] != 0 or alpha is None:
            return None
        a, b, scale = given["batch1"], given["batch2"], float(alpha)
    elif pair := operands(node, "matmul"):
        a, b, scale = *pair, 1.0
    else:
        return None
    dims = [value(t).dim() if value(t) is not None else 0 for t in (a, b)]
    if dims[0] != dims[1] or dims[0] not in (3, 4):
        return None
    if not same_shape(value(a).shape[:-2], value(b).shape[:-2]):
        return None
    batch = "gh"[: dims[0] - 2]
    return Product(node, a, b, batch + "ic", batch + "cj", batch + "ij", scale)


def _einsum(node: Node) -> Product | None:
    equation, *tensors = node.args
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        tensors = list(tensors[0])
    if not isinstance(equation, str) or len(tensors) != 2 or node.kwargs:
        return None
    sides = equation.replace(" ", "").split("->")
    if len(sides) != 2 or "." in equation or sides[0].count(",") != 1:
        return None
    a, b = sides[0].split(",")
    if any(len(set(labels)) != len(labels) for labels in (a, b, sides[1])):
        return None
    return Product(node, *tensors, a, b, sides[1])


def _beside(product: Product, weights: Node) -> tuple:
    """v of the second product, whichever comes first in it; the weights' labels, v's labels."""
    if (product.a is weights) == (product.b is weights):
        return None, "", ""
    if product.a is weights:
        return product.b, product.labels_a, product.labels_b
    return product.a, product.labels_b, product.labels_a
