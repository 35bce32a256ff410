"""attention on every back end against the float64 reference, forward and backward."""

import math

import pytest
import torch
from budget import FORWARD, GRADIENT, assert_within_budget, error
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
    "widest head": (1, 1, 17, 17, 512),
    "7 keys": (1, 2, 7, 7, 32),
    "77 keys": (1, 1, 5, 77, 64),
    "255 keys": (1, 1, 40, 255, 32),
    "past what is resident": (1, 1, 40, 257, 32),
    "past 256 queries": (1, 1, 257, 20, 32),
}

# Heads of one piece, of two, padded, odd, and so wide that products go by chunks.
HEAD_DIMS = (8, 16, 24, 32, 33, 40, 48, 64, 80, 96, 112, 128, 144, 160, 192, 256, 320, 512)


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


def old_sizes(monkeypatch) -> None:
    """Tiles as for chips without wgmma."""
    from engine.kernels import attention_short, attention_tiles

    for module in (attention_short, attention_tiles):
        monkeypatch.setattr(module, "has_wgmma", lambda device: False)


def run(function, qkv, dout, **kwargs):
    leaves = [t.detach().requires_grad_() for t in qkv]
    out = function(*leaves, **kwargs)
    return out, torch.autograd.grad(out, leaves, dout.to(out.dtype))


def with_rounded_logits(q, k, v, scale=None):
    """The reference, each logit moved by a rounding step of the largest, and in the backward anew.

    That is what a kernel may do that forms p a second time, from lse and sums in another order.
    """
    g = torch.Generator().manual_seed(7)
    s = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    step = torch.finfo(torch.float32).eps * s.detach().abs().max()

    def moved():
        return s + step * (2 * torch.randint(2, s.shape, generator=g).to(s.device) - 1)

    out = torch.exp(moved() - s.logsumexp(-1, keepdim=True)) @ v
    return out + (torch.softmax(moved(), -1) @ v - out).detach()


def check(impl, qkv, *, softmax_scale=None, view="contiguous", or_wrong_by=None):
    """or_wrong_by: a float64 function whose error counts where it is larger than eager's."""
    g = torch.Generator().manual_seed(9)
    dout = torch.randn(qkv[0].shape, generator=g).to(qkv[0].dtype).to(DEVICE)
    truth, true_grads = run(
        reference.attention, [t.double() for t in qkv], dout.double(), scale=softmax_scale
    )
    plain, plain_grads = run(ops.attention, qkv, dout, scale=softmax_scale, impl="eager")
    if or_wrong_by is not None:
        moved, moved_grads = run(
            or_wrong_by, [t.double() for t in qkv], dout.double(), scale=softmax_scale
        )
        plain, *plain_grads = (
            max(pair, key=lambda t, truth=truth: error(t, truth))
            for *pair, truth in zip(
                (plain, *plain_grads), (moved, *moved_grads), (truth, *true_grads), strict=True
            )
        )
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
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(impl, head_dim, dtype):
    check(impl, make_qkv((1, 1, 20, 18, head_dim), dtype))


@pytest.mark.parametrize("head_dim", [40, 64, 144, 192, 256, 512])
def test_head_dims_of_more_keys_than_are_resident(impl, head_dim):
    dtype = torch.float16 if head_dim in (64, 256) else torch.bfloat16
    check(impl, make_qkv((1, 1, 18, 260, head_dim), dtype))


@pytest.mark.parametrize("shape", [(1, 1, 20, 40, 48), (1, 1, 18, 260, 192), (1, 1, 18, 260, 320)])
def test_sizes_without_wgmma(impl, shape, monkeypatch):
    if impl == "triton":
        old_sizes(monkeypatch)
    check(impl, make_qkv(shape, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["tokens", "packed", "channels first"])
def test_any_strides(impl, view, dtype):
    check(impl, make_qkv((2, 2, 20, 20, 16), dtype), view=view)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0, -0.5])
def test_scale(impl, scale, dtype):
    check(impl, make_qkv((1, 2, 20, 24, 16), dtype), softmax_scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e38, -1e38])
def test_a_huge_scale_picks_one_key(impl, scale, dtype):
    """The largest (smallest) product takes all the weight; nothing overflows."""
    if impl == "eager":
        pytest.skip("PyTorch's SDPA overflows")
    q, k, v = make_qkv((1, 1, 9, 24, 16), dtype)
    best = (q.double() @ k.double().transpose(-1, -2) * (1 if scale > 0 else -1)).argmax(-1)
    out = ops.attention(q, k, v, scale=scale, impl=impl)
    assert torch.equal(out[0, 0], v[0, 0][best[0, 0]])


@pytest.mark.parametrize("seed", range(3))
def test_large_logits_do_not_overflow(impl, seed):
    """Logits of 2,700: one rounding of them, 3e-4, is by how much a weight can be wrong.

    Whether eager's error has it is chance, and so is whether both products of a kernel, forward and
    backward, round alike: matrix libraries differ by CPU. Over 60 seeds eager's error of the output
    is 0 to 385 rounding steps on an AMD EPYC.
    """
    qkv = make_qkv((1, 1, 20, 20, 16), torch.float32, by=30.0, seed=seed)
    check(impl, qkv, or_wrong_by=with_rounded_logits)


def test_expanded_gradient(impl):
    q, k, v = (t.requires_grad_() for t in make_qkv((1, 2, 9, 9, 16), torch.float32))
    ops.attention(q, k, v, impl=impl).sum().backward()  # dout has stride 0
    assert torch.isfinite(q.grad).all()
    assert torch.allclose(v.grad.sum(2), torch.full_like(v.grad.sum(2), 9.0), rtol=1e-4)


def test_empty_batch(impl):
    for shape in ((0, 2, 4, 16), (2, 2, 4, 0)):
        q = torch.empty(shape, device=DEVICE)
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


# name: N, heads, S, D
PACKED = {
    "7x7": (2, 2, 49, 32),
    "one token": (3, 2, 1, 16),
    "40": (1, 2, 20, 40),
    "257": (1, 1, 257, 16),
}


def qkv_view(t: torch.Tensor, view: str) -> torch.Tensor:
    if view == "sliced":
        return torch.cat([t, torch.full_like(t, float("nan"))], 2)[:, :, : t.shape[2]]
    if view == "channels first":  # a 1×1 convolution's output in NCHW
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if view == "samples inside":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    return t.contiguous()


def qkv_reference(qkv, heads, order, scale=None):
    """By copies of single channels, not by strides."""
    width = qkv.shape[2] // 3
    d = width // heads
    at = {
        "3hd": lambda which, h, i: (which * heads + h) * d + i,
        "h3d": lambda which, h, i: (h * 3 + which) * d + i,
        "hd3": lambda which, h, i: (h * d + i) * 3 + which,
    }[order]
    parts = []
    for which in range(3):
        channels = [at(which, h, i) for h in range(heads) for i in range(d)]
        parts.append(qkv[:, :, channels].unflatten(2, (heads, d)).transpose(1, 2))
    return reference.attention(*parts, scale=scale).transpose(1, 2).reshape(*qkv.shape[:2], width)


def check_qkv(impl, shape, order, dtype, *, view="contiguous", dout_view="contiguous", scale=None):
    n, heads, s, d = shape
    g = torch.Generator().manual_seed(s + d)
    qkv = torch.randn(n, s, 3 * heads * d, generator=g).to(dtype).to(DEVICE)
    dout = torch.randn(n, s, heads * d, generator=g).to(dtype).to(DEVICE)

    def results(function, qkv, dout, **kwargs):
        leaf = qkv.detach().requires_grad_()
        out = function(leaf, heads, order, scale=scale, **kwargs)
        return out, torch.autograd.grad(out, leaf, dout)[0]

    truth, true_grad = results(qkv_reference, qkv.double(), dout.double())
    plain, plain_grad = results(ops.attention_qkv, qkv, dout, impl="eager")
    seen = qkv_view(qkv, view)
    out, grad = results(ops.attention_qkv, seen, qkv_view(dout, dout_view), impl=impl)
    assert out.dtype == grad.dtype == dtype and out.shape == dout.shape
    if impl == "triton":
        assert out.is_contiguous() and grad.stride(-1) == 1
        if view in ("contiguous", "samples inside"):
            assert grad.stride() == seen.stride()
    assert_within_budget(out, truth, plain, factor=FORWARD)
    assert_within_budget(grad, true_grad, plain_grad, factor=GRADIENT)
    assert torch.equal(ops.attention_qkv(seen, heads, order, scale=scale, impl=impl), out)


@pytest.mark.parametrize("order", ["3hd", "h3d", "hd3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PACKED)
def test_qkv(impl, shape, dtype, order):
    if shape == "257" and (dtype == torch.float32 or order == "h3d"):
        pytest.skip("the interpreter is slow: 16 bits are enough")
    check_qkv(impl, PACKED[shape], order, dtype)


@pytest.mark.parametrize("order", ["3hd", "hd3"])
@pytest.mark.parametrize("view", ["sliced", "channels first", "samples inside"])
def test_qkv_of_any_strides(impl, view, order):
    check_qkv(impl, (2, 2, 9, 16), order, torch.bfloat16, view=view)


@pytest.mark.parametrize("order", ["3hd", "h3d", "hd3"])
@pytest.mark.parametrize("view", ["sliced", "channels first", "samples inside"])
def test_qkv_gradient_of_other_strides(impl, view, order):
    dtype = torch.float32 if order == "h3d" else torch.float16
    check_qkv(impl, (2, 2, 9, 16), order, dtype, dout_view=view, scale=-0.3)


def test_qkv_gradient_that_is_expanded(impl):
    qkv = torch.randn(1, 9, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    qkv.requires_grad_()
    ops.attention_qkv(qkv, 2, impl=impl).sum().backward()  # dout has stride 0
    dv = qkv.grad[:, :, 64:].sum(1)
    assert torch.isfinite(qkv.grad).all() and torch.allclose(dv, torch.full_like(dv, 9), rtol=1e-4)


def test_qkv_gradcheck_float64():
    qkv = torch.randn(1, 3, 30, dtype=torch.float64, requires_grad=True)
    for order in ("3hd", "h3d", "hd3"):
        assert torch.autograd.gradcheck(
            lambda t, order=order: ops.attention_qkv(t, 2, order, impl="eager"), qkv
        )


def test_qkv_of_an_empty_batch(impl):
    qkv = torch.empty(0, 4, 48, device=DEVICE)
    assert ops.attention_qkv(qkv, 2, impl=impl).shape == (0, 4, 16)


def test_nothing_is_copied_by_qkv(monkeypatch):
    """Neither a transpose nor a cat: the launchers get views of qkv and of one dqkv."""
    pytest.importorskip("triton")
    from engine.kernels import attention

    seen = []
    monkeypatch.setattr(attention, "launch_fwd", lambda *t: seen.extend(t[:3]) or t[3].zero_())
    monkeypatch.setattr(
        attention, "launch_bwd", lambda *t: seen.extend(t[1:4]) or seen.extend(t[6:9])
    )
    for order in ("3hd", "h3d", "hd3"):
        seen.clear()
        qkv = torch.zeros(2, 5, 96)
        out, lse = attention.attention_qkv_fwd(qkv, 2, order, 1.0)
        dqkv = attention.attention_qkv_bwd(out, qkv, out, lse, 2, order, 1.0)
        at = [t.untyped_storage().data_ptr() for t in seen]
        assert at == [qkv.data_ptr()] * 6 + [dqkv.data_ptr()] * 3


def test_explain_of_qkv(capsys):
    qkv = torch.zeros(1, 4, 48)
    ops.explain("attention_qkv", qkv, 2, order="hd3")
    assert "native serves" in " ".join(capsys.readouterr().out.split())
    ops.explain("attention_qkv", qkv.transpose(1, 2).contiguous().transpose(1, 2), 2)
    assert "have stride 4; native and triton copy it once" in capsys.readouterr().out


BAD_QKV = {
    "dims": ((torch.ones(2, 48),), r"expected \(N, S, 3·heads·D\)"),
    "channels": ((torch.ones(2, 4, 50),), "expected a multiple of 6"),
    "no channels": ((torch.ones(2, 4, 0),), "0 channels cannot be split"),
    "order": ((torch.ones(2, 4, 48), 2, "dh3"), "order is 'dh3', expected one of"),
    "heads": ((torch.ones(2, 4, 48), 0), "num_heads is 0, expected"),
    "a name": ((torch.ones(2, 4, 48), "2"), "num_heads is '2', expected"),
    "integers": ((torch.ones(2, 4, 48).int(),), "expected .* floating point"),
    "no tensor": (([1.0],), "qkv is list, expected a tensor"),
}


@pytest.mark.parametrize("case", BAD_QKV)
def test_bad_qkv_is_one_sentence(case):
    (qkv, *rest), sentence = BAD_QKV[case]
    with pytest.raises(ValueError, match=sentence):
        ops.attention_qkv(qkv, *(rest or [2]))


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
