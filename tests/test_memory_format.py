"""engine.accelerate(channels_last=True): which weights lie how, and when."""

import copy

import foreign_models
import pytest
import torch
from torch import nn

import engine

X = torch.randn(2, 2, 8, 8)


@pytest.fixture
def model():
    torch.compiler.reset()
    torch.manual_seed(0)
    return foreign_models.Plain()


def laid(model) -> bool:
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return all(w.stride()[1] == 1 and w.stride()[-1] == w.shape[1] for w in weights)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_that_are_exchanged_are_laid_at_the_next_call(model, mode):
    """Else two copies of a model round differently, and one of them lost its speed."""
    model.bfloat16()
    state = copy.deepcopy(model.state_dict())
    loaded = foreign_models.Plain().bfloat16()
    engine.accelerate(model)
    handle = engine.accelerate(loaded)
    loaded.load_state_dict(state, assign=True)
    assert not laid(loaded)
    with mode():
        assert torch.equal(loaded(X.bfloat16()), model(X.bfloat16()))
    assert laid(loaded)
    loaded(X.bfloat16()).float().square().mean().backward()  # they are not of inference mode
    handle.undo()
    assert all(p.is_contiguous() for p in loaded.parameters())


def test_volumes_and_convolutions_of_one_channel():
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv3d(2, 3, 2), nn.Conv3d(3, 1, 1), nn.Conv3d(1, 2, 2))
    before = [p.stride() for p in model.parameters()]
    with engine.accelerate(model):
        for p, old in zip(model.parameters(), before, strict=True):
            plain = torch.empty_like(p, memory_format=torch.contiguous_format)
            assert plain.stride() == old
            if p.dim() == 5:
                expected = torch.empty_like(plain, memory_format=torch.channels_last_3d)
                assert p.stride() == expected.stride()
    assert [p.stride() for p in model.parameters()] == before


def test_memory_that_somebody_else_holds_stays(model):
    """A flat buffer of an optimizer, memory of several processes: a copy would part from it."""
    weights = [p for p in model.parameters() if p.dim() == 4]
    flat = torch.cat([p.detach().flatten() for p in weights[:2]])
    for p, part in zip(weights, flat.split([p.numel() for p in weights[:2]]), strict=False):
        p.data = part.view_as(p)
    weights[2].data.share_memory_()
    pointers = [p.data_ptr() for p in weights]
    expected = model(X)
    engine.accelerate(model)
    assert torch.allclose(model(X), expected, atol=1e-5)
    assert [p.data_ptr() for p in weights] == pointers
    flat.zero_()
    assert not weights[0].any() and weights[2].is_shared()


def test_weights_that_are_not_there_yet():
    """Made on the meta device, or lazily: laid when they are."""
    torch.compiler.reset()
    with torch.device("meta"):
        model = foreign_models.Plain()
    handle = engine.accelerate(model)
    model.load_state_dict(foreign_models.Plain().state_dict(), assign=True)
    model(X)
    assert laid(model) and handle.report.replaced
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.GroupNorm(2, 4))
    engine.accelerate(lazy)
    lazy(X)
    lazy(X)
    assert laid(lazy)


def test_inside_a_larger_compiled_model(model):
    """The compiler around it sees through the call, without a break."""
    expected = model(X) * 2
    engine.accelerate(model)
    graphs = []

    def count(gm, inputs):
        graphs.append(gm)
        return gm.forward

    whole = torch.compile(lambda x: model(x) * 2, backend=count, fullgraph=True)
    assert torch.allclose(whole(X), expected, atol=1e-5) and len(graphs) == 1
