"""Winograd's convolution as the layers use it: where it serves, its gradients, its errors."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from budget import FORWARD, GRADIENT, assert_within_budget

from engine import dispatch, winograd
from engine.blocks import Conv2d, Upsample, upsample_nearest
from engine.prepacked import prepacked

SERVED = torch.backends.cpu.get_cpu_capability() in winograd.SETS
pytestmark = [
    pytest.mark.skipif(bool(dispatch.absence(winograd.OP, "native")), reason="extension not built"),
    pytest.mark.skipif(not SERVED, reason="this CPU has no AVX2"),
]
LAST = torch.channels_last


def image(*shape, seed=0, **options):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(memory_format=LAST).requires_grad_(options.get("grad", False))


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel was called."""
    found, conv2d = [], winograd.conv2d
    counted = lambda *args, **options: found.append(1) or conv2d(*args, **options)  # noqa: E731
    monkeypatch.setattr(winograd, "conv2d", counted)
    return found


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("pair", [0, 16])
@pytest.mark.parametrize(
    "channels, size", [((32, 32), (8, 8)), ((64, 96), (5, 7)), ((48, 32), (2, 3))]
)
def test_layer_and_its_gradients(monkeypatch, calls, channels, size, pair, add):
    c, k = channels
    torch.manual_seed(1)
    layer = Conv2d(c, k, 3, padding=1).to(memory_format=LAST)
    x, dy = image(2, c, *size), image(2, k, *size, seed=2)
    residual = image(2, k, *size, seed=3, grad=True) if add else None
    results = []
    for dtype, served in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        monkeypatch.setenv("ENGINE_BACKEND", "auto" if served else "eager")
        cast = Conv2d(c, k, 3, padding=1).to(dtype, memory_format=LAST)
        cast.load_state_dict(layer.state_dict())
        parts = x.to(dtype).split([c - pair, pair], dim=1)
        parts = [t.contiguous(memory_format=LAST) for t in parts]
        leaves = [t.detach().requires_grad_() for t in parts[: 2 if pair else 1]]
        extra = None if residual is None else residual.detach().to(dtype).requires_grad_()
        before = len(calls)
        y = cast(tuple(leaves) if pair else leaves[0], extra)
        y.backward(dy.to(dtype))
        assert served == (len(calls) > before)
        grads = [*(t.grad for t in leaves), cast.weight.grad, cast.bias.grad]
        results.append((y, grads + ([] if extra is None else [extra.grad])))
    (truth, exact), (plain, theirs), (found, ours) = results
    assert found.is_contiguous(memory_format=LAST)
    assert_within_budget(found, truth, plain, factor=FORWARD)
    for mine, true, other in zip(ours, exact, theirs, strict=True):
        assert_within_budget(mine, true, other, factor=GRADIENT)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8)])
def test_upsampling_is_folded_into_its_convolution(calls, size):
    """Nine products of the small image, its edges included."""
    torch.manual_seed(1)
    layer = Upsample(32)
    x = image(3, 32, *size)
    with torch.inference_mode():
        found = prepacked(layer, torch.float32)(x, None)
        assert len(calls) == 1
        double = layer.double()
        truth = double(x.double(), None)
        plain = F.conv2d(
            upsample_nearest(x), *(p.float() for p in double.conv.parameters()), padding=1
        )
    assert found.is_contiguous(memory_format=LAST)
    assert_within_budget(found, truth, plain, factor=FORWARD)


def test_error_is_below_onednns():
    """Sums of C terms where the direct convolution has 9 C."""
    layer, x = Conv2d(128, 64, 3, padding=1), image(2, 128, 16, 16)
    with torch.no_grad():
        truth = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
        direct = layer._conv_forward(x, layer.weight, layer.bias)
        found = layer(x)
    assert (found - truth).norm() < (direct - truth).norm()


LAYERS = {
    "1×1": dict(kernel_size=1),
    "stride": dict(kernel_size=3, padding=1, stride=2),
    "no padding": dict(kernel_size=3),
    "dilation": dict(kernel_size=3, padding=1, dilation=2),
    "groups": dict(kernel_size=3, padding=1, groups=2),
    "circular": dict(kernel_size=3, padding=1, padding_mode="circular"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_other_layers_are_pytorchs(calls, kind):
    layer = Conv2d(32, 32, **LAYERS[kind])
    assert torch.equal(
        layer(image(2, 32, 8, 8)), torch.nn.Conv2d.forward(layer, image(2, 32, 8, 8))
    )
    assert not calls


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 32, 8, 8),
        image(2, 32, 8, 16)[..., ::2],
        image(2, 32, 8, 8).double(),
        image(32, 8, 8, 1).squeeze(-1),
    ],
    ids=["contiguous", "strided", "float64", "no batch"],
)
def test_other_images_are_pytorchs(calls, x):
    layer = Conv2d(32, 32, 3, padding=1).to(x.dtype)
    assert layer(x).shape == x.shape and not calls


@pytest.mark.parametrize("channels", [16, 48])
def test_other_channels_are_told_by_pytorch(channels):
    with pytest.raises(RuntimeError, match=f"to have 32 channels, but got {channels} channels"):
        Conv2d(32, 32, 3, padding=1)(image(2, channels, 8, 8))


def test_what_differs_from_backward(calls):
    """Gradients of gradients, tangents and vmap are PyTorch's; so is autocast's convolution."""
    layer, x = Conv2d(32, 32, 3, padding=1), image(1, 32, 4, 4, grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    double = Conv2d(32, 32, 3, padding=1).double()
    double.load_state_dict(layer.state_dict())
    wide = x.detach().double().requires_grad_()
    (dwide,) = torch.autograd.grad(double(wide).square().sum(), wide, create_graph=True)
    (expected,) = torch.autograd.grad(dwide.square().sum(), wide)
    assert torch.allclose(second, expected.float(), rtol=1e-4, atol=1e-5)
    del calls[:]
    _, tangent = torch.func.jvp(layer, (x.detach(),), (torch.ones_like(x),))
    assert tangent.abs().sum() > 0
    torch.func.vmap(layer)(image(3, 32, 4, 4).detach()[:, None])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not calls


def test_frozen_parts(calls):
    layer, x = Conv2d(32, 32, 3, padding=1, bias=False), image(1, 32, 4, 4)
    layer(x).sum().backward()  # the gradient of a sum is expanded: not an image of its own
    assert layer.weight.grad is not None and x.grad is None and len(calls) == 1
    layer.requires_grad_(False)
    wanted = x.clone().requires_grad_()
    layer(wanted).square().sum().backward()
    assert wanted.grad is not None and len(calls) == 3


def test_a_twin_packs_once(monkeypatch, calls):
    packs, packed = [], winograd.packed
    monkeypatch.setattr(winograd, "packed", lambda *a, **k: packs.append(1) or packed(*a, **k))
    layer = Conv2d(32, 64, 3, padding=1)
    twin = prepacked(layer, torch.float32)
    with torch.inference_mode():
        for size in (4, 8, 5):
            x = image(2, 32, size, size)
            add = image(2, 64, size, size, seed=1)
            halves = tuple(t.contiguous(memory_format=LAST) for t in x.split(16, dim=1))
            assert torch.allclose(twin(x, add), layer(x, add), atol=1e-5)
            assert torch.allclose(twin(halves), layer(x), atol=1e-5)
        assert torch.allclose(twin(x.contiguous()), layer(x), atol=1e-5)  # by oneDNN
    assert len(packs) == 1 + 3 * 2 + 1  # the layer packs at every call


def test_without_avx2_it_is_pytorchs():
    code = (
        "import torch; from engine import winograd; from engine.blocks import Conv2d; "
        "print(winograd.serves(Conv2d(32, 32, 3, padding=1)))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


X, WEIGHT = image(2, 32, 4, 4), torch.zeros(2, 16, 32, 16)


@pytest.mark.parametrize(
    "x, weight, more, sentence",
    [
        (X.contiguous(), WEIGHT, {}, "x must be channels_last"),
        (X.double(), WEIGHT, {}, "x must be float32"),
        (X[0], WEIGHT, {}, r"x must be \(N, C, H, W\)"),
        (X, WEIGHT[:1], {}, r"K % 32 == 0"),
        (X[:, :16], WEIGHT, {}, r"weight must be"),
        ((X, image(2, 32, 4, 5)), torch.zeros(2, 16, 64, 16), {}, r"x2 must be \(2, 32, 4, 4\)"),
        (X, WEIGHT, {"bias": torch.zeros(16)}, "bias must have shape"),
        (X, WEIGHT, {"bias": torch.zeros(32).double()}, "bias must be float32"),
        (X, WEIGHT, {"add": image(2, 32, 4, 4), "upsample": True}, r"add must be \(2, 32, 8, 8\)"),
    ],
)
def test_one_sentence(x, weight, more, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        winograd.conv2d(x, weight, **more)


@pytest.mark.parametrize("shape", [(0, 32, 4, 4), (2, 32, 0, 4)])
def test_nothing(shape):
    layer = Conv2d(32, 32, 3, padding=1)
    assert layer(image(*shape)).shape == shape


@pytest.mark.parametrize("upsample", [False, True])
def test_opcheck(upsample):
    x, x2 = image(2, 32, 3, 4), image(2, 16, 3, 4)
    add = image(2, 32, 6, 8) if upsample else image(2, 32, 3, 4)
    weight = torch.randn(32, 48, 3, 3)
    given = x, x2, winograd.packed(weight), torch.zeros(32), add, upsample
    torch.library.opcheck(torch.ops.engine.conv2d_winograd_fwd.default, given)
    torch.library.opcheck(torch.ops.engine.conv2d_winograd_weight.default, (weight, False))
    turned = weight.contiguous(memory_format=LAST)
    torch.library.opcheck(torch.ops.engine.conv2d_winograd_weight.default, (turned, True))


def test_threads_change_no_bit():
    layer, x = Conv2d(64, 64, 3, padding=1), image(3, 64, 11, 13)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(layer(x).detach())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
