"""A convolution with an addend, in bfloat16: its result, gradients, and what refuses it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from budget import FORWARD, GRADIENT, assert_within_budget
from small_unet import OPTIONS, SMALL, alive, inputs

import engine
from engine import addend
from engine.blocks import Conv2d
from engine.device import cannot_pack

pytestmark = pytest.mark.skipif(
    bool(cannot_pack(torch.bfloat16)), reason="oneDNN has no bfloat16 kernels for this CPU"
)
BF16 = torch.bfloat16
# name: (N, C_in, C_out, H, W), options of Conv2d
CASES = {
    "3x3": ((2, 16, 24, 8, 8), dict(kernel_size=3, padding=1)),
    "odd": ((3, 5, 7, 9, 7), dict(kernel_size=3, padding=1)),
    "one channel": ((1, 1, 3, 5, 4), dict(kernel_size=3, padding=1)),
    "1x1": ((2, 16, 8, 6, 5), dict(kernel_size=1)),
    "no bias": ((2, 6, 6, 4, 4), dict(kernel_size=1, bias=False)),
    "stride": ((2, 8, 6, 9, 9), dict(kernel_size=3, padding=1, stride=2)),
    "groups": ((2, 8, 12, 6, 6), dict(kernel_size=3, padding=(1, 2), dilation=(1, 2), groups=4)),
}


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def layer_and_inputs(shape, options, layout):
    g = torch.Generator().manual_seed(0)
    n, c_in, c_out, h, w = shape
    layer = Conv2d(c_in, c_out, **options).to(memory_format=layout)
    x = torch.randn(n, c_in, h, w, generator=g).to(BF16).contiguous(memory_format=layout)
    with torch.autocast("cpu", BF16):
        size = F.conv2d(
            x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
        ).shape
    more, dy = (torch.randn(size, generator=g).to(BF16) for _ in range(2))
    return layer, x, more.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)


def gradients(layer, tensors, dy, dtype=None):
    leaves = [t.detach().requires_grad_() for t in tensors]
    first = leaves[0] if len(leaves) == 2 else tuple(leaves[:-1])
    with torch.autocast("cpu", BF16, enabled=dtype is None):
        y = layer(first, leaves[-1])
    return y, torch.autograd.grad(y, [*leaves, *layer.parameters()], dy.to(y.dtype))


def check(layer, tensors, dy, monkeypatch, fused=1):
    """Under autocast against float64, with what PyTorch's own ops err as the measure."""
    calls, real = [], addend.convolution
    monkeypatch.setattr(addend, "convolution", lambda *args: calls.append(1) or real(*args))
    y, found = gradients(layer, tensors, dy)
    assert len(calls) == fused
    monkeypatch.setattr(addend, "fits", lambda *args: False)
    plain, expected = gradients(layer, tensors, dy)
    exact = copy.deepcopy(layer).to(BF16).double()  # autocast rounds the weights
    truth, true = gradients(exact, [t.double() for t in tensors], dy, torch.float64)
    assert y.dtype == plain.dtype and y.stride() == plain.stride()
    assert_within_budget(y, truth, plain, factor=FORWARD)
    for i, (a, b, c) in enumerate(zip(found, true, expected, strict=True)):
        assert a.dtype == c.dtype and a.stride() == c.stride()
        step = c if c.dtype == BF16 else c.to(BF16)  # a weight's gradient is computed in bfloat16
        assert_within_budget(a.to(BF16), b, step, factor=GRADIENT, what=f"gradient {i}")


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_convolution(name, layout, monkeypatch):
    layer, x, more, dy = layer_and_inputs(*CASES[name], layout)
    check(layer, (x, more), dy, monkeypatch)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_of_a_pair(layout, monkeypatch):
    layer, x, more, dy = layer_and_inputs((2, 24, 8, 5, 7), dict(kernel_size=1), layout)
    halves = [t.contiguous(memory_format=layout) for t in x.split([9, 15], 1)]
    check(layer, (*halves, more), dy, monkeypatch, fused=2)  # more, and the first half's


def test_a_gradient_that_arrives_in_another_layout(monkeypatch):
    layer, x, more, dy = layer_and_inputs(*CASES["odd"], torch.channels_last)
    check(layer, (x, more), dy.contiguous(), monkeypatch)


def test_only_the_gradients_that_are_wanted():
    layer, x, more, dy = layer_and_inputs(*CASES["3x3"], torch.channels_last)
    layer.requires_grad_(False)
    leaf = more.requires_grad_()
    with torch.autocast("cpu", BF16):
        (found,) = torch.autograd.grad(layer(x, leaf), leaf, dy)
    assert torch.equal(found, dy) and x.grad is None


def test_second_derivatives_are_those_of_pytorch(monkeypatch):
    layer, x, more, _ = layer_and_inputs(*CASES["odd"], torch.channels_last)

    def second():
        leaf = x.detach().requires_grad_()
        with torch.autocast("cpu", BF16):
            y = layer(leaf, more)
        (g,) = torch.autograd.grad(y.float().square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(g.float().square().sum(), layer.weight)[0]

    found = second()
    monkeypatch.setattr(addend, "fits", lambda *args: False)
    expected = second()
    assert (found - expected).norm() < 0.03 * expected.norm() and expected.norm() > 0


def test_where_it_does_not_fit():
    layer, x, more, _ = layer_and_inputs(*CASES["3x3"], torch.channels_last)
    weight = layer.weight
    assert not addend.fits(layer, x, weight, more)  # float32, no autocast: an error's place
    assert addend.fits(layer, x, weight.to(BF16), more)
    with torch.autocast("cpu", torch.float16):
        assert not addend.fits(layer, x, weight, more)
    with torch.autocast("cpu", BF16):
        assert addend.fits(layer, x.float(), weight, more)
        assert not addend.fits(layer, x, weight, more.float())
        assert not addend.fits(layer, x.to("meta"), weight, more)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not addend.fits(layer, x, weight, more)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert not addend.fits(layer, mode.from_tensor(x), weight, more)

        def tangent(t):
            return layer(t, more)

        expected = torch.func.jvp(tangent, (x,), (torch.ones_like(x),))[1]
        assert expected.shape == more.shape and expected.abs().max() > 0
        assert torch.func.vjp(tangent, x)[1](more)[0].shape == x.shape


# name: options of Conv2d, shape of x, shape of what is added
OTHERS = {
    "a number": (dict(padding=1), (2, 16, 8, 8), ()),
    "an image": (dict(padding=1), (2, 16, 8, 8), (16, 8, 8)),
    "a row": (dict(padding=1), (2, 16, 8, 8), (2, 16, 1, 1)),
    "more images": (dict(padding=1), (1, 16, 8, 8), (3, 16, 8, 8)),
    "larger images": (dict(padding=1, stride=8), (2, 16, 8, 8), (2, 16, 4, 4)),
    "no batch": (dict(padding=1), (16, 8, 8), (16, 8, 8)),
    "padding by name": (dict(padding="same"), (2, 16, 8, 8), (2, 16, 8, 8)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_addends_are_pytorch_s(name):
    options, *shapes = OTHERS[name]
    g = torch.Generator().manual_seed(0)
    layer = Conv2d(16, 16, 3, **options).to(BF16)
    x, more = (torch.randn(s, generator=g).to(BF16).requires_grad_() for s in shapes)
    expected = more + F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
    found = layer(x, more)
    assert torch.equal(found, expected)
    dy = torch.randn(found.shape, generator=g).to(BF16)
    both = [torch.autograd.grad(y, (x, more), dy) for y in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_trace_has_pytorch_s_convolutions(dtype, tmp_path):
    """torch.jit.save knows no Python function."""
    layer = Conv2d(32, 32, 3, padding=1).to(dtype)
    x = torch.randn(2, 32, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.jit.trace(layer, (x, x)).save(tmp_path / "traced.pt")
        found, expected = torch.jit.load(tmp_path / "traced.pt")(x, x), x + layer(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["plain", "adm", "three levels"])
def test_a_unet_in_bfloat16(name, monkeypatch):
    """Loss gradients with every addition inside the kernels, and with PyTorch's own instead."""
    torch.manual_seed(0)
    model = alive(engine.UNet(**{**SMALL, **OPTIONS[name]})).to(memory_format=torch.channels_last)
    x, t, y = inputs(model)
    options = {} if y is None else {"y": y}

    def gradient(dtype):
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            out = model.to(dtype if dtype == torch.float64 else torch.float32)(
                x.to(torch.float64 if dtype == torch.float64 else torch.float32), t, **options
            )
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
        found = torch.cat([p.grad.flatten().double() for p in model.parameters()])
        model.zero_grad()
        return found

    fused = gradient(BF16)
    monkeypatch.setattr(addend, "fits", lambda *args: False)
    monkeypatch.setattr("engine.blocks.norm_and_input", lambda norm, x: (norm(x), x))
    plain, truth = gradient(BF16), gradient(torch.float64)
    assert not torch.equal(fused, plain)
    assert (fused - truth).norm() <= 1.1 * (plain - truth).norm()


def test_a_hook_on_a_norm_sees_one_tensor():
    model = alive(engine.UNet(**SMALL))
    x, t, _ = inputs(model)
    model(x, t).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    seen = []
    norm = model.mid_block_1.norm1
    norm.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    norm.register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0].shape))
    model(x, t).sum().backward()
    assert len(seen) == 2 and seen[0] == seen[1]
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert (p.grad - grad).norm() <= 1e-4 * grad.norm() + 1e-6
