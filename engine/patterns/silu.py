"""SiLU behind a norm → activation="silu": F.silu(v), or v · sigmoid(v) as it is written by hand."""

import torch
import torch.nn.functional as F
from torch.fx import Node

from .nodes import arguments, barrier, calls, is_norm, operands, other, value, widen


def rewrite(node: Node) -> Node | str | None:
    if not is_norm(node) or node.kwargs["activation"] != "none":
        return None
    for user in list(node.users):
        last = _silu(user, node)
        if last is None:
            continue
        if len(node.users) > (1 if last is user else 2):
            return "the norm's result has other readers beside SiLU"
        if value(last) is None or value(last).dtype != value(node).dtype:
            return "SiLU's result has another dtype than the norm's"
        return barrier(node, last) or widen(node, last, activation="silu")
    return None


def _silu(user: Node, node: Node) -> Node | None:
    """The node that is SiLU of `node`, of which `user` is the first step."""
    if calls(user, F.silu):
        given = arguments(user, "input inplace")
        return user if given is not None and given["input"] is node else None
    if not calls(user, torch.sigmoid, F.sigmoid, method="sigmoid"):
        return None
    for last in user.users:
        pair = operands(last, "mul")
        if pair is not None and other(pair, user) is node and len(user.users) == 1:
            return last
    return None
