"""Schedules against reference values at nine digits, T = 1000, float64."""

import pytest
import torch

from engine import schedules

# β_0, β_999, ᾱ_0, ᾱ_499, ᾱ_999, first t with ᾱ < ½
GOLDEN = {
    "linear": (1e-4, 0.02, 0.9999, 0.07858724288, 4.035829765e-5, 259),
    "quadratic": (1e-4, 0.02, 0.9999, 0.3331877674, 7.334124596e-4, 418),
    "sigmoid": (1.492052008e-4, 0.0199507948, 0.9998507948, 0.3019310566, 3.968181991e-5, 439),
    "cosine": (4.128422482e-5, 0.999, 0.9999587158, 0.4938435904, 2.428766907e-9, 496),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    *values, half = GOLDEN[name]
    beta = schedules.betas(name, 1000)
    alpha_bar = schedules.alpha_bar(beta)
    assert beta.dtype == torch.float64 and beta.shape == (1000,)
    found = (beta[0], beta[-1], alpha_bar[0], alpha_bar[499], alpha_bar[-1])
    for a, b in zip(found, values, strict=True):
        assert a.item() == pytest.approx(b, rel=1e-8)
    assert (alpha_bar < 0.5).nonzero()[0].item() == half


@pytest.mark.parametrize(
    "name, T, last",
    [
        ("linear", 4000, 4.2466523e-5),
        ("linear", 100, 2.0390090e-5),
        ("linear_unscaled", 300, 0.0480584289),
        ("cosine", 4000, 1.5179805e-10),
    ],
)
def test_other_lengths(name, T, last):
    assert schedules.alpha_bar(schedules.betas(name, T))[-1].item() == pytest.approx(last, rel=1e-7)


def test_linear_unscaled_is_linear_at_1000():
    assert torch.equal(schedules.betas("linear_unscaled", 1000), schedules.betas("linear", 1000))


def test_linear_destroys_information_sooner():
    half = {
        n: (schedules.alpha_bar(schedules.betas(n, 1000)) < 0.5).int().argmax().item()
        for n in ("linear", "cosine", "sigmoid")
    }
    assert half["linear"] < half["sigmoid"] < half["cosine"]


@pytest.mark.parametrize(
    "name, T, sentence",
    [("cubic", 10, "choose one of"), ("linear", 0, "at least one"), ("linear", 20, "more steps")],
)
def test_bad_input(name, T, sentence):
    with pytest.raises(ValueError, match=sentence):
        schedules.betas(name, T)


def test_kept_steps():
    assert schedules.kept_steps(1000, 10)[:3] == [0, 111, 222]
    kept = schedules.kept_steps(1000, 25)
    assert kept[:5] == [0, 42, 83, 125, 166] and kept[-3:] == [916, 957, 999]
    assert schedules.kept_steps(1000, 1000) == list(range(1000))
    assert schedules.kept_steps(1000, 1) == [999]
    rounded = torch.linspace(0, 999, 21, dtype=torch.float64).round().int().tolist()
    assert schedules.kept_steps(1000, 21) != rounded  # the accumulated rule, not linspace
    for steps in range(1, 301):
        kept = schedules.kept_steps(300, steps)
        assert len(set(kept)) == steps and kept == sorted(kept) and kept[-1] == 299
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="use 1 … 1000"):
            schedules.kept_steps(1000, steps)
