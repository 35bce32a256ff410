"""The forward process, posterior and losses against reference values and each other."""

import types

import pytest
import torch

import engine
from engine import schedules


def linear(**options) -> engine.Diffusion:
    return engine.Diffusion(schedules.betas("linear", 1000), **options)


def at(values):
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def test_posterior_golden():
    t = torch.tensor([1, 249, 499, 999])
    one, zero = (torch.full((4, 1, 1, 1), v, dtype=torch.float64) for v in (1.0, 0.0))
    c1, variance = linear().posterior(one, zero, t)
    c2, _ = linear().posterior(zero, one, t)
    assert torch.allclose(c1[[0, 1, 3]], at([0.5452915, 0.00771666, 1.2835e-4]), rtol=1e-5)
    assert torch.allclose(c2[[0, 1, 3]], at([0.4547085, 0.99188038, 0.98994868]), rtol=1e-6)
    assert torch.allclose(variance[:3], at([5.453187661e-5, 0.00503172, 0.01003136]), rtol=1e-5)


@pytest.mark.parametrize("name, b1", [("quadratic", 5.065600427e-5), ("sigmoid", 7.475617673e-5)])
def test_posterior_variance_of_other_schedules(name, b1):
    diffusion = engine.Diffusion(schedules.betas(name, 1000))
    x = torch.zeros(1, 1, dtype=torch.float64)
    assert diffusion.posterior(x, x, torch.tensor([1]))[1].item() == pytest.approx(b1, rel=1e-8)


def test_variance_choice():
    x, t = torch.zeros(3, 1, dtype=torch.float64), torch.tensor([0, 1, 999])
    small, large = (linear(variance=v).posterior(x, x, t)[1] for v in ("small", "large"))
    assert small[0] == 0 and large[0] == small[1]
    assert torch.allclose(large[1:, 0], linear().betas[[1, 999]])


def test_posterior_is_bayes():
    """q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0), from the two Gaussians."""
    diffusion, t = linear(), torch.tensor([400])
    beta, alpha_bar = diffusion.betas[400], diffusion.alpha_bar[399]
    x0, x_t = (
        torch.tensor([[0.3]], dtype=torch.float64),
        torch.tensor([[-0.8]], dtype=torch.float64),
    )
    precision = (1 - beta) / beta + 1 / (1 - alpha_bar)
    mean = ((1 - beta).sqrt() / beta * x_t + alpha_bar.sqrt() / (1 - alpha_bar) * x0) / precision
    found = diffusion.posterior(x0, x_t, t)
    assert torch.allclose(found[0], mean) and torch.allclose(found[1], 1 / precision)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_predict_x0_inverts_q_sample(prediction):
    diffusion = linear(prediction=prediction)
    x0, noise = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64).unbind()
    t = torch.tensor([0, 1, 249, 499, 900, 999])
    target = diffusion.target(x0, t, noise)
    found = diffusion.predict_x0(diffusion.q_sample(x0, t, noise), t, target)
    assert torch.allclose(found, x0, atol=1e-11)


def test_q_sample_has_the_right_moments():
    diffusion, t = linear(), torch.full((20000,), 499)
    g = torch.Generator().manual_seed(0)
    x_t = diffusion.q_sample(torch.ones(20000, 1), t, torch.randn(20000, 1, generator=g))
    alpha_bar = diffusion.alpha_bar[499].item()
    assert x_t.mean().item() == pytest.approx(alpha_bar**0.5, abs=0.03)
    assert x_t.var().item() == pytest.approx(1 - alpha_bar, rel=0.05)


@pytest.mark.parametrize("loss, value", [("l1", 2.0), ("l2", 4.0), ("huber", 1.5)])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_losses(loss, value, prediction):
    diffusion = linear(prediction=prediction, loss=loss)
    x0, noise = torch.randn(2, 3, 1, 4, 4).unbind()
    t = torch.tensor([0, 500, 999])
    target = diffusion.target(x0, t, noise)
    found = diffusion.loss(lambda x, t: target + 2.0, x0, t=t, noise=noise)
    assert found.item() == pytest.approx(value, rel=1e-5)
    assert diffusion.loss(lambda x, t, y: target, x0, t=t, noise=noise, y=t).item() == 0


def test_low_precision_images_use_float32_tables():
    x0 = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    x_t = linear().q_sample(x0, torch.tensor([10, 11]), torch.ones_like(x0))
    assert x_t[0, 0, 0, 0] != x_t[1, 0, 0, 0]


def test_loss_draws_t_and_noise():
    torch.manual_seed(0)
    seen = []

    def model(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    loss = linear().loss(model, torch.zeros(4096, 1, 2, 2))
    assert loss.item() == pytest.approx(1.0, abs=0.05)
    assert seen[0].min() < 10 and seen[0].max() > 990


X = torch.zeros(2, 1, 4, 4)
T = torch.tensor([3, 4])


@pytest.mark.parametrize(
    "t, sentence",
    [
        (T.float(), r"t is \(2,\) torch.float32, expected \(2,\) int64: one diffusion step per"),
        (T.bool(), "torch.bool, expected"),
        (T.to(torch.uint8), "torch.uint8, expected"),
        (T[:1], r"t is \(1,\) torch.int64, expected \(2,\)"),
        (T[0], r"t is \(\) torch.int64"),
        (T[:, None], r"t is \(2, 1\) torch.int64"),
        ([3, 4], r"t is \[3, 4\], expected \(2,\)"),
        (5, "t is 5, expected"),
        (T - 4, r"t reaches from -1 to 0, expected steps 0 … 999"),
        (T + 996, "t reaches from 999 to 1000"),
    ],
)
def test_wrong_steps(t, sentence):
    calls = (linear().q_sample, lambda x, t, z: linear().posterior(x, z, t), linear().predict_x0)
    for call in calls:
        with pytest.raises(ValueError, match=sentence):
            call(X, t, X)


def test_steps_of_either_integer_type():
    noise = torch.ones_like(X)
    assert torch.equal(linear().q_sample(X, T.int(), noise), linear().q_sample(X, T, noise))


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: linear().q_sample(X, T, X[:1]), r"noise is \(1, 1, 4, 4\) and x0 \(2, 1, 4, 4\)"),
        (
            lambda: linear().q_sample(X.byte(), T, X),
            "x0 .* torch.uint8, expected .* floating point",
        ),
        (lambda: linear().predict_x0(X, T, X[0]), r"model_out is \(1, 4, 4\) and x_t"),
        (lambda: linear().posterior(X[:1], X, T), r"x0 is \(1, 1, 4, 4\) and x_t"),
        (lambda: linear().loss(lambda x, t: x, X, t=T, noise=X[:1]), "noise is"),
        (lambda: linear(prediction="noise"), "expected one of eps, x0, v"),
        (lambda: linear(variance="learned"), "expected one of small, large"),
        (lambda: linear(loss="mse"), "expected one of l1, l2, huber"),
        (lambda: engine.Diffusion("cosine"), r"expected .* schedules\.betas\('cosine', 1000\)"),
        (
            lambda: linear().loss(lambda x, t: types.SimpleNamespace(sample=x), X),
            r"the model returned SimpleNamespace, .* returns its \.sample",
        ),
        (lambda: engine.Diffusion(torch.tensor([0.1, 1.0])), "0 < beta < 1"),
        (lambda: engine.Diffusion(torch.ones(2, 2) / 2), r"expected \(T,\)"),
        (
            lambda: linear().loss(lambda x, t: x[:, :0], torch.ones(1, 1, 2, 2)),
            "the model returned",
        ),
    ],
)
def test_bad_input(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
def test_loss_of_a_key_is_the_loss_of_its_noise(prediction, loss):
    """key and step: the same normals as ops.noise, drawn in the kernels; gradients included."""
    process = engine.Diffusion(schedules.betas("cosine", 50), prediction=prediction, loss=loss)
    x0, w = torch.rand(4, 3, 6, 6) * 2 - 1, torch.full((), 0.5, requires_grad=True)
    t = torch.tensor([0, 3, 20, 49])

    def model(x, t):
        return w * x

    noise = engine.ops.noise(11, 5, engine.ops.TRAINING_NOISE, x0.shape)
    expected = process.loss(model, x0, t=t, noise=noise)
    got = process.loss(model, x0, t=t, key=11, step=5)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, w), torch.autograd.grad(expected, w), strict=True):
        torch.testing.assert_close(a, b)
    other = process.loss(model, x0, t=t, key=11, step=6)
    assert not torch.isclose(got, other)
    with pytest.raises(ValueError, match="exactly one"):
        process.loss(model, x0, t=t, key=11, noise=noise)
