"""Calls that give their input back: x / 1, x · 1, dropout that drops nothing, a cast to x's dtype;
and x.contiguous() for convolutions alone, which read any layout.

A division gives a new tensor, and one without a gradient under no_grad. It stays where somebody
could tell: where both it and its input leave the graph or the input is the caller's, anything
around it is written in place, or gradients are switched between it and a reader.
"""

import torch
import torch.nn.functional as F
from torch.fx import Node

from .nodes import (
    aliases_of,
    arguments,
    calls,
    cast_source,
    node_method,
    operands,
    prune,
    shared,
    switched,
    value,
    written,
)

CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def rewrite(node: Node) -> str | None:
    """The name of what was taken out."""
    if cast_source(node) is not None and not node.users:
        prune(node)  # made for its dtype alone: a reader of x that reads nothing
        return None
    source, name = _source(node)
    if source is None or source is node or not node.users:
        return None
    if not calls(node, F.dropout) and not _private(node, source):
        return None
    node.replace_all_uses_with(source)
    prune(node)
    return name


def _source(node: Node) -> tuple[Node | None, str]:
    if (pair := operands(node, "div")) and _is_one(pair[1]):
        return _unchanged(node, pair[0]), "division by 1"
    if pair := operands(node, "mul"):
        for one, x in (pair, pair[::-1]):
            if _is_one(one):
                return _unchanged(node, x), "product with 1"
    if calls(node, F.dropout):
        given = arguments(node, "input p training inplace", p=0.5, training=True)
        if given is not None and (given["p"] == 0 or given["training"] is False):
            return _unchanged(node, given["input"]), "dropout of nothing"
    source = cast_source(node)
    if source is not None and value(source).dtype == value(node).dtype:
        return source, "cast to the same dtype"
    if node_method(node) == "contiguous" and len(node.args) == 1 and not node.kwargs:
        x = node.args[0]
        if all(calls(user, *CONVOLUTIONS) and user.args[:1] == (node,) for user in node.users):
            return _unchanged(node, x), "contiguous ahead of a convolution"
    return None, ""


def _is_one(number) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and number == 1


def _unchanged(node: Node, source) -> Node | None:
    a, b = value(source), value(node)
    return source if a is not None and b is not None and a.dtype == b.dtype else None


def _private(node: Node, source: Node) -> bool:
    """Whether nobody can tell the result from its input."""
    aliases = aliases_of(node)
    if any(user.op == "output" for alias in aliases for user in alias.users) and shared(source):
        return False
    if any(switched(node, user) for alias in aliases for user in alias.users):
        return False
    return not written(node) and not written(source)
