"""The samplers' rows: against their papers, the ODE that they solve, and diffusers' schedulers."""

import math

import pytest
import torch

import engine
from engine import ops, samplers, schedules

SHAPE = (2, 1, 4, 4)


def diffusion(T=1000, schedule="linear", **options) -> engine.Diffusion:
    return engine.Diffusion(schedules.betas(schedule, T), **options)


def sigma_of(process):
    return ((1 - process.alpha_bar) / process.alpha_bar).sqrt()


def alpha_bar_at(process, t):
    """ᾱ at a t between two steps, where log σ is linear."""
    low = t.double().floor().long().clamp(max=process.T - 2)
    log_sigma = sigma_of(process).log()
    there = torch.lerp(log_sigma[low], log_sigma[low + 1], t.double() - low)
    return 1 / (1 + (2 * there).exp())


# ---- Published numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "t, free, clipped, small, large",
    [
        (0, 0.497524877, 0.497524877, 0.497524877, 0.497524877),
        (1, 0.498008189, 0.498008189, 0.505392759, 0.508958984),
        (999, 0.500025408, 0.495102691, 0.636523989, 0.636524047),
    ],
)
@pytest.mark.parametrize("impl", ["eager", "native"])
def test_ddpm_golden(impl, t, free, clipped, small, large):
    """x_t = 0.5, ε = 0.25, z = 1, in float64 and through the kernels."""
    x, eps, z = (torch.full((1, 1, 2, 2), value) for value in (0.5, 0.25, 1.0))
    for variance, noisy in (("small", small), ("large", large)):
        rows = samplers.coefficients(diffusion(variance=variance), "ddpm")[1]
        a, b, c, d, s = rows[999 - t, :5].tolist()
        x0 = a * 0.5 + b * 0.25
        bounded = min(max(x0, -1), 1)
        assert c * x0 + d * 0.5 == pytest.approx(free, abs=1e-9)
        assert c * bounded + d * 0.5 == pytest.approx(clipped, abs=1e-9)
        assert c * bounded + d * 0.5 + s == pytest.approx(noisy, abs=1e-9)
        found = ops.reverse_step(x, eps, rows.float(), 999 - t, noise=z, impl=impl)
        assert found.max().item() == pytest.approx(noisy, abs=2e-6)


def test_ddpm_rows_are_the_posterior():
    process = diffusion(100, variance="large")
    times, rows = samplers.coefficients(process, "ddpm")
    one, zeros = torch.ones(100, 1, dtype=torch.float64), torch.zeros(100, 1, dtype=torch.float64)
    assert torch.allclose(rows[:, 2:3], process.posterior(one, zeros, times)[0])
    assert torch.allclose(rows[:, 3:4], process.posterior(zeros, one, times)[0])
    assert torch.allclose(rows[:-1, 4:5] ** 2, process.posterior(one, one, times)[1][:-1])
    assert rows[-1, 4] == 0


def test_ddim_golden():
    process = diffusion()
    times, rows = samplers.coefficients(process, "ddim")
    for t, value in ((0, 0.497524877), (1, 0.498822437), (999, 0.500064294)):
        a, b, c, d, s = rows[999 - t, :5]
        assert times[999 - t] == t and s == 0
        x0 = (a * 0.5 + b * 0.25).clamp(-1, 1)
        assert (c * x0 + d * 0.5).item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "quadratic"])
@pytest.mark.parametrize("spacing", ["uniform", "karras"])
def test_ddim_with_eta_one_is_ddpm(schedule, spacing):
    for steps in (1000, 50, 3, 1):
        given = dict(steps=steps, spacing=spacing)
        ddim = samplers.coefficients(diffusion(schedule=schedule), "ddim", eta=1.0, **given)
        ddpm = samplers.coefficients(diffusion(schedule=schedule), "ddpm", **given)
        assert torch.equal(ddim[0], ddpm[0])
        assert (ddim[1][:, :6] - ddpm[1][:, :6]).abs().max() <= 1e-12


def test_karras_noise_levels():
    """Karras et al. 2022, eq. 5, between the schedule's own ends; t where log σ is linear."""
    process = diffusion()
    known = sigma_of(process)
    times, rows = samplers.coefficients(process, "ddim", 18, spacing="karras")
    first, last = known[-1].item(), known[0].item()
    for i in (0, 5, 17):
        sigma = (first ** (1 / 7) + i / 17 * (last ** (1 / 7) - first ** (1 / 7))) ** 7
        assert rows[i, 0].item() == pytest.approx(math.sqrt(1 + sigma**2), rel=1e-12)
        assert rows[i, 1].item() == pytest.approx(-sigma, rel=1e-12)
    assert times[0].item() == pytest.approx(999) and times[-1].item() == pytest.approx(0)
    sigma = -rows[:, 1]
    low = times.floor().long().clamp(0, 998)
    assert (known[low] <= sigma * (1 + 1e-12)).all() and (sigma <= known[low + 1] * 1.0001).all()
    assert torch.allclose(alpha_bar_at(process, times), 1 / (1 + sigma**2), rtol=1e-10)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize("spacing", ["uniform", "karras"])
def test_a_respaced_process_is_that_of_the_kept_steps(spacing, sampler):
    """Its t are those of the process that the model was trained on; between them, as many apart."""
    process = diffusion()
    times, rows = samplers.coefficients(process, sampler, "10,5", spacing="uniform")
    found = samplers.coefficients(process.respaced("10,5"), sampler, spacing=spacing)
    if spacing == "uniform":
        assert torch.equal(found[0], times) and torch.allclose(found[1], rows, rtol=1e-9)
        return
    assert len(found[0]) == len(times)
    assert found[0][[0, -1]].tolist() == pytest.approx([999, 0], abs=1e-9)
    sigma = -found[1][:, 1]
    kept = torch.tensor(schedules.kept_steps(1000, "10,5"))
    known = sigma_of(process)[kept].log()
    low = (torch.searchsorted(known, sigma.log()) - 1).clamp(0, 13)
    share = (sigma.log() - known[low]) / (known[low + 1] - known[low])
    assert torch.allclose(found[0], torch.lerp(kept[low].double(), kept[low + 1].double(), share))


# ---- The probability-flow ODE of a Gaussian -----------------------------------------------------


@pytest.mark.parametrize("c", [0.5, 1.7])
@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm++", 2), ("heun", 2)])
@pytest.mark.parametrize("spacing", ["uniform", "karras"])
def test_order_of_convergence(spacing, sampler, order, c):
    """Data N(0, c²): x_σ = √(c² + σ²)·const solves the ODE, and ε = σ/(c² + σ²) x_σ.

    The last step, from σ_min to 0, is an x̂_0 in every sampler, and its error no matter of steps:
    it is taken from the exact solution too. With uniform spacing h is large where σ is small, so
    that the order shows at more steps.
    """
    process = diffusion(4000)

    def model(x, t):
        alpha_bar = alpha_bar_at(process, t).reshape(-1, 1, 1, 1)
        calls.append(t)
        eps = (1 - alpha_bar).sqrt() / (c**2 * alpha_bar + 1 - alpha_bar) * x.double()
        return eps.float()

    sigma = sigma_of(process)
    start = torch.ones(SHAPE)
    exact = start.double() * (1 + sigma[-1] ** 2).sqrt()
    exact = exact * ((c**2 + sigma[0] ** 2) / (c**2 + sigma[-1] ** 2)).sqrt()
    exact = exact * c**2 / (c**2 + sigma[0] ** 2)
    errors = []
    for steps in (40, 80) if spacing == "karras" else (250, 500):
        calls = []
        found = engine.sample(
            *(model, process, SHAPE),
            **dict(sampler=sampler, steps=steps, clip=False, spacing=spacing),
            noise=lambda k: start,
        )
        assert len(calls) == (2 * steps - 1 if sampler == "heun" else steps)
        errors.append((found - exact).abs().max().item() / exact.abs().max().item())
    assert errors[0] < 0.1
    assert 0.75 * 2**order <= errors[0] / errors[1] <= 1.4 * 2**order, errors


def bent(x, t):
    """A network that is no straight line in anything."""
    return torch.tanh(x * (0.3 + 0.002 * t.reshape(-1, 1, 1, 1).to(x.dtype))) * 0.8


@pytest.mark.parametrize("spacing", ["karras", "uniform"])
@pytest.mark.parametrize(
    "steps, churn",
    [
        (1, {}),
        (3, {}),
        (8, {}),
        (8, dict(s_churn=2.0)),
        (5, dict(s_churn=40.0, s_min=0.05, s_max=20.0, s_noise=1.01)),
    ],
    ids=str,
)
def test_heun_is_algorithm_2(steps, churn, spacing):
    """Karras et al. 2022, alg. 2, in its own symbols and float64, its state x_σ."""
    process = diffusion(100)
    n = ops.noise(3, 0, ops.INITIAL_NOISE, (steps + 1, *SHAPE))
    t_of = torch.arange(100, dtype=torch.float64)
    known = sigma_of(process)
    if spacing == "karras":
        ends = known[-1].item() ** (1 / 7), known[0].item() ** (1 / 7)
        share = [i / max(steps - 1, 1) for i in range(steps)]
        sigma = [(ends[0] + u * (ends[1] - ends[0])) ** 7 for u in share] + [0.0]
    else:
        sigma = [known[t].item() for t in schedules.kept_steps(100, steps)[::-1]] + [0.0]

    def denoised(x, sigma):
        i = int(torch.searchsorted(known, sigma * (1 - 1e-12)).clamp(1, 99))
        share = math.log(sigma / known[i - 1]) / math.log(known[i] / known[i - 1])
        t = torch.full((2,), t_of[i - 1].item() + share)
        return x - sigma * bent(x / math.sqrt(1 + sigma**2), t)

    x = n[0].double() * math.sqrt(1 + sigma[0] ** 2)
    for i in range(steps):
        low, high = churn.get("s_min", 0), churn.get("s_max", math.inf)
        gamma = min(churn.get("s_churn", 0) / steps, math.sqrt(2) - 1)
        gamma = gamma if low <= sigma[i] <= high and i else 0
        there = min(sigma[i] * (1 + gamma), sigma[0])
        extra = math.sqrt(there**2 - sigma[i] ** 2) * churn.get("s_noise", 1)
        x = x + extra * n[i].double() if gamma else x
        d = (x - denoised(x, there)) / there
        x_next = x + (sigma[i + 1] - there) * d
        if sigma[i + 1]:
            d_next = (x_next - denoised(x_next, sigma[i + 1])) / sigma[i + 1]
            x_next = x + (sigma[i + 1] - there) * (d + d_next) / 2
        x = x_next
    options = dict(sampler="heun", steps=steps, spacing=spacing, clip=False, **churn)
    found = engine.sample(bent, process, SHAPE, noise=n, **options)
    assert (found - x).abs().max() <= 1e-4 * x.abs().max()


# ---- Other people's schedulers ------------------------------------------------------------------


def blind(x):
    """A network that does not look at t, where the libraries round differently."""
    return torch.tanh(0.7 * x + 0.1) * 0.9


def trained(**options):
    return dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, **options)


OLD_NUMPY_PROTOCOL = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")


@OLD_NUMPY_PROTOCOL
@pytest.mark.parametrize("steps", [3, 7, 14])
def test_heun_is_that_of_diffusers(steps):
    """Their state is x_σ, ours √ᾱ x_σ: the same start, the same images."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    theirs = schedulers.HeunDiscreteScheduler(**trained(use_karras_sigmas=True))
    theirs.set_timesteps(steps)
    start = ops.noise(1, 0, ops.INITIAL_NOISE, SHAPE)
    x = start * (1 + theirs.sigmas[0] ** 2).sqrt()
    for t in theirs.timesteps:
        x = theirs.step(blind(theirs.scale_model_input(x, t)), t, x).prev_sample
    seen = []

    def model(x, t):
        seen.append(t[0].item())
        return blind(x)

    found = engine.sample(
        model, diffusion(), SHAPE, sampler="heun", steps=steps, seed=1, clip=False
    )
    assert torch.allclose(found, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())
    assert torch.allclose(torch.tensor(seen), theirs.timesteps.float(), atol=2e-2)


@OLD_NUMPY_PROTOCOL
@pytest.mark.parametrize("spacing", ["uniform", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 9, 24])
def test_dpm_solver_is_that_of_diffusers(spacing, steps):
    schedulers = pytest.importorskip("diffusers.schedulers")
    karras = dict(use_karras_sigmas=True) if spacing == "karras" else {}
    theirs = schedulers.DPMSolverMultistepScheduler(**trained(final_sigmas_type="zero", **karras))
    if karras:
        theirs.set_timesteps(steps)
    else:
        theirs.set_timesteps(timesteps=schedules.kept_steps(1000, steps)[::-1])
    x = start = ops.noise(1, 0, ops.INITIAL_NOISE, SHAPE)
    theirs.set_begin_index(0)  # at many steps their rounded t repeat, and would be looked up
    for t in theirs.timesteps:
        x = theirs.step(blind(x), t, x).prev_sample
    options = dict(sampler="dpm++", steps=steps, spacing=spacing, clip=False)
    found = engine.sample(
        lambda x, t: blind(x), diffusion(), SHAPE, noise=lambda k: start, **options
    )
    assert torch.allclose(found, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())
