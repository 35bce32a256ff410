"""Channel RMS norm on the CPU through NumPy alone: float64 against every instruction set."""

import numpy as np
import pytest
from native_build import EPS, decode, encode, in_layout

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
TERM = {"f32": 2.0**-20, "bf16": 2.0**-12, "f16": 2.0**-16}


def reference(x, operands, eps, silu, dy):
    """y, and all gradients with the size of the terms they are sums of."""
    n, c, _ = x.shape
    weight = operands.get("weight", np.ones(c))[None, :, None]
    scale, shift = (operands.get(k, np.zeros((n, c)))[:, :, None] for k in ("scale", "shift"))
    norm = np.sqrt((x**2).sum(1, keepdims=True))
    factor = np.sqrt(c) / np.maximum(norm, eps)
    xhat, gain = x * factor, weight * (1 + scale)
    v = xhat * gain + shift
    sigmoid = 1 / (1 + np.exp(-v))
    dv = dy * sigmoid * (1 + v * (1 - sigmoid)) if silu else dy
    free = norm >= eps
    pull = free * (gain * dv * xhat).mean(1, keepdims=True)
    pull_terms = free * abs(gain * dv * xhat).mean(1, keepdims=True)
    return v * sigmoid if silu else v, {
        "x": (
            factor * (gain * dv - xhat * pull),
            factor * (abs(gain * dv) + abs(xhat) * pull_terms),
        ),
        "weight": (((1 + scale) * dv * xhat).sum((0, 2)), abs((1 + scale) * dv * xhat).sum((0, 2))),
        "scale": ((weight * dv * xhat).sum(2), abs(weight * dv * xhat).sum(2)),
        "shift": (dv.sum(2), abs(dv).sum(2)),
    }


@st.composite
def cases(draw):
    dtypes = st.sampled_from(["f32", "bf16", "f16"])
    return {
        "n": draw(st.integers(1, 3)),
        "c": draw(st.sampled_from([1, 2, 5, 16, 31, 32, 33, 64, 96, 200])),
        "s": draw(st.sampled_from([1, 4, 7, 16, 17, 48, 63, 64, 150, 1030])),
        "dtype": draw(dtypes),
        "small_dtype": draw(dtypes),
        "channels_last": draw(st.booleans()),
        "dy_channels_last": draw(st.booleans()),
        "present": draw(st.sets(st.sampled_from(["weight", "scale", "shift"]))),
        "silu": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-12, 0.25])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@EXAMPLES
@given(case=cases())
def check_rms_norm_silu(kernels, case):
    rng = np.random.default_rng(case["seed"])
    n, c, s, dtype, last = case["n"], case["c"], case["s"], case["dtype"], case["channels_last"]
    x = rng.normal(size=(n, c, s)) * 10 ** rng.uniform(-2, 2, size=(n, 1, s))
    x[:, :, s // 2] = 0
    x, dy = encode(x, dtype), encode(rng.normal(size=(n, c, s)), dtype)
    wide = encode(0.5 * rng.normal(size=(n, 2 * c + 3)), case["small_dtype"])
    operands = {
        "weight": encode(rng.normal(size=c) + 0.5, case["small_dtype"]),
        "scale": wide[:, c : 2 * c],
        "shift": wide[:, :c],
    }
    operands = {name: operands[name] for name in sorted(case["present"])}
    exact = {name: decode(value) for name, value in operands.items()}
    # The zero vector's gradient, 1e12 times the others', is judged in tests/test_rms_norm_silu.py.
    truth, gradients = reference(decode(x), exact, case["eps"], case["silu"], decode(dy))
    laid = in_layout(x, last)
    y, rstd = kernels.rms_norm_silu_fwd(laid, last, operands, case["eps"], case["silu"], 2)
    y = in_layout(decode(y), last)
    assert np.abs(y - truth).max() <= 4 * EPS[dtype] * np.abs(truth).max()
    got = kernels.rms_norm_silu_bwd(
        in_layout(dy, case["dy_channels_last"]), case["dy_channels_last"], laid, last, operands,
        rstd, case["silu"], 2,
    )  # fmt: skip
    for name, (value, terms) in gradients.items():
        if name != "x" and name not in operands:
            continue
        if name == "x":  # pixels differ in size by powers of ten: each is judged by its own
            found = in_layout(decode(got["x"]), last)
            if dtype == "f16":
                value = np.where(abs(value) > 65504, np.copysign(np.inf, value), value)
                same = np.isinf(value) & (found == value)
                value, found = np.where(same, 0, value), np.where(same, 0, found)
            size = np.nan_to_num(np.abs(value), posinf=0).max(1, keepdims=True)
            allowed = TERM[dtype] * terms.max(1, keepdims=True) + EPS[dtype] * size + 1e-7
        else:
            found, allowed = decode(got[name]), TERM[dtype] * terms.max()
        assert (np.abs(found - value) <= allowed).all(), f"d{name}"


def test_rms_norm_silu(kernels):
    check_rms_norm_silu(kernels)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("c", [1000, 4096])
def test_equal_terms(kernels, c, channels_last):
    """Sums of many equal squares: roundings that all go one way."""
    x = np.full((1, c, 70), 0.7, np.float32)
    y, rstd = kernels.rms_norm_silu_fwd(
        in_layout(x, channels_last), channels_last, {}, 1e-12, False, 1
    )
    assert np.abs(rstd * np.float64(x[0, 0, 0]) - 1).max() < 1e-6
    assert np.abs(y - 1).max() < 1e-6


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 32, 4096), (3, 96, 1024), (40, 8, 64)])
def test_does_not_depend_on_threads(built, shape, channels_last, dtype):
    """Batch 1 is cut into pieces, many samples are not: the same bits from 1, 2 and 7 threads."""
    rng = np.random.default_rng(1)
    x, dy = (in_layout(encode(rng.normal(size=shape), dtype), channels_last) for _ in range(2))
    operands = {"weight": rng.normal(size=shape[1]).astype(np.float32)}
    operands["scale"] = rng.normal(size=shape[:2]).astype(np.float32)
    results = []
    for threads in (1, 2, 7):
        y, rstd = built.rms_norm_silu_fwd(x, channels_last, operands, 1e-12, True, threads)
        grads = built.rms_norm_silu_bwd(
            dy, channels_last, x, channels_last, operands, rstd, True, threads
        )
        results.append([y, rstd, *grads.values()])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert first.tobytes() == second.tobytes()
