"""The variants of reverse_step on every back end against the float64 reference and the papers."""

import math

import pytest
import torch
from budget import FORWARD, assert_within_budget
from conftest import DEVICE
from engine.kernels import reference
from test_group_norm_silu import as_layout

import engine
from engine import ops, samplers, schedules
from engine.ops.reverse_step import _sliced

OP = "reverse_step"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 1, 1), (2, 3, 5, 7), (3, 18, 3, 3), (2, 6), (2, 3, 41), (1, 2, 3, 4, 5))
VARIANTS = {
    "results": "",
    "guidance": "uncond",
    "gradient": "grad",
    "two-step": "x0_prev",
    "learned": "learned_range",
    "dynamic": "dynamic_threshold",
    "guided learned": "uncond learned_range grad",
    "all": "uncond grad x0_prev learned_range dynamic_threshold",
}
LAYOUTS = {  # of x, model_out and uncond, the other operands
    "planes": ("contiguous",) * 3,
    "rows": ("channels_last",) * 3,
    "mixed": ("contiguous", "channels_last", "channels_last"),
    "views": ("channels_last", "sliced", "transposed"),
}


def table(n=4, seed=3) -> torch.Tensor:
    """Rows with every coefficient at work."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(n, 10, generator=g)
    rows[:, 1] *= -2
    rows[:, 8:] -= torch.tensor([4.0, 1.0])
    return rows.to(DEVICE)


def make(variant, shape, dtype=torch.float32, out_dtype=None, seed=0):
    """x, model_out, noise, and the operands of a variant."""
    g = torch.Generator().manual_seed(seed)
    n, c, *s = shape

    def normal(channels=c, kind=None):
        t = 1.5 * torch.randn(n, channels, *s, generator=g)
        return t.to(kind or dtype).to(DEVICE)

    names, out_dtype = VARIANTS[variant].split(), out_dtype or dtype
    learned = "learned_range" in names
    x, out, z = normal(), normal(2 * c if learned else c, out_dtype), normal()
    more = {name: normal() for name in ("grad", "x0_prev") if name in names}
    if "uncond" in names:
        more |= {"uncond": normal(2 * c if learned else c, out_dtype), "guidance": 2.5}
    if learned:
        out[:, c:] /= 1 + out[:, c:].abs()  # a trained v keeps about to [-1, 1]
        more["learned_range"] = True
    if "dynamic_threshold" in names:
        more["dynamic_threshold"] = 0.83
    return x, out, z, more


def truth_of(x, out, coeffs, step, z, more):
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in more.items()}
    exact.pop("learned_range", None)
    return reference.reverse_step_general(
        x.double(), out.double(), coeffs.double(), step, z.double(), **exact
    )


def check(impl, variant, shape, dtype=torch.float32, out_dtype=None, layouts=LAYOUTS["planes"]):
    x, out, z, more = make(variant, shape, dtype, out_dtype)
    truth, truth_x0 = truth_of(x, out, table(), 2, z, more)
    options = dict(return_x0=True, model_dtype=torch.bfloat16)
    plain = ops.reverse_step(x, out, table(), 2, noise=z, **more, **options, impl="eager")
    x, out, z = (as_layout(t, kind) for t, kind in zip((x, out, z), layouts, strict=True))
    for name in ("uncond", "grad", "x0_prev"):
        if name in more:
            more[name] = as_layout(more[name], layouts[1 if name == "uncond" else 2])
    got = ops.reverse_step(x, out, table(), 2, noise=z, **more, **options, impl=impl)
    assert [t.dtype for t in got] == [dtype, dtype, torch.bfloat16]
    for mine, exact, theirs, what in zip(
        got, (truth, truth_x0, truth), plain, ("x_next", "x0", "model_in"), strict=True
    ):
        assert_within_budget(mine, exact, theirs, factor=FORWARD, what=what)
    return x, got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_and_layouts(impl, variant, layout):
    x, got = check(impl, variant, (2, 3, 5, 6), layouts=LAYOUTS[layout])
    if impl != "eager":
        assert all(t.stride() == x.stride() for t in got)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["guidance", "all"])
def test_dtypes(impl, variant, dtype, out_dtype):
    check(impl, variant, (2, 3, 6, 6), dtype, out_dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", ["guided learned", "all"])
def test_shapes(impl, variant, shape):
    check(impl, variant, shape)


@pytest.mark.parametrize("shape", [(2, 2, 40, 41), (1, 40, 13, 12)], ids=str)
def test_many_tiles(impl, shape):
    layouts = ("contiguous", "channels_last", "contiguous")
    check(impl, "all", shape)
    check(impl, "all", shape, layouts=layouts)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [0, 1, 6])
def test_a_key_draws_the_contract_noise(impl, offset, layout):
    x, out, _, more = make("all", (3, 3, 5, 5))
    x, out = as_layout(x, layout), as_layout(out, layout)
    z = ops.noise(7, 2, ops.STEP_NOISE, x.shape, device=DEVICE, offset=offset)
    drawn = ops.reverse_step(x, out, table(), 2, key=7, offset=offset, **more, impl=impl)
    given = ops.reverse_step(x, out, table(), 2, noise=z, **more, impl=impl)
    assert torch.allclose(drawn, given, rtol=1e-6, atol=1e-6)


def test_a_plain_call_and_its_general_form_agree(impl):
    x, out, z, _ = make("results", (2, 3, 5, 7))
    plain = ops.reverse_step(x, out, table(), 1, noise=z, impl=impl)
    five = ops.reverse_step(x, out, table()[:, :5].contiguous(), 1, noise=z, impl=impl)
    general, x0 = ops.reverse_step(x, out, table(), 1, noise=z, return_x0=True, impl=impl)
    assert torch.equal(plain, five) and torch.allclose(plain, general, rtol=0, atol=1e-6)
    a, b = table()[1, :2]
    assert torch.allclose(x0, (a * x + b * out).clamp(-1, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_network_s_input_is_the_state_rounded_once(impl, dtype):
    x, out, z, _ = make("results", (2, 3, 4, 5))
    state, model_in = ops.reverse_step(x, out, table(), 0, noise=z, model_dtype=dtype, impl=impl)
    assert state.dtype == torch.float32 and torch.equal(model_in, state.to(dtype))


def test_what_a_zero_multiplies_is_not_read(impl):
    x, out, z, more = make("all", (2, 3, 4, 4))
    del more["dynamic_threshold"]
    rows = table()
    rows[0, 4:6], rows[0, 9] = 0, rows[0, 8]  # s = e = 0, lo = hi
    more["x0_prev"][:] = math.nan
    out[:, 3:] = math.nan
    z[:] = math.nan
    assert ops.reverse_step(x, out, rows, 0, noise=z, **more, impl=impl).isfinite().all()


@pytest.mark.parametrize("step", [-1, 4, 2**40])
def test_a_step_outside_the_table_is_nan(impl, step):
    x, out, z, more = make("all", (2, 3, 4, 4))
    options = dict(return_x0=True, model_dtype=torch.float16)
    got = ops.reverse_step(
        x, out, table(), torch.tensor(step, device=DEVICE), noise=z, **more, **options, impl=impl
    )
    assert all(t.isnan().all() for t in got)


def test_halves_of_one_tensor_are_read_in_place():
    both = torch.randn(4, 6, 5, 7)
    for t in (both, as_layout(both, "channels_last")):
        for view in (*t.chunk(2), t[:, :3], t[:, 3:], t.chunk(2)[1][:, 3:], t[:, :1]):
            assert _sliced(view) is view
        assert _sliced(t[:, ::2, ::2]).is_contiguous() and _sliced(t[..., :3]).is_contiguous()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_guidance_of_halves(impl, layout):
    """Batch halves and channel halves: what a guided, learned-variance model returns at once."""
    both = as_layout(torch.randn(4, 6, 5, 7, device=DEVICE), layout)
    x, z = torch.randn(2, 2, 3, 5, 7, device=DEVICE)
    cond, uncond = both.chunk(2)
    split = [t.clone(memory_format=torch.contiguous_format) for t in (cond, uncond)]
    for channels in (slice(0, 6), slice(0, 3), slice(3, 6)):
        more = dict(noise=z, guidance=3.0, learned_range=channels == slice(0, 6), impl=impl)
        views, copies = (
            ops.reverse_step(x, a[:, channels], table(), 1, uncond=b[:, channels], **more)
            for a, b in ((cond, uncond), split)
        )
        assert torch.allclose(views, copies, rtol=0, atol=1e-6)


# ---- Dynamic thresholding -----------------------------------------------------------------------


def thresholded(impl, x0, p):
    """x_next = bound(x0) itself."""
    rows = torch.tensor([[0.0, 1, 1, 0, 0]], device=DEVICE)
    return ops.reverse_step(
        torch.zeros_like(x0), x0, rows, 0, key=0, dynamic_threshold=p, impl=impl
    )


@pytest.mark.parametrize("p", [0.0, 0.31, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("count", [1, 2, 257, 5000])
def test_the_quantile_is_torch_s(impl, count, p):
    g = torch.Generator().manual_seed(count)
    x0 = (4 * torch.randn(2, 1, count, generator=g)).to(DEVICE)
    x0[1] = (x0[1] * 2).round() / 2  # ties
    m = torch.quantile(x0.double().abs().flatten(1), p, dim=1).clamp(min=1)[:, None, None]
    truth = x0.double().clamp(-m, m) / m
    assert torch.allclose(thresholded(impl, x0, p).double(), truth, rtol=0, atol=3e-7)


def test_a_quantile_below_one_clips(impl):
    x0 = torch.linspace(-3, 3, 400, device=DEVICE).reshape(1, 1, 400)
    assert torch.equal(thresholded(impl, x0, 0.1), x0.clamp(-1, 1))


@pytest.mark.parametrize("largest", [1.0, 1.25, 1e9])
def test_a_threshold_is_at_most_its_largest(impl, largest):
    x, out, z, more = make("dynamic", (3, 2, 5, 7))
    out *= torch.tensor([0.1, 1, 10], device=DEVICE)[:, None, None, None]  # m = 1, between, larger
    more["dynamic_threshold_max"] = largest
    truth, _ = truth_of(x, out, table(), 2, z, more)
    got, plain = (
        ops.reverse_step(x, out, table(), 2, noise=z, impl=name, **more) for name in (impl, "eager")
    )
    assert_within_budget(got, truth, plain, factor=FORWARD)


def test_nan_and_infinity_stay_in_their_sample(impl):
    x0 = 3 * torch.randn(3, 2, 5, 5, device=DEVICE)
    x0[0, 0, 1, 1], x0[1, 1, 2, 2] = math.nan, -math.inf
    got = thresholded(impl, x0, 0.7)
    assert got[0].isnan().all() and got[1:].isfinite().all() and got[1, 1, 2, 2] == -1


# ---- The papers ---------------------------------------------------------------------------------


def process(**options):
    return engine.Diffusion(schedules.betas("linear", 1000), **options)


def rows_of(sampler="ddpm", steps=50, **options):
    return samplers.coefficients(process(**options), sampler, steps)[1].float().to(DEVICE)


def test_learned_range_lies_between_the_two_variances(impl):
    """v = −1 is β̃, v = 1 is β, and what lies between has a standard deviation between."""
    shape, step = (1, 1, 64, 64), 30
    x = torch.zeros(shape, device=DEVICE)
    learned = rows_of(variance="learned_range")

    def noise_of(v):
        out = torch.cat([x, v], 1)
        return ops.reverse_step(x, out, learned, step, key=1, learned_range=True, impl=impl)

    z = ops.noise(1, step, ops.STEP_NOISE, shape, device=DEVICE)
    small, large = (rows_of(variance=name)[step, 4] for name in ("small", "large"))
    assert torch.allclose(noise_of(x - 1), small * z, rtol=2e-6, atol=0)
    assert torch.allclose(noise_of(x + 1), large * z, rtol=2e-6, atol=0)
    g = torch.Generator().manual_seed(0)
    found = noise_of((2 * torch.rand(shape, generator=g) - 1).to(DEVICE)).std() / z.std()
    assert 1.001 * small < found < 0.999 * large


def test_the_classifier_moves_ddpm_s_mean(impl):
    """Dhariwal & Nichol 2021, alg. 1: μ + Σ·grad, with a fixed and with a learned Σ."""
    x, out, z, more = make("guided learned", (2, 3, 4, 4))
    grad, eps, v = more["grad"], out[:, :3], out[:, 3:]
    rows, step = rows_of(), 20
    plain = ops.reverse_step(x, eps, rows, step, noise=z, impl=impl)
    moved = ops.reverse_step(x, eps, rows, step, noise=z, grad=grad, impl=impl)
    assert torch.allclose(moved, plain + rows[step, 4] ** 2 * grad, rtol=0, atol=1e-6)
    rows = rows_of(variance="learned_range")
    learned = dict(noise=z, learned_range=True, impl=impl)
    plain = ops.reverse_step(x, out, rows, step, **learned)
    moved = ops.reverse_step(x, out, rows, step, grad=grad, **learned)
    lo, hi = rows[step, 8:]
    variance = torch.exp((v + 1) / 2 * hi + (1 - v) / 2 * lo)
    assert torch.allclose(moved, plain + variance * grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_classifier_moves_ddim_s_noise(impl, sampler, prediction):
    """Dhariwal & Nichol 2021, alg. 2: ε − √(1−ᾱ)·grad, whatever the network predicts."""
    x, eps, _, more = make("gradient", (2, 3, 4, 4))
    diffusion = process(prediction=prediction)
    times, rows = samplers.coefficients(diffusion, sampler, 50)
    a = diffusion.alpha_bar[times[45]]
    root, rest = a.sqrt().item(), (1 - a).sqrt().item()

    def output(eps):
        x0 = (x - rest * eps) / root
        return {"eps": eps, "x0": x0, "v": root * eps - rest * x0}[prediction]

    rows = rows.float().to(DEVICE)
    options = dict(key=0, clip=None, impl=impl)
    moved = ops.reverse_step(x, output(eps), rows, 45, grad=more["grad"], **options)
    shifted = ops.reverse_step(x, output(eps - rest * more["grad"]), rows, 45, **options)
    assert torch.allclose(moved, shifted, rtol=0, atol=1e-5)


X, TWO = torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 4, 4)
BAD = {
    "learned": (dict(learned_range=True), r"model_out is \(2, 3, 4, 4\).*expected \(2, 6, 4, 4\)"),
    "not learned": (dict(model_out=TWO, return_x0=True), r"expected \(2, 3, 4, 4\)"),
    "uncond": (dict(uncond=TWO), r"uncond is \(2, 6, 4, 4\)"),
    "uncond, learned": (dict(model_out=TWO, uncond=X, learned_range=True), r"uncond is"),
    "no tensor": (dict(grad=1.0), "grad is float, expected a tensor"),
    "x0_prev": (dict(x0_prev=X[:1]), r"x0_prev is \(1, 3, 4, 4\)"),
    "guidance": (dict(uncond=X, guidance="2"), "guidance is '2', expected a number"),
    "guidance alone": (dict(guidance=3.0), "guidance is 3.0 without uncond"),
    "guidance nan": (dict(uncond=X, guidance=math.nan), "guidance is nan, expected a finite"),
    "alone": (dict(guidance=2.0, return_x0=True), "without uncond"),
    "quantile": (dict(dynamic_threshold=99.5), "dynamic_threshold is 99.5, expected a quantile"),
    "clip": (dict(dynamic_threshold=0.9, clip=2.0), "leave clip out"),
    "largest": (dict(dynamic_threshold_max=2.0), "expected a number, 1 or more, beside a dynamic"),
    "dtype": (dict(model_dtype=torch.float64), "model_dtype is torch.float64, expected"),
    "columns": (dict(coeffs=torch.zeros(3, 7)), r"expected \(n_steps, 5\) float32, or"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case):
    arguments, sentence = BAD[case]
    defaults = dict(x=X, model_out=X, coeffs=torch.zeros(10, 10), step=0, key=1)
    with pytest.raises(ValueError, match=sentence) as raised:
        ops.reverse_step(**{**defaults, **arguments})
    assert "\n" not in str(raised.value)


def test_gradients_come_from_eager_alone(impl):
    x, out, z, more = make("all", (2, 3, 4, 4))
    more["x0_prev"].requires_grad_()
    if impl != "eager":
        with pytest.raises(RuntimeError, match="has no gradient"):
            ops.reverse_step(x, out, table(), 1, noise=z, **more, impl=impl)
    ops.reverse_step(x, out, table(), 1, noise=z, **more).sum().backward()
    assert more["x0_prev"].grad.abs().max() > 0


def test_explain_takes_the_variants(capsys):
    x, out, z, more = make("all", (2, 3, 4, 4))
    ops.explain("reverse_step", x, out, table(), 1, noise=z, **more)
    assert "serves" in capsys.readouterr().out
    empty = ops.reverse_step(x[:0], out[:0, :3], table(), 1, key=1, model_dtype=torch.float16)
    assert [t.shape for t in empty] == [(0, 3, 4, 4)] * 2


@pytest.mark.parametrize("p", [0.5, 0.8, 0.9, 1.0])
def test_an_infinite_bound_is_nan(impl, p):
    """An overflow must not become a black picture: x0 / infinity."""
    out = torch.tensor([[1.0, 2, 3, 4, math.inf], [1, 2, 3, 4, 5]], device=DEVICE)
    y = thresholded(impl, out, p)
    assert y[0].isnan().all() == (p > 0.75) and y[1].isfinite().all()
    if p == 0.5:
        assert torch.allclose(y[0], torch.tensor([1 / 3, 2 / 3, 1, 1, 1], device=DEVICE))
