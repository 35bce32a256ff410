"""Samplers: coefficients against their definitions, and whole runs with known answers."""

import copy
import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

import engine
from engine import ops, samplers, schedules

SHAPE = (3, 1, 4, 4)


def diffusion(T=100, **options) -> engine.Diffusion:
    return engine.Diffusion(schedules.betas("linear", T), **options)


def zero(x, t):
    return torch.zeros_like(x)


def perfect(process: engine.Diffusion, x0: torch.Tensor):
    """A network that knows the image: it returns exactly what it should have predicted."""
    log_sigma = ((1 - process.alpha_bar) / process.alpha_bar).log() / 2

    def model(x, t):
        low = t.floor().long().clamp(max=process.T - 2)
        sigma = torch.lerp(log_sigma[low], log_sigma[low + 1], t.double() - low).exp()
        a = (1 / (1 + sigma**2)).float().reshape(-1, 1, 1, 1)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * x0
        return {"eps": eps, "x0": x0.expand_as(x), "v": v}[process.prediction]

    return model


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(
    "sampler, steps",
    [
        *(("ddpm", None), ("ddpm", 10), ("ddim", 10), ("ddim", 1), ("dpm++", 10), ("dpm++", 1)),
        *(("heun", 10), ("heun", 1)),
    ],
)
def test_a_perfect_network_gives_the_image(prediction, sampler, steps):
    process = diffusion(prediction=prediction)
    x0 = torch.rand(1, 1, 4, 4) * 1.8 - 0.9
    found = engine.sample(perfect(process, x0), process, SHAPE, sampler=sampler, steps=steps)
    assert torch.allclose(found, x0.expand(SHAPE), atol=2e-3)


def curved(x, t):
    """A network that is no straight line in anything."""
    return torch.tanh(x * (0.3 + 0.01 * t.reshape(-1, 1, 1, 1))) * 0.8


@pytest.mark.parametrize("steps", [1, 2, 3, 12])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_dpm_solver_is_algorithm_2(schedule, steps):
    """Lu et al. 2022, alg. 2, written in its own symbols, float64, from the same x_T."""
    process = engine.Diffusion(schedules.betas(schedule, 100))
    kept = schedules.kept_steps(100, steps)[::-1]
    alpha = [process.alpha_bar[t].sqrt().item() for t in kept] + [1.0]
    sigma = [math.sqrt(1 - process.alpha_bar[t]) for t in kept] + [0.0]
    lam = [math.log(a / s) if s else math.inf for a, s in zip(alpha, sigma, strict=True)]
    x, before = ops.noise(3, 0, ops.INITIAL_NOISE, SHAPE).double(), None
    for i, t in enumerate(kept):
        x0 = (x - sigma[i] * curved(x, torch.full((3,), t))) / alpha[i]
        h, d = lam[i + 1] - lam[i], x0
        if before is not None and h != math.inf:
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - before / (2 * r)
        x, before = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * d, x0
    found = engine.sample(curved, process, SHAPE, sampler="dpm++", steps=steps, seed=3, clip=False)
    assert (found - x).abs().max() <= 2e-5 * max(1, x.abs().max().item())


def test_dpm_solver_nears_the_ode_faster_than_ddim():
    """Both solve the same ODE: with 25 steps, the second order is much nearer to 400."""
    process = diffusion(400)

    def run(sampler, steps):
        return engine.sample(curved, process, SHAPE, sampler=sampler, steps=steps, clip=False)

    exact = run("dpm++", None)
    first, second = ((run(name, 25) - exact).abs().max() for name in ("ddim", "dpm++"))
    assert second < 0.5 * first


@pytest.mark.parametrize("steps", [None, 10])
def test_a_learned_variance_at_its_ends_is_a_fixed_one(steps):
    """v = −1 draws the images of "small", v = 1 those of "large"; ddim and dpm++ do not see v."""

    def with_v(value):
        return lambda x, t: torch.cat([curved(x, t), torch.full_like(x, value)], 1)

    learned = diffusion(variance="learned_range")
    for value, name in ((-1, "small"), (1, "large")):
        found = engine.sample(with_v(value), learned, SHAPE, steps=steps)
        fixed = engine.sample(curved, diffusion(variance=name), SHAPE, steps=steps)
        assert torch.allclose(found, fixed, rtol=0, atol=2e-5)
    for options in (dict(sampler="ddim", eta=0.5), dict(sampler="dpm++")):
        found = engine.sample(with_v(0.3), learned, SHAPE, steps=steps, **options)
        fixed = engine.sample(curved, diffusion(), SHAPE, steps=steps, **options)
        assert torch.allclose(found, fixed, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"model_out is \(3, 1, 4, 4\).*expected \(3, 2, 4, 4\)"):
        engine.sample(curved, learned, SHAPE)


def test_a_dynamic_threshold_bounds_the_images():
    images = engine.sample(zero, diffusion(25), SHAPE, dynamic_threshold=0.8)
    static = engine.sample(zero, diffusion(25), SHAPE)
    assert images.abs().max() <= 1 and not torch.equal(images, static)


def test_nothing_in_the_loop_waits_for_the_device(monkeypatch):
    """No value of a tensor is read back: on a GPU each reading would wait."""

    def reads(self, *args):
        raise AssertionError("a tensor was read back")

    calls = []
    for sampler in samplers.SAMPLERS:
        with monkeypatch.context() as patched:

            def model(x, t):
                calls.append(t)
                for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
                    patched.setattr(torch.Tensor, name, reads)
                return torch.zeros_like(x)

            engine.sample(model, diffusion(25), SHAPE, sampler=sampler, steps=5, progress=True)
    assert len(calls) == 5 + 5 + 5 + 9  # heun calls twice a step, once in the last


def test_seeds():
    process = diffusion(20 + 5)
    first, again, other = (engine.sample(zero, process, SHAPE, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_batches_give_the_images_of_one_large_batch(sampler):
    process = diffusion(25)
    kwargs = dict(sampler=sampler, eta=1.0 if sampler == "ddim" else 0.0, seed=5)
    whole = engine.sample(zero, process, (5, 1, 3, 3), **kwargs)
    parts = [
        engine.sample(zero, process, (n, 1, 3, 3), offset=o, **kwargs) for n, o in ((2, 0), (3, 2))
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_back_ends_agree(impl, sampler):
    process, options = diffusion(25), dict(steps=5, sampler=sampler)
    eager = engine.sample(zero, process, SHAPE, impl="eager", **options)
    found = engine.sample(zero, process, SHAPE, impl=impl, **options)
    assert torch.allclose(found, eager, atol=1e-5)


def test_no_noise_at_the_last_step():
    """From any x_1 the last step returns the clipped x̂_0 itself."""
    images, states = engine.sample(
        lambda x, t: torch.ones_like(x), diffusion(25), SHAPE, trajectory=26
    )
    a, b, c, d, s = samplers.coefficients(diffusion(25))[1][-1, :5].float()
    assert (c, d, s) == (1.0, 0.0, 0.0)
    assert torch.allclose(images, (a * states[-2] + b).clamp(-1, 1), atol=1e-6)


def test_trajectory_and_clip():
    images, states = engine.sample(zero, diffusion(25), SHAPE, trajectory=6)
    assert len(states) == 6 and torch.equal(states[-1], images)
    expected = ops.noise(0, 0, ops.INITIAL_NOISE, SHAPE)
    assert torch.equal(states[0], expected)
    assert images.abs().max() <= 1
    free = engine.sample(zero, diffusion(25), SHAPE, clip=False)
    assert free.abs().max() > 1


def test_labels_and_modes():
    class Net(torch.nn.Module):
        def forward(self, x, t, y):
            assert not self.training and t.shape == (3,) and t.dtype == torch.int64
            return y.reshape(-1, 1, 1, 1).expand_as(x).float()

    net = Net().train()
    images = engine.sample(
        net,
        diffusion(25, prediction="x0"),
        SHAPE,
        sampler="ddim",
        steps=3,
        y=torch.tensor([0, 1, 0]),
    )
    assert images[:, 0, 0, 0].tolist() == [0, 1, 0]
    assert net.training and not images.is_inference()


def test_every_module_gets_its_own_mode_back():
    class Net(torch.nn.Sequential):
        def forward(self, x, t):
            assert not any(m.training for m in self.modules())
            return super().forward(x)

    frozen, trained = torch.nn.Dropout(0.9).eval(), torch.nn.Dropout(0.9)
    for top in (True, False):
        net = Net(frozen, trained)
        net.training = top
        engine.sample(net, diffusion(25), SHAPE, sampler="ddim", steps=2)
        assert (net.training, frozen.training, trained.training) == (top, False, True)


@pytest.mark.parametrize(
    "kwargs, sentence",
    [
        (dict(sampler="euler"), "expected one of ddpm, ddim, dpm"),
        (dict(sampler="heun", steps="10,5"), "karras spacing takes a number.*spacing 'uniform'"),
        (dict(spacing="even"), "spacing is 'even', expected one of uniform, karras, or None"),
        (dict(sampler="heun", eta=0.5), "heun has none"),
        (dict(s_churn=1.0), "s_churn is 1.0, but ddpm has none: use sampler='heun'"),
        (dict(sampler="heun", s_noise=-1), "s_noise is -1, expected a number, 0 or more"),
        (dict(sampler="heun", s_max=math.nan), "s_max is nan, expected a number, 0 or more"),
        (
            dict(noise=torch.zeros(25, *SHAPE)),
            r"noise is \(25, 3, 1, 4, 4\), expected \(26, 3, 1, 4",
        ),
        (dict(noise=lambda k: torch.zeros(3)), r"noise\(0\) is \(3,\), expected \(3, 1, 4, 4\)"),
        (dict(noise=lambda k: None), r"noise\(0\) is NoneType, expected \(3, 1, 4, 4\)"),
        (dict(noise=7), "noise is int, expected a tensor or a function"),
        (dict(model_dtype="bf16"), "model_dtype is 'bf16', expected torch.float32, bfloat16"),
        (dict(model_dtype=torch.float64), "model_dtype is torch.float64, expected"),
        (dict(sampler="dpm++", eta=0.5), r"dpm\+\+ has none"),
        (dict(graph=True), "graph=True needs a CUDA device, not cpu"),
        (dict(graph="always"), "graph is 'always', expected True, False or 'auto'"),
        (dict(dynamic_threshold=99), "dynamic_threshold is 99, expected a quantile"),
        (dict(steps=26), "use 1 … 25"),
        (dict(sampler="ddim", eta=2.0), "eta is 2.0"),
        (dict(sampler="ddpm", eta=0.5), "ddpm has none"),
        (dict(steps=0), "use 1 … 25"),
        (dict(trajectory=1), "2 and more states"),
        (dict(shape=4), r"shape is 4, expected \(N, C, H, W\)"),
        (dict(shape=(4,)), r"shape is \(4,\), expected"),
        (dict(shape=(-1, 1, 4, 4)), r"shape is \(-1, 1, 4, 4\), expected"),
        (dict(shape=(1.5, 1, 4, 4)), "shape is .1.5"),
        (dict(trajectory=2.5), "2 and more states"),
        (dict(sampler="ddim", eta="1"), "eta is '1', expected"),
        (dict(y=torch.zeros(2)), r"y is \(2,\), expected \(3,\) class labels"),
        (dict(y=[0, 1, 2]), r"y is \[0, 1, 2\], expected \(3,\)"),
        (dict(model=lambda x, t: None), "the model returned NoneType, expected a tensor like"),
        (dict(model=lambda x, t: x[:1]), r"model_out is \(1, 1, 4, 4\)"),
        (dict(steps=2.5), r"steps is 2\.5, expected a whole number"),
        (dict(seed=2**64), "seed"),
        (dict(offset=-1), "offset is -1, expected the index of the first sample, 0 or more"),
        (dict(device="toaster"), "'toaster' is no device"),
        (dict(device="meta"), "device meta: tensors have no values there"),
        (dict(diffusion=torch.ones(25)), "diffusion is Tensor, expected an engine.Diffusion"),
        (dict(model=None), "model is NoneType, expected a function of "),
    ],
)
def test_bad_input(kwargs, sentence):
    kwargs = dict(model=zero, diffusion=diffusion(25), shape=SHAPE) | kwargs
    with pytest.raises(ValueError, match=sentence):
        engine.sample(**kwargs)


# ---- The dtype of the network's input ------------------------------------------------------------


def unet(**options):
    torch.manual_seed(0)
    net = engine.UNet(
        **dict(image_size=8, in_channels=1, model_channels=16, channel_mult=(1, 2), num_groups=4),
        **options,
    )
    torch.nn.init.normal_(net.conv_out.weight, std=0.2)  # it starts at zero
    net.seen = []
    net.register_forward_pre_hook(lambda net, args: net.seen.append(args[0].dtype))
    return net.eval()


@pytest.mark.parametrize("impl", ["eager", "native"])
@pytest.mark.parametrize("sampler, steps", [("ddpm", 4), ("ddim", 3), ("dpm++", 3), ("heun", 3)])
def test_the_step_casts_for_the_network_without_a_change(sampler, steps, impl):
    """The same bits as with the cast in the network: under autocast, and with bf16 weights."""
    net = unet(num_classes=3)
    options = dict(sampler=sampler, steps=steps, impl=impl, y=torch.tensor([0, 1]), prepack=False)
    options |= dict(guidance=2.0, null_label=2) if sampler == "ddim" else {}

    def draw(model, **more):
        net.seen.clear()
        return engine.sample(model, diffusion(25), (2, 1, 8, 8), **options, **more)

    plain = draw(net)
    assert set(net.seen) == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        found = draw(net)
        assert set(net.seen) == {torch.bfloat16}
        expected = draw(net, model_dtype=None)
        assert set(net.seen) == {torch.float32}
    assert torch.equal(found, expected) and found.dtype == torch.float32
    # This untrained network is chaotic: single pixels may swing, the picture does not.
    assert 0 < (found - plain).abs().mean() < 0.1
    with pytest.raises(ValueError, match="the model is float64, but the sampler's state is float3"):
        draw(copy.deepcopy(net).double())
    net.bfloat16()
    found = draw(net)
    assert set(net.seen) == {torch.bfloat16}
    assert torch.equal(found, draw(lambda x, t, y: net(x.bfloat16(), t, y)))


def test_another_model_gets_float32_unless_it_is_said():
    def model(x, t):
        dtypes.append(x.dtype)
        return x * 0.3

    for wanted, dtype in (("auto", torch.float32), (torch.float16, torch.float16)):
        dtypes = []
        with torch.autocast("cpu", torch.bfloat16):
            engine.sample(model, diffusion(25), SHAPE, steps=2, model_dtype=wanted)
        assert dtypes == [dtype] * 2


def test_heun_keeps_the_states_between_its_steps():
    process, kwargs = diffusion(), dict(sampler="heun", steps=4, spacing="uniform", seed=3)
    images, states = engine.sample(curved, process, SHAPE, trajectory=5, **kwargs)
    assert len(states) == 5 and torch.equal(states[-1], images)
    times, rows = samplers.coefficients(process, "heun", 4, spacing="uniform")
    x, x0 = states[0], torch.zeros(SHAPE)
    for i, t in enumerate(times):
        out = curved(x, t.expand(3))
        x, x0 = ops.reverse_step(x, out, rows.float(), i, key=3, x0_prev=x0, return_x0=True)
        if i % 2 or i == 6:
            assert torch.equal(x, states[i // 2 + 1])
    ends = engine.sample(curved, process, SHAPE, trajectory=3, **kwargs)[1]
    assert all(torch.equal(a, states[i]) for a, i in zip(ends, (0, 2, 4), strict=True))


def test_numpy_numbers_serve():
    one, three = np.int64(1), np.int32(3)
    found = engine.sample(zero, diffusion(25), (three, one, 4, 4), steps=np.int64(5), seed=one)
    assert torch.equal(found, engine.sample(zero, diffusion(25), SHAPE, steps=5, seed=1))


def test_the_command_line_offers_every_sampler():
    from engine.sample import SampleConfig

    assert get_args(get_type_hints(SampleConfig)["sampler"]) == samplers.SAMPLERS
