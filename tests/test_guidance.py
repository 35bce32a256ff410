"""Guidance by label (classifier-free) and by a classifier: closed forms and plain loops."""

import math

import pytest
import torch

import engine
from engine import guidance, ops, samplers, schedules

SHAPE = (3, 1, 4, 4)
NULL = 4  # the label of no class


def diffusion(T=60, **options) -> engine.Diffusion:
    return engine.Diffusion(schedules.betas("linear", T), **options)


class Network:
    """Bent in x, t and y; counts its calls and the batch of each."""

    null_label = NULL

    def __init__(self, doubled=False):
        self.doubled, self.batches = doubled, []
        self.weight = torch.tensor([0.2, -0.4, 0.9, 0.5, 0.05])

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        scale = (self.weight[y] + 0.003 * t).reshape(-1, 1, 1, 1)
        out = torch.tanh(x * scale + 0.1 * y.reshape(-1, 1, 1, 1))
        return torch.cat([out, torch.sin(3 * out)], 1) if self.doubled else out


def y():
    return torch.tensor([0, 2, 3])


def draw(model, process, impl="auto", **options):
    return engine.sample(model, process, SHAPE, impl=impl, seed=2, **options)


SAMPLERS = [
    dict(sampler="ddpm"),
    dict(sampler="ddim", eta=0.4, steps=9),
    dict(sampler="dpm++", steps=7),
    dict(sampler="heun", steps=6, s_churn=2.0),
]


# ---- Classifier-free ----------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["eager", "native"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("options", SAMPLERS, ids=str)
def test_guided_images_are_those_of_the_combined_network(options, learned, impl):
    """ε_u + s(ε_c − ε_u) as one plain network; a learned variance is the conditional one's."""
    process = diffusion(variance="learned_range" if learned else "small")
    net = Network(learned)

    def combined(scale):
        def model(x, t):
            cond, uncond = net(x, t, y()), net(x, t, torch.full((3,), NULL))
            eps = uncond[:, :1] + scale * (cond[:, :1] - uncond[:, :1])
            return torch.cat([eps, cond[:, 1:]], 1)

        return model

    for scale in (0, 2.5, -1.0):
        expected = draw(combined(scale), process, impl, **options)
        net.batches.clear()
        found = draw(net, process, impl, y=y(), guidance=scale, **options)
        assert set(net.batches) == {6}, "one call of the doubled batch"
        assert torch.allclose(found, expected, atol=1e-5)
    conditional = draw(net, process, impl, y=y(), **options)
    net.batches.clear()
    assert torch.equal(draw(net, process, impl, y=y(), guidance=1, **options), conditional)
    assert set(net.batches) == {3}
    nearly = draw(net, process, impl, y=y(), guidance=1 + 1e-6, **options)
    assert set(net.batches) == {3, 6} and torch.allclose(nearly, conditional, atol=1e-4)
    if not learned:
        unconditional = draw(net, process, impl, y=torch.full((3,), NULL), **options)
        found = draw(net, process, impl, y=y(), guidance=0, **options)
        assert torch.allclose(found, unconditional, atol=1e-6)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_the_combine_is_of_what_the_network_predicts(prediction):
    process, net = diffusion(prediction=prediction), Network()

    def combined(x, t):
        uncond = net(x, t, torch.full((3,), NULL))
        return uncond + 3 * (net(x, t, y()) - uncond)

    found = draw(net, process, y=y(), guidance=3, sampler="dpm++", steps=8)
    expected = draw(combined, process, sampler="dpm++", steps=8)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_null_label_is_the_models_or_the_callers():
    process, net = diffusion(), Network()
    options = dict(y=y(), guidance=2.0, sampler="ddim", steps=5)
    mine = draw(net, process, **options)
    assert torch.equal(mine, draw(net, process, null_label=NULL, **options))
    assert not torch.equal(mine, draw(net, process, null_label=1, **options))
    net.null_label = None
    with pytest.raises(ValueError, match="has no null_label: use one that was trained with label"):
        draw(net, process, **options)


# ---- A classifier -------------------------------------------------------------------------------


def exact_eps(process, mean, variance):
    """The network of data N(mean, variance): ε = √(1−ᾱ)(x − √ᾱ·mean)/(ᾱ·variance + 1−ᾱ)."""

    def model(x, t):
        a = alpha_bar(process, t)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * variance + 1 - a)

    return model


def alpha_bar(process, t):
    low = t.floor().long().clamp(max=process.T - 2)
    log_sigma = ((1 - process.alpha_bar) / process.alpha_bar).sqrt().log()
    there = torch.lerp(log_sigma[low], log_sigma[low + 1], t.double() - low)
    return (1 / (1 + (2 * there).exp())).float().reshape(-1, 1, 1, 1)


def quadratic(process, mean, variance, prior):
    """log p(y = 1 | x_t) = log N(x_t; of the data with y) − log N(x_t; of all data) + constant.

    The other logit is so large that the softmax's denominator does not move.
    """

    def classifier(x, t):
        a = alpha_bar(process, t)
        log_p = -((x - a.sqrt() * mean) ** 2) / (a * variance + 1 - a)
        log_p = log_p / 2 + x**2 / (a * prior + 1 - a) / 2
        return torch.stack([torch.full((len(x),), 1e4), log_p.flatten(1).sum(1)], 1)

    return classifier


PRIOR, MEAN, VARIANCE = 0.8, 0.6, 0.2  # of all data N(0, PRIOR), of those with y N(MEAN, VARIANCE)


@pytest.mark.parametrize("impl", ["eager", "native"])
@pytest.mark.parametrize("options", SAMPLERS[1:], ids=str)
def test_a_gaussian_guided_is_the_conditional_gaussian(options, impl):
    """ε − √(1−ᾱ)∇log p(y|x_t) is the conditional ε itself: the same images at any step count."""
    process = diffusion()
    classifier = quadratic(process, MEAN, VARIANCE, PRIOR)
    labels = torch.ones(3, dtype=torch.int64)
    found = draw(
        lambda x, t, y: exact_eps(process, 0, PRIOR)(x, t),
        *(process, impl),
        **dict(y=labels, classifier=classifier, clip=False, **options),
    )
    expected = draw(exact_eps(process, MEAN, VARIANCE), process, impl, clip=False, **options)
    assert torch.allclose(found, expected, atol=2e-3 if options["sampler"] == "heun" else 2e-4)
    assert not found.is_inference() and not found.requires_grad


def test_a_gaussian_guided_by_ddpm_is_the_conditional_gaussian_in_the_limit():
    process, shape = diffusion(400), (2000, 1, 1, 1)
    images = engine.sample(
        lambda x, t, y: exact_eps(process, 0, PRIOR)(x, t),
        *(process, shape),
        y=torch.ones(2000, dtype=torch.int64),
        classifier=quadratic(process, MEAN, VARIANCE, PRIOR),
        clip=False,
    )
    assert images.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert images.var().item() == pytest.approx(VARIANCE, rel=0.12)


@pytest.mark.parametrize("variance", ["small", "large", "learned_range"])
def test_ddpm_with_a_classifier_is_algorithm_1(variance):
    """Dhariwal & Nichol 2021, alg. 1: N(μ + sΣ∇, Σ), Σ the network's own where it is learned."""
    process = diffusion(variance=variance)
    net, scale = Network(variance == "learned_range"), 1.7
    times = schedules.kept_steps(60, 12)[::-1]
    noise = torch.randn((13, *SHAPE), generator=torch.Generator().manual_seed(0))

    def classifier(x, t):  # gentle: a rounding must not grow from step to step
        return torch.stack([(0.2 * k * x).sin().flatten(1).sum(1) for k in (1, 2, 3, 4)], 1)

    fixed = engine.Diffusion(process.betas, variance="small" if net.doubled else variance)
    rows = samplers.coefficients(fixed, "ddpm", 12)[1]
    x = noise[0].double()
    for i, t in enumerate(times):
        a, b, c, d, s = rows[i, :5]
        out = net(x.float(), torch.full((3,), t), y()).double()
        var = rows[i, 7]
        if net.doubled:
            before = process.alpha_bar[times[i + 1]] if i < 11 else torch.ones(())
            beta = 1 - process.alpha_bar[t] / before
            small = rows[i, 7] if i < 11 else rows[10, 7]  # β̃_0 = 0 is clipped to β̃_1
            share = (out[:, 1:] + 1) / 2
            var = torch.exp(share * beta.log() + (1 - share) * small.log())
        with torch.enable_grad():
            at = x.clone().requires_grad_()
            log_p = classifier(at, None).log_softmax(1)[torch.arange(3), y()]
            grad = torch.autograd.grad(log_p.sum(), at)[0]
        mean = c * (a * x + b * out[:, :1]).clamp(-1, 1) + d * x
        x = mean + scale * var * grad
        x = x + (var**0.5 if net.doubled else s) * noise[i + 1] if i < 11 else x
    found = draw(
        *(net, process),
        **dict(y=y(), classifier=classifier, classifier_scale=scale, steps=12, noise=noise),
    )
    assert torch.allclose(found.double(), x, rtol=1e-4, atol=2e-4)


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(1, 8, 3)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x, t):
        assert torch.is_grad_enabled() and not self.training
        h = self.drop(torch.tanh(self.conv(x))).mean((2, 3)) * (1 + t[:, None] / 60)
        return self.head(h)


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
def test_a_module_guides_wherever_gradients_are_off(options):
    process, net, classifier = diffusion(), Network(), Classifier().train()
    given = dict(y=y(), classifier=classifier, classifier_scale=30.0, **options)
    found = draw(net, process, **given)
    with torch.inference_mode():
        labels = y()
        inside = draw(net, process, **(given | dict(y=labels)))
    assert torch.equal(found, inside) and classifier.training
    assert all(p.grad is None for p in classifier.parameters())

    def log_p(images):
        return classifier.eval()(images, torch.zeros(3)).log_softmax(1)[range(3), y()].sum()

    unguided = draw(net, process, **(given | dict(classifier_scale=0.0)))
    assert torch.allclose(unguided, draw(net, process, y=y(), **options), atol=1e-6)
    assert log_p(found) > log_p(unguided)
    both = draw(net, process, guidance=2.0, **given)
    assert not torch.equal(both, found)


def test_a_unet_without_classes_is_not_given_the_label():
    net = engine.UNet(
        image_size=4, in_channels=1, model_channels=8, channel_mult=(1,), num_groups=4
    )
    options = dict(y=y(), sampler="ddim", steps=2)
    images = draw(net, diffusion(), classifier=Classifier(), classifier_scale=5.0, **options)
    assert not torch.equal(images, draw(net, diffusion(), sampler="ddim", steps=2))
    with pytest.raises(ValueError, match="guidance is 2, but this model is unconditional"):
        draw(net, diffusion(), guidance=2, **options)


def test_a_network_may_be_its_own_classifier():
    """Under autocast both then share the bf16 copies of the weights that the first call made."""
    classifier = Classifier()

    def model(x, t, y):
        return torch.nn.functional.conv2d(x, classifier.conv.weight, padding=1)[:, :1].tanh()

    options = dict(y=y(), sampler="ddim", steps=3, classifier=classifier, classifier_scale=9.0)
    plain = draw(model, diffusion(), **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = draw(model, diffusion(), **options)
    assert torch.allclose(found, plain, atol=0.1)


def test_gradient_of_a_class():
    """∇ log softmax(W x)_y = W_y − Σ_k p_k W_k, in closed form, scaled."""
    torch.manual_seed(0)
    weight, x = torch.randn(5, 16), torch.randn(SHAPE)
    found = guidance.class_gradient(
        lambda x, t: x.flatten(1) @ weight.T, x, torch.zeros(3), y(), scale=-2.0
    )
    p = (x.flatten(1) @ weight.T).softmax(1)
    expected = -2 * (weight[y()] - p @ weight)
    assert torch.allclose(found.flatten(1), expected, atol=1e-5)
    with torch.inference_mode():  # and what is made there
        given = (x + 0, torch.zeros(3), y())
        inside = guidance.class_gradient(lambda x, t: x.flatten(1) @ weight.T, *given, scale=-2.0)
    assert torch.equal(found, inside)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(guidance=2.0), "guidance is 2.0 without y"),
        (dict(guidance="much", y=y()), "guidance is 'much', expected a finite number"),
        (dict(guidance=True, y=y()), "guidance is True, expected a finite number"),
        (dict(guidance=math.nan, y=y()), "guidance is nan, expected a finite number"),
        (dict(classifier=Classifier()), "a classifier guides to y: y is nothing"),
        (dict(classifier=Classifier(), y=y().float()), r"y is \(3,\) torch.float32, expected"),
        (
            dict(classifier=Classifier(), y=y(), classifier_scale="1"),
            "classifier_scale is '1', expected a finite number",
        ),
        (
            dict(classifier=lambda x, t: x, y=y()),
            r"returned \(3, 1, 4, 4\), expected logits \(3, c",
        ),
        (dict(classifier=lambda x, t: None, y=y()), "classifier returned NoneType, expected"),
        (
            dict(classifier=lambda x, t: x.detach().flatten(1), y=y()),
            "the classifier's logits have no gradient",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_guidance(options, sentence):
    net = Network()
    with pytest.raises(ValueError, match=sentence):
        draw(net if "y" in options else lambda x, t: torch.zeros_like(x), diffusion(), **options)


def test_a_noise_of_the_noise_contract_is_the_key():
    """Injected normals of (seed, row, stream 0) give the keyed images."""
    for options in SAMPLERS:
        calls = 2 if options["sampler"] == "heun" else 1

        def normals(k, calls=calls):
            if k == 0:
                return ops.noise(2, 0, ops.INITIAL_NOISE, SHAPE)
            return ops.noise(2, calls * k - 1, ops.STEP_NOISE, SHAPE)

        more = dict(y=y(), guidance=2.0, **options)
        keyed = draw(Network(), diffusion(), **more)
        assert torch.equal(draw(Network(), diffusion(), noise=normals, **more), keyed)
        n = options.get("steps", 60)
        asked = []
        draw(
            Network(), diffusion(), noise=lambda k, a=asked, z=normals: a.append(k) or z(k), **more
        )
        assert asked == list(range(n)), "each once, and not the last"
        stacked = torch.stack([normals(k) for k in range(n + 1)])
        assert torch.equal(draw(Network(), diffusion(), noise=stacked, **more), keyed)
        stacked[1:] += 1
        same = torch.equal(draw(Network(), diffusion(), noise=stacked, **more), keyed)
        assert same == (options["sampler"] == "dpm++")
