"""Puts our ops into a graph that Dynamo captured, nested graphs included, and reports what it did.

The patterns, each with its own rules, lie in engine/patterns. Where a graph was changed, its `view`
calls become `reshape`: a norm of ours keeps the layout of its input, where PyTorch's returns a
contiguous one, of which more can be viewed.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from . import ops, patterns
from .patterns import no_op
from .patterns.nodes import is_norm, node_method, where, written

TRANSFORMED = "torch.func transforms a part of it, for which the kernels have no rules"


@dataclass(frozen=True)
class Replaced:
    pattern: str  # "add → GroupNorm → SiLU"
    where: str  # the modules, first to last: "down_blocks.0.resnets.0.norm2, …"
    count: int = 1


@dataclass(frozen=True)
class Left:
    pattern: str
    where: str
    why: str


@dataclass
class Report:
    """What one compilation, or several, replaced and left alone."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    graphs: int = 0  # captured by Dynamo: one more than there are graph breaks
    nested: int = 0  # graphs inside them: checkpointed blocks

    def add(self, more: "Report") -> None:
        self.replaced += more.replaced
        self.left += more.left
        self.graphs += more.graphs
        self.nested += more.nested

    def counts(self) -> dict[str, int]:
        """Pattern → how often it was replaced."""
        found: Counter = Counter()
        for entry in self.replaced:
            found[entry.pattern] += entry.count
        return dict(found)

    def __str__(self) -> str:
        lines = [f"{_many(self.graphs, 'graph')}, {self.nested} nested; replaced:"]
        for pattern, count in sorted(self.counts().items(), key=lambda item: -item[1]):
            places = [entry.where for entry in self.replaced if entry.pattern == pattern]
            lines.append(f"  {count:4d} × {pattern:36s} {_places(places)}")
        if not self.replaced:
            lines.append("  nothing")
        reasons: dict[tuple[str, str], list[str]] = {}
        for entry in self.left:
            reasons.setdefault((entry.pattern, entry.why), []).append(entry.where)
        if reasons:
            lines.append("left as it was:")
        for (pattern, why), places in reasons.items():
            lines.append(f"  {len(places):4d} × {pattern}: {why} ({_places(places)})")
        return "\n".join(lines)


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _places(places: list[str]) -> str:
    shown = list(dict.fromkeys(place for place in places if place))
    return ", ".join(shown[:3]) + (", …" if len(shown) > 3 else "")


def rewrite(gm: GraphModule) -> Report:
    """Changes the graph in place. Raises nothing that a graph of Dynamo's can cause."""
    report = Report(graphs=1)
    _rewrite(gm, report)
    return report


def _rewrite(gm: GraphModule, report: Report) -> None:
    if transformed := next(filter(_transforms, gm.graph.nodes), None):
        report.left.append(Left("the graph", where(transformed), TRANSFORMED))
        return
    left: dict[tuple[str, str], str] = {}
    removed: list[Replaced] = []
    for pattern in patterns.ORDER:
        name = pattern.__name__.rpartition(".")[2]
        for node in list(gm.graph.nodes):
            if node._erased:
                continue
            place = where(node)
            found = pattern.rewrite(node)
            if pattern is no_op:
                removed += [Replaced(found, place)] if found else []
            elif isinstance(found, str):
                left[name, place] = found
            elif found is not None:
                left.pop((name, place), None)
    fused = [Replaced(_label(node), where(node)) for node in gm.graph.nodes if _label(node)]
    report.replaced += fused + removed
    report.left += [Left(pattern, place, why) for (pattern, place), why in left.items()]
    for nested in _nested(gm):
        report.nested += 1
        _rewrite(nested, report)
    if fused or removed:
        _views_to_reshapes(gm)
        gm.graph.lint()
        gm.recompile()


def _transforms(node: Node) -> bool:
    """Whether the node begins torch.func's vmap, grad or jvp, or forward-mode derivatives."""
    name = "" if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return "increment_nesting" in name or "enter_dual_level" in name or "make_dual" in name


def _label(node: Node) -> str:
    """What a node of ours stands for; "" for any other."""
    if node.op != "call_function":
        return ""
    if node.target is ops.attention:
        return "attention"
    if not is_norm(node):
        return ""
    kwargs = node.kwargs
    steps = ["GroupNorm" if node.target is ops.group_norm_silu else "RMS norm"]
    if kwargs.get("add") is not None:
        steps.insert(0, "add")
    if isinstance(node.args[0], tuple):
        steps.insert(0, "cat")
    if kwargs.get("scale") is not None or kwargs.get("shift") is not None:
        steps.append("scale and shift")
    if kwargs["activation"] == "silu":
        steps.append("SiLU")
    return " → ".join(steps)


def _nested(gm: GraphModule) -> Iterable[GraphModule]:
    """The graphs that the graph calls through higher-order ops, each once."""
    found = {}
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            inner = gm
            for name in node.target.split("."):
                inner = getattr(inner, name, None)
            if isinstance(inner, GraphModule):
                found[id(inner)] = inner
    return found.values()


def _views_to_reshapes(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        if node_method(node) != "view" or written(node):  # a write must reach what is viewed
            continue
        arguments = (*node.args, *node.kwargs.values())
        if not any(isinstance(a, torch.dtype) for a in arguments):
            node.target = "reshape"
