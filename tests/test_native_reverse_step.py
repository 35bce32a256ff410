"""Noise and reverse step on the CPU through NumPy alone, on every instruction set."""

import numpy as np
import pytest
from native_build import EPS, decode, encode, in_layout

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def test_philox_known_answers(built):
    """Random123's vectors for Philox4x32-10."""
    ones = 0xFFFFFFFF
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, words in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, [ones] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        assert built.philox_words(counter, key) == words


@EXAMPLES
@given(
    n=st.integers(1, 300),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 2),
    offset=st.one_of(st.integers(0, 70), st.integers(2**34 - 200, 2**34 + 5)),
)
def check_noise_bits(kernels, n, seed, step, stream, offset):
    out = np.empty(n, np.float32)
    kernels.noise(out, seed, step, stream, offset, 1)
    truth = kernels.scalar_noise(n, seed, step, stream, offset)
    assert out.tobytes() == truth.tobytes()
    for dtype in ("bf16", "f16"):
        small = encode(np.zeros(n), dtype)
        kernels.noise(small, seed, step, stream, offset, 1)
        assert small.tobytes() == encode(truth, dtype).tobytes()


def test_noise_bits(kernels):
    check_noise_bits(kernels)


def test_noise_is_normal_and_independent_of_threads(built):
    whole = np.empty(1_000_003, np.float32)
    built.noise(whole, 7, 3, 0, 1, 1)
    split = np.empty_like(whole)
    built.noise(split, 7, 3, 0, 1, 5)
    assert whole.tobytes() == split.tobytes()
    assert abs(whole.mean()) < 5e-3 and abs(whole.std() - 1) < 5e-3
    assert abs((whole**4).mean() - 3) < 0.05 and np.abs(whole).max() < 5.77


@st.composite
def steps(draw):
    boolean, dtype = st.booleans(), st.sampled_from(["f32", "bf16", "f16"])
    return {
        "shape": (draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 4, 17, 40])),
                  draw(st.sampled_from([1, 49, 64, 300]))),
        "dtype": draw(dtype),
        "model_dtype": draw(dtype),
        "layouts": (draw(boolean), draw(boolean), draw(boolean)),
        "noise": draw(st.sampled_from(["given", "drawn", "none"])),
        "clip": draw(st.sampled_from([float("inf"), 1.0])),
        "offset": draw(st.integers(0, 9)),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }  # fmt: skip


@EXAMPLES
@given(case=steps())
def check_reverse_step(kernels, case):
    rng = np.random.default_rng(case["seed"])
    n, c, s = case["shape"]
    x, noise = (encode(rng.normal(size=(n, c, s)), case["dtype"]) for _ in range(2))
    model_out = encode(rng.normal(size=(n, c, s)), case["model_dtype"])
    coeffs = rng.normal(size=(4, 5)).astype(np.float32)
    if case["noise"] == "none":
        coeffs[2, 4] = 0
    x_last, model_last, noise_last = case["layouts"]
    got = kernels.reverse_step_fwd(
        in_layout(x, x_last), x_last, in_layout(model_out, model_last), model_last, coeffs, 2,
        case["seed"], in_layout(noise, noise_last) if case["noise"] == "given" else None,
        noise_last, case["clip"], case["offset"], 2,
    )  # fmt: skip
    z = decode(noise)
    if case["noise"] == "drawn":
        z = kernels.scalar_noise(n * c * s, case["seed"], 2, 0, case["offset"]).reshape(n, c, s)
    a, b, k, d, sigma = coeffs[2].astype(np.float64)
    x0 = np.clip(a * decode(x) + b * decode(model_out), -case["clip"], case["clip"])
    truth = k * x0 + d * decode(x) + sigma * z
    assert np.abs(in_layout(decode(got), x_last) - truth).max() <= EPS[case["dtype"]] * max(
        8.0, np.abs(truth).max()
    )


def test_reverse_step(kernels):
    check_reverse_step(kernels)


@EXAMPLES
@given(case=steps())
def check_general_step(kernels, case):
    """All operands at once: the tiles, the exponential and the selection of every level."""
    rng = np.random.default_rng(case["seed"])
    n, c, s = case["shape"]
    dtype, last = case["dtype"], case["layouts"][0]
    out_dtype, channels = case["model_dtype"], {"model_out": 2 * c, "uncond": 2 * c}
    operands = {
        name: encode(
            rng.uniform(-2, 2, size=(n, channels.get(name, c), s)),
            out_dtype if name in channels else dtype,
        )
        for name in ("x", "model_out", "uncond", "grad", "x0_prev")
    }
    row = rng.normal(size=10).astype(np.float32)
    row[8:] = -2, 1  # log variances
    position = 0.77 * (c * s - 1)
    rank, fraction = int(position), position % 1
    x_next, x0, model_in, threshold = kernels.reverse_step_general_fwd(
        {k: in_layout(t, last) for k, t in operands.items()}, last, row, case["seed"], 1.5, rank,
        fraction, 2,
    )  # fmt: skip
    a, b, k, d, sigma, e, g0, g1, lo, hi = row.astype(np.float64)
    x, out, uncond, grad, prev = (decode(t).astype(np.float64) for t in operands.values())
    v, out = out[:, c:], uncond[:, :c] + 1.5 * (out - uncond)[:, :c]
    wanted = a * x + b * out + g0 * grad
    ordered = np.sort(np.abs(wanted).reshape(n, -1))
    high = ordered[:, min(rank + 1, c * s - 1)]
    m = np.maximum(1, ordered[:, rank] + fraction * (high - ordered[:, rank]))
    assert np.allclose(threshold, m, rtol=1e-6, atol=0)
    m = m[:, None, None]
    wanted = np.clip(wanted, -m, m) / m
    z = kernels.scalar_noise(n * c * s, case["seed"], 0, 0, 0).reshape(n, c, s)
    variance = np.exp(lo + (hi - lo) * (v + 1) / 2)
    truth = k * wanted + d * x + e * prev + g1 * variance * grad + sigma * np.sqrt(variance) * z
    near = {"rtol": 4 * EPS[dtype], "atol": 16 * EPS[dtype]}  # eight terms, two exponentials
    assert np.allclose(in_layout(decode(x0), last), wanted, **near)
    assert np.allclose(in_layout(decode(x_next), last), truth, **near)
    rounded = in_layout(decode(model_in.reshape(x_next.shape)), last)
    assert np.allclose(rounded, truth, rtol=EPS["bf16"], atol=EPS["bf16"])


def test_general_step(kernels):
    check_general_step(kernels)


def test_reverse_step_outside_the_schedule_is_nan(kernels):
    x = np.zeros((1, 2, 5), np.float32)
    coeffs = np.ones((3, 5), np.float32)
    for step in (-1, 3):
        out = kernels.reverse_step_fwd(x, False, x, False, coeffs, step, 0, None, False, 1.0, 0, 1)
        assert np.isnan(out).all()
    x[0, 1, 2] = np.nan  # passes the clamp
    out = kernels.reverse_step_fwd(x, False, x, False, coeffs, 1, 0, None, False, 1.0, 0, 1)
    assert np.isnan(out[0, 1, 2]) and np.isfinite(np.delete(out.ravel(), 7)).all()
