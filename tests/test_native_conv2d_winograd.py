"""Winograd's convolution through NumPy alone: float64 against every instruction set."""

import numpy as np
import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

# Of the sum of the terms' sizes. Its transforms add up to 16 numbers before the products: more
# than a sum of 9 C products rounds, of which half the error is left here.
TERM = 2.0**-22


def convolved(x, w, upsample):
    """(N, H, W, C) and (K, C, 3, 3) → (N, H, W, K) of pixels that are 2×2 with `upsample`."""
    if upsample:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
    wide = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), axis=(1, 2))
    return np.einsum("nhwcij,kcij->nhwk", windows, w, optimize=True)


@st.composite
def cases(draw):
    return {
        "n": draw(st.integers(1, 3)),
        "size": (draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 7, 8, 13, 32]))),
        "c": draw(st.sampled_from([16, 32, 48, 80])),
        "c2": draw(st.sampled_from([0, 0, 16, 64])),
        "k": draw(st.sampled_from([32, 64, 96])),
        "present": draw(st.sets(st.sampled_from(["bias", "add"]))),
        "transposed": draw(st.booleans()),
        "channels_last": draw(st.booleans()),
        "upsample": draw(st.booleans()),
        "threads": draw(st.sampled_from([1, 2, 3])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
def check(kernels, case):
    rng = np.random.default_rng(case["seed"])
    n, (height, width), c, k = case["n"], case["size"], case["c"] + case["c2"], case["k"]
    x = rng.normal(size=(n, height, width, c)).astype(np.float32)
    x *= 10 ** rng.uniform(-3, 3, size=(n, 1, 1, 1)).astype(np.float32)
    w = rng.normal(size=(c, k, 3, 3) if case["transposed"] else (k, c, 3, 3)).astype(np.float32)
    if case["channels_last"]:
        w = np.ascontiguousarray(w.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    effective = w.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1] if case["transposed"] else w
    truth = convolved(x.astype(np.float64), effective.astype(np.float64), case["upsample"])
    terms = convolved(
        abs(x).astype(np.float64), abs(effective).astype(np.float64), case["upsample"]
    )
    bias = rng.normal(size=k).astype(np.float32) if "bias" in case["present"] else None
    add = rng.normal(size=truth.shape).astype(np.float32) if "add" in case["present"] else None
    for term in (bias, add):
        if term is not None:
            truth, terms = truth + term, terms + abs(term)
    parts = [np.ascontiguousarray(part) for part in np.split(x, [case["c"]], axis=3)]
    second = parts[1] if case["c2"] else None
    operands = parts[0], second, w, bias, add, case["transposed"], case["upsample"]
    y = kernels.conv2d_winograd_fwd(*operands, case["threads"])
    assert (abs(y - truth) <= TERM * terms.max((1, 2, 3), keepdims=True)).all()
    assert np.array_equal(y, kernels.conv2d_winograd_fwd(*operands, 1))


def test_conv2d_winograd(kernels):
    check(kernels)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_near(kernels, value, upsample):
    """A pixel reaches the tiles that read it and no further: not another image, not its far end."""
    x = np.ones((2, 9, 9, 16), np.float32)
    x[0, 4, 4, 3] = value
    w = np.ones((32, 16, 3, 3), np.float32)
    y = kernels.conv2d_winograd_fwd(x, None, w, None, None, False, upsample, 1)
    times = 2 if upsample else 1
    reached = ~np.isfinite(y)
    first, last = 4 * times - 1, 5 * times + 1  # its neighbourhood
    assert reached[0, first:last, first:last].all()
    reached[0, first - 1 : last + 1, first - 1 : last + 1] = False
    assert not reached.any()
