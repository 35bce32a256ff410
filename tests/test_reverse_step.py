"""reverse_step on every back end against the float64 reference."""

import math

import pytest
import torch
from budget import FORWARD, assert_within_budget
from conftest import DEVICE
from engine.kernels import reference
from test_group_norm_silu import as_layout

import engine
from engine import ops, samplers, schedules

OP = "reverse_step"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 2, 4, 4),
    (1, 5, 9, 1),
    (2, 6),
    (2, 3, 8),
    (1, 2, 3, 4, 5),
)


def rows(sampler="ddpm", prediction="eps", eta=0.0, variance="small"):
    diffusion = engine.Diffusion(
        schedules.betas("linear", 1000), prediction=prediction, variance=variance
    )
    return samplers.coefficients(diffusion, sampler, 100, eta)[1].float().to(DEVICE)


def make(shape, dtype=torch.float32, out_dtype=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, out, z = (torch.randn(shape, generator=g) for _ in range(3))
    return x.to(dtype).to(DEVICE), out.to(out_dtype or dtype).to(DEVICE), z.to(dtype).to(DEVICE)


def check(impl, x, out, coeffs, step, noise, *, clip=1.0, layouts=("contiguous",) * 3):
    exact = [t.double() for t in (x, out, coeffs)]
    truth = reference.reverse_step(*exact, step, noise.double(), clip)
    kwargs = {"clip": clip}
    plain = ops.reverse_step(x, out, coeffs, step, noise=noise, impl="eager", **kwargs)
    views = [as_layout(t, layout) for t, layout in zip((x, out, noise), layouts, strict=True)]
    got = ops.reverse_step(views[0], views[1], coeffs, step, noise=views[2], impl=impl, **kwargs)
    assert got.dtype == x.dtype
    assert_within_budget(got, truth, plain, factor=FORWARD)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(impl, shape, dtype):
    x, out, z = make(shape, dtype)
    check(impl, x, out, rows(), 40, z)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(impl, dtype, out_dtype):
    x, out, z = make((2, 3, 6, 6), dtype, out_dtype)
    check(impl, x, out, rows(), 40, z)


@pytest.mark.parametrize("noise_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("out_layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last", "sliced"])
def test_layouts(impl, x_layout, out_layout, noise_layout):
    x, out, z = make((2, 3, 5, 6))
    got = check(impl, x, out, rows(), 7, z, layouts=(x_layout, out_layout, noise_layout))
    if x_layout != "sliced" and impl != "eager":
        assert got.stride() == as_layout(x, x_layout).stride()


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("step", [0, 50, 99])
def test_samplers(impl, sampler, eta, prediction, step):
    x, out, z = make((2, 3, 4, 4))
    check(impl, x, out, rows(sampler, prediction, eta), step, z)


@pytest.mark.parametrize("clip", [1.0, 0.25, None])
def test_clip(impl, clip):
    x, out, z = make((2, 3, 4, 4))
    check(impl, x, out, rows(), 99, z, clip=clip)


@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [0, 1, 6, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_key_draws_the_contract_noise(impl, dtype, offset, x_layout):
    x, out, _ = make((3, 3, 5, 5), dtype)
    z = ops.noise(7, 12, ops.STEP_NOISE, x.shape, device=DEVICE, offset=offset, impl="eager")
    x32, out = x.float(), out
    drawn = ops.reverse_step(
        as_layout(x32, x_layout), out, rows(), 12, key=7, offset=offset, impl=impl
    )
    given = ops.reverse_step(x32, out, rows(), 12, noise=z, impl=impl)
    assert torch.allclose(drawn, given, rtol=1e-6, atol=1e-6)
    low = ops.reverse_step(as_layout(x, x_layout), out, rows(), 12, key=7, offset=offset, impl=impl)
    assert torch.allclose(low.float(), drawn, rtol=0, atol=4 * torch.finfo(dtype).eps * 4)


def test_device_scalars(impl):
    x, out, _ = make((2, 3, 4, 4))
    step, key = (torch.tensor(v, device=DEVICE) for v in (12, 7))
    assert torch.equal(
        ops.reverse_step(x, out, rows(), step, key=key, impl=impl),
        ops.reverse_step(x, out, rows(), 12, key=7, impl=impl),
    )


@pytest.mark.parametrize("step", [-1, 100, 2**40])
def test_a_step_outside_the_table_is_nan(impl, step):
    x, out, _ = make((2, 3, 4, 4))
    step = torch.tensor(step, device=DEVICE)
    assert ops.reverse_step(x, out, rows(), step, key=7, impl=impl).isnan().all()


def test_nan_passes_the_clamp(impl):
    x, out, z = make((2, 3, 4, 4))
    out[0, 1, 2, 3] = math.nan
    got = ops.reverse_step(x, out, rows(), 40, noise=z, impl=impl)
    assert torch.equal(got.isnan(), out.isnan())


def test_no_noise_where_sigma_is_zero(impl):
    x, out, z = make((2, 3, 4, 4))
    coeffs = rows()
    assert coeffs[99, 4] == 0
    with_noise = ops.reverse_step(x, out, coeffs, 99, noise=z, impl=impl)
    assert torch.equal(with_noise, ops.reverse_step(x, out, coeffs, 99, key=3, impl=impl))


def test_golden_steps(impl):
    """Single steps of the linear schedule, T = 1000: x_t = 0.5, ε = 0.25, clipped, z = 1."""
    diffusion = {
        v: engine.Diffusion(schedules.betas("linear", 1000), variance=v) for v in ("small", "large")
    }
    coeffs = {v: samplers.coefficients(d)[1].float().to(DEVICE) for v, d in diffusion.items()}
    golden = {
        ("small", 0): 0.497524877,
        ("small", 1): 0.505392759,
        ("large", 1): 0.508958984,
        ("small", 999): 0.636523989,
        ("large", 999): 0.636524047,
    }
    x, out, z = (torch.full((1, 1, 2, 2), v, device=DEVICE) for v in (0.5, 0.25, 1.0))
    for (variance, t), value in golden.items():
        got = ops.reverse_step(x, out, coeffs[variance], 999 - t, noise=z, impl=impl)
        assert torch.allclose(got, torch.full_like(got, value), rtol=0, atol=2e-7), (variance, t)


def test_gradients_come_from_eager_alone(impl):
    x, out, z = make((2, 3, 4, 4))
    out.requires_grad_()
    if impl != "eager":
        with pytest.raises(RuntimeError, match="has no gradient"):
            ops.reverse_step(x, out, rows(), 40, noise=z, impl=impl)
    ops.reverse_step(x, out, rows(), 40, noise=z).sum().backward()
    assert out.grad.abs().max() > 0


X = torch.zeros(2, 3, 4, 4)
BAD = {
    "both": (dict(key=1, noise=X), "exactly one of key"),
    "neither": (dict(), "exactly one of key"),
    "shape": (dict(model_out=torch.zeros(2, 6, 4, 4), key=1), r"expected \(2, 3, 4, 4\)"),
    "coeffs": (dict(coeffs=torch.zeros(10, 4), key=1), r"expected \(n_steps, 5\) float32"),
    "step": (dict(step=10, key=1), "step is 10, expected an integer, 0 <= step < 10"),
    "step tensor": (dict(step=torch.zeros(1), key=1), "expected one int64"),
    "key": (dict(key=2**63), "key is"),
    "clip": (dict(key=1, clip=-1.0), "expected clip > 0"),
    "device": (dict(model_out=X.to("meta"), key=1), "on meta, expected"),
    "offset": (dict(key=1, offset=-4), "offset"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case):
    arguments, sentence = BAD[case]
    defaults = dict(x=X, model_out=X, coeffs=torch.zeros(10, 5), step=0)
    with pytest.raises(ValueError, match=sentence):
        ops.reverse_step(**{**defaults, **arguments})
