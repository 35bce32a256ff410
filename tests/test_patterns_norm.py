"""Each pattern of a norm: what it recognises, that the result is right, and why it lets be."""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from budget import FORWARD, assert_within_budget
from rewriting import check_function, fused

from engine import ops
from engine.backend import Backend
from engine.rewrite import rewrite

N, C, G = 2, 8, 4
X, WEIGHT, BIAS = (N, C, 4, 6), (C,), (C,)
ROW, WIDE = (N, C), (N, C, 1, 1)


def gn(x, w=None, b=None, groups=G):
    return F.group_norm(x, groups, w, b)


def swish(y):
    return y * torch.sigmoid(y)


def high(x):  # x.float() of the tests' low dtypes, that leaves the truth in float64
    return x if x.dtype == torch.float64 else x.float()


def gn32(x, w, b):
    return gn(high(x), w.type(high(x).dtype), b.type(high(x).dtype)).type(x.dtype)


def unsqueezed(t):
    return t.unsqueeze(-1).unsqueeze(-1)


def looped(t):
    while t.dim() < 4:
        t = t[..., None]
    return t


GROUP_NORMS = {  # function, shapes of its tensors, what is put in its place
    "alone": (gn, (X, WEIGHT, BIAS), "GroupNorm"),
    "torch.group_norm, no weights": (
        lambda x: torch.group_norm(x, 2, None, None, 1e-3),
        (X,),
        "GroupNorm",
    ),
    "(N, C, S), transposed": (
        lambda x, w: gn(x.transpose(1, 2), w).transpose(1, 2),
        ((N, 6, C), WEIGHT),
        "GroupNorm",
    ),
    "(N, C, D, H, W)": (
        lambda x, w: F.silu(gn(x, w)),
        ((1, C, 2, 3, 4), WEIGHT),
        "GroupNorm → SiLU",
    ),
    "silu": (lambda x, w, b: F.silu(gn(x, w, b)), (X, WEIGHT, BIAS), "GroupNorm → SiLU"),
    "silu in place": (lambda x, w: F.silu(gn(x, w), inplace=True), (X, WEIGHT), "GroupNorm → SiLU"),
    "silu by hand": (lambda x, w: swish(gn(x, w)), (X, WEIGHT), "GroupNorm → SiLU"),
    "sigmoid as a method": (lambda x: gn(x).sigmoid() * gn(x), (X,), "GroupNorm"),
    "add": (
        lambda x, t, w: F.silu(gn(x + t[:, :, None, None], w)),
        (X, ROW, WEIGHT),
        "add → GroupNorm → SiLU",
    ),
    "add, the other way round": (
        lambda x, t, w: gn(unsqueezed(t) + x, w),
        (X, ROW, WEIGHT),
        "add → GroupNorm",
    ),
    "add of (N, C, 1, 1)": (
        lambda x, t: F.silu(gn(torch.add(x, t.exp()))),
        (X, WIDE),
        "add → GroupNorm → SiLU",
    ),
    "scale and shift": (
        lambda x, s, t: F.silu(gn(x) * (1 + looped(s)) + looped(t)),
        (X, ROW, ROW),
        "GroupNorm → scale and shift → SiLU",
    ),
    "scale and shift, chunks": (
        lambda x, e, w: (lambda s, t: F.silu(gn(x, w).mul(s + 1).add(t)))(
            *e[:, :, None, None].chunk(2, 1)
        ),
        (X, (N, 2 * C), WEIGHT),
        "GroupNorm → scale and shift → SiLU",
    ),
    "scale": (lambda x, s: gn(x) * (s + 1), (X, WIDE), "GroupNorm → scale and shift"),
    "shift": (lambda x, s: F.silu(gn(x) + s), (X, WIDE), "GroupNorm → scale and shift → SiLU"),
    "add, scale, shift": (
        lambda x, a, s, t: F.silu(gn(x + looped(a)) * (1 + s) + t),
        (X, ROW, WIDE, WIDE),
        "add → GroupNorm → scale and shift → SiLU",
    ),
    "pair": (
        lambda a, b, w: F.silu(gn(torch.cat([a, b], 1), w)),
        ((N, 3, 5, 5), (N, 5, 5, 5), WEIGHT),
        "cat → GroupNorm → SiLU",
    ),
    "pair, dim from behind": (
        lambda a, b: gn(torch.cat((a, b), dim=-3)),
        (X, X),
        "cat → GroupNorm",
    ),
    "cast back": (lambda x, w, b: swish(gn32(x, w, b)), (X, WEIGHT, BIAS), "GroupNorm → SiLU"),
    "cast back after silu": (
        lambda x, w, b: F.silu(gn(high(x), high(w), high(b))).to(x.dtype),
        (X, WEIGHT, BIAS),
        "GroupNorm → SiLU",
    ),
    "cast back, add": (
        lambda x, t, w, b: F.silu(gn32(x + looped(t), w, b)),
        (X, ROW, WEIGHT, BIAS),
        "add → GroupNorm → SiLU",
    ),
    "cast back, scale, shift": (
        lambda x, s, t, w, b: F.silu(gn32(x, w, b) * (1 + s) + t),
        (X, WIDE, WIDE, WEIGHT, BIAS),
        "GroupNorm → scale and shift → SiLU",
    ),
}


def tensors(shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", GROUP_NORMS)
def test_group_norm(name, dtype):
    function, shapes, expected = GROUP_NORMS[name]
    counts = {expected: 2 if name == "sigmoid as a method" else 1}
    report = check_function(function, tensors(shapes), dtype)
    assert fused(report) == counts, report
    assert not report.left, report


def rms(x, g, factor=None):
    return F.normalize(x, dim=1) * g * (math.sqrt(x.shape[1]) if factor is None else factor)


RMS_NORMS = {
    "alone": (rms, (X, (1, C, 1, 1)), "RMS norm"),
    "factor first": (
        lambda x, g: 8**0.5 * F.normalize(x, p=2, dim=-3) * g,
        (X, (C, 1, 1)),
        "RMS norm",
    ),
    "no weight": (lambda x: F.normalize(x, dim=1, eps=1e-6) * 8**0.5, (X,), "RMS norm"),
    "silu": (lambda x, g: F.silu(rms(x, g)), (X, (1, C, 1, 1)), "RMS norm → SiLU"),
    "scale and shift": (
        lambda x, g, e: (lambda s, t: F.silu(rms(x, g) * (s + 1) + t))(
            *e[:, :, None, None].chunk(2, 1)
        ),
        (X, (1, C, 1, 1), (N, 2 * C)),
        "RMS norm → scale and shift → SiLU",
    ),
}


@pytest.mark.skipif(not hasattr(ops, "rms_norm_silu"), reason="ops.rms_norm_silu is not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", RMS_NORMS)
def test_rms_norm(name, dtype):
    function, shapes, expected = RMS_NORMS[name]
    report = check_function(function, tensors(shapes), dtype)
    assert fused(report) == {expected: 1} and not report.left, report


@pytest.mark.skipif(not hasattr(ops, "rms_norm_silu"), reason="ops.rms_norm_silu is not there")
def test_a_norm_with_another_factor_is_left():
    report = check_function(lambda x, g: rms(x, g, 2.0), tensors((X, (1, C, 1, 1))), torch.float32)
    assert fused(report) == {} and "not the square root of its 8 channels" in str(report)


def in_place_add(x, t):
    h = x * 2
    h += looped(t)
    return F.silu(gn(h))


def written_later(x, t):
    h = x * 2
    y = F.silu(gn(h + looped(t)))
    h.mul_(3)
    return y + h


def written_between(x):
    h = x * 2
    y = gn(h)
    z = h.relu_()
    return F.silu(y) + z


def two_readers(x):
    y = gn(x)
    return F.silu(y) + y


NEAR_MISSES = {  # function, shapes, what is still done, a part of the sentence
    "silu, two readers": (two_readers, (X,), "GroupNorm", "other readers beside SiLU"),
    "times something": (lambda x, s: gn(x) * s, (X, WIDE), "GroupNorm", "else than 1 + scale"),
    "scale, two readers": (
        lambda x, s: (lambda y: y * (1 + s) + y)(gn(x)),
        (X, WIDE),
        "GroupNorm",
        "other readers beside its scale",
    ),
    "sum, two readers": (
        lambda x, t: (lambda h: gn(h) + h)(x + looped(t)),
        (X, ROW),
        "GroupNorm",
        "the sum has other readers",
    ),
    "one row for all": (
        lambda x, t: gn(x + looped(t)),
        (X, (1, C)),
        "GroupNorm",
        "not one number per sample",
    ),
    "sum in place": (in_place_add, (X, ROW), "GroupNorm → SiLU", "the sum is written in place"),
    "written later": (written_later, (X, ROW), "GroupNorm → SiLU", "must be kept as it was"),
    "pair, two readers": (
        lambda a, b: (lambda h: gn(h) + h)(torch.cat([a, b], 1)),
        (X, X),
        "GroupNorm",
        "it stays",
    ),
    "three": (lambda a: gn(torch.cat([a, a, a], 1)), (X,), "GroupNorm", "3 tensors"),
    "float32 result wanted": (
        lambda x: gn(x.float()) * 3.0,
        (X,),
        "GroupNorm",
        "would lose digits",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_reported(name):
    function, shapes, expected, sentence = NEAR_MISSES[name]
    if name == "float32 result wanted":
        x = torch.randn(X).bfloat16()
        report = compiled_report(function, x)
    else:
        report = check_function(function, tensors(shapes), torch.float32)
    assert fused(report) == {expected: 1}, report
    assert sentence in str(report) and len(report.left) == 1, report


def compiled_report(function, *args):
    torch.compiler.reset()
    backend = Backend("eager")
    out, expected = torch.compile(function, backend=backend)(*args), function(*args)
    assert out.dtype == expected.dtype and torch.allclose(out, expected, atol=1e-5)
    return backend.report


def test_float64_is_left():
    report = compiled_report(lambda x: F.silu(gn(x)), torch.randn(X).double())
    assert not report.replaced and "torch.float64" in str(report)


def test_nothing_is_read_past_a_write():
    """The op would read x where SiLU stands: after the write."""
    report = compiled_report(written_between, torch.randn(X))
    assert fused(report) == {"GroupNorm": 1} and "writes in place" in str(report)


def test_no_ops_are_taken_out():
    def function(x, w):
        h = F.dropout(x * 1, 0.0) / 1.0
        h = F.dropout(h, 0.3, training=False).to(x.dtype)
        return F.conv2d(h.contiguous(), w)

    report = check_function(function, tensors((X, (3, C, 1, 1))), torch.float32)
    assert report.counts() == {
        "cast to the same dtype": 1,
        "contiguous ahead of a convolution": 1,
        "division by 1": 1,
        "dropout of nothing": 2,
        "product with 1": 1,
    }


def test_what_looks_like_a_no_op_stays_where_somebody_could_tell():
    def function(x):
        h = x / 1.0
        h.view(2, 2)[0].add_(1)
        return h * 1.5, x / 1.0, F.dropout(x, 0.0), torch.ones(3, dtype=torch.int64) / 1

    x = torch.zeros(4)
    compiled = torch.compile(function, backend="engine", options={"inner": "eager"})
    torch.compiler.reset()
    added, copy, dropped, quotient = compiled(x)
    copy.add_(5)
    assert x.eq(0).all() and added.sum() == 3 and quotient.dtype == torch.float32


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside):
    """The fused op rounds where the convolution behind it would."""

    def plain(x, w, c):
        return F.conv2d(F.silu(gn(F.conv2d(x, c), w)), c)

    def autocast(function, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*args)

    torch.compiler.reset()
    backend = Backend("eager")
    args = tensors((X, WEIGHT, (C, C, 1, 1)))
    if inside:
        got = torch.compile(autocast, backend=backend)(plain, *args)
    else:
        got = autocast(torch.compile(plain, backend=backend), *args)
    assert fused(backend.report) == {"GroupNorm → SiLU": 1}
    expected, truth = autocast(plain, *args), plain(*(t.double() for t in args))
    assert got.dtype == expected.dtype == torch.bfloat16
    assert_within_budget(got, truth, expected, factor=FORWARD)


@pytest.mark.parametrize("lowered", [True, False])
def test_norms_that_autocast_computes_in_float32(lowered):
    """As on CUDA: the captured calls are plain, their results' dtypes tell what autocast does."""
    graph = torch.fx.Graph()

    def node(made, shape, dtype):
        made.meta["example_value"] = torch.empty(shape, dtype=dtype)
        return made

    def call(function, *args, dtype):
        return node(graph.call_function(function, args), X, dtype)

    x = node(graph.placeholder("x"), X, torch.bfloat16)
    t = node(graph.placeholder("t"), ROW, torch.bfloat16)
    c = node(graph.placeholder("c"), (C, C, 1, 1), torch.float32)
    index = (slice(None), slice(None), None, None)
    wide = node(graph.call_function(operator.getitem, (t, index)), WIDE, torch.bfloat16)
    h = call(operator.add, x, wide, dtype=torch.bfloat16)
    y = call(F.silu, call(F.group_norm, h, G, dtype=torch.float32), dtype=torch.float32)
    graph.output(call(torch.conv2d, y, c, dtype=torch.bfloat16 if lowered else torch.float32))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    report = rewrite(gm)
    norm = next(n for n in gm.graph.nodes if n.target is ops.group_norm_silu)
    if lowered:
        assert norm.args[0] is x and norm.meta["example_value"].dtype == torch.bfloat16
        assert fused(report) == {"add → GroupNorm → SiLU": 1} and not report.left
    else:
        assert norm.args[0].target == "to" and norm.meta["example_value"].dtype == torch.float32
        assert fused(report) == {"GroupNorm → SiLU": 1} and "would lose digits" in str(report)


def test_dynamic_shapes_compile_once():
    def function(x, t, w):
        return F.silu(gn(x + t[:, :, None, None], w))

    torch.compiler.reset()
    backend = Backend("eager")
    compiled = torch.compile(function, backend=backend, dynamic=True, fullgraph=True)
    for n, side in ((2, 4), (3, 6), (5, 9)):
        x, t, w = tensors(((n, C, side, side + 1), (n, C), WEIGHT))
        assert torch.allclose(compiled(x, t, w), function(x, t, w), atol=1e-5)
    assert fused(backend.report) == {"add → GroupNorm → SiLU": 1}
