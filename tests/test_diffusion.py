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
        (
            lambda: linear(loss="hybrid"),
            "loss='hybrid' trains a learned variance: give variance='learned_range'",
        ),
        (
            lambda: linear(variance="learned_range").loss(lambda x, t: x, X),
            "loss='l2' leaves the variance untrained: use one of hybrid, l2_vlb, vlb, rescaled_vlb",
        ),
        (
            lambda: linear(variance="learned_range", loss="vlb").loss(lambda x, t: x, X),
            r"returned \(2, 1, 4, 4\), expected \(2, 2, 4, 4\) like its input, with twice its",
        ),
        (lambda: linear().loss(lambda x, t: x, X, reduction="sum"), "expected mean or none"),
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


LEARNED = ("hybrid", "l2_vlb", "vlb", "rescaled_vlb")


def learned(loss, T=500, **options) -> engine.Diffusion:
    return engine.Diffusion(
        schedules.betas("cosine", T), variance="learned_range", loss=loss, **options
    )


def outputs(dtype=torch.float32):
    """x_0, noise, t (0 among them), and 2C channels to be differentiated in."""
    g = torch.Generator().manual_seed(3)
    x0 = (torch.randint(256, (5, 2, 4, 4), generator=g) / 127.5 - 1).to(dtype)
    noise, wrong, v = torch.randn(3, 5, 2, 4, 4, generator=g, dtype=dtype)
    out = torch.cat([noise + 0.2 * wrong, v], 1).requires_grad_()
    return x0, noise, torch.tensor([0, 1, 7, 250, 499]), out


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("loss, scale", [("hybrid", 0.5), ("l2_vlb", 1.0)])
@pytest.mark.parametrize("keyed", [False, True])
def test_the_bound_trains_the_variance_and_l2_the_mean(prediction, loss, scale, keyed):
    """The gradients of the two halves of the channels are those of the two losses, to the bit."""
    x0, noise, t, out = outputs()
    draw = {"key": 4, "step": 2} if keyed else {"noise": noise}

    def gradient(process, channels):
        total = process.loss(lambda x, t: out[:, :channels], x0, t=t, **draw)
        return total.detach(), torch.autograd.grad(total, out)[0]

    simple, of_mean = gradient(
        engine.Diffusion(schedules.betas("cosine", 500), prediction=prediction), 2
    )
    bound, of_v = gradient(learned("vlb", prediction=prediction), 4)
    both, found = gradient(learned(loss, prediction=prediction), 4)
    assert of_v[:, 2:].any() and of_v[:, :2].any()
    assert torch.equal(found[:, :2], of_mean[:, :2])
    assert torch.equal(found[:, 2:], scale * of_v[:, 2:])
    assert torch.equal(both, simple + scale * bound)


@pytest.mark.parametrize("loss", ["l1", "l2", "huber", *LEARNED])
@pytest.mark.parametrize("keyed", [False, True])
def test_losses_per_image_have_the_mean_as_their_mean(loss, keyed):
    """reduction="none", and with it any weights: values and gradients."""
    x0, noise, t, out = outputs()
    draw = {"key": 4, "step": 2} if keyed else {"noise": noise}
    process = learned(loss) if loss in LEARNED else linear(loss=loss)
    channels = 4 if loss in LEARNED else 2

    def losses(rows, **options):
        part = {k: v[rows] if k == "noise" else v for k, v in draw.items()}
        return process.loss(
            lambda x, t: out[rows, :channels], x0[rows], t=t[rows], **part, **options
        )

    whole = slice(None)
    each = losses(whole, reduction="none")
    assert each.shape == (5,) and each.dtype == torch.float32
    mean = losses(whole)
    torch.testing.assert_close(each.mean(), mean)
    expected, got = (torch.autograd.grad(x, out)[0] for x in (mean, each.mean()))
    torch.testing.assert_close(got, expected)
    if not keyed:
        for i in range(5):
            torch.testing.assert_close(each[i], losses(slice(i, i + 1)))
    weights = torch.tensor([0.0, 2.0, 0.5, 1.0, 3.0])
    weighted = torch.autograd.grad((weights * losses(whole, reduction="none")).sum(), out)[0]
    for i in range(0 if keyed else 5):
        alone = torch.autograd.grad(losses(slice(i, i + 1)), out)[0]
        torch.testing.assert_close(weighted[i], weights[i] * alone[i])


@pytest.mark.parametrize("loss", LEARNED)
def test_a_learned_variance_from_a_key_is_that_of_its_noise(loss):
    x0, _, t, out = outputs()
    process = learned(loss)
    noise = engine.ops.noise(4, 2, engine.ops.TRAINING_NOISE, x0.shape)
    totals = [
        process.loss(lambda x, t: out + 0.01 * torch.cat([x, x], 1), x0, t=t, **draw)
        for draw in ({"key": 4, "step": 2}, {"noise": noise})
    ]
    torch.testing.assert_close(*totals)
    # x_t may differ by a rounding, and L_t at small t measures by √β_0.
    tolerance = 8 * torch.finfo(torch.float32).eps / process.betas[0].sqrt().item()
    got, expected = (torch.autograd.grad(total, out)[0] for total in totals)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variance", ["small", "large", "learned_range"])
def test_the_loss_vlb_is_a_term_of_the_bound(variance):
    """Mean over all t: rescaled_vlb is Σ_t L_t of bits_per_dim, unclipped, for the same noise."""
    T = 9
    x0 = (torch.randint(256, (1, 1, 4, 4)) / 127.5 - 1).expand(T, 1, 4, 4)
    noise, t = torch.randn(T, 1, 4, 4), torch.arange(T)

    def model(x, t):
        v = [x.sin()] if variance == "learned_range" else []
        return torch.cat([0.5 * x, *v], 1)

    options = {"variance": variance, "loss": "rescaled_vlb"}
    process = engine.Diffusion(schedules.betas("cosine", T), **options)
    found = process.loss(model, x0, t=t, noise=noise)
    bits = process.bits_per_dim(model, x0[:1], noise=noise[:, None], clip=False)
    torch.testing.assert_close(found, bits.vb.sum())
    options["loss"] = "vlb"
    term = engine.Diffusion(schedules.betas("cosine", T), **options)
    torch.testing.assert_close(T * term.loss(model, x0, t=t, noise=noise), found)


def test_gradient_of_the_bound_in_float64():
    x0, noise, t, out = outputs(torch.float64)
    process = learned("vlb", prediction="v")
    x_t = process.q_sample(x0, t, noise)
    assert torch.autograd.gradcheck(lambda o: process.vlb_terms(x0, x_t, t, o)[0], out)


def test_a_learned_variance_in_bfloat16_is_read_in_float32():
    x0, noise, t, out = outputs()
    low = out.detach().bfloat16()
    process = learned("hybrid")
    found = process.loss(lambda x, t: low, x0, t=t, noise=noise)
    assert torch.equal(found, process.loss(lambda x, t: low.float(), x0, t=t, noise=noise))


def test_the_bound_compiles_whole():
    """Dynamo alone: no graph break, the same bits; t = 0 among the steps."""
    x0, _, t, out = outputs()
    part = learned("hybrid").respaced("100,50")
    t = t.clamp(max=149)

    def loss(x0, t, key):
        return part.loss(lambda x, t: out * (1 + x[:, :1]), x0, t=t, key=key, step=2)

    key = torch.tensor(4)
    found = torch.compile(loss, fullgraph=True, backend="eager")(x0, t, key)
    assert torch.equal(found, loss(x0, t, key))


def test_tables_made_under_inference_mode_serve_training():
    process = engine.Diffusion(schedules.betas("linear", 100))
    x0, t = torch.rand(2, 1, 4, 4) * 2 - 1, torch.tensor([1, 3])
    scale = torch.ones((), requires_grad=True)

    def model(x, t):
        return x.half() * scale.half()  # float16: the loss keeps the rows for its backward pass

    with torch.inference_mode():
        process.loss(model, x0, t=t, key=1)
    process.loss(model, x0, t=t, key=1).backward()
    assert scale.grad.isfinite()
