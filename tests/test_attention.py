"""attention on every back end against the float64 reference, forward and backward."""

import math

import pytest
import torch
from budget import FORWARD, GRADIENT, assert_within_budget
from conftest import DEVICE
from engine.kernels import reference
from test_group_norm_silu import directional

from engine import ops

OP = "attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# name: N, heads, S, Sk, D
SHAPES = {
    "one key": (2, 1, 1, 1, 16),
    "one query": (1, 2, 1, 17, 32),
    "7x7": (2, 2, 49, 49, 32),
    "odd": (1, 1, 63, 63, 40),
    "64": (1, 2, 64, 64, 64),
    "past one block": (1, 1, 130, 130, 32),
    "cross": (1, 2, 65, 77, 40),
    "more keys": (1, 1, 16, 200, 16),
    "wide head": (1, 1, 33, 33, 128),
    "widest head": (1, 1, 17, 17, 256),
}


def make_qkv(shape, dtype, *, seed=0, by=1.0):
    n, heads, s, sk, d = shape
    g = torch.Generator().manual_seed(seed)

    def normal(length):
        return (torch.randn(n, heads, length, d, generator=g) * by).to(dtype).to(DEVICE)

    return normal(s), normal(sk), normal(sk)


def as_view(t: torch.Tensor, view: str) -> torch.Tensor:
    """The same values of (N, heads, S, D) inside a larger or permuted tensor."""
    if view == "tokens":  # memory (N, S, heads, D)
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if view == "packed":  # every third slice of (N, S, 3, heads, D)
        n, heads, s, d = t.shape
        packed = t.new_full((n, s, 3, heads, d), float("nan"))
        packed[:, :, 1] = t.transpose(1, 2)
        return packed[:, :, 1].transpose(1, 2)
    if view == "channels first":  # D is not the fast dimension
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    return t.contiguous()


def run(function, qkv, dout, **kwargs):
    leaves = [t.detach().requires_grad_() for t in qkv]
    out = function(*leaves, **kwargs)
    return out, torch.autograd.grad(out, leaves, dout.to(out.dtype))


def check(impl, qkv, *, softmax_scale=None, view="contiguous"):
    g = torch.Generator().manual_seed(9)
    dout = torch.randn(qkv[0].shape, generator=g).to(qkv[0].dtype).to(DEVICE)
    truth, true_grads = run(
        reference.attention, [t.double() for t in qkv], dout.double(), scale=softmax_scale
    )
    plain, plain_grads = run(ops.attention, qkv, dout, scale=softmax_scale, impl="eager")
    viewed = [as_view(t, view) for t in qkv]
    out, grads = run(ops.attention, viewed, as_view(dout, view), scale=softmax_scale, impl=impl)
    assert out.dtype == qkv[0].dtype
    assert_within_budget(out, truth, plain, factor=FORWARD)
    # With one key the softmax is constant: dq and dk are zero, differences of terms of dv's size.
    scale = true_grads[2].abs().max().item() if qkv[1].shape[2] == 1 else None
    for name, *triple in zip("qkv", grads, true_grads, plain_grads, strict=True):
        assert_within_budget(*triple, factor=GRADIENT, what=f"d{name}", scale=scale)
    with torch.no_grad():
        assert (
            torch.equal(ops.attention(*viewed, scale=softmax_scale, impl=impl), out)
            or impl == "eager"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(impl, shape, dtype):
    check(impl, make_qkv(SHAPES[shape], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["tokens", "packed", "channels first"])
def test_any_strides(impl, view, dtype):
    check(impl, make_qkv((2, 2, 20, 20, 16), dtype), view=view)


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0, -0.5])
def test_scale(impl, scale):
    check(impl, make_qkv((1, 2, 20, 24, 16), torch.float32), softmax_scale=scale)


def test_large_logits_do_not_overflow(impl):
    check(impl, make_qkv((1, 1, 20, 20, 16), torch.float32, by=30.0))


def test_expanded_gradient(impl):
    q, k, v = (t.requires_grad_() for t in make_qkv((1, 2, 9, 9, 16), torch.float32))
    ops.attention(q, k, v, impl=impl).sum().backward()  # dout has stride 0
    assert torch.isfinite(q.grad).all()
    assert torch.allclose(v.grad.sum(2), torch.full_like(v.grad.sum(2), 9.0), rtol=1e-4)


def test_empty_batch(impl):
    q = torch.empty(0, 2, 4, 16, device=DEVICE)
    assert ops.attention(q, q, q, impl=impl).shape == q.shape


def test_gradcheck_float64():
    qkv = [t.requires_grad_() for t in make_qkv((1, 2, 3, 4, 5), torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, impl="eager"), qkv)


def test_gradients_are_those_of_the_forward(impl):
    """A finite difference of the kernel's own forward, in float32."""
    leaves = [t.requires_grad_() for t in make_qkv((1, 2, 20, 24, 16), torch.float32)]
    dout = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def f(*qkv):
        return ops.attention(*qkv, impl=impl)

    grads = torch.autograd.grad(f(*leaves), leaves, dout)
    slope, ways = directional(f, leaves, dout)
    along = sum((g * w).double().sum() for g, w in zip(grads, ways, strict=True))
    assert abs(along - slope) < 2e-3 * sum(g.double().norm() for g in grads)


def test_default_scale(impl):
    """One query, two keys, by hand: the logits are 1 and 0 after a division by √D."""
    q, k = torch.full((1, 1, 1, 25), 0.2), torch.zeros(1, 1, 2, 25)
    k[0, 0, 0] = 1.0
    v = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1).expand(1, 1, 2, 25).contiguous()
    out = ops.attention(*(t.to(DEVICE) for t in (q, k, v)), impl=impl)
    assert torch.allclose(out.cpu(), torch.full_like(q, 1 / (1 + math.exp(-1))), atol=1e-6)


@pytest.mark.parametrize("wanted", range(3))
def test_only_some_gradients(impl, wanted):
    qkv = make_qkv((1, 2, 9, 11, 16), torch.float32)
    qkv[wanted].requires_grad_()
    dout = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    ops.attention(*qkv, impl=impl).backward(dout)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    reference.attention(*exact).backward(dout.double())
    for i, (t, truth) in enumerate(zip(qkv, exact, strict=True)):
        assert (t.grad is None) == (i != wanted)
        if i == wanted:
            assert torch.allclose(t.grad.double(), truth.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -3e38, 1e39])
def test_a_scale_beyond_float32_is_refused(scale):
    pytest.importorskip("triton")
    qkv = make_qkv((1, 1, 4, 4, 16), torch.float32)
    with pytest.raises(RuntimeError, match="is not within"):
        ops.attention(*qkv, scale=scale, impl="triton")


@pytest.mark.parametrize("scale", [1e-46, -1e-40, 5e-324])
def test_a_scale_below_float32_is_zero(impl, scale):
    leaves = [t.requires_grad_() for t in make_qkv((1, 1, 4, 6, 16), torch.float32)]
    out, mean = ops.attention(*leaves, scale=scale, impl=impl), leaves[2].mean(2, keepdim=True)
    torch.testing.assert_close(out, mean.expand_as(out))
    dq, dk, _ = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert max(dq.abs().max(), dk.abs().max()) < 2.0**-126


BAD = {
    "dims": ((torch.ones(2, 4, 8),) * 3, r"expected \(N, heads, S, D\)"),
    "head dim": ((torch.ones(1, 1, 4, 8), *(torch.ones(1, 1, 4, 9),) * 2), "expected"),
    "key value": ((*(torch.ones(1, 1, 4, 8),) * 2, torch.ones(1, 1, 5, 8)), "expected"),
    "dtype": ((*(torch.ones(1, 1, 4, 8),) * 2, torch.ones(1, 1, 4, 8).half()), "one floating"),
    "device": ((*(torch.ones(1, 1, 4, 8),) * 2, torch.ones(1, 1, 4, 8, device="meta")), "one dev"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case):
    qkv, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        ops.attention(*qkv)
