"""Our AdamW is PyTorch's, bit for bit, without its copies of gradients."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine.optimizer import AdamW

SHAPES = [(8, 4, 3, 3), (4, 8, 1, 1), (5, 1, 3, 3), (6, 3, 1, 2), (7,), (3, 5), ()]


def parameters(layout=torch.channels_last) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [torch.nn.Parameter(p.to(memory_format=layout) if p.dim() == 4 else p) for p in found]


def steps(make, layout, grads=lambda g, p: torch.empty_like(p).copy_(g), count=3, **options):
    ps = parameters(layout)
    optimizer = make(ps, lr=0.1, weight_decay=0.02, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in ps:
            p.grad = grads(torch.randn(p.shape, generator=generator), p)
        optimizer.step()
    return ps, optimizer


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("options", [{"fused": True}, {"fused": True, "amsgrad": True}, {}])
def test_bits_and_state_of_pytorch(layout, options):
    mine, mine_state = steps(AdamW, layout, **options)
    theirs, their_state = steps(torch.optim.AdamW, layout, **options)
    for p, q in zip(mine, theirs, strict=True):
        assert torch.equal(p, q) and p.stride() == q.stride()
        s, r = mine_state.state[p], their_state.state[q]
        assert s.keys() == r.keys() >= {"step", "exp_avg", "exp_avg_sq"}
        for key in s:
            assert torch.equal(s[key], r[key]) and s[key].stride() == r[key].stride()


def test_gradients_of_another_layout():
    """PyTorch's kernel takes them for those of other elements."""
    mine, _ = steps(AdamW, torch.channels_last, lambda g, p: g, fused=True)
    plain, _ = steps(torch.optim.AdamW, torch.channels_last, lambda g, p: g, foreach=False)
    for p, q in zip(mine, plain, strict=True):
        assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_moments_of_another_layout(amsgrad):
    """PyTorch's kernel takes them, too, for those of other elements: a state that is loaded keeps
    the layout that it was saved in."""

    def two_halves(make, **options):
        ps, before = steps(make, torch.contiguous_format, amsgrad=amsgrad, **options)
        ps = [p.detach().to(memory_format=torch.channels_last) if p.dim() == 4 else p for p in ps]
        after = make([torch.nn.Parameter(p.detach()) for p in ps], lr=0.1, **options)
        after.load_state_dict(before.state_dict())
        ps = after.param_groups[0]["params"]
        for _ in range(2):
            for i, p in enumerate(ps):
                p.grad = torch.empty_like(p).copy_(torch.linspace(-1, i, p.numel()).view(p.shape))
            after.step()
        return ps, after

    mine, state = two_halves(AdamW, fused=True)
    plain, truth = two_halves(torch.optim.AdamW, foreach=False)
    for p, q in zip(mine, plain, strict=True):
        assert torch.allclose(p, q, atol=1e-6)
        for key in state.state[p]:
            assert torch.allclose(state.state[p][key], truth.state[q][key], atol=1e-6)


def test_no_gradient_is_copied():
    p = torch.nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    optimizer = AdamW([p], fused=True)
    p.grad = torch.randn_like(p)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        optimizer.step()
    assert not {e.key for e in recorded.key_averages()} & {"aten::clone", "aten::contiguous"}
