"""Samplers: coefficients against their definitions, and whole runs with known answers."""

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

    def model(x, t):
        a = process.alpha_bar.float()[t].reshape(-1, 1, 1, 1)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        return process.target(x0.expand_as(x), t, eps)

    return model


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(
    "sampler, steps", [("ddpm", None), ("ddpm", 10), ("ddim", 10), ("ddim", 1)]
)
def test_a_perfect_network_gives_the_image(prediction, sampler, steps):
    process = diffusion(prediction=prediction)
    x0 = torch.rand(1, 1, 4, 4) * 1.8 - 0.9
    found = engine.sample(perfect(process, x0), process, SHAPE, sampler=sampler, steps=steps)
    assert torch.allclose(found, x0.expand(SHAPE), atol=2e-3)


def test_ddpm_rows_are_the_posterior():
    process = diffusion(variance="large")
    times, rows = samplers.coefficients(process, "ddpm")
    one, zeros = torch.ones(100, 1, dtype=torch.float64), torch.zeros(100, 1, dtype=torch.float64)
    assert torch.allclose(rows[:, 2:3], process.posterior(one, zeros, times)[0])
    assert torch.allclose(rows[:, 3:4], process.posterior(zeros, one, times)[0])
    assert torch.allclose(rows[:-1, 4:5] ** 2, process.posterior(one, one, times)[1][:-1])
    assert rows[-1, 4] == 0


def test_ddim_with_eta_one_is_as_noisy_as_ddpm():
    for steps in (None, 10):
        ddim = samplers.coefficients(diffusion(), "ddim", steps, eta=1.0)[1]
        ddpm = samplers.coefficients(diffusion(), "ddpm", steps)[1]
        assert torch.allclose(ddim[:, :5], ddpm[:, :5], atol=1e-13)


def test_ddim_golden():
    process = engine.Diffusion(schedules.betas("linear", 1000))
    times, rows = samplers.coefficients(process, "ddim")
    for t, value in ((0, 0.497524877), (1, 0.498822437), (999, 0.500064294)):
        a, b, c, d, s = rows[999 - t, :5]
        assert times[999 - t] == t and s == 0
        x0 = (a * 0.5 + b * 0.25).clamp(-1, 1)
        assert (c * x0 + d * 0.5).item() == pytest.approx(value, abs=1e-9)


def test_seeds():
    process = diffusion(20 + 5)
    first, again, other = (engine.sample(zero, process, SHAPE, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_batches_give_the_images_of_one_large_batch(sampler):
    process = diffusion(25)
    kwargs = dict(sampler=sampler, eta=1.0 if sampler == "ddim" else 0.0, seed=5)
    whole = engine.sample(zero, process, (5, 1, 3, 3), **kwargs)
    parts = [
        engine.sample(zero, process, (n, 1, 3, 3), offset=o, **kwargs) for n, o in ((2, 0), (3, 2))
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_back_ends_agree(impl):
    process = diffusion(25)
    eager = engine.sample(zero, process, SHAPE, steps=5, impl="eager")
    assert torch.allclose(engine.sample(zero, process, SHAPE, steps=5, impl=impl), eager, atol=1e-5)


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


@pytest.mark.parametrize(
    "kwargs, sentence",
    [
        (dict(sampler="euler"), "expected one of ddpm, ddim"),
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
        (dict(device="toaster"), "'toaster' is no device"),
    ],
)
def test_bad_input(kwargs, sentence):
    kwargs = dict(model=zero, diffusion=diffusion(25), shape=SHAPE) | kwargs
    with pytest.raises(ValueError, match=sentence):
        engine.sample(**kwargs)


def test_numpy_numbers_serve():
    one, three = np.int64(1), np.int32(3)
    found = engine.sample(zero, diffusion(25), (three, one, 4, 4), steps=np.int64(5), seed=one)
    assert torch.equal(found, engine.sample(zero, diffusion(25), SHAPE, steps=5, seed=1))
