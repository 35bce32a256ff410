"""Log-likelihood: reference values, the bound against its definition, models with known bits."""

import math

import pytest
import torch
from test_samplers import perfect

import engine
from engine import likelihood, ops, schedules

BITS = 1 / math.log(2)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def process(name="linear", T=1000, **options) -> engine.Diffusion:
    return engine.Diffusion(schedules.betas(name, T), **options)


def pixels(*shape, seed=0) -> torch.Tensor:
    """8-bit values, −1 and 1 among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(256, shape, generator=g)
    x.view(-1)[:2] = torch.tensor([0, 255])
    return x.double() / 127.5 - 1


def posterior_kl(diffusion, x0, x_t, t, x0_hat, logvar):
    """L_t from the two Gaussians themselves, in bits/dim."""
    mean, _ = diffusion.posterior(x0, x_t, t)
    beta, bar, prev = (
        v[t].reshape(-1, 1, 1, 1)
        for v in (diffusion.betas, diffusion.alpha_bar, diffusion.alpha_bar_prev)
    )
    variance = beta * (1 - prev) / (1 - bar)
    found, _ = diffusion.posterior(x0_hat, x_t, t)
    kl = logvar - variance.log() + (variance + (mean - found) ** 2) / logvar.exp() - 1
    return 0.5 * kl.flatten(1).mean(1) * BITS


# --- the pieces ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, nats",
    [
        ((0, 0, 0, 0), 0.0),
        ((1, 0, 0, 0), 0.5),
        ((0, 0, 0, math.log(2)), 0.0965735903),
        ((0.3, -1, 0.1, -0.5), 0.0862397553),
    ],
)
def test_gaussian_kl_golden(arguments, nats):
    assert likelihood.gaussian_kl(*map(f64, arguments)).item() == pytest.approx(nats, rel=1e-8)


def test_gaussian_kl_is_torchs_and_survives_float32():
    g = torch.Generator().manual_seed(0)
    m1, v1, m2, v2 = torch.randn(4, 100, generator=g, dtype=torch.float64)
    normal = torch.distributions.Normal
    truth = torch.distributions.kl_divergence(
        normal(m1, (v1 / 2).exp()), normal(m2, (v2 / 2).exp())
    )
    assert torch.allclose(likelihood.gaussian_kl(m1, v1, m2, v2), truth)
    near = torch.tensor([1e-4])  # the usual e^δ − 1 − δ would be 0 or 1e-7 here
    found = likelihood.gaussian_kl(torch.zeros(1), torch.zeros(1), torch.zeros(1), near)
    assert found.item() == pytest.approx(0.25e-8, rel=1e-3)


@pytest.mark.parametrize(
    "x, mean, log_scale, nats",
    [
        (0, 0, 0, -5.767057474),
        (0, 0, math.log(1 / 255), -0.382162757),
        (1, 1, math.log(0.01), -0.426927234),
        (-1, -1, math.log(0.01), -0.426927234),
        (0.5, -0.5, math.log(0.001), -27.631021116),
    ],
)
def test_discretized_gaussian_golden(x, mean, log_scale, nats):
    found = likelihood.discretized_gaussian_log_likelihood(f64(x), f64(mean), f64(log_scale))
    assert found.item() == pytest.approx(nats, rel=1e-8)


@pytest.mark.parametrize("mean, log_scale", [(0.1, -3.0), (-0.97, -1.0), (3.0, 0.5)])
def test_the_bins_of_the_decoder_make_up_one(mean, log_scale):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    logs = likelihood.discretized_gaussian_log_likelihood(x, f64(mean), f64(log_scale))
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_gaussian_cdf_is_near_the_true_one():
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    found = likelihood.gaussian_cdf(x) - torch.special.ndtr(x)
    assert 1e-4 < found.abs().max().item() < 2e-4


def test_decoder_has_no_nan_gradient():
    mean = torch.tensor([-9.0, 0.0, 9.0, 1e4], requires_grad=True)
    log_scale = torch.full((4,), -8.0, requires_grad=True)
    likelihood.discretized_gaussian_log_likelihood(torch.zeros(4), mean, log_scale).sum().backward()
    assert mean.grad.isfinite().all() and log_scale.grad.isfinite().all()


@pytest.mark.parametrize("value, bits", [(1, 2.911295e-5), (-1, 2.911295e-5), (0, 5.875e-10)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_prior_golden(value, bits, dtype):
    """linear, T = 1000; in float32 too, where ½(σ² − 1 − log σ²) of x_0 = 0 would round to 0."""
    x0 = torch.full((2, 1, 2, 2), value, dtype=dtype)
    found = likelihood.prior_bits_per_dim(process().alpha_bar[-1].item(), x0)
    assert found.dtype == dtype and found.tolist() == pytest.approx([bits] * 2, rel=5e-4)
    if value:
        assert found.tolist() == pytest.approx([bits] * 2, rel=2e-7)


# --- the terms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["small", "large", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("name, T", [("linear", 1000), ("cosine", 40)])
def test_terms_are_the_kl_of_the_posteriors(variance, prediction, name, T):
    diffusion = process(name, T, variance=variance, prediction=prediction)
    t = torch.tensor([1, 2, T // 2, T - 2, T - 1, 1])
    g = torch.Generator().manual_seed(1)
    noise, wrong, v = torch.randn(3, 6, 2, 4, 4, generator=g, dtype=torch.float64)
    x0 = pixels(6, 2, 4, 4)
    x_t = diffusion.q_sample(x0, t, noise)
    out = diffusion.target(x0, t, noise) + 0.3 * wrong
    x0_hat = diffusion.predict_x0(x_t, t, out)
    beta, bar, prev = (
        d[t].reshape(-1, 1, 1, 1)
        for d in (diffusion.betas, diffusion.alpha_bar, diffusion.alpha_bar_prev)
    )
    small = (beta * (1 - prev) / (1 - bar)).log().expand_as(x0)
    f = (v + 1) / 2
    logvar = {
        "small": small,
        "large": beta.log().expand_as(x0),
        "learned_range": f * beta.log() + (1 - f) * small,
    }[variance]
    full = torch.cat([out, v], 1) if variance == "learned_range" else out
    for clip in (False, True):
        hat = x0_hat.clamp(-1, 1) if clip else x0_hat
        bits, error = diffusion.vlb_terms(x0, x_t, t, full, clip=clip)
        assert torch.allclose(bits, posterior_kl(diffusion, x0, x_t, t, hat, logvar), rtol=1e-7)
        assert torch.allclose(error, ((x0 - hat) ** 2).flatten(1).mean(1))
    low = [a.float() for a in (x0, x_t, full)]
    found = diffusion.vlb_terms(low[0], low[1], t, low[2])[0]
    truth = diffusion.vlb_terms(x0, x_t, t, full)[0]
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), truth, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("variance", ["small", "large", "learned_range"])
def test_the_first_term_is_the_decoder(variance):
    """At t = 0 the mean is x̂_0 and β̃_1 stands for β̃_0 = 0, also in "large"."""
    diffusion = process(variance=variance)
    x0, noise = pixels(3, 1, 4, 4), torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    t = torch.zeros(3, dtype=torch.int64)
    out = torch.full_like(x0, 0.3)
    x_t = diffusion.q_sample(x0, t, noise)
    x0_hat = diffusion.predict_x0(x_t, t, out)
    logvar = math.log(5.453187661e-5)
    if variance == "learned_range":
        out = torch.cat([out, torch.full_like(out, 0.5)], 1)
        logvar = 0.25 * logvar + 0.75 * math.log(1e-4)
    truth = -likelihood.discretized_gaussian_log_likelihood(x0, x0_hat, f64(logvar / 2)) * BITS
    found = diffusion.vlb_terms(x0, x_t, t, out)[0]
    assert torch.allclose(found, truth.flatten(1).mean(1), rtol=1e-8)


def test_a_process_of_one_step_is_prior_and_decoder():
    for variance in ("small", "large", "learned_range"):
        diffusion = engine.Diffusion([0.5], variance=variance)
        x0 = pixels(2, 1, 2, 2)

        def model(x, t, channels=2 if variance == "learned_range" else 1):
            return torch.zeros_like(x).repeat(1, channels, 1, 1)

        found = diffusion.bits_per_dim(model, x0)
        assert found.vb.shape == (2, 1) and found.total.isfinite().all()


# --- bits/dim -----------------------------------------------------------------------------------


def decoder_bits(diffusion, x0):
    """−log₂ p of each pixel where the mean is the pixel and the variance β̃_1."""
    variance = diffusion.posterior(x0, x0, torch.ones(len(x0), dtype=torch.int64))[1]
    below = 0.5 * (1 + math.erf(1 / 255 / math.sqrt(2 * variance[0].item())))
    inside = (x0.abs() < 0.999).double().flatten(1).mean(1)
    return -(inside * math.log2(2 * below - 1) + (1 - inside) * math.log2(below))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_perfect_model_pays_for_prior_and_decoder_alone(prediction, name):
    """Every KL is 0; the decoder's Gaussian keeps its width β̃_1, and so costs what it must."""
    diffusion = process(name, 60, prediction=prediction)
    x0 = pixels(1, 2, 4, 4)

    def model(x, t):
        if prediction == "x0":
            return x0.expand_as(x)
        a = diffusion.alpha_bar[t].reshape(-1, 1, 1, 1)
        return diffusion.target(x0, t, (x - a.sqrt() * x0) / (1 - a).sqrt())

    found = diffusion.bits_per_dim(model, x0)
    assert found.vb.dtype == torch.float64
    assert found.vb[:, 1:].abs().max() < 1e-18
    if prediction == "x0":
        assert not found.vb[:, 1:].any() and not found.mse.any() and not found.x0_mse.any()
    # The approximate Φ of the decoder is wrong by 2e-4 at most.
    assert torch.allclose(found.vb[:, 0], decoder_bits(diffusion, x0), atol=2e-3)
    prior = likelihood.prior_bits_per_dim(diffusion.alpha_bar[-1].item(), x0)
    assert torch.equal(found.total, prior + found.vb.sum(1))
    assert torch.equal(found.prior, prior)


def test_a_perfect_model_in_float32_and_the_decoder_of_a_fine_process():
    """In float32 the KLs of all steps together cost below 1e-6 bits/dim. With a last step far below
    the width of a bin, the decoder is sure: 0 bits, and the prior is all there is."""
    fine = torch.cat([f64(1e-7, 1e-7), schedules.betas("cosine", 50)])
    diffusion = engine.Diffusion(fine)
    x0 = pixels(1, 1, 4, 4).float()
    found = diffusion.bits_per_dim(perfect(diffusion, x0), x0)
    assert found.total.dtype == torch.float32
    assert 0 <= found.vb[:, 0] < 1e-6 and 0 <= found.vb[:, 1:].sum() < 1e-2
    x0_model = engine.Diffusion(fine, prediction="x0")
    found = x0_model.bits_per_dim(lambda x, t: x0, x0)
    assert not found.vb.any() and torch.equal(found.total, found.prior)


def test_a_variance_of_beta_costs_what_it_says():
    """ "large" with the right mean: ½(δ + e^−δ − 1) per step with δ = log β/β̃."""
    diffusion = process("linear", 40, prediction="x0", variance="large")
    x0 = pixels(1, 1, 2, 2)
    found = diffusion.bits_per_dim(lambda x, t: x0, x0).vb[0, 1:]
    ratio = (1 - diffusion.alpha_bar[1:]) / (1 - diffusion.alpha_bar[:-1])
    assert torch.allclose(found, 0.5 * (ratio.log() + 1 / ratio - 1) * BITS, rtol=1e-10)


@pytest.mark.parametrize("prediction, variance", [("x0", "small"), ("eps", "learned_range")])
@pytest.mark.parametrize("name, steps", [("linear", 1000), ("cosine", "250,200")])
def test_coin_flips_cost_one_bit(prediction, variance, name, steps):
    """For pixels ±1, x̂_0 = E[x_0|x_t] = tanh(√ᾱ x_t/(1−ᾱ)) is the best that there is, and the
    terms beside the decoder's add up to the entropy: ½ ∫ E(x_0 − x̂_0)² dSNR (Guo et al. 2005)."""
    whole = process(name, prediction=prediction, variance=variance)
    g = torch.Generator().manual_seed(0)
    x0 = torch.randint(2, (2, 1, 48, 48), generator=g) * 2.0 - 1

    def model(x, t):
        a = whole.alpha_bar.float()[t].reshape(-1, 1, 1, 1)
        x0_hat = torch.tanh(a.sqrt() * x / (1 - a))
        out = x0_hat if prediction == "x0" else (x - a.sqrt() * x0_hat) / (1 - a).sqrt()
        return torch.cat([out, -torch.ones_like(x)], 1) if variance == "learned_range" else out

    found = whole.respaced(steps).bits_per_dim(model, x0)
    entropy = (found.total - found.vb[:, 0]).mean().item()
    assert entropy == pytest.approx(1, abs=0.03)  # 4608 draws of x_t per step


def curved(x, t):
    return 0.5 * x + (0.01 * t).reshape(-1, *[1] * (x.dim() - 1)).sin()


def doubled(x, t):
    return torch.cat([curved(x, t), torch.sin(3 * x)], 1)


@pytest.mark.parametrize("variance", ["small", "large", "learned_range"])
def test_bits_are_the_sum_of_terms_of_their_noise(variance):
    T, n = 12, 3
    diffusion = process("cosine", T, variance=variance)
    model = doubled if variance == "learned_range" else curved
    x0 = pixels(n, 1, 4, 4).float()
    seen = []

    def spy(x, t):
        assert not torch.is_grad_enabled()
        seen.append(t.tolist())
        return model(x, t)

    noise = torch.stack([ops.noise(5, t, likelihood.LIKELIHOOD_NOISE, x0.shape) for t in range(T)])
    found = diffusion.bits_per_dim(spy, x0, seed=5)
    assert seen == [[t] * n for t in range(T)]
    again = diffusion.bits_per_dim(model, x0, noise=noise)
    for name, a, b in zip(found._fields, found, again, strict=True):
        assert torch.equal(a, b), name
        assert not a.is_inference() and a.shape == ((n,) if name in ("total", "prior") else (n, T))
    assert torch.allclose(found.total, found.prior + found.vb.sum(1))
    for t in range(T):
        steps = torch.full((n,), t)
        x_t = diffusion.q_sample(x0, steps, noise[t])
        eps = model(x_t, steps)[:, :1]
        x0_hat = diffusion.predict_x0(x_t, steps, eps).clamp(-1, 1)
        a = diffusion.alpha_bar[t].float()
        eps_hat = (x_t - a.sqrt() * x0_hat) / (1 - a).sqrt()
        mse = ((eps_hat - noise[t]) ** 2).flatten(1).mean(1)
        assert torch.allclose(found.mse[:, t], mse, rtol=1e-4, atol=1e-7)
        assert torch.allclose(found.x0_mse[:, t], ((x0 - x0_hat) ** 2).flatten(1).mean(1))
    free = diffusion.bits_per_dim(model, x0, noise=noise, clip=False)
    assert free.total.sum() > found.total.sum()


def test_batches_do_not_change_bits_but_seeds_do():
    diffusion, x0 = process("cosine", 10), pixels(5, 1, 4, 4).float()
    whole = diffusion.bits_per_dim(curved, x0, seed=1)
    parts = [
        diffusion.bits_per_dim(curved, part, seed=1, offset=start)
        for start, part in ((0, x0[:2]), (2, x0[2:]))
    ]
    assert torch.equal(whole.vb, torch.cat([part.vb for part in parts]))
    other = diffusion.bits_per_dim(curved, x0, seed=2)
    assert not torch.isclose(whole.vb[:, 1:], other.vb[:, 1:]).all(1).any()
    assert torch.equal(whole.prior, other.prior)


def test_uint8_labels_and_the_mode_of_the_model():
    class Model(torch.nn.Module):
        def forward(self, x, t, y):
            assert not self.training and y.tolist() == [3, 4]
            return curved(x, t)

    model, diffusion = Model(), process("cosine", 5)
    raw = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
    labels = torch.tensor([3, 4])
    found = diffusion.bits_per_dim(model, raw, y=labels)
    same = diffusion.bits_per_dim(model, raw.float() / 127.5 - 1, y=labels, progress=True)
    assert model.training and torch.equal(found.total, same.total)


@pytest.mark.parametrize(
    "x0, options, sentence",
    [
        (torch.full((1, 1, 2, 2), 1.5), {}, r"x0 reaches from 1.5 to 1.5, expected \[−1, 1\]"),
        (torch.full((1, 1, 2, 2), math.nan), {}, "x0 reaches from nan"),
        (torch.zeros(3), {}, r"x0 is \(3,\) torch.float32, expected \(N, C, H, W\)"),
        ([0.0], {}, "x0 is list"),
        (
            torch.zeros(1, 1, 2, 2),
            {"noise": torch.zeros(1, 1, 2, 2)},
            r"expected \(5, 1, 1, 2, 2\)",
        ),
    ],
)
def test_bad_input(x0, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        process("cosine", 5).bits_per_dim(curved, x0, **options)


def test_a_model_without_v_is_refused():
    with pytest.raises(ValueError, match=r"returned \(1, 1, 2, 2\), expected \(1, 2, 2, 2\)"):
        process("cosine", 5, variance="learned_range").bits_per_dim(curved, torch.zeros(1, 1, 2, 2))


# --- respaced processes -------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["small", "large", "learned_range"])
def test_a_respaced_process_counts_its_own_steps(variance):
    """The model sees the longer process's t; the KLs are those of neighbours among the kept."""
    whole = process("linear", 100, variance=variance)
    part = whole.respaced(7)
    kept = schedules.kept_steps(100, 7)
    x0 = pixels(2, 1, 4, 4).float()
    seen = []

    def model(x, t):
        seen.append(t[0].item())
        return doubled(x, t) if variance == "learned_range" else curved(x, t)

    found = part.bits_per_dim(model, x0)
    assert seen == kept and found.vb.shape == (2, 7)
    assert torch.equal(found.prior, whole.bits_per_dim(model, x0).prior)
    same = whole.respaced(100).bits_per_dim(model, x0)
    for a, b in zip(same, whole.bits_per_dim(model, x0), strict=True):
        assert torch.equal(a, b)
