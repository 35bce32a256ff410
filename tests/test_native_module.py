"""The CPU kernels through NumPy alone: hypothesis against float64, on every instruction set.

The module is built from csrc/cpu and tests/native_module.cpp with no torch in sight, which proves
that the kernels need none.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lock
import numpy as np
import pytest

pybind11 = pytest.importorskip("pybind11")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
# Of setup.py, but for -O1: the build is most of this file's time.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
EPS = {"f32": 2.0**-23, "bf16": 2.0**-7, "f16": 2.0**-10}
TERM = {"f32": 2.0**-20, "bf16": 2.0**-12, "f16": 2.0**-16}
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def build() -> Path:
    """Compiles the module into tests/build, once per state of its sources."""
    with lock.alone("native_module"):
        return _build()


def _build() -> Path:
    sources = [HERE / "native_module.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    headers = [CSRC / "kernels.h", CSRC / "philox.h", *sorted((CSRC / "cpu").glob("*.h"))]
    state = hashlib.sha256("".join(FLAGS).encode())
    for path in (*sources, *headers):
        state.update(path.read_bytes())
    folder = HERE / "build" / f"native_module-{state.hexdigest()[:16]}"
    library = folder / f"native_module{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists():
        return library
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    shutil.rmtree(HERE / "build", ignore_errors=True)
    folder.mkdir(parents=True)
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def compile(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [*compiler, *FLAGS, *includes, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = [str(path) for path in pool.map(compile, sources)]
    linked = library.with_suffix(".linked")
    subprocess.run([*compiler, "-shared", *objects, "-pthread", "-o", str(linked)], check=True)
    assert b"libtorch" not in linked.read_bytes()
    linked.rename(library)
    return library


@pytest.fixture(scope="module")
def built():
    spec = importlib.util.spec_from_file_location("native_module", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "avx2", "avx512"])
def kernels(built, request):
    built.limit_isa_level(request.param)
    if built.isa_level() != request.param:
        built.limit_isa_level(2)
        pytest.skip("this machine has no such instructions")
    yield built
    built.limit_isa_level(2)


def encode(values, dtype: str):
    """float64 → the array type of a dtype, rounded to nearest even."""
    if dtype == "f32":
        return np.asarray(values, np.float32)
    if dtype == "f16":
        return np.asarray(values, np.float16)
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(array):
    """The array's values in float64."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


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
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def in_layout(array, channels_last: bool):
    return np.ascontiguousarray(array.transpose(0, 2, 1)) if channels_last else array


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
        mean, rstd, silu, 2,
    )  # fmt: skip
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
