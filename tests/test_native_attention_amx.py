"""Attention of bfloat16 by AMX through NumPy alone, against float64."""

import numpy as np
import pytest
from native_build import decode, encode

FACTOR, RESULT = 2.0**-8, 2.0**-8  # of every term (P or dS is rounded); of the result (it is)
HEAD_DIMS = [1, 5, 8, 16, 18, 31, 32, 33, 40, 64, 80, 128, 160, 256]


@pytest.fixture
def amx(built):
    if not built.attention_amx_available():
        pytest.skip("this machine, its system or its compiler has no AMX of bfloat16")
    return built


def empty(shape, layout, count, fill=0x7FC1):
    """`count` views (N, H, S, D) of one array full of NaN, and that array."""
    n, h, s, d = shape
    if layout == "nhsd":
        base = np.full((count, n, h, s, d + 3), fill, np.uint16)
        return [base[i, ..., 1 : d + 1] for i in range(count)], base
    if layout == "nshd":
        base = np.full((count, n, s + 1, h, d), fill, np.uint16)
        return [base[i, :, :s].transpose(0, 2, 1, 3) for i in range(count)], base
    if layout == "3hd":
        base = np.full((n, s, count, h, d + 1), fill, np.uint16)
        return [base[:, :, i, :, :d].transpose(0, 2, 1, 3) for i in range(count)], base
    base = np.full((n, s, h, d + 1, count), fill, np.uint16)  # hd3
    return [base[..., :d, i].transpose(0, 2, 1, 3) for i in range(count)], base


def filled(rng, shape, layout, count):
    views, _ = empty(shape, layout, count)
    for view in views:
        view[...] = encode(rng.normal(size=shape), "bf16")
    return views


def forward(amx, q, k, v, scale, layout="nshd", threads=2):
    (out,), base = empty(q.shape, layout, 1)
    lse = np.full(q.shape[:3], np.nan, np.float32)
    amx.attention_fwd_amx(q, k, v, scale, out, lse, threads)
    return out, lse, base


def softmax(q, k, scale):
    s = np.einsum("nhqd,nhkd->nhqk", decode(q), decode(k)) * scale
    top = s.max(-1, keepdims=True)
    weights = np.exp(s - top)
    total = weights.sum(-1, keepdims=True)
    return weights / total, (np.log(total) + top)[..., 0]


def check(got, truth, terms, what):
    allowed = FACTOR * terms + RESULT * np.abs(truth) + 1e-6
    wrong = np.abs(decode(got) - truth) - allowed
    assert (wrong <= 0).all(), f"{what}: {wrong.max():.2e} over the budget"


def check_gradients(got, q, k, v, out, dout, scale):
    """Of each gradient: the value, and the size of the terms it is a sum of."""
    p, _ = softmax(q, k, scale)
    q, k, v, out, dout = (decode(a) for a in (q, k, v, out, dout))
    dp = np.einsum("nhqd,nhkd->nhqk", dout, v)
    truth = np.einsum("nhqk,nhkd->nhqd", p, v)
    ds = p * (dp - (dout * truth).sum(-1, keepdims=True))
    sizes = p * (abs(dp) + abs(dout * out).sum(-1, keepdims=True))
    to_q, to_k = "nhqk,nhkd->nhqd", "nhqk,nhqd->nhkd"
    for what, array, form, weights, terms, factor, other in (
        ("dq", got[0], to_q, ds, sizes, scale, k),
        ("dk", got[1], to_k, ds, sizes, scale, q),
        ("dv", got[2], to_k, p, p, 1.0, dout),
    ):
        value = np.einsum(form, weights, other) * factor
        check(array, value, np.einsum(form, terms, abs(other)) * abs(factor), what)


def cases():
    rng = np.random.default_rng(0)
    lengths = [1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 255, 256, 257, 300]
    for i, d in enumerate(HEAD_DIMS * 3):
        layout = ["nhsd", "nshd", "3hd", "hd3"][i % 4]
        s, sk = (int(n) for n in rng.choice(lengths, 2))
        yield d, s, s if "3" in layout else sk, layout, [1.0, -0.7, 4.0][i % 3]
    yield 8, 40, 1000, "nhsd", 1.0  # several blocks of keys
    yield 40, 600, 70, "nshd", 1.0  # several chunks of queries
    yield 16, 100, 9000, "nhsd", 1.0  # chunks of 32


def split(views, layout, rng, s, sk):
    """q, k, v; where they are not one packed tensor, k and v of another length."""
    if s == sk:
        return views
    return [views[0], *filled(rng, (*views[0].shape[:2], sk, views[0].shape[3]), layout, 2)]


@pytest.mark.parametrize(("d", "s", "sk", "layout", "gain"), list(cases()))
def test_attention(amx, d, s, sk, layout, gain):
    rng = np.random.default_rng(d + s)
    n, h = (1, 1) if s * sk > 30000 else (2, 2)
    scale = float(np.float32(gain / np.sqrt(d)))
    q, k, v = split(filled(rng, (n, h, s, d), layout, 3), layout, rng, s, sk)
    out, lse, base = forward(amx, q, k, v, scale, layout)
    p, truth_lse = softmax(q, k, scale)
    truth, terms = (np.einsum("nhqk,nhkd->nhqd", p, a) for a in (decode(v), abs(decode(v))))
    check(out, truth, terms, "out")
    assert np.abs(lse - truth_lse).max() < 2e-4 + 1e-6 * np.abs(truth_lse).max()
    assert (base == 0x7FC1).sum() == base.size - out.size  # nothing else was written
    (dout,) = filled(rng, q.shape, "nshd", 1)
    packed, of_queries = empty(q.shape, layout, 3)
    dq, dk, dv = packed
    of_keys = np.empty(0, np.uint16)
    if s != sk:
        (dk, dv), of_keys = empty(k.shape, layout, 2)
    amx.attention_bwd_amx(dout, q, k, v, out, lse, scale, dq, dk, dv, 2)
    check_gradients((dq, dk, dv), q, k, v, out, dout, scale)
    untouched = (of_queries == 0x7FC1).sum() + (of_keys == 0x7FC1).sum()
    assert untouched == of_queries.size + of_keys.size - dq.size - dk.size - dv.size


def test_without_lse(amx):
    q, k, v = filled(np.random.default_rng(0), (1, 2, 40, 24), "nshd", 3)
    (out,), _ = empty(q.shape, "nshd", 1)
    amx.attention_fwd_amx(q, k, v, 0.2, out, None, 2)
    assert out.tobytes() == forward(amx, q, k, v, 0.2)[0].tobytes()


@pytest.mark.parametrize("sk", [50, 600])
def test_infinite_and_huge(amx, sk):
    """As plain softmax: NaN where it has NaN, rows of -inf among them, and nowhere else."""
    rng = np.random.default_rng(2)

    def results(change):
        q, k, v = filled(rng, (1, 1, 40, 8), "nhsd", 3)
        k, v = filled(rng, (1, 1, sk, 8), "nhsd", 2)
        change(q, k, v)
        out, lse, _ = forward(amx, q, k, v, 0.5)
        with np.errstate(invalid="ignore"):
            p, _ = softmax(q, k, np.float64(0.5))
            truth = np.einsum("nhqk,nhkd->nhqd", p, decode(v))
        assert (np.isnan(decode(out)) == np.isnan(truth)).all()
        finite = ~np.isnan(truth)
        assert np.abs((decode(out) - truth)[finite]).max(initial=0) < 0.02
        (dout,) = filled(rng, q.shape, "nshd", 1)
        grads = [empty(a.shape, "nshd", 1)[0][0] for a in (q, k, v)]
        amx.attention_bwd_amx(dout, q, k, v, out, lse, 0.5, *grads, 2)
        return truth, [decode(g) for g in grads]

    def one(which, value, row=3):
        def change(*qkv):
            qkv[which][0, 0, row, 1] = encode(value, "bf16")

        return change

    def minus_inf(q, k, v, last=False):  # every score -inf, or every one but the last
        q[..., 0] = encode(1.0, "bf16")
        k[..., 0] = encode(-np.inf, "bf16")
        if last:
            k[0, 0, -1, 0] = encode(1.0, "bf16")

    def huge(q, k, v):
        q[...] = encode(decode(q) * 2.0**40, "bf16")

    truth, grads = results(one(0, np.inf))
    assert np.isnan(truth[0, 0, 3]).all() and not np.isnan(truth[0, 0, 2]).any()
    assert np.isnan(grads[0][0, 0, 3]).all() and not np.isnan(grads[0][0, 0, 2]).any()
    results(one(1, -np.inf))
    results(one(1, np.nan))
    truth, grads = results(one(2, np.nan))
    assert not np.isnan(grads[2]).any()
    assert np.isnan(results(minus_inf)[0]).all()
    assert not np.isnan(results(lambda *qkv: minus_inf(*qkv, last=True))[0]).any()
    truth, grads = results(huge)
    assert not any(np.isnan(g).any() for g in grads)


@pytest.mark.parametrize("shape", [(3, 2, 100, 40), (1, 1, 300, 8), (1, 3, 20, 64)])
def test_does_not_depend_on_threads(amx, shape):
    q, k, v, dout = filled(np.random.default_rng(1), shape, "nshd", 4)
    results = []
    for threads in (1, 2, 7):
        out, lse, _ = forward(amx, q, k, v, 0.2, threads=threads)
        grads = [empty(shape, "nshd", 1)[0][0] for _ in range(3)]
        amx.attention_bwd_amx(dout, q, k, v, out, lse, 0.2, *grads, threads)
        results.append(b"".join(a.tobytes() for a in (out, lse, *grads)))
    assert results[0] == results[1] == results[2]


def test_can_be_forbidden(built):
    """The level of AVX-512 and those below leave AMX out."""
    before = built.attention_amx_available()
    built.limit_isa_level(2)
    try:
        assert not built.attention_amx_available()
    finally:
        built.limit_isa_level(3)
    assert built.attention_amx_available() == before
