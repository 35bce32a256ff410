"""What tests of the graph rewriting share: compile, compare outputs and gradients, in budget."""

import copy

import torch
from budget import FORWARD, GRADIENT, assert_within_budget

from engine.backend import Backend

NO_OPS = (
    "cast to the same dtype",
    "contiguous ahead of a convolution",
    "division by 1",
    "dropout of nothing",
    "nearest upsampling without a scatter",
    "product with 1",
)


def fused(report) -> dict[str, int]:
    """The report's counts, no-ops left out."""
    return {name: n for name, n in report.counts().items() if name not in NO_OPS}


def gradients(out, leaves, cotangent):
    leaves = [t for t in leaves if t.requires_grad]
    return torch.autograd.grad(out, leaves, cotangent.to(out.dtype), allow_unused=True)


def check_function(function, tensors, dtype, inner="eager", dynamic=None):
    """Compiles function(*tensors) in one graph; output and gradients within budget → report."""

    def run(f, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in rounded]
        out = f(*leaves)
        g = torch.Generator().manual_seed(3)
        return out, gradients(out, leaves, torch.randn(out.shape, generator=g))

    rounded = [t.to(dtype) for t in tensors]
    torch.compiler.reset()
    backend = Backend(inner)
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    got, plain, truth = run(compiled, dtype), run(function, dtype), run(function, torch.float64)
    assert got[0].dtype == plain[0].dtype and got[0].shape == plain[0].shape
    assert_within_budget(got[0], truth[0], plain[0], factor=FORWARD)
    for i, (a, t, p) in enumerate(zip(got[1], truth[1], plain[1], strict=True)):
        assert (a is None) == (t is None)
        if a is not None:
            assert_within_budget(a, t, p, factor=GRADIENT, what=f"gradient {i}")
    assert backend.report.graphs == 1
    return backend.report


def run_model(model, inputs, call):
    """Output, and the gradients of all parameters in one vector."""
    model.zero_grad()
    out = call(model, *inputs)
    g = torch.Generator().manual_seed(4)
    out.backward(torch.randn(out.shape, generator=g).to(out.dtype))
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return out.detach(), torch.cat(grads)


def cast_inputs(inputs, dtype):
    return [t.to(dtype) if t.is_floating_point() else t for t in inputs]


def check_model(model, inputs, call, dtype, cast, accelerate):
    """`accelerate`d against the untouched model, in dtype and in float64 → the handle.

    call(model, *inputs) → one tensor; cast(model, dtype) → the model in it.
    """
    inputs = cast_inputs(inputs, dtype)
    model = cast(model, dtype)
    untouched, exact = copy.deepcopy(model), cast(copy.deepcopy(model), torch.float64)
    torch.compiler.reset()
    handle = accelerate(model)
    got = run_model(model, inputs, call)
    plain = run_model(untouched, inputs, call)
    truth = run_model(exact, cast_inputs(inputs, torch.float64), call)
    for what, factor, a, t, p in zip(
        ("output", "gradient"), (FORWARD, GRADIENT), got, truth, plain, strict=True
    ):
        assert_within_budget(a, t, p, factor=factor, what=what)
    return handle
