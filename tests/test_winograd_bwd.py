"""Gradients of weights and bias by Winograd on the CPU: against float64, on every instruction set,
through NumPy alone and through the layer."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budget import GRADIENT, assert_within_budget
from engine.kernels import native

from engine import dispatch, winograd
from engine.blocks import Conv2d

# N, C, H, W, K: odd and even sides, one pixel, panels of 1, 2 and 3 vectors, several blocks of
# tiles (more than 96), the last of them not full.
SHAPES = [
    (1, 16, 1, 1, 32),
    (2, 16, 1, 5, 32),
    (5, 16, 2, 2, 64),
    (3, 32, 3, 4, 32),
    (2, 48, 5, 5, 64),
    (4, 64, 6, 7, 32),
    (1, 80, 9, 8, 64),
    (2, 96, 7, 3, 32),
    (1, 32, 33, 33, 32),
    (2, 16, 33, 9, 64),
    (1, 112, 4, 33, 32),
]


def gradients(dy, x, dtype):
    """dw, db by PyTorch."""
    x, dy = x.to(dtype), dy.to(dtype)
    w = torch.zeros(dy.shape[1], x.shape[1], 3, 3, dtype=dtype, requires_grad=True)
    b = torch.zeros(dy.shape[1], dtype=dtype, requires_grad=True)
    F.conv2d(x, w, b, padding=1).backward(dy)
    return w.grad, b.grad


def images(n, c, h, w, k, seed=0):
    """x and dy, channels_last."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(n, h, w, m, generator=generator) for m in (c, k))
    return x.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2)


def by_kernel(kernels, dy, x, channels_last, threads=2):
    """The kernel's dw (K, C, 3, 3) and db."""
    dy, x = (t.permute(0, 2, 3, 1).numpy() for t in (dy, x))
    dw, db = map(
        torch.from_numpy, kernels.conv2d_winograd_bwd_weight(dy, x, channels_last, threads)
    )
    return dw.permute(0, 3, 1, 2) if channels_last else dw, db


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_against_float64(kernels, shape):
    x, dy = images(*shape)
    truth, plain = gradients(dy, x, torch.float64), gradients(dy, x, torch.float32)
    results = [by_kernel(kernels, dy, x, last) for last in (False, True)]
    for found, exact, other, what in zip(results[0], truth, plain, ("dw", "db"), strict=True):
        assert_within_budget(found, exact, other, factor=GRADIENT, what=what)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # layouts


def test_many_terms(kernels):
    """Long sums that do not cancel: an error that grew with their number would show."""
    x, dy = (t.abs() for t in images(8, 16, 64, 64, 32))
    truth, plain = gradients(dy, x, torch.float64), gradients(dy, x, torch.float32)
    found = by_kernel(kernels, dy, x, True)
    for got, exact, other, what in zip(found, truth, plain, ("dw", "db"), strict=True):
        assert_within_budget(got, exact, other, factor=GRADIENT, what=what)
        assert ((got - exact).abs() / exact).max() < 4e-6, what


@pytest.mark.parametrize("shape", [(1, 16, 3, 3, 32), (3, 96, 9, 33, 64), (2, 640, 3, 5, 128)])
def test_threads_change_no_bit(kernels, shape):
    """Also where a thread's sums are more than it takes at once (C = 640)."""
    x, dy = images(*shape)
    first = by_kernel(kernels, dy, x, True, 1)
    for threads in (2, 3, 7):
        other = by_kernel(kernels, dy, x, True, threads)
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), threads


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [(0, 3, 0, 0), (1, 5, 4, 3), (1, 0, 2, 6)])
def test_what_is_not_finite_stays_so(kernels, value, where):
    x, dy = images(2, 16, 5, 7, 32)
    bad = x.clone(memory_format=torch.preserve_format)
    bad[where] = value
    dw, db = by_kernel(kernels, dy, bad, False)
    lost = ~gradients(dy, bad, torch.float64)[0].isfinite()
    assert not dw[lost].isfinite().any() and db.isfinite().all()
    others = torch.arange(16) != where[1]  # channels of x do not meet
    assert dw[:, others].isfinite().all()
    bad = dy.clone(memory_format=torch.preserve_format)
    bad[where] = value
    dw, db = by_kernel(kernels, bad, x, False)
    lost = ~gradients(bad, x, torch.float64)[0].isfinite()
    assert not dw[lost].isfinite().any()
    others = torch.arange(32) != where[1]
    assert dw[others].isfinite().all() and db[others].isfinite().all()
    assert not db[where[1]].isfinite()


# ---- The op and the layer -----------------------------------------------------------------------

served = pytest.mark.skipif(
    bool(dispatch.absence(winograd.OP, "native"))
    or torch.backends.cpu.get_cpu_capability() not in winograd.SETS,
    reason="needs the extension and AVX2",
)


def op(dy, x, channels_last=False, bias=True):
    return dispatch.function(winograd.OP, "bwd_weight", "native")(dy, x, channels_last, bias)


@served
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_registered_op(last, bias):
    x, dy = images(2, 16, 5, 4, 32)
    dw, db = op(dy, x, last, bias)
    assert dw.stride() == ((144, 1, 48, 16) if last else (144, 9, 3, 1))
    assert db.shape == ((32,) if bias else (0,))
    overload = torch.ops.engine.conv2d_winograd_bwd_weight.default
    torch.library.opcheck(overload, (dy, x, last, bias))
    assert "conv2d_winograd_bwd_weight" in native.CPU_OPS


@served
def test_refusals():
    x, dy = images(2, 16, 5, 4, 32)
    for arguments, words in [
        ((dy[:, :16], x), "multiple of 32"),
        ((dy, x[:, :8]), "multiple of 16"),
        ((dy[:, :, :4], x), "dy must be"),
        ((dy.double(), x), "float32"),
        ((dy.contiguous(), x), "channels_last"),
        ((dy[:0], x[:0]), "empty"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            op(*arguments)


@pytest.fixture
def calls(monkeypatch):
    """How often backward asks the kernel for dw."""
    found, function = [], dispatch.function

    def counting(op, stage, backend):
        found.append(stage)
        return function(op, stage, backend)

    monkeypatch.setattr(dispatch, "function", counting)
    return lambda: found.count("bwd_weight")


@served
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_layer(calls, last, pair, bias):
    """A layer of either layout, x alone or a pair, of which each half has a slice of the weight."""
    torch.manual_seed(0)
    layer = Conv2d(64, 32, 3, padding=1, bias=bias)
    layer = layer.to(memory_format=torch.channels_last) if last else layer
    exact = copy.deepcopy(layer).double()
    x, dy = images(2, 64, 7, 9, 32)
    parts = [t.contiguous(memory_format=torch.channels_last) for t in x.split(32, dim=1)]
    layer(tuple(parts) if pair else x).backward(dy)  # no gradient of x
    assert calls() == (2 if pair else 1)
    assert layer.weight.grad.stride() == layer.weight.stride()
    F.conv2d(x.double(), exact.weight, exact.bias, padding=1).backward(dy.double())
    plain = gradients(dy, x, torch.float32)
    for got, truth, other in zip(layer.parameters(), exact.parameters(), plain, strict=False):
        assert_within_budget(got.grad, truth.grad, other, factor=GRADIENT)


@served
@pytest.mark.parametrize("frozen", ["weight", "bias", "x", "weight bias"])
def test_frozen(calls, frozen):
    """What wants no gradient gets none, and the others' are the same."""
    layer = Conv2d(32, 32, 3, padding=1)
    x, dy = images(2, 32, 8, 8, 32)
    leaves = {"x": x.clone(memory_format=torch.preserve_format).requires_grad_()}
    leaves |= dict(layer.named_parameters())
    layer(leaves["x"]).backward(dy)
    before = {name: leaf.grad for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        leaf.grad = None
        leaf.requires_grad_(name not in frozen.split())
    layer(leaves["x"]).backward(dy)
    assert calls() == 1 + ("weight" not in frozen)
    for name, leaf in leaves.items():
        if name in frozen.split():
            assert leaf.grad is None
        else:
            assert torch.allclose(leaf.grad, before[name], rtol=1e-5, atol=1e-5), name


@served
def test_left_to_pytorch(calls):
    """Few tiles, a dy that is not channels_last, gradients of gradients."""
    layer = Conv2d(32, 32, 3, padding=1)
    x, dy = images(2, 32, 8, 8, 32)
    layer(x[..., :4]).backward(dy[..., :4].contiguous(memory_format=torch.channels_last))
    layer(x).backward(dy.contiguous())
    layer(x).sum().backward()  # dy of stride 0
    torch.autograd.grad(layer(x), layer.weight, dy, create_graph=True)
    assert calls() == 0
