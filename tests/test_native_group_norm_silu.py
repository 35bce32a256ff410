"""GroupNorm on the CPU through NumPy alone: float64 against every instruction set."""

import numpy as np
import pytest
from native_build import EPS, decode, encode, in_layout

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
TERM = {"f32": 2.0**-20, "bf16": 2.0**-12, "f16": 2.0**-16}


def reference(x, operands, groups, eps, silu, dy=None):
    """y and, for a cotangent dy, all gradients with the size of the terms they are sums of."""
    n, c, _ = x.shape
    row = {name: np.zeros((n, c, 1)) for name in ("add", "scale", "shift")}
    weight, bias = np.ones((1, c, 1)), np.zeros((1, c, 1))
    for name in row:
        if name in operands:
            row[name] = operands[name][:, :, None]
    if "weight" in operands:
        weight = operands["weight"][None, :, None]
    if "bias" in operands:
        bias = operands["bias"][None, :, None]

    def grouped(v):
        return v.reshape(n, groups, -1)

    def average(v):
        means = grouped(v).mean(-1, keepdims=True)
        return np.broadcast_to(means, grouped(v).shape).reshape(x.shape)

    u = x + row["add"]
    centred = u - average(u)
    rstd = 1 / np.sqrt(average(centred**2) + eps)
    xhat = centred * rstd
    h = xhat * weight + bias
    v = h * (1 + row["scale"]) + row["shift"]
    sigmoid = 1 / (1 + np.exp(-v))
    y = v * sigmoid if silu else v
    if dy is None:
        return y
    dv = dy * sigmoid * (1 + v * (1 - sigmoid)) if silu else dy
    dh = dv * (1 + row["scale"])
    dxhat = dh * weight
    dx = rstd * (dxhat - average(dxhat) - xhat * average(dxhat * xhat))
    dx_terms = rstd * (abs(dxhat) + average(abs(dxhat)) + abs(xhat) * average(abs(dxhat * xhat)))
    return y, {
        "x": (dx, dx_terms),
        "weight": ((dh * xhat).sum((0, 2)), abs(dh * xhat).sum((0, 2))),
        "bias": (dh.sum((0, 2)), abs(dh).sum((0, 2))),
        "add": (dx.sum(2), dx_terms.sum(2)),
        "scale": ((dv * h).sum(2), (abs(dv) * (abs(h) + abs(xhat * weight))).sum(2)),
        "shift": (dv.sum(2), abs(dv).sum(2)),
    }


@st.composite
def cases(draw):
    groups = draw(st.sampled_from([1, 2, 3, 8, 32]))
    per_group = draw(st.sampled_from([1, 2, 3, 5, 6, 10, 18]))
    return {
        "n": draw(st.integers(1, 3)),
        "groups": groups,
        "c": groups * per_group,
        "s": draw(st.sampled_from([1, 4, 8, 16, 48, 49, 63, 64, 1024])),
        "dtype": draw(st.sampled_from(["f32", "bf16", "f16"])),
        "small_dtype": draw(st.sampled_from(["f32", "bf16", "f16"])),
        "channels_last": draw(st.booleans()),
        "dy_channels_last": draw(st.booleans()),
        "present": draw(st.sets(st.sampled_from(["weight", "bias", "add", "scale", "shift"]))),
        "silu": draw(st.booleans()),
        "adds": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def within(got, truth, step: float, what: str) -> None:
    """Four rounding steps of the result's largest value."""
    allowed = 4 * step * max(np.abs(truth).max(), 1e-3)
    assert np.abs(got - truth).max() <= allowed, what


@EXAMPLES
@given(case=cases())
def check_group_norm_silu(kernels, case):
    rng = np.random.default_rng(case["seed"])
    n, c, s, dtype = case["n"], case["c"], case["s"], case["dtype"]
    x = encode(rng.normal(size=(n, c, s)) + 0.5, dtype)
    dy = encode(rng.normal(size=(n, c, s)), dtype)
    more = encode(rng.normal(size=(n, c, s)), dtype)
    operands = {}
    for name in sorted(case["present"]):
        if name in ("weight", "bias"):
            operands[name] = encode(rng.normal(size=c) + 0.5, case["small_dtype"])
        else:  # rows of one wider embedding
            wide = encode(0.5 * rng.normal(size=(n, 2 * c + 3)), case["small_dtype"])
            operands[name] = wide[:, c : 2 * c]
    eps, last, silu = 1e-5, case["channels_last"], case["silu"]
    exact = {name: decode(value) for name, value in operands.items()}
    truth, gradients = reference(decode(x), exact, case["groups"], eps, silu, decode(dy))
    laid = in_layout(x, last)
    y, mean, rstd = kernels.group_norm_silu_fwd(laid, last, operands, case["groups"], eps, silu, 2)
    within(in_layout(decode(y), last), truth, EPS[dtype], "y")

    got = kernels.group_norm_silu_bwd(
        in_layout(dy, case["dy_channels_last"]), case["dy_channels_last"], laid, last, operands,
        mean, rstd, silu, 2, in_layout(more, last) if case["adds"] else None,
    )  # fmt: skip
    if case["adds"]:
        gradients["x"] = gradients["x"][0] + decode(more), gradients["x"][1]
    for name, (value, terms) in gradients.items():
        if name != "x" and name not in operands:
            continue
        found = in_layout(decode(got["x"]), last) if name == "x" else decode(got[name])
        # Terms cancel; each carries the error of a sigmoid that is as exact as dtype needs.
        allowed = TERM[dtype] * terms.max()
        if name == "x":
            allowed += EPS[dtype] * np.abs(value).max()
        assert np.abs(found - value).max() <= allowed, f"d{name}"


def test_group_norm_silu(kernels):
    check_group_norm_silu(kernels)


@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_far_from_zero(kernels, channels_last):
    """mean 1e3, std 1e-2: E[x²] − E[x]² would keep no digit."""
    x = np.random.default_rng(0).normal(1e3, 1e-2, size=(2, 12, 256)).astype(np.float32)
    y, _, _ = kernels.group_norm_silu_fwd(
        in_layout(x, channels_last), channels_last, {}, 3, 1e-5, True, 1
    )
    truth = reference(x.astype(np.float64), {}, 3, 1e-5, True)
    assert np.abs(in_layout(y, channels_last) - truth).max() < 2e-5


@pytest.mark.parametrize(
    "shape, channels_last, lonely",
    [
        ((1, 1, 65536), False, np.arange(65536) % 8192 < 32),
        ((1, 1, 262144), False, np.arange(262144) % 32768 < 32),  # in pieces
        ((1, 4, 16384), True, np.arange(16384) % 1024 == 0),
        ((1, 4, 65536), True, np.arange(65536) % 4096 == 0),  # in pieces
    ],
    ids=["slab", "slab-pieces", "columns", "columns-pieces"],
)
def test_group_norm_misled_first_mean(kernels, shape, channels_last, lonely):
    """The first mean looks at a few elements. Here they alone are large: up to 60 standard
    deviations from the mean, around which sums of squares cancel to a few digits."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x[:, :, lonely] += 1000
    y, mean, rstd = kernels.group_norm_silu_fwd(
        in_layout(x, channels_last), channels_last, {}, 1, 1e-5, True, 2
    )
    exact = x.astype(np.float64)
    assert np.abs(rstd * np.sqrt(exact.var() + 1e-5) - 1).max() < 2e-7
    assert np.abs(mean - exact.mean()).max() < 1e-6 * exact.std()
    truth = reference(exact, {}, 1, 1e-5, True)
    within(in_layout(y, channels_last), truth, EPS["f32"], "y")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("values", ["two", "spikes", "relu"])
def test_group_norm_of_equal_terms(kernels, values, channels_last):
    """Sums of many equal terms: roundings that all go one way."""
    rng = np.random.default_rng(0)
    shape = (2, 8, 4096)
    x = {
        "two": lambda: np.where(rng.random(shape) < 0.3, 0.7, 0.1),
        "spikes": lambda: np.where(rng.random(shape) < 0.01, 3.0, 0.1),
        "relu": lambda: np.maximum(rng.normal(size=shape), 0),
    }[values]().astype(np.float32)
    y, _, rstd = kernels.group_norm_silu_fwd(
        in_layout(x, channels_last), channels_last, {}, 2, 1e-5, True, 1
    )
    exact = x.astype(np.float64)
    truth = 1 / np.sqrt(exact.reshape(2, 2, -1).var(-1) + 1e-5)
    assert np.abs(rstd / truth - 1).max() < 5e-7
    within(in_layout(y, channels_last), reference(exact, {}, 2, 1e-5, True), EPS["f32"], "y")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [1e1, 1e3, 1e4])
def test_group_norm_of_an_add_that_cancels(kernels, size, channels_last):
    """x + add is small and exact; add alone is not."""
    rng = np.random.default_rng(0)
    add = (size * (1 + rng.random((2, 16)))).astype(np.float32)
    x = (rng.normal(size=(2, 16, 64)) - add[:, :, None]).astype(np.float32)
    y, _, _ = kernels.group_norm_silu_fwd(
        in_layout(x, channels_last), channels_last, {"add": add}, 4, 1e-5, True, 1
    )
    truth = reference(x.astype(np.float64), {"add": add.astype(np.float64)}, 4, 1e-5, True)
    within(in_layout(y, channels_last), truth, EPS["f32"], "y")


def test_group_norm_first_mean_overflows(kernels):
    """Around a first mean of 1e18 squares overflow; around the mean they do not."""
    x = np.random.default_rng(0).normal(size=(1, 1, 65536)).astype(np.float32)
    x[:, :, np.arange(65536) % 8192 < 32] = 1e18
    y, _, _ = kernels.group_norm_silu_fwd(x, False, {}, 1, 1e-5, True, 1)
    truth = reference(x.astype(np.float64), {}, 1, 1e-5, True)
    assert np.abs(y - truth).max() < 1e-6 * np.abs(truth).max()  # 1 when the overflow stands


@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_near_overflow(kernels, channels_last):
    x = np.random.default_rng(0).uniform(-65000, 65000, size=(2, 12, 256)).astype(np.float16)
    y, _, _ = kernels.group_norm_silu_fwd(
        in_layout(x, channels_last), channels_last, {}, 3, 1e-5, True, 1
    )
    truth = reference(x.astype(np.float64), {}, 3, 1e-5, True)
    within(in_layout(decode(y), channels_last), truth, EPS["f16"], "y")


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 32, 4096), (3, 96, 1024), (40, 8, 64)])
def test_group_norm_does_not_depend_on_threads(built, shape, channels_last, dtype):
    """Batch 1 is cut into pieces, many samples are not: the same bits from 1, 2 and 7 threads."""
    rng = np.random.default_rng(1)
    x = in_layout(encode(rng.normal(size=shape), dtype), channels_last)
    dy = in_layout(encode(rng.normal(size=shape), dtype), channels_last)
    operands = {"weight": rng.normal(size=shape[1]).astype(np.float32)}
    operands["add"] = rng.normal(size=shape[:2]).astype(np.float32)
    results = []
    for threads in (1, 2, 7):
        y, mean, rstd = built.group_norm_silu_fwd(
            x, channels_last, operands, 4, 1e-5, True, threads
        )
        grads = built.group_norm_silu_bwd(
            dy, channels_last, x, channels_last, operands, mean, rstd, True, threads
        )
        results.append([y, mean, rstd, *grads.values()])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert first.tobytes() == second.tobytes()
    truth = reference(
        decode(in_layout(x, channels_last)),
        {k: decode(v) for k, v in operands.items()}, 4, 1e-5, True,
    )  # fmt: skip
    within(in_layout(decode(results[0][0]), channels_last), truth, EPS[dtype], "y")


def test_group_norm_nan_and_infinity_stay_in_their_group(kernels):
    for bad in (np.nan, np.inf):
        x = np.ones((2, 4, 40), np.float32) * np.arange(40, dtype=np.float32)
        x[1, 2, 7] = bad
        for last in (False, True):
            y, _, _ = kernels.group_norm_silu_fwd(in_layout(x, last), last, {}, 2, 1e-5, True, 1)
            y = in_layout(y, last)
            assert np.isnan(y[1, 2:]).all()
            assert np.isfinite(y[0]).all() and np.isfinite(y[1, :2]).all()
