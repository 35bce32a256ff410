"""The loss-aware sampler of t: warm-up, history, probabilities and weights as in the paper."""

import math

import pytest
import torch

from engine.importance import LossAwareSampler


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(losses: torch.Tensor, **options) -> LossAwareSampler:
    """A sampler whose t has seen losses[t] (T, history)."""
    sampler = LossAwareSampler(len(losses), history=losses.shape[1], **options)
    for column in losses.T:
        sampler.update(torch.arange(len(losses)), column)
    return sampler


def decaying(T=50) -> torch.Tensor:  # as the terms of the bound: large at small t
    return 1 / (1 + torch.arange(T, dtype=torch.float64)) ** 2


def test_uniform_until_every_t_has_its_history():
    sampler = LossAwareSampler(4, history=2)
    everything_but_one = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0, 0])
    sampler.update(everything_but_one, torch.linspace(1, 9, 9))
    assert not sampler.warm and sampler.filled == 3
    assert sampler.probabilities().tolist() == [0.25] * 4
    t, weights = sampler.sample(1000, generator(3))
    assert torch.equal(t, torch.randint(4, (1000,), generator=generator(3)))
    assert weights.dtype == torch.float32 and torch.equal(weights, torch.ones(1000))
    sampler.update(torch.tensor([3]), torch.tensor([1.0]))
    assert sampler.warm and sampler.filled == 4
    assert sampler.probabilities().tolist() != [0.25] * 4


def test_the_history_keeps_the_last_losses_of_each_t():
    """Also of one batch in which a t comes more often than its history is long."""
    sampler = LossAwareSampler(2, history=3)
    sampler.update(torch.tensor([0, 0, 1, 0, 0, 0]), torch.tensor([9.0, 9.0, 5.0, 1.0, 2.0, 3.0]))
    assert sorted(sampler.losses[0].tolist()) == [1, 2, 3]
    sampler.update(torch.tensor([0, 1, 1]), torch.tensor([7.0, 6.0, 7.0]))
    assert sorted(sampler.losses[0].tolist()) == [2, 3, 7]
    assert sorted(sampler.losses[1].tolist()) == [5, 6, 7]
    assert sampler.counts.tolist() == [6, 3]


@pytest.mark.parametrize("uniform", [0.001, 0.0, 1.0])
def test_probabilities_are_the_papers(uniform):
    losses = torch.rand(6, 10, generator=generator(), dtype=torch.float64)
    root = [math.sqrt(sum(x * x for x in row) / 10) for row in losses.tolist()]
    expected = [(1 - uniform) * r / sum(root) + uniform / 6 for r in root]
    sampler = filled(losses, uniform=uniform)
    assert sampler.probabilities().tolist() == pytest.approx(expected, rel=1e-12)
    assert sampler.probabilities().sum().item() == pytest.approx(1, rel=1e-12)


def test_negative_losses_count_by_size_and_none_at_all_is_uniform():
    """L_0 may be below 0 bits where x is a density; a perfect model has no loss anywhere."""
    sampler = filled(torch.tensor([[-2.0, -2.0], [1.0, 1.0]]), uniform=0.0)
    assert sampler.probabilities().tolist() == pytest.approx([2 / 3, 1 / 3])
    assert filled(torch.zeros(5, 2)).probabilities().tolist() == [0.2] * 5


def test_draws_follow_the_probabilities_and_weights_undo_them():
    sampler, n = filled(decaying()[:, None].repeat(1, 10)), 200_000
    p = sampler.probabilities()
    t, weights = sampler.sample(n, generator())
    assert t.dtype == torch.int64 and t.shape == weights.shape == (n,)
    share = torch.bincount(t, minlength=50) / n
    assert ((share - p).abs() < 5 * (p / n).sqrt()).all()
    assert torch.allclose(weights, (1 / (50 * p[t])).float())


def test_the_weighted_loss_is_unbiased_and_less_noisy():
    """E_p[L_t/(T p_t)] is the mean over t: over all t exactly, over draws within their error."""
    loss = decaying()
    sampler, n = filled(loss[:, None].repeat(1, 10)), 20_000
    p, mean = sampler.probabilities(), loss.mean()
    assert (p * loss / (50 * p)).sum().item() == pytest.approx(mean.item(), rel=1e-12)
    other = loss.flip(0)  # unbiased also for losses that the history does not know
    for truth in (loss, other):
        t, weights = sampler.sample(n, generator(1))
        terms = weights * truth[t]
        assert abs(terms.mean() - truth.mean()) < 4 * terms.std() / n**0.5
    t, weights = sampler.sample(n, generator(2))
    uniform = loss[torch.randint(50, (n,), generator=generator(2))]
    assert (weights * loss[t]).var() < 1e-3 * uniform.var()


def test_warm_up_takes_as_long_as_simulated_elsewhere():
    """T = 1000, 128 images a step: about 184 steps."""
    sampler, g, steps = LossAwareSampler(1000), generator(), 0
    while not sampler.warm:
        t, weights = sampler.sample(128, g)
        sampler.update(t, torch.rand(128, generator=g))
        steps += 1
    assert 155 < steps < 230


def test_the_state_is_all_that_there_is():
    sampler = filled(decaying()[:, None].repeat(1, 10))
    copy = LossAwareSampler(50)
    copy.load_state_dict({k: v.clone() for k, v in sampler.state_dict().items()})
    for _ in range(3):
        a, b = sampler.sample(16, generator(5)), copy.sample(16, generator(5))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for each in (sampler, copy):
            each.update(a[0], a[1])
    assert all(torch.equal(v, copy.state_dict()[k]) for k, v in sampler.state_dict().items())


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda s: s.update(torch.tensor([1]), torch.ones(2)), r"t is \(1,\) and losses \(2,\)"),
        (lambda s: s.update(torch.tensor([1]), torch.tensor([math.nan])), "not finite"),
        (lambda s: s.update(torch.tensor([1]), torch.tensor([math.inf])), "not finite"),
        (lambda s: s.load_state_dict({}), "the t sampler's losses is missing"),
        (
            lambda s: s.load_state_dict(LossAwareSampler(5).state_dict()),
            r"losses is \(5, 10\) torch.float64, expected \(4, 10\)",
        ),
        (
            lambda s: s.load_state_dict(s.state_dict() | {"losses": s.losses + math.nan}),
            "losses are no losses' that were finite",
        ),
        (
            lambda s: s.load_state_dict(s.state_dict() | {"counts": s.counts - 1}),
            "counts are no losses' that were finite",
        ),
        (lambda s: LossAwareSampler(0), "T is 0"),
        (lambda s: LossAwareSampler(4, history=0), "history 0"),
        (lambda s: LossAwareSampler(4, uniform=1.5), "uniform 1.5"),
    ],
)
def test_bad_input(call, sentence):
    sampler = LossAwareSampler(4)
    with pytest.raises(ValueError, match=sentence):
        call(sampler)
    assert not sampler.counts.any()
