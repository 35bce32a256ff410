"""Attention on the CPU through NumPy alone: float64 against every instruction set."""

import numpy as np
import pytest
from native_build import EPS, decode, encode

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)
GRADIENTS = ("q", "k", "v")


def reference(q, k, v, scale, dout):
    """out, lse, and per gradient its value and the size of the terms it is a sum of."""
    s = q @ k.swapaxes(-1, -2) * scale
    top = s.max(-1, keepdims=True)
    total = np.exp(s - top).sum(-1, keepdims=True)
    p, lse = np.exp(s - top) / total, top + np.log(total)
    out, dp = p @ v, dout @ v.swapaxes(-1, -2)
    delta = (dout * out).sum(-1, keepdims=True)
    ds, terms = scale * p * (dp - delta), abs(scale) * p * (abs(dp) + abs(delta))
    turned, turned_terms = ds.swapaxes(-1, -2), terms.swapaxes(-1, -2)
    grads = {
        "q": (ds @ k, (terms @ abs(k)).max()),
        "k": (turned @ q, (turned_terms @ abs(q)).max()),
        "v": (p.swapaxes(-1, -2) @ dout, (p.swapaxes(-1, -2) @ abs(dout)).max()),
    }
    return out, lse[..., 0], grads


def laid_out(array, order):
    """The same (N, H, S, D) with another order in memory, NaN around it."""
    axes = {"nhsd": (0, 1, 2, 3), "nshd": (0, 2, 1, 3), "nhds": (0, 1, 3, 2)}[order]
    n, h, s, d = array.shape
    nothing = {"u": 0x7FC0, "f": np.nan}[array.dtype.kind]
    wide = np.full((n, h, s, d + 3), nothing, array.dtype)
    wide[..., 1 : d + 1] = array
    return np.ascontiguousarray(wide.transpose(axes)).transpose(np.argsort(axes))[..., 1 : d + 1]


@st.composite
def cases(draw):
    sizes = st.sampled_from([1, 2, 7, 16, 17, 31, 32, 33, 48, 65, 96, 97, 130, 260])
    return {
        "n": draw(st.integers(1, 2)),
        "h": draw(st.integers(1, 3)),
        "s": draw(sizes),
        "sk": draw(sizes),
        "d": draw(st.sampled_from([1, 3, 8, 12, 16, 20, 31, 40, 64, 100, 256])),
        "dtype": draw(st.sampled_from(["f32", "bf16", "f16"])),
        "orders": [draw(st.sampled_from(["nhsd", "nshd", "nhds"])) for _ in range(4)],
        "scale": draw(st.sampled_from([None, 1.0, -0.3, 0.0])),
        "mean": draw(st.sampled_from([0.0, 3.0])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@EXAMPLES
@given(case=cases())
def check_attention(kernels, case):
    rng = np.random.default_rng(case["seed"])
    n, h, s, sk, d, dtype = (case[name] for name in ("n", "h", "s", "sk", "d", "dtype"))
    scale = d**-0.5 if case["scale"] is None else case["scale"]
    q, k, v, dout = (
        laid_out(encode(rng.normal(size=(n, h, length, d)) + mean, dtype), order)
        for length, mean, order in zip(
            (s, sk, sk, s), (0, case["mean"], 0, 0), case["orders"], strict=True
        )
    )
    exact = [decode(t) for t in (q, k, v)]
    truth, true_lse, gradients = reference(*exact, scale, decode(dout))
    out, lse = kernels.attention_fwd(q, k, v, scale, 2)
    # Scores are sums of float32 products: their error is one of |q| |k| scale.
    length = abs(scale) * np.linalg.norm(exact[0], axis=-1).max()
    shift = 2.0**-22 * length * np.linalg.norm(exact[1], axis=-1).max()
    size = np.abs(exact[2]).max()
    allowed = (EPS[dtype] + 2.0**-21 + 4 * shift) * size
    allowed += (2.0**-12 if dtype == "bf16" else 2.0**-17 if dtype == "f16" else 0) * size
    assert np.abs(decode(out) - truth).max() <= allowed
    assert np.abs(lse - true_lse).max() <= 2.0**-21 * (1 + np.abs(true_lse).max()) + 4 * shift + (
        2.0**-12 if dtype == "bf16" else 2.0**-17
    )
    got = kernels.attention_bwd(dout, q, k, v, out, lse, scale, 2)
    term = {"f32": 2.0**-19, "bf16": 2.0**-6, "f16": 2.0**-9}[dtype] + 4 * shift
    for name, (value, terms) in gradients.items():
        found = decode(got[name])
        allowed = term * terms + EPS[dtype] * np.abs(value).max() + 1e-30
        assert np.abs(found - value).max() <= allowed, f"d{name}"


def test_attention(kernels):
    check_attention(kernels)


def some(shape, dtype, seed=0, by=1.0):
    n, h, s, sk, d = shape
    rng = np.random.default_rng(seed)
    return [encode(rng.normal(size=(n, h, i, d)) * by, dtype) for i in (s, sk, sk, s)]


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("shape", [(1, 1, 300, 520, 24), (3, 2, 70, 70, 40), (2, 20, 33, 64, 8)])
def test_does_not_depend_on_threads(built, shape, dtype):
    """Few heads are cut along the keys, many are not: the same bits from 1, 2 and 7 threads."""
    q, k, v, dout = some(shape, dtype)
    results = []
    for threads in (1, 2, 7):
        out, lse = built.attention_fwd(q, k, v, 0.2, threads)
        grads = built.attention_bwd(dout, q, k, v, out, lse, 0.2, threads)
        results.append([out, lse, *grads.values()])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert first.tobytes() == second.tobytes()


def test_many_keys(kernels):
    """Scores that grow from block to block: each block's sums are rescaled."""
    q, k, v, dout = some((1, 1, 40, 4096, 16), "f32", seed=2)
    k *= np.linspace(0.1, 3, 4096, dtype=np.float32)[:, None]
    truth, lse, gradients = reference(*(t.astype(np.float64) for t in (q, k, v)), 0.25, dout)
    out, found = kernels.attention_fwd(q, k, v, 0.25, 1)
    assert np.abs(out - truth).max() < 2e-6 and np.abs(found - lse).max() < 1e-5
    grads = kernels.attention_bwd(dout, q, k, v, out, found, 0.25, 1)
    for name, (value, terms) in gradients.items():
        assert np.abs(grads[name] - value).max() <= 4e-6 * terms, name


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_hidden_keys(kernels, dtype):
    """Scores of -inf, a whole block of them first: weight 0; all of them: NaN, as 0 / 0 is."""
    q, k, v, _ = some((1, 1, 3, 300, 4), dtype, seed=1)
    infinity = {"f32": np.inf, "f16": np.inf, "bf16": 0x7F80}[dtype]
    one = {"f32": 1.0, "f16": 1.0, "bf16": 0x3F80}[dtype]
    minus = {"f32": -1.0, "f16": -1.0, "bf16": 0xBF80}[dtype]
    q[..., 0] = one
    hidden = k.copy()
    hidden[:, :, :250, 0] = -infinity if dtype != "bf16" else 0xFF80
    out, lse = kernels.attention_fwd(q, hidden, v, 0.5, 1)
    seen, seen_lse = kernels.attention_fwd(q, k[:, :, 250:], v[:, :, 250:], 0.5, 1)
    assert np.abs(decode(out) - decode(seen)).max() <= 4 * EPS[dtype]
    assert np.abs(lse - seen_lse).max() <= 1e-4
    hidden[..., 0] = infinity
    q[..., 0, 0] = minus  # the first row sees -inf everywhere, the others +inf
    out, lse = kernels.attention_fwd(q, hidden, v, 0.5, 1)
    assert np.isnan(decode(out)).all()


def test_nan_stays_in_its_row(kernels):
    q, k, v, dout = some((1, 2, 70, 140, 8), "f32")
    clean, _ = kernels.attention_fwd(q, k, v, 0.3, 1)
    q[0, 1, 33, 5] = np.nan
    out, lse = kernels.attention_fwd(q, k, v, 0.3, 1)
    assert np.isnan(out[0, 1, 33]).all() and np.isnan(lse[0, 1, 33])
    rest = np.ones(out.shape, bool)
    rest[0, 1, 33] = False
    assert (out[rest] == clean[rest]).all()
    grads = kernels.attention_bwd(dout, q, k, v, out, lse, 0.3, 1)
    assert np.isnan(grads["q"][0, 1, 33]).all() and np.isnan(grads["k"][0, 1]).all()
    assert not any(np.isnan(t[0, 0]).any() for t in grads.values())


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_huge_scores_have_finite_gradients(kernels, dtype):
    q, k, v, dout = some((1, 1, 40, 70, 16), dtype)
    q = encode(decode(q) * 2.0**40, dtype)
    out, lse = kernels.attention_fwd(q, k, v, 0.25, 1)
    grads = kernels.attention_bwd(dout, q, k, v, out, lse, 0.25, 1)
    assert all(np.isfinite(decode(t)).all() for t in (out, *grads.values()))


def test_large_scores_of_equal_keys(kernels):
    """Equal keys share the weight, however large their common score."""
    v = np.random.default_rng(0).normal(size=(1, 1, 77, 12)).astype(np.float32)
    q = np.full((1, 1, 5, 12), 1e3, np.float32)
    out, lse = kernels.attention_fwd(q, np.full_like(v, 1e3), v, 1.0, 1)
    assert np.abs(out - v.mean(2, keepdims=True)).max() < 1e-6
    assert np.abs(lse / (12e6 + np.log(77)) - 1).max() < 1e-6
