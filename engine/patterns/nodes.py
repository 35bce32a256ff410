"""What patterns ask of the torch-level graph that Dynamo captures, and how they change it.

A node's `meta["example_value"]` is a fake tensor: its shape, dtype and layout. Sizes may be
symbolic; questions about them add no guard.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from .. import ops

BINARY = {
    "add": (operator.add, torch.add),
    "mul": (operator.mul, torch.mul, torch.multiply),
    "div": (operator.truediv, torch.div, torch.divide, torch.true_divide),
    "matmul": (operator.matmul, torch.matmul, torch.bmm),
}
IN_PLACE = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow),
    *(operator.ifloordiv, operator.imod, operator.imatmul, operator.iand, operator.ior),
    *(operator.ixor, operator.ilshift, operator.irshift, operator.setitem, operator.delitem),
)
CASTS = ("to", "type", "type_as", "float", "half", "bfloat16")
VIEWS = (  # by name, method or function; a cast may be one
    *("view", "reshape", "transpose", "swapaxes", "permute", "movedim", "flatten", "unflatten"),
    *("unsqueeze", "squeeze", "t", "chunk", "split", "unbind", "narrow", "select", "expand"),
    *("contiguous", "detach", "view_as", "expand_as", "diagonal", "unfold", *CASTS),
)
# Under autocast these take their operands in the lower precision.
LOWERED = (
    *(torch.conv1d, torch.conv2d, torch.conv3d, F.linear, torch.bmm, torch.matmul),
    *(operator.matmul, torch.baddbmm, F.scaled_dot_product_attention),
)


def value(node) -> Tensor | None:
    """The fake tensor that stands for the node's result; None for anything else."""
    found = node.meta.get("example_value") if isinstance(node, Node) else None
    return found if isinstance(found, Tensor) else None


def number(given) -> int | float | None:
    """The number that an argument is; None where it is none.

    A float of a module in which two models of one class differ is an input of the second's graph:
    a guard then makes it the number that it is.
    """
    if isinstance(given, (int, float)):
        return given
    found = given.meta.get("example_value") if isinstance(given, Node) else None
    if not isinstance(found, torch.SymFloat):
        return None
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return None if free_unbacked_symbols(found) else float(found)


def same(a, b) -> bool:
    """Whether two sizes are equal for sure."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def same_shape(a, b) -> bool:
    return len(a) == len(b) and all(same(i, j) for i, j in zip(a, b, strict=True))


def calls(node, *targets: Callable, method: str = "") -> bool:
    if not isinstance(node, Node):
        return False
    if node.op == "call_method":
        return bool(method) and node.target == method
    return node.op == "call_function" and node.target in targets


def arguments(node: Node, names: str, **defaults) -> dict | None:
    """The call's arguments by name; None where it has one that `names` does not list."""
    given = dict(zip(names.split(), node.args, strict=False))
    if len(node.args) > len(given) or set(node.kwargs) - set(names.split()):
        return None
    return {**defaults, **given, **node.kwargs}


def operands(node, kind: str) -> tuple | None:
    """(a, b) of a + b, a · b, a / b or a @ b, written as operator, function or method."""
    names = {"add": ("add",), "mul": ("mul", "multiply"), "div": ("div", "divide", "true_divide")}
    names["matmul"] = ("matmul", "bmm")
    if not (calls(node, *BINARY[kind]) or (node_method(node) in names[kind])):
        return None
    if len(node.args) != 2 or node.kwargs:  # alpha, rounding_mode, out
        return None
    return node.args[0], node.args[1]


def node_method(node) -> str:
    return node.target if isinstance(node, Node) and node.op == "call_method" else ""


def other(pair: tuple, node: Node):
    """The operand of a pair that is not `node`; None where both or none are."""
    if (pair[0] is node) == (pair[1] is node):
        return None
    return pair[1] if pair[0] is node else pair[0]


def sole_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def cast_source(node) -> Node | None:
    """x of a node that is x in another (or its own) dtype and nothing else."""
    if node_method(node) not in CASTS:
        return None
    source = node.args[0]
    a, b = value(source), value(node)
    if a is None or b is None or not a.is_floating_point() or not b.is_floating_point():
        return None
    if a.device != b.device or not same_shape(a.shape, b.shape):
        return None
    if node.kwargs.get("memory_format") is not None or node.kwargs.get("copy"):
        return None
    return source


def mutates(node: Node) -> bool:
    """Whether the node writes into a tensor, or changes a mode (autocast, gradients)."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    if node.target in IN_PLACE or node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if schema := getattr(node.target, "_schema", None):
        return schema.is_mutable
    at = _inplace_at(node.target)
    if at is not None and len(node.args) > at and node.args[at]:
        return True
    return name.endswith("_") or "autocast" in name or "enter" in name or _switches(node)


@functools.cache
def _inplace_at(function: Callable) -> int | None:
    """Where the function takes `inplace` unnamed, as nn.Dropout2d and nn.Hardswish give it."""
    if inspect.isclass(function):
        return None
    try:
        names = [*inspect.signature(function).parameters]
    except (TypeError, ValueError):  # PyTorch's built-in ones, which have no such argument
        return None
    return names.index("inplace") if "inplace" in names else None


def _switches(node: Node) -> bool:
    """Whether the node switches gradients off or on."""
    name = "" if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op == "call_function" and ("set_grad" in name or "inference_mode" in name)


def switched(first: Node, last: Node) -> bool:
    """Whether gradients may be recorded at one of the nodes and not at the other."""
    return any(_switches(node) for node in between(first, last))


def between(first: Node, last: Node) -> Iterator[Node]:
    """The nodes after `first` and before `last`."""
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def barrier(first: Node, last: Node, *absorbed: Node) -> str:
    """Why what `first` reads may not be read at `last` instead; "" where it may."""
    for node in between(first, last):
        if node not in absorbed and mutates(node):
            return f"{node.name} writes in place, or changes a mode, between its parts"
    return ""


def written(node: Node, after: Node | None = None) -> bool:
    """Whether anything (behind `after`) writes into the node's memory, or that of which it is a
    view."""
    root = _root(node)
    counts = None if after is None else set(between(after, after))
    for alias in aliases_of(root):
        for user in alias.users:
            if mutates(user) and (counts is None or user in counts) and _writes(user, alias):
                return True
    return False


def shared(node: Node) -> bool:
    """Whether the node's memory is the caller's, or the graph returns a view of it."""
    root = _root(node)
    if root.op in ("placeholder", "get_attr"):
        return True
    return any(user.op == "output" for alias in aliases_of(root) for user in alias.users)


def viewed(node: Node) -> Node | None:
    """What the node is a view of."""
    return _first(node) if _is_view(node) else None


def _root(node: Node) -> Node:
    while (source := viewed(node)) is not None:
        node = source
    return node


def aliases_of(root: Node) -> list[Node]:
    """The node and all whose results may lie in its memory."""
    found = {root: None}
    queue = [root]
    for alias in queue:
        for user in alias.users:
            if user not in found and _first(user) is alias and (_is_view(user) or mutates(user)):
                found[user] = None
                queue.append(user)
    return queue


def _first(node: Node):
    """The first argument, under whatever name."""
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def _writes(user: Node, alias: Node) -> bool:
    first = _first(user)
    if first is alias or (isinstance(first, (tuple, list)) and alias in first):
        return True
    return alias is user.kwargs.get("out") or hasattr(user.target, "_schema")


def _is_view(node: Node) -> bool:
    """Whether the node's result may lie in the memory of its first argument."""
    if not isinstance(_first(node), Node):
        return False
    if calls(node, operator.getitem, getattr, F.dropout):  # dropout of nothing returns its input
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in VIEWS


def emit(before: Node, like: Node, op: str, target, args=(), kwargs=None, example=None) -> Node:
    """A new call ahead of `before`, with the meta of `like`; example: its result, if another."""
    graph: Graph = before.graph
    with graph.inserting_before(before):
        made = graph.create_node(op, target, tuple(args), kwargs or {})
    made.meta = dict(like.meta)
    if example is not None:
        made.meta["example_value"] = example
    return made


def method(before: Node, source: Node, name: str, *args, **kwargs) -> Node:
    example = getattr(value(source), name)(*args, **kwargs)
    return emit(before, source, "call_method", name, (source, *args), kwargs, example)


def put(made: Node, old: Node) -> Node:
    """Puts `made` in the place of `old`, and erases what nobody needs any more."""
    old.replace_all_uses_with(made)
    prune(old)
    return made


def prune(*nodes) -> None:
    """Erases those without users, then their operands."""
    for node in nodes:
        if not node.users and node.op in ("call_function", "call_method") and not must_stay(node):
            sources = node.all_input_nodes
            node.graph.erase_node(node)
            prune(*(source for source in sources if not source._erased))


def must_stay(node: Node) -> bool:
    """A write that must stay though nobody reads its result. F.silu(x, inplace=True) of what only
    it read is none."""
    if not mutates(node) or node.op == "call_method" or _inplace_at(node.target) is None:
        return mutates(node)
    source = _first(node)
    made = source.op in ("call_function", "call_method") and not mutates(source)
    return not made or viewed(source) is not None or len(source.users) > 1


def widen(norm: Node, last: Node, *, args: tuple | None = None, **kwargs) -> Node:
    """norm's call with these arguments on top, in the place of `last`, which it takes in."""
    kwargs = {**norm.kwargs, **kwargs}
    made = emit(last, last, "call_function", norm.target, args or norm.args, kwargs)
    made.meta["engine_where"] = where(norm)
    return put(made, last)


def is_norm(node) -> bool:
    """Whether the node calls one of our norms, which patterns widen step by step."""
    return calls(node, ops.group_norm_silu, getattr(ops, "rms_norm_silu", None))


def channels(norm: Node) -> tuple:
    """(N, C) of a fused node's result."""
    return tuple(value(norm).shape[:2])


def per_channel(node, norm: Node) -> bool:
    """Whether the operand is (N, C, 1, …, 1) beside a norm of (N, C, *S)."""
    t = value(node)
    if t is None or not t.is_floating_point() or t.dim() != value(norm).dim() or t.dim() < 3:
        return False
    return same_shape(t.shape[:2], channels(norm)) and all(same(s, 1) for s in t.shape[2:])


def broadcasts(node, norm: Node) -> bool:
    """Whether the operand is one number per channel in any other form."""
    t, x = value(node), value(norm)
    if t is None or t.dim() > x.dim() or t.dim() < 1:
        return False
    c = t.shape[1 - x.dim()] if t.dim() >= x.dim() - 1 else 1
    trailing = t.shape[2 - x.dim() :] if x.dim() > 2 else ()
    return same(c, x.shape[1]) and all(same(s, 1) for s in trailing)


def as_rows(node: Node, before: Node) -> Node:
    """The (N, C) tensor that (N, C, 1, …, 1) is a view of."""
    shape = value(node).shape[:2]
    found = node
    while (source := _unsqueezed(found)) is not None and not switched(found, before):
        found = source
    if value(found).dim() == 2 and same_shape(value(found).shape, shape):
        return found
    return method(before, node, "flatten", 1)


def _unsqueezed(node: Node) -> Node | None:
    """t of t[:, :, None, None], t[..., None], t.unsqueeze(-1) or t.reshape(n, c, 1, 1)."""
    known = calls(node, operator.getitem, torch.unsqueeze, torch.reshape, method="unsqueeze")
    if not known and node_method(node) not in ("view", "reshape"):
        return None
    if not node.args:
        return None
    if calls(node, operator.getitem):
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if any(i is not None and i is not Ellipsis and i != slice(None) for i in index):
            return None
    source, result = value(node.args[0]), value(node)
    if source is None or not 2 <= source.dim() < result.dim():
        return None
    return node.args[0] if same_shape(source.shape, result.shape[: source.dim()]) else None


def where(node: Node) -> str:
    """The module that the node comes from: "down_blocks.0.resnets.1.norm2"."""
    if "engine_where" in node.meta:
        return node.meta["engine_where"]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    for text in ("__dict__", "['_modules']", "_modules", "_parameters"):
        path = path.replace(text, "")
    path = path.replace("[", ".").replace("]", "").replace("'", "").replace('"', "")
    path = ".".join(part for part in path.split(".") if part and part not in ("L", "self"))
    return path or node.name
