"""Our schedulers' step against diffusers' own, option by option: fused, or the original's step."""

import copy
import itertools

import pytest
import torch
from budget import FORWARD, assert_within_budget
from conftest import DEVICE

diffusers = pytest.importorskip("diffusers")

from diffusers.schedulers import (  # noqa: E402
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
)
from scheduler_pairs import DYNAMIC, KINDS, SHAPE, originals, pair, seeded, tensors  # noqa: E402

from engine import diffusers_schedulers as ours  # noqa: E402

OP = "reverse_step"
PREDICTIONS = ("epsilon", "sample", "v_prediction")
BOUNDS = (
    dict(clip_sample=False),
    dict(clip_sample_range=0.7),
    dict(thresholding=True),
    DYNAMIC,
)
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")


@pytest.fixture
def given_noise(monkeypatch):
    """→ a function that makes every scheduler draw this noise, in whatever dtype."""

    def give(z):
        def randn_tensor(shape, generator=None, device=None, dtype=None, layout=None):
            assert tuple(shape) == z.shape
            return z.to(device, dtype)

        modules = (scheduling_ddpm, scheduling_ddim, scheduling_dpmsolver_multistep, ours)
        for module in modules:
            monkeypatch.setattr(module, "randn_tensor", randn_tensor)

    return give


def check(monkeypatch, original, mine, t, x, out, case, **options):
    """Both results of ours within the budget of the original's, float64 by the original is true."""
    results = original.step(out, t, x, **options, return_dict=False)
    noise = options.pop("variance_noise", None)
    exact = {} if noise is None else {"variance_noise": noise.double()}
    truths = original.step(out.double(), t, x.double(), **options, **exact, return_dict=False)
    given = {} if noise is None else {"variance_noise": noise}
    with originals(monkeypatch, allowed=False):
        found = mine.step(out, t, x, **options, **given, return_dict=False)
    for name, got, plain, truth in zip(("x", "x0"), found, results, truths, strict=True):
        assert got.dtype == plain.dtype, case
        assert_within_budget(
            got, truth, plain, factor=FORWARD, what=f"{name} of {case}", scale=sizes(mine, t)[name]
        )


def sizes(mine, row: int) -> dict[str, float]:
    """Of the terms that cancel in x0 and, from there, in x: at ᾱ = 4e-5 they are hundreds."""
    rows = next(reversed(mine._tables.values()))[0].host
    a, b, c, d, s, e, _, g, *_ = rows[row].abs().tolist()
    x0 = 3 * (a + b)  # of tensors of normal numbers
    return {"x0": max(x0, 1), "x": max(c * x0 + 3 * (d + s + e + g), 1)}


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm(prediction, variance, monkeypatch, given_noise):
    x, out, z = tensors(doubled=variance == "learned_range")
    given_noise(z)
    spacings = ("leading", "trailing", "linspace")
    for spacing, bound in itertools.product(spacings, ({}, *BOUNDS)):
        config = dict(prediction_type=prediction, variance_type=variance, **bound)
        original, mine = pair("DDPM", timestep_spacing=spacing, **config)
        for t in (original.timesteps[0], original.timesteps[5], int(original.timesteps[-1])):
            check(monkeypatch, original, mine, t, x, out, (spacing, bound, t))


def test_ddpm_steps(monkeypatch, given_noise):
    """All T steps before set_timesteps, custom ones, several schedules, ᾱ = 0 at the end."""
    x, out, z = tensors()
    given_noise(z)
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"):
        original, mine = pair("DDPM", None, beta_schedule=schedule)
        for t in (999, 500, 1, 0):
            check(monkeypatch, original, mine, t, x, out, (schedule, t))
    original, mine = pair("DDPM", None, steps_offset=1)
    for scheduler in (original, mine):
        scheduler.set_timesteps(timesteps=[999, 700, 41, 3])
    for t in original.timesteps:
        check(monkeypatch, original, mine, t, x, out, t)
    zero = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    for prediction in ("sample", "v_prediction"):
        original, mine = pair("DDPM", prediction_type=prediction, **zero)
        assert original.alphas_cumprod[-1] == 0
        check(monkeypatch, original, mine, 999, x, out, prediction)


def set_last_bit(original, mine, bit: int) -> float:
    """→ ᾱ' of the first of ten trailing steps, near what it is with ᾱ = 0 at their start.

    On one CPU it is even, on another odd; if odd, 1 − ᾱ' is less than its root's square.
    """
    alpha_bar = (1780 + bit) * 2.0**-24
    for scheduler in (original, mine):
        scheduler.alphas_cumprod[899] = alpha_bar
    return alpha_bar


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim(prediction, eta, monkeypatch, given_noise):
    x, out, z = tensors()
    given_noise(z)
    more = (dict(set_alpha_to_one=False, steps_offset=1), dict(timestep_spacing="linspace"))
    if prediction != "epsilon":
        more += (dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"),)
    for options, clipped in itertools.product(({}, *BOUNDS, *more), (False, True)):
        original, mine = pair("DDIM", prediction_type=prediction, **options)
        if "rescale_betas_zero_snr" in options:
            set_last_bit(original, mine, 0)
        for t in (original.timesteps[0], original.timesteps[5], int(original.timesteps[-1])):
            case = (options, clipped, t)
            step = dict(eta=eta, use_clipped_model_output=clipped)
            check(monkeypatch, original, mine, t, x, out, case, **step)
    if eta:
        noise = torch.randn(SHAPE, generator=seeded())
        original, mine = pair("DDIM")
        check(monkeypatch, original, mine, 500, x, out, "noise", eta=eta, variance_noise=noise)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_ddim_from_noise_alone(prediction, clipped, monkeypatch, given_noise):
    """At ᾱ = 0 and η = 1, x' = √ᾱ' x0 + √(1−ᾱ') z, also where the original's root is NaN."""
    x, out, z = tensors()
    given_noise(z)
    zero = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    original, mine = pair("DDIM", prediction_type=prediction, **zero)
    x0 = (out if prediction == "sample" else -out).clamp(-1, 1)
    step = dict(use_clipped_model_output=clipped, return_dict=False)
    for bit in (0, 1):
        alpha_bar = set_last_bit(original, mine, bit)
        theirs = original.step(out, 999, x, eta=1.0, **step)[0]
        assert theirs.isnan().all() if bit else theirs.isfinite().all()
        with originals(monkeypatch, allowed=False):
            found = mine.step(out, 999, x, eta=1.0, **step)
        truth = alpha_bar**0.5 * x0.double() + (1 - alpha_bar) ** 0.5 * z.double()
        plain = alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * z
        assert_within_budget(found[0], truth, plain, factor=FORWARD, what=f"x, bit {bit}")
        assert torch.equal(found[1], x0)
    with originals(monkeypatch, allowed=True) as calls:  # η > 1: below zero for good
        assert mine.step(out, 999, x, eta=1.5, **step)[0].isnan().all() and len(calls) == 1


SOLVERS = (
    {},
    dict(solver_type="heun"),
    dict(use_karras_sigmas=True),
    dict(euler_at_final=True, final_sigmas_type="sigma_min"),
    dict(lower_order_final=False, timestep_spacing="leading", steps_offset=1),
    dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    dict(beta_schedule="squaredcos_cap_v2", use_lu_lambdas=True),
    DYNAMIC,
)
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def solver_truth(original, out, x, z):
    """x_next and the converted output in float64, of the step that the original stands before."""
    scheduler, i, n = copy.deepcopy(original), original.step_index, len(original.timesteps)
    m = scheduler.convert_model_output(out.double(), sample=x.double())
    config, before = scheduler.config, original.lower_order_nums
    few = config.lower_order_final and n < 15
    last = config.euler_at_final or few or config.final_sigmas_type == "zero"
    if config.solver_order == 1 or before < 1 or (i == n - 1 and last):
        order = 1
    elif config.solver_order == 2 or before < 2 or (i == n - 2 and few):
        order = 2
    else:
        order = 3
    history = [t if t is None else t.double() for t in original.model_outputs[1:]] + [m]
    updates = (
        lambda **given: scheduler.dpm_solver_first_order_update(m, **given),
        lambda **given: scheduler.multistep_dpm_solver_second_order_update(history, **given),
        lambda **given: scheduler.multistep_dpm_solver_third_order_update(history, **given),
    )
    return updates[order - 1](sample=x.double(), noise=z.double()), m


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver(order, algorithm, monkeypatch, given_noise):
    cases = [*itertools.product(PREDICTIONS, SOLVERS)]
    if algorithm == "dpmsolver":  # which has no step to sigma 0; the original's thresholds stay
        cases = [(p, {**o, "final_sigmas_type": "sigma_min"}) for p, o in cases if o != DYNAMIC]
    else:
        cases += [("flow_prediction", FLOW)]
    for (prediction, options), n in itertools.product(cases, (5, 16)):
        config = {"prediction_type": prediction, "algorithm_type": algorithm, **options}
        if n == 16 and (options or prediction != "epsilon"):
            continue
        original, mine = pair("DPMSolverMultistep", n, solver_order=order, **config)
        for k, t in enumerate(original.timesteps):
            x, out, z = tensors(seed=k)
            given_noise(z)
            original._step_index = k
            mine.model_outputs = list(original.model_outputs)  # each step on its own
            truths = solver_truth(original, out, x, z)
            (plain,) = original.step(out, t, x, return_dict=False)
            with originals(monkeypatch, allowed=False):
                (got,) = mine.step(out, t, x, return_dict=False)
            both = mine.model_outputs[-1], original.model_outputs[-1]
            found = (("x", got, plain, truths[0]), ("x0", *both, truths[1]))
            for name, mine_, theirs, truth in found:
                what = f"{name} of step {k} of {config}"
                scale = sizes(mine, k)[name]
                assert_within_budget(mine_, truth, theirs, factor=FORWARD, what=what, scale=scale)
            state = ("_step_index", "lower_order_nums")
            assert [getattr(mine, s) for s in state] == [getattr(original, s) for s in state]


@pytest.mark.parametrize("kind", KINDS)
def test_every_back_end(kind, impl, monkeypatch):
    """Three steps of each scheduler on each back end, seeded; the cases of the op's own tests."""
    options = {"DDPM": dict(variance_type="learned_range", **DYNAMIC), "DDIM": {}}.get(kind, {})
    x, out, _ = (t.to(DEVICE) for t in tensors(doubled=kind == "DDPM"))
    original, mine = pair(kind, 4, device=DEVICE, **options)
    mine.impl = impl
    states, generators = [x, x], [torch.Generator(DEVICE).manual_seed(3) for _ in "ab"]
    more = {"eta": 0.5} if kind == "DDIM" else {}
    for t in original.timesteps[:3]:
        states[0] = original.step(out, t, states[0], generator=generators[0], **more).prev_sample
        with originals(monkeypatch, allowed=False):
            found = mine.step(out, t, states[1], generator=generators[1], **more)
        states[1] = found.prev_sample
        assert torch.allclose(*states, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtypes", [("bfloat16",) * 2, ("float16",) * 2, ("float32", "bfloat16")])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(kind, dtypes, monkeypatch, given_noise):
    dtype, out_dtype = (getattr(torch, name) for name in dtypes)
    for prediction, shape in itertools.product(PREDICTIONS, ((1, 1, 1, 1), (5, 2, 9, 4), (2, 6))):
        x, out, z = tensors(shape, dtype=dtype, out_dtype=out_dtype)
        given_noise(z.to(out_dtype).float())
        original, mine = pair(kind, prediction_type=prediction)
        t = original.timesteps[4]
        if prediction == "sample" and dtype != out_dtype:
            with originals(monkeypatch, allowed=True) as calls:
                results = [s.step(out, t, x, return_dict=False) for s in (original, mine)]
            assert len(calls) == 2
            for a, b in zip(*results, strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)
        elif kind != "DPMSolverMultistep":
            check(monkeypatch, original, mine, t, x, out, (prediction, shape))
        else:
            original._step_index = mine._step_index = 4
            truth = solver_truth(original, out, x, z)[0]
            plain = original.step(out, t, x).prev_sample
            got = mine.step(out, t, x).prev_sample
            assert got.dtype == plain.dtype
            assert_within_budget(got, truth, plain, factor=FORWARD)


def fallbacks():
    x, out, _ = tensors()
    wide = torch.cat([out, out], 1)
    zero = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    yield "DDPM", dict(variance_type="learned"), (wide.abs(), 500, x), {}
    yield "DDPM", dict(variance_type="fixed_large_log"), (out, 500, x), {}  # NaN, in theirs too
    yield "DDPM", zero, (out, 999, x), {}
    yield "DDIM", zero, (out, 999, x), {"eta": 0.5}
    yield "DDIM", {}, (out, 500, x), {"eta": 3.0}  # √ of a negative number
    yield "DDPM", dict(DYNAMIC, sample_max_value=0.8), (out, 500, x), {}
    yield "DDPM", dict(clip_sample_range=-1.0), (out, 500, x), {}
    broadcast = out[:1]
    for kind in KINDS:
        yield kind, {}, (out.double(), 500, x.double()), {}
        if kind != "DPMSolverMultistep":
            yield kind, {}, (broadcast, 500, x), {}
        yield kind, {}, (out, torch.tensor([500]), x), {}
    given = {"eta": 0.5, "variance_noise": torch.tensor(0.5)}
    yield "DDIM", {}, (out, 500, x), given
    yield "DDIM", {}, (out, torch.tensor(500), x), {"eta": torch.tensor(0.5)}
    sde = dict(algorithm_type="sde-dpmsolver++")
    yield "DPMSolverMultistep", sde, (out.bfloat16(), 500, x.bfloat16()), {}
    old = dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min", thresholding=True)
    yield "DPMSolverMultistep", old, (out, 500, x), {}


@pytest.mark.parametrize("case", range(len([*fallbacks()])))
def test_the_rest_takes_the_original_s_step(case, monkeypatch):
    kind, config, arguments, options = [*fallbacks()][case]
    original, mine = pair(
        kind, timestep_spacing=config.pop("timestep_spacing", "leading"), **config
    )
    generator = {} if "variance_noise" in options else {"generator": seeded()}
    expected = original.step(*arguments, **generator, **options, return_dict=False)
    generator = {} if "variance_noise" in options else {"generator": seeded()}
    with originals(monkeypatch, allowed=True) as calls:
        found = mine.step(*arguments, **generator, **options, return_dict=False)
    if "500]" not in str(arguments[1]) or kind != "DPMSolverMultistep":
        assert calls == [f"Engine{kind}Scheduler"]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=1e-5, equal_nan=True)


def test_errors_are_the_original_s():
    x, out, z = tensors()
    _, mine = pair("DDIM", None)
    with pytest.raises(ValueError, match="set_timesteps"):
        mine.step(out, 3, x)
    _, mine = pair("DDIM")
    with pytest.raises(ValueError, match="generator"):
        mine.step(out, 500, x, eta=1.0, generator=seeded(), variance_noise=z)
    _, mine = pair("DDPM", prediction_type="epsilon", variance_type="fixed_small")
    with pytest.raises((RuntimeError, ValueError)):
        mine.step(torch.cat([out, out], 1), 500, x)
    with pytest.raises(IndexError):
        mine.step(out, 501, x)  # none of the ten
