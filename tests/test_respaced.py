"""Processes of some of a longer one's steps, and the steps that their models know."""

import pytest
import torch

import engine
from engine import schedules


def linear(**options) -> engine.Diffusion:
    return engine.Diffusion(schedules.betas("linear", 1000), **options)


@pytest.mark.parametrize("T, steps", [(1000, 1000), (40, "40"), (40, "ddim40"), (40, [20, 20])])
def test_a_whole_respaced_process_is_the_process(T, steps):
    whole = engine.Diffusion(schedules.betas("cosine", T), prediction="v", variance="large")
    same = whole.respaced(steps)
    for name in ("betas", "alpha_bar", "alpha_bar_prev", "timesteps"):
        assert torch.equal(getattr(whole, name), getattr(same, name)), name
    assert (same.prediction, same.variance, same.loss_type) == ("v", "large", "l2")
    t = torch.arange(T)
    assert same.model_steps(t) is t


@pytest.mark.parametrize("steps", [25, "10,15,20", "ddim50", 1])
def test_a_respaced_process_has_the_kept_marginals(steps):
    whole = linear(loss="huber")
    part = whole.respaced(steps)
    kept = schedules.kept_steps(1000, steps)
    assert len(kept) == part.T and part.timesteps.tolist() == kept
    assert torch.equal(part.alpha_bar, whole.alpha_bar[kept])
    assert torch.allclose(schedules.alpha_bar(part.betas), part.alpha_bar, rtol=1e-12)
    t = torch.tensor([0, part.T - 1], dtype=torch.int32)
    assert part.model_steps(t).tolist() == [kept[0], kept[-1]]
    again = part.respaced(min(3, part.T))
    assert set(again.timesteps.tolist()) <= set(kept)


def test_a_model_is_called_with_the_original_steps():
    part, seen = linear().respaced(5), []

    def model(x, t):
        seen.extend(t.tolist())
        return torch.zeros_like(x)

    part.loss(model, torch.zeros(3, 1, 4, 4), t=torch.tensor([0, 2, 4]))
    assert seen == [0, 500, 999]
    seen.clear()
    x = engine.sample(model, part, (1, 1, 4, 4))
    assert seen == [999, 749, 500, 250, 0]
    seen.clear()
    assert torch.equal(x, engine.sample(model, linear(), (1, 1, 4, 4), steps=5))
    for sampler in ("ddpm", "ddim", "dpm++"):
        a = engine.sample(model, linear(), (1, 1, 4, 4), steps="3,4", sampler=sampler)
        b = engine.sample(model, linear().respaced("3,4"), (1, 1, 4, 4), sampler=sampler)
        assert torch.equal(a, b)


def test_rescaled_timesteps():
    """A model of T = 4000 that knows t as t·1000/T, its respaced process, and its samples."""
    beta = schedules.betas("cosine", 4000)
    process = engine.Diffusion(beta, rescale_timesteps=True)
    t = torch.tensor([0, 1, 3999])
    torch.testing.assert_close(process.model_steps(t), torch.tensor([0, 0.25, 999.75]))
    short = process.respaced(5)
    called = []

    def model(x, t):
        called.append(t[0].item())
        return torch.zeros_like(x)

    engine.sample(model, short, (1, 1, 4, 4))
    torch.testing.assert_close(called, (short.timesteps.flip(0)).tolist())
    assert called[0] == 999.75 and called[-1] == 0
    called.clear()
    engine.sample(model, process, (1, 1, 4, 4), sampler="heun", steps=3)
    assert max(called) == pytest.approx(999.75) and min(called) == pytest.approx(0, abs=1e-3)
    plain = engine.Diffusion(beta)
    assert torch.equal(plain.model_steps(t), t)
