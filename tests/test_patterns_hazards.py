"""What looks like a pattern and is none: writes, switched gradients, shapes that broadcast.

Each function is compiled and must give the plain one's results, gradients and errors (none).
"""

import pytest
import torch
import torch.nn.functional as F
from rewriting import fused

from engine.backend import Backend

N, C, G = 2, 8, 4
X, ROW, WIDE = (N, C, 4, 6), (N, C), (N, C, 1, 1)
FLAT, FLAT_K = (4, 6, 8), (4, 5, 8)
E = torch.einsum


def gn(x):
    return F.group_norm(x, G)


def looped(t):
    return t[:, :, None, None]


def written_between(write):
    """The sum is read where the norm stands: after a write into its first operand."""

    def function(x, t):
        h = x * 2
        total = h + looped(t)
        write(h)
        return gn(total) + h

    return function


def copied(write):
    """A division by 1 is a copy for whoever writes."""

    def function(x):
        h = x * 2
        copy = h / 1.0
        write(h)
        return copy + h

    return function


def scale_written(x, s):
    s = s * 1.5
    scale = 1 + looped(s)
    s.mul_(3)
    return gn(x) * scale


def later(use):
    """What the op keeps for its backward and PyTorch does not, is written afterwards."""

    def function(x, t):
        t = t * 1.5
        y = use(x, t)
        t.mul_(3)
        return y * looped(t)

    return function


def query_written(q, k, v):
    q = q * 1.5
    out = ((q * 0.3) @ k.mT).softmax(-1) @ v
    return out + q.mul_(2)


def upcast_then_written(x):
    x = x.bfloat16() * 2
    y = F.silu(gn(x.float()).to(x.dtype))
    x += y
    return x.float()


def without_gradient(make, use):
    def function(x, t):
        with torch.no_grad():
            t = make(t)
        return use(x, t)

    return function


def read_by_nobody(x):
    """The cast and what it reads go; not the write behind them."""
    h = x * 2
    F.group_norm(F.silu(h, inplace=True).bfloat16().float(), G).to(torch.bfloat16).float()
    return gn(h)


def inference(x):
    with torch.inference_mode():
        y = gn(x)
    return F.silu(y) * x


def mapped(x):
    return torch.vmap(lambda u: F.silu(F.group_norm(u[None], G))[0])(x)


HAZARDS = {  # function, shapes, what is still replaced
    "hardswish, in place unnamed": (
        written_between(lambda h: F.hardswish(h, True)),
        (X, ROW),
        {"GroupNorm": 1},
    ),
    "hardtanh, in place unnamed": (
        written_between(lambda h: F.hardtanh(h, -0.1, 0.1, True)),
        (X, ROW),
        {"GroupNorm": 1},
    ),
    "copy, by name": (copied(lambda h: F.hardswish(input=h, inplace=True)), (X,), {}),
    "copy, out": (copied(lambda h: torch.exp(torch.zeros(X), out=h.detach())), (X,), {}),
    "scale written after 1 + scale": (scale_written, (X, ROW), {"GroupNorm": 1}),
    "addend written later": (later(lambda x, t: gn(x + looped(t))), (X, ROW), {"GroupNorm": 1}),
    "scale written later": (
        later(lambda x, t: gn(x) * (1 + looped(t))),
        (X, ROW),
        {"GroupNorm": 1},
    ),
    "shift written later": (later(lambda x, t: gn(x) + looped(t)), (X, ROW), {"GroupNorm": 1}),
    "q written later": (query_written, (FLAT, FLAT_K, FLAT_K), {}),
    "upcast input written later": (upcast_then_written, (X,), {"GroupNorm": 1}),
    "product with 1, no gradient": (
        without_gradient(lambda t: t * 1.0, lambda x, t: x * t),
        (X, WIDE),
        {},
    ),
    "view, no gradient": (
        without_gradient(looped, lambda x, t: gn(x + t)),
        (X, ROW),
        {"add → GroupNorm": 1},
    ),
    "scale, no gradient": (
        without_gradient(lambda t: 1 + t, lambda x, t: gn(x) * t),
        (X, WIDE),
        {"GroupNorm": 1},
    ),
    "write read by nobody": (read_by_nobody, (X,), {"GroupNorm": 1}),
    "inference mode": (inference, (X,), {"GroupNorm": 1}),
    "vmap": (mapped, (X,), {}),
    "add_(other=)": (
        lambda x, t: gn((x * 2).add_(other=looped(t))),
        (X, ROW),
        {"GroupNorm": 1},
    ),
    "unsqueeze(input=)": (
        lambda x, t: gn(x + torch.unsqueeze(input=t[..., None], dim=-1)),
        (X, ROW),
        {"add → GroupNorm": 1},
    ),
    "first operand broadcasts": (
        lambda x, t: gn(x + looped(t)),
        ((1, C, 4, 4), ROW),
        {"GroupNorm": 1},
    ),
    "first operand has no batch": (
        lambda x, t: gn(x + looped(t)),
        ((C, 4, 4), ROW),
        {"GroupNorm": 1},
    ),
    "normalize with eps 0": (lambda x: F.normalize(x, dim=1, eps=0.0) * C**0.5, (X,), {}),
    "scaled result": (
        lambda q, k, v: torch.baddbmm(q, (q @ k.mT).softmax(-1), v, beta=0, alpha=2),
        (FLAT, FLAT_K, FLAT_K),
        {},
    ),
    "one key in v": (
        lambda q, k, v: E("bij,bjd->bid", E("bid,bjd->bij", q, k).softmax(-1), v),
        (FLAT, FLAT_K, (4, 1, 8)),
        {},
    ),
    "one channel in k": (
        lambda q, k, v: E("bij,bjd->bid", E("bid,bjd->bij", q, k).softmax(-1), v),
        (FLAT, (4, 5, 1), FLAT_K),
        {},
    ),
}


def run(function, shapes):
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]
    out = function(*leaves)
    cotangent = torch.randn(out.shape, generator=g)
    return out, torch.autograd.grad(out, leaves, cotangent, allow_unused=True)


@pytest.mark.parametrize("name", HAZARDS)
def test_hazard(name):
    function, shapes, expected = HAZARDS[name]
    torch.compiler.reset()
    backend = Backend("eager")
    out, gradients = run(torch.compile(function, backend=backend), shapes)
    plain, expected_gradients = run(function, shapes)
    close = {"atol": 0.05, "rtol": 0.05} if "upcast" in name else {"atol": 1e-5, "rtol": 1e-4}
    assert torch.allclose(out, plain, **close)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or torch.allclose(got, wanted, **close)
    assert fused(backend.report) == expected, backend.report


def test_a_copy_stays_where_both_leave_the_graph():
    def broken(x):
        h = torch.relu(x)
        copy = h / 1.0
        torch._dynamo.graph_break()
        copy.add_(1)
        return h

    torch.compiler.reset()
    x = torch.randn(4)
    compiled = torch.compile(lambda x: (x * 1.0).view(-1), backend=Backend("eager"))
    assert compiled(x).data_ptr() != x.data_ptr()
    assert torch.equal(torch.compile(broken, backend=Backend("eager"))(x), broken(x))


def test_scores_of_wider_q_and_k_are_not_rounded():
    """Exact casts of them are: the op's scores are float32 anyway."""

    def mixed(q, k, v):
        return (q @ k.mT).softmax(-1).to(v.dtype) @ v

    def exact(q, k, v):
        return (q.float() @ k.float().mT * 0.3).softmax(-1).to(v.dtype) @ v

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=g) for s in (FLAT, FLAT_K, FLAT_K))
    q, k, v = q * 3, k * 3, v.bfloat16()
    for function, expected in ((mixed, {}), (exact, {"attention": 1})):
        torch.compiler.reset()
        backend = Backend("eager")
        low = (q, k) if function is mixed else (q.bfloat16(), k.bfloat16())
        torch.compile(function, backend=backend)(*low, v)
        assert fused(backend.report) == expected, backend.report


def test_an_eps_that_is_not_constant():
    """Dynamo makes a float a symbol when it has seen a second value."""
    torch.compiler.reset()
    norm = torch.nn.GroupNorm(G, C)
    functions = norm, lambda x: F.normalize(x, dim=1, eps=norm.eps) * C**0.5
    for function in functions:
        compiled = torch.compile(lambda x, f=function: f(x) * 2, backend=Backend("eager"))
        for norm.eps in (0.1, 0.5, 0.01):
            x = torch.randn(X)
            assert torch.allclose(compiled(x), function(x) * 2, atol=1e-5)


def test_a_scale_that_is_not_constant():
    torch.compiler.reset()
    q = torch.randn(2, 3, 5, 8)

    def function(q, scale):
        by_hand = (q @ q.mT * scale).softmax(-1) @ q
        return F.scaled_dot_product_attention(q, q, q, scale=scale) + by_hand

    compiled = torch.compile(function, backend=Backend("eager"))
    for scale in (0.1, 0.5, 0.7):
        assert torch.allclose(compiled(q, scale), function(q, scale), atol=1e-5)
