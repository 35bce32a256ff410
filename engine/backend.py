"""torch.compile(model, backend="engine"): our ops in the captured graph, then an inner compiler.

    options={"inner": "inductor"}   the default; further options and `mode` are Inductor's
    options={"inner": "eager"}      the graph as it is: compiled in seconds instead of a minute

Named by the entry point group torch_dynamo_backends, so that an installed engine needs no import;
`import engine` names it too where it is not installed.
"""

from collections.abc import Callable

import torch
from torch.fx import GraphModule

from .patterns import nearest
from .patterns.nodes import where
from .rewrite import Replaced, Report, rewrite

INNER = ("inductor", "eager")


def engine(gm: GraphModule, example_inputs: list, *, mode=None, options=None) -> Callable:
    """The backend. Raises ValueError for an unknown inner compiler."""
    return Backend(mode=mode, **(options or {}))(gm, example_inputs)


class Backend:
    """A backend for torch.compile(backend=…) whose `report` tells what it replaced."""

    def __init__(self, inner: str = "inductor", *, mode: str | None = None, **options):
        if inner not in INNER:
            raise ValueError(f"inner is {inner!r}, expected one of {', '.join(INNER)}")
        if inner == "eager" and (mode or options):
            given = ", ".join(filter(None, (mode and "mode", *options)))
            raise ValueError(f"{given} is for inner='inductor': inner='eager' has no options")
        self.inner, self.mode, self.options = inner, mode, options
        self.report = Report()

    def __call__(self, gm: GraphModule, example_inputs: list) -> Callable:
        self.report.add(rewrite(gm))
        if self.inner == "eager":
            _plain_checkpoints(gm)
            return gm.forward
        self.report.replaced += _without_scatter(gm)
        return _inductor(gm, example_inputs, self.mode, self.options)


def _plain_checkpoints(gm: GraphModule) -> None:
    """Runs checkpointed blocks as torch.utils.checkpoint does without a compiler.

    The captured call is made to be traced: run as it is, it dispatches each op through Python, and
    draws dropout's random numbers anew when it computes a block a second time.
    """
    captured = torch.ops.higher_order.tag_activation_checkpoint
    for inner in gm.modules():
        if not isinstance(inner, GraphModule):
            continue
        nodes = inner.graph.find_nodes(op="call_function", target=captured)
        for node in nodes:
            node.target = _checkpoint
        if nodes:
            inner.recompile()


def _checkpoint(block: GraphModule, *args, use_reentrant=None, **kwargs):
    """use_reentrant is left aside: a graph has no state that tells the two apart."""
    from torch.utils.checkpoint import checkpoint

    if "_checkpoint_context_fn" in block.meta:
        kwargs["context_fn"] = block.meta["_checkpoint_context_fn"]
    return checkpoint(block, *args, use_reentrant=False, **kwargs)


def _without_scatter(gm: GraphModule) -> list[Replaced]:
    """Gives Inductor nearest upsampling in a form whose gradient it gets right (nearest.py)."""
    found = []
    for inner in gm.modules():
        if not isinstance(inner, GraphModule):
            continue
        made = [made for node in list(inner.graph.nodes) if (made := nearest.rewrite(node))]
        found += [Replaced(nearest.NAME, where(node)) for node in made]
        if made:
            inner.recompile()
    return found


def _inductor(gm: GraphModule, example_inputs: list, mode: str | None, options: dict) -> Callable:
    from torch._inductor.compile_fx import compile_fx

    config = dict(options)
    if mode:
        config = {**torch._inductor.list_mode_options(mode), **config}
    # Our ops ask whether they are being traced: torch 2.11 tells them only inside Dynamo.
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        return compile_fx(gm, example_inputs, config_patches=config or None)
    finally:
        torch.compiler._is_compiling_flag = before
