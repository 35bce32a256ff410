"""Nearest upsampling as Inductor gets it: the same pictures, and the gradient that it is."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import fused

from engine.backend import Backend, _without_scatter
from engine.patterns import nearest


def captured(function, x, dynamic=False):
    """The graph that Dynamo makes of function(x), after the rewriting, and what it replaced."""
    found = []

    def backend(gm, inputs):
        found.append((gm, _without_scatter(gm)))
        return gm.forward

    torch.compiler.reset()
    out = torch.compile(function, backend=backend, dynamic=dynamic)(x)
    return out, *found[0]


SAME = {
    "a number": dict(scale_factor=2),
    "a float": dict(scale_factor=2.0),
    "two": dict(scale_factor=(2.0, 4.0)),
    "one side": dict(scale_factor=(1, 2)),
    "a size": dict(size=(20, 12)),
    "exact": dict(scale_factor=8, mode="nearest-exact"),
}
LEFT = {
    "three": dict(scale_factor=3),
    "not whole": dict(scale_factor=1.5),
    "smaller": dict(scale_factor=0.5),
    "another size": dict(size=(15, 9)),
    "bilinear": dict(scale_factor=2, mode="bilinear"),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("form", [*SAME, *LEFT])
def test_pictures_and_gradients(form, layout):
    options = (SAME | LEFT)[form]
    x = torch.randn(2, 3, 5, 3).to(memory_format=layout).requires_grad_()
    expected = F.interpolate(x, **options)
    out, _, replaced = captured(lambda x: F.interpolate(x, **options), x)
    assert [entry.pattern for entry in replaced] == ([nearest.NAME] if form in SAME else [])
    assert torch.equal(out, expected) and out.stride() == expected.stride()
    cotangent = torch.randn(out.shape)
    got, truth = (torch.autograd.grad(y, x, cotangent)[0] for y in (out, expected))
    assert torch.allclose(got, truth, atol=1e-5)


@pytest.mark.parametrize("options", [dict(size=(5, 3)), dict(scale_factor=1)])
def test_a_factor_of_one_is_a_copy(options):
    """As in PyTorch: what the model writes into it is not written into x."""

    def function(x):
        return F.relu(F.interpolate(x, **options), inplace=True) + x

    x = torch.randn(2, 3, 5, 3)
    expected = function(x.clone())
    assert torch.equal(captured(function, x)[0], expected)


def test_sizes_that_change():
    """A factor holds for all sizes; a size is a factor for one alone."""
    x = torch.randn(2, 3, 5, 6)
    for function, count in (
        (lambda x: F.interpolate(x, scale_factor=2), 1),
        (lambda x: F.interpolate(x, size=(10, 12)), 0),
    ):
        out, gm, replaced = captured(function, x, dynamic=True)
        assert torch.equal(out, function(x)) and len(replaced) == count
        assert any(node.target is nearest.upsampled for node in gm.graph.nodes) == bool(count)


def test_three_dimensions_are_left():
    x = torch.randn(2, 3, 5)
    assert not captured(lambda x: F.interpolate(x, scale_factor=2), x)[2]


def test_eager_keeps_its_kernel():
    backend = Backend("eager")
    torch.compiler.reset()
    torch.compile(lambda x: F.interpolate(x, scale_factor=2), backend=backend)(
        torch.ones(1, 1, 2, 2)
    )
    assert not fused(backend.report) and not backend.report.replaced
