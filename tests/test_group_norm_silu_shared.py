"""group_norm_silu(..., return_input=True): what comes back by the returned x is in dx."""

import pytest
import torch
from budget import GRADIENT, assert_within_budget
from conftest import DEVICE
from engine.kernels import native, reference
from test_group_norm_silu import DTYPES, as_layout, make_inputs
from test_group_norm_silu_pair import pair_inputs

from engine import dispatch, ops

OP = "group_norm_silu"

# name: (N, C, *S), groups
SHAPES = {
    "C/G=3 odd S": ((2, 12, 7, 9), 4),
    "C/G=5 batch 1": ((1, 20, 3, 5), 4),
    "HW=1": ((2, 8, 1, 1), 4),
    "rows of a vector": ((3, 24, 4, 4), 4),
    "pieces": ((1, 6, 112, 113), 2),
    "wide": ((2, 136, 3, 4), 8),
    "volume": ((2, 8, 2, 3, 5), 2),
    "sequence": ((2, 8, 63), 2),
}


def gradients(function, inputs, groups, cotangents, **options):
    """Of every present input, for cotangents of y and of each returned x."""
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items() if t is not None}
    rest = {k: leaves.get(k) for k in ("add", "scale", "shift")}
    x = (leaves["x"], leaves["x2"]) if "x2" in leaves else leaves["x"]
    y, again = function(x, leaves.get("weight"), leaves.get("bias"), groups, **rest, **options)
    outputs = [y, *again] if isinstance(again, tuple) else [y, again]
    for given, found in zip((leaves["x"], leaves.get("x2")), outputs[1:], strict=False):
        assert torch.equal(given, found) and given.data_ptr() == found.data_ptr()
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return dict(zip(leaves, found, strict=True))


def check(impl, inputs, groups, layout, monkeypatch):
    g = torch.Generator().manual_seed(3)
    xs = [inputs[k] for k in ("x", "x2") if k in inputs]
    shape = list(xs[0].shape)
    shape[1] = sum(x.shape[1] for x in xs)
    shapes = [shape, *(x.shape for x in xs)]
    cotangents = [torch.randn(s, generator=g).to(xs[0].dtype).to(DEVICE) for s in shapes]
    exact = {k: None if t is None else t.double() for k, t in inputs.items()}

    def truly(x, *args, **options):
        return reference.group_norm_silu(x, *args, **options), x

    truth = gradients(truly, exact, groups, [t.double() for t in cotangents])
    options = {"return_input": True}
    plain = gradients(ops.group_norm_silu, inputs, groups, cotangents, impl="eager", **options)
    kernel, calls = native.group_norm_silu_bwd_add, []
    monkeypatch.setattr(
        native, "group_norm_silu_bwd_add", lambda *args: calls.append(1) or kernel(*args)
    )
    laid = [cotangents[0], *(as_layout(t, layout) for t in cotangents[1:])]
    found = gradients(ops.group_norm_silu, inputs, groups, laid, impl=impl, **options)
    for name, grad in found.items():
        assert grad.dtype == inputs[name].dtype
        assert_within_budget(grad, truth[name], plain[name], factor=GRADIENT, what=f"d{name}")
    return len(calls)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, layout, dtype, monkeypatch):
    shape, groups = SHAPES[name]
    inputs = make_inputs(shape, dtype, ("add", "scale", "shift"))
    inputs["x"] = as_layout(inputs["x"], layout)
    calls = check("auto", inputs, groups, layout, monkeypatch)
    kernel = DEVICE == "cpu" and not dispatch.absence(OP, "native")
    assert calls == (kernel and len(shape) > 3)  # (N, C, S) is read as another tensor


@pytest.mark.parametrize("layouts", ["contiguous", "channels_last", "mixed", "sliced"])
@pytest.mark.parametrize("name", ["seam in a group", "seam at a border", "one channel last"])
def test_pairs_and_layouts(impl, name, layouts, monkeypatch):
    """x in one layout, what comes back in that or in the other; a view is no case of its own."""
    inside = "channels_last" if layouts == "mixed" else layouts
    dtype = torch.float32 if layouts == "contiguous" else torch.bfloat16
    inputs, groups = pair_inputs(name, dtype, ("add",), (inside, inside))
    check(impl, inputs, groups, "contiguous" if layouts == "mixed" else layouts, monkeypatch)


@pytest.mark.parametrize("silu", ["silu", "none"])
def test_one_rounding(silu, monkeypatch):
    """In bfloat16: the norm's gradient is not rounded before the other is added."""
    x = torch.randn(4, 32, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    dy, other = torch.randn_like(x), torch.randn_like(x)
    errors = []
    for shares in (True, False):
        leaf = x.detach().requires_grad_()
        y, again = ops.group_norm_silu(leaf, None, None, 4, activation=silu, return_input=True)
        (dx,) = torch.autograd.grad([y, again if shares else leaf * 1], leaf, [dy, other])
        exact = x.double().requires_grad_()
        truth = reference.group_norm_silu(exact, None, None, 4, silu=silu == "silu")
        (true,) = torch.autograd.grad([truth, exact * 1], exact, [dy.double(), other.double()])
        errors.append((dx.double() - true).square().mean().item())
    assert errors[0] < 0.8 * errors[1]


def test_what_is_not_read_again_adds_nothing(impl):
    inputs = make_inputs((2, 12, 5, 7), torch.float32, ())
    x, dy = inputs["x"].requires_grad_(), torch.randn(2, 12, 5, 7, device=DEVICE)
    args = x, inputs["weight"], inputs["bias"], 4
    y, _ = ops.group_norm_silu(*args, impl=impl, return_input=True)
    (found,) = torch.autograd.grad(y, x, dy)
    (expected,) = torch.autograd.grad(ops.group_norm_silu(*args, impl=impl), x, dy)
    assert torch.equal(found, expected)
    y, again = ops.group_norm_silu(*args, impl=impl, return_input=True)
    assert torch.equal(torch.autograd.grad(again, x, dy)[0], dy)


def test_without_a_gradient_it_is_x_itself(impl):
    inputs = make_inputs((2, 12, 5, 7), torch.float32, ())
    x, weight = inputs["x"], inputs["weight"].requires_grad_()
    for enabled in (False, True):  # where x wants none, but the weight does
        with torch.set_grad_enabled(enabled):
            assert ops.group_norm_silu(x, weight, None, 4, impl=impl, return_input=True)[1] is x


def test_a_second_derivative_is_right_or_refused(impl):
    x = torch.randn(2, 8, 4, 4, device=DEVICE, requires_grad=True)
    c = torch.randn(2, 8, 4, 4, device=DEVICE)

    def second(read):
        y, again = ops.group_norm_silu(read, None, None, 2, impl=impl, return_input=True)
        (g,) = torch.autograd.grad((y * c + again**3).sum(), read, create_graph=True)
        return torch.autograd.grad((g * g).sum(), read)[0]

    if impl == "eager":
        assert second(x).abs().max() > 0
    else:
        with pytest.raises(RuntimeError, match="no second derivative"):
            second(x)


def test_fullgraph(impl, backend):
    if backend == "cuda-emulated":
        pytest.skip("exchanged in Python, which a graph does not see")
    inputs = make_inputs((2, 8, 4, 6), torch.float32, ("add",))
    leaves = [inputs[k].detach().requires_grad_() for k in ("x", "weight", "bias", "add")]

    def function(x, weight, bias, add):
        options = {"add": add, "impl": impl, "return_input": True}
        y, again = ops.group_norm_silu(x * 1, weight, bias, 2, **options)
        return y + again.sin()

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    dy = torch.randn(2, 8, 4, 6, device=DEVICE)
    found, expected = (torch.autograd.grad(f(*leaves), leaves, dy) for f in (compiled, function))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
