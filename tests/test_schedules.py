"""Schedules against reference values at nine digits, T = 1000, float64."""

import numpy as np
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


def test_respace_golden():
    assert schedules.respace(1000, 10) == [round(111 * i) for i in range(10)]
    assert schedules.respace(1000, 25) == schedules.kept_steps(1000, 25)
    kept = schedules.respace(300, "10,15,20")
    assert kept[:3] == [0, 11, 22] and kept[9:12] == [99, 100, 107] and kept[-1] == 299
    assert len(kept) == 45 and kept == schedules.respace(300, [10, 15, 20])
    assert schedules.respace(300, " 10, 15,20 ") == kept == schedules.kept_steps(300, "10,15,20")


def test_respace_adds_up_where_linspace_multiplies():
    differing = [
        n
        for n in range(2, 62)
        if schedules.respace(1000, n) != np.linspace(0, 999, n).round().astype(int).tolist()
    ]
    assert differing == [21, 23, 31, 35, 39, 43, 45, 59, 61]
    for n in (100, 250, 500, 1000):
        assert schedules.respace(1000, n) == np.linspace(0, 999, n).round().astype(int).tolist()


def test_respace_of_sections():
    """11 steps in 3 sections: 4, 4 and 3; a section that keeps one keeps its first."""
    assert schedules.respace(11, [1, 1, 1]) == [0, 4, 8]
    assert schedules.respace(11, [2, 4, 3]) == [0, 3, 4, 5, 6, 7, 8, 9, 10]
    assert schedules.respace(11, "4,2,2") == [0, 1, 2, 3, 4, 7, 8, 10]
    assert schedules.respace(1, 1) == [0] == schedules.respace(1000, 1)
    for T in (5, 7, 40):
        assert schedules.respace(T, T) == list(range(T)) == schedules.respace(T, [1] * T)


def test_respace_by_a_whole_stride():
    assert schedules.respace(1000, "ddim50") == list(range(0, 1000, 20))
    assert schedules.respace(1000, "ddim1000") == list(range(1000))
    assert schedules.respace(300, "ddim75") == list(range(0, 300, 4))
    assert schedules.respace(10, "ddim4") == [0, 3, 6, 9]  # ceil(10/3)
    unreachable = 0
    for n in range(1, 1001):
        try:
            assert len(schedules.respace(1000, f"ddim{n}")) == n
        except ValueError as error:
            unreachable += 1
            assert f"keeps exactly {n} of T=1000 steps; the nearest" in str(error)
    assert unreachable == 938


@pytest.mark.parametrize(
    "T, sections, sentence",
    [
        (300, "", "sections is ''"),
        (300, "10,", "expected a number of steps, a list"),
        (300, "10;20", "or text like '10,15,20' or 'ddim50'"),
        (300, "ddim", "sections is 'ddim'"),
        (300, "-5", "sections is '-5'"),
        (300, [], r"sections is \[\]"),
        (300, [1.5], r"sections is \[1.5\]"),
        (300, None, "sections is None"),
        (300, 301, "section 1 of 1 has 300 of the T=300 steps, and 301 shall be kept"),
        (300, "101,1,1", "section 1 of 3 has 100 .* and 101 shall be kept: give 1 … 100"),
        (300, "1,0", "section 2 of 2 has 150 .* and 0 shall be kept"),
        (3, [1] * 4, "4 sections do not fit a diffusion of T=3: give at most 3"),
        (1000, "ddim999", "the nearest counts are 500 and 1000"),
        (1, "ddim1", "the nearest counts are none"),
        (0, 1, "T is 0"),
    ],
)
def test_respace_refuses(T, sections, sentence):
    with pytest.raises(ValueError, match=sentence):
        schedules.respace(T, sections)
