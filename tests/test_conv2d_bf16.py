"""Convolution and projection of bfloat16, by AMX and by AVX512_BF16: against float64, whatever the
shapes, whatever lies around."""

import copy

import pytest
import torch
import torch.nn.functional as F
from budget import FORWARD, assert_within_budget
from small_unet import OPTIONS, SMALL, alive, inputs

import engine
from engine import conv2d_bf16, dispatch
from engine.blocks import Conv2d, Upsample
from engine.prepacked import prepacked

OP = "conv2d_bf16"  # on poisoned memory
BF16 = torch.bfloat16


def native():
    return dispatch.module(OP, "native")


@pytest.fixture(autouse=True, params=[2, 3], ids=["dots", "tiles"])
def form(request):
    """Each of the two that this machine, its system and its compiler have."""
    if native().available():
        pytest.skip(native().available())
    torch.ops.engine.limit_isa_level(request.param)
    try:
        if torch.ops.engine.conv2d_bf16_level() != request.param:
            pytest.skip("this machine, its system or its compiler has no such instructions")
        yield
    finally:
        torch.ops.engine.limit_isa_level(3)  # no limit


def picture(*shape):
    return torch.randn(shape).to(BF16).to(memory_format=torch.channels_last)


def convolve(x, x2, weight, bias, add, kernel=3, stride=1, padding=1, upsample=False, shortcut=()):
    """The kernel on weights (Co, C + C2, k, k); shortcut: pairs (picture, weight)."""
    pack = native().pack_conv2d_bf16
    split = [x.shape[1]] if x2 is None else [x.shape[1], x2.shape[1]]
    packs = [pack(w) for w in (*weight.split(split, 1), *(w for _, w in shortcut))]
    more = [p for p, _ in shortcut] + [None] * (2 - len(shortcut))
    out_channels = weight.shape[0]
    geometry = out_channels, kernel, stride, padding, upsample
    return native().conv2d_bf16_fwd(x, x2, *more, torch.cat(packs, 1), bias, add, *geometry)


def plainly(x, x2, weight, bias, add, stride=1, padding=1, upsample=False, shortcut=(), dtype=None):
    """The same by PyTorch, in float64 or in dtype."""
    dtype = dtype or torch.float64

    def low(t):
        return None if t is None else t.to(BF16).to(dtype)

    whole = low(x) if x2 is None else torch.cat([low(x), low(x2)], 1)
    if upsample:
        whole = F.interpolate(whole, scale_factor=2.0)
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(whole, low(weight), bias, stride, padding)
    for p, w in shortcut:
        y = y + F.conv2d(low(p), low(w))
    return y if add is None else y + low(add)


def check(x, x2, weight, bias, add, kernel=3, **options):
    found = convolve(x, x2, weight, bias, add, kernel, **options)
    truth = plainly(x, x2, weight, bias, add, **options)
    plain = plainly(x, x2, weight, bias, add, **options, dtype=BF16)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_within_budget(found, truth, plain, factor=FORWARD)


# N, H, W, C, C2 (0: no pair), Co
SHAPES = [
    (1, 8, 8, 128, 0, 128),
    (3, 4, 4, 64, 96, 48),
    (2, 7, 7, 32, 0, 40),
    (1, 14, 14, 48, 0, 64),
    (2, 16, 16, 40, 24, 16),
    (1, 28, 28, 32, 0, 64),
    (1, 32, 32, 192, 64, 64),
    (1, 32, 32, 1, 0, 64),
    (1, 32, 32, 64, 0, 1),
    (2, 5, 33, 3, 5, 17),
    (1, 2, 3, 32, 0, 16),
    (1, 1, 1, 33, 0, 5),
    (4, 9, 48, 64, 0, 32),  # more than one window of copied rows
    (1, 64, 64, 128, 0, 32),
]
GEOMETRIES = {
    "3x3": {},
    "1x1": dict(kernel=1, padding=0),
    "stride": dict(stride=2),
    "stride, padded before": dict(stride=2, padding=0),
    "upsampled": dict(upsample=True),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution_within_budget(shape, geometry):
    n, h, w, c, c2, co = shape
    options = GEOMETRIES[geometry]
    if options.get("padding") == 0 and "stride" in options and min(h, w) < 3:
        pytest.skip("smaller than the kernel")
    if options.get("upsample") and h * w > 1024:
        pytest.skip("large enough as it is")
    k = options.get("kernel", 3)
    x, x2 = picture(n, c, h, w), picture(n, c2, h, w) if c2 else None
    weight = torch.randn(co, c + c2, k, k) / (c + c2) ** 0.5 / k
    check(x, x2, weight, None, None, **options)
    like = plainly(x, x2, weight, None, None, **{k: v for k, v in options.items() if k != "kernel"})
    check(x, x2, weight, torch.randn(co), picture(*like.shape), **options)


@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
def test_shortcut_is_summed_with_the_convolution(shape):
    n, h, w, c, c2, co = shape
    x, weight = picture(n, c, h, w), torch.randn(co, c, 3, 3) / c**0.5 / 3
    shortcut = [(picture(n, d, h, w), torch.randn(co, d, 1, 1) / d**0.5) for d in (c, c2) if d]
    check(x, None, weight, torch.randn(co), None, shortcut=shortcut)


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 64, 100, 256, 777])
@pytest.mark.parametrize("c, co", [(128, 384), (32, 16), (40, 24), (256, 128)])
def test_projection_within_budget(rows, c, co):
    for shape in ((rows, c), (2, rows, c)):
        x, weight, bias = torch.randn(shape).to(BF16), torch.randn(co, c) / c**0.5, torch.randn(co)
        add = torch.randn(*shape[:-1], co).to(BF16)
        w = weight.to(BF16)
        found = native().linear_bf16_fwd(x, native().pack_conv2d_bf16(weight), bias, add, co)
        truth = F.linear(x.double(), w.double(), bias.double()) + add.double()
        plain = F.linear(x, w, bias.to(BF16)) + add
        assert_within_budget(found, truth, plain, factor=FORWARD)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("n, h, w", [(2, 8, 8), (1, 16, 16), (2, 5, 7)])
def test_a_pixel_reaches_its_neighbours_alone(n, h, w, value):
    """At every place: nothing leaks over the zeros between rows and pictures."""
    weight = torch.ones(16, 32, 3, 3)
    clean = picture(n, 32, h, w)
    for i in range(n):
        for y in {0, 1, h // 2, h - 1}:
            for x in {0, 1, w // 2, w - 1}:
                hit = clean.clone()
                hit[i, 3, y, x] = value
                expected = torch.zeros(n, 16, h, w, dtype=torch.bool)
                expected[i, :, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = True
                found = convolve(hit, None, weight, None, None)
                assert torch.equal(~found.isfinite(), expected), (i, y, x)


@pytest.mark.parametrize("shape", [(1, 8, 8, 128, 0, 128), (3, 16, 16, 64, 64, 48), SHAPES[12]])
def test_does_not_depend_on_threads(shape):
    n, h, w, c, c2, co = shape
    x, x2 = picture(n, c, h, w), picture(n, c2, h, w) if c2 else None
    weight, tokens = torch.randn(co, c + c2, 3, 3), torch.randn(n, h * w, c).to(BF16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = convolve(x, x2, weight, None, None)
            pack = native().pack_conv2d_bf16(weight[:, :c, 0, 0])
            results.append((y, native().linear_bf16_fwd(tokens, pack, None, None, co)))
    finally:
        torch.set_num_threads(before)
    for y, z in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(z, results[0][1])


def test_what_is_refused():
    x, packed = picture(1, 32, 8, 8), native().pack_conv2d_bf16(torch.randn(16, 32, 3, 3))
    rest = packed, None, None, 16, 3, 1, 1, False
    run = native().conv2d_bf16_fwd
    for given, sentence in (
        ((x.float(), None, None, None, *rest), "x must be a bfloat16 tensor"),
        ((x.contiguous(), None, None, None, *rest), "x must be channels_last"),
        ((x, x[:, :, 1:], None, None, *rest), "x2 must have shape"),
        ((x, x, None, None, *rest), "weight must be packed for these channels"),
        ((x, None, None, None, packed, None, x, *rest[3:]), "add must have 16 channels"),
        ((x, None, None, None, *rest[:5], 3, 1, False), "kernel, stride, padding must be"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            run(*given)


def test_weights_may_lie_anywhere():
    """Restored into a larger buffer, say: the loads ask for no alignment."""
    x, packed = picture(1, 32, 8, 8), native().pack_conv2d_bf16(torch.randn(48, 32, 3, 3))
    off = torch.empty(packed.numel() + 8, dtype=BF16)[8:].view(packed.shape).copy_(packed)
    rest = None, None, 48, 3, 1, 1, False
    run = native().conv2d_bf16_fwd
    assert torch.equal(
        run(x, None, None, None, off, *rest), run(x, None, None, None, packed, *rest)
    )


def test_lower_instructions_leave_it_out(form):
    torch.ops.engine.limit_isa_level(1)
    assert native().conv2d_bf16_level() == 0 and not conv2d_bf16.available()
    x, tiles = torch.randn(4, 32).to(BF16), native().pack_conv2d_bf16(torch.randn(16, 32))
    with pytest.raises(RuntimeError, match="has neither AMX nor AVX512_BF16"):
        native().linear_bf16_fwd(x, tiles, None, None, 16)


def test_registered():
    """Schema and fake agree with the kernel."""
    x, pack = picture(2, 32, 6, 6), native().pack_conv2d_bf16
    bias, add = torch.randn(16), picture(2, 16, 3, 3)
    tiles = pack(torch.randn(16, 32, 3, 3))
    given = x, None, None, None, tiles, bias, add, 16, 3, 2, 1, False
    torch.library.opcheck(torch.ops.engine.conv2d_bf16_fwd.default, given)
    rows = torch.randn(2, 7, 32).to(BF16), pack(torch.randn(24, 32)), None, None, 24
    torch.library.opcheck(torch.ops.engine.linear_bf16_fwd.default, rows)


def counted(monkeypatch):
    """How often the kernels run, Winograd's among them."""
    calls, module = [], native()
    for name in ("conv2d_bf16_fwd", "linear_bf16_fwd", "conv2d_winograd_fwd"):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, k=kernel: calls.append(1) or k(*a))
    return calls


@pytest.mark.parametrize("option", OPTIONS)
def test_twin_takes_it(option, monkeypatch):
    """Within the budget, as the batch and the size of the pictures change."""
    calls = counted(monkeypatch)
    model = alive(engine.UNet(**{**SMALL, **OPTIONS[option]})).eval()
    low, high = copy.deepcopy(model).to(BF16), copy.deepcopy(model).double()
    twin = prepacked(model, BF16)
    x, t, y = inputs(model)
    wide = torch.cat([x, x.flip(3)], 3)
    with torch.inference_mode():
        for images in (x, x[:1], wide, x):
            rest = t[: len(images)], y if y is None else y[: len(images)]
            calls.clear()
            found = twin(images.to(BF16), *rest)
            assert len(calls) > 10
            truth, plain = high(images.double(), *rest), low(images.to(BF16), *rest)
            assert_within_budget(found, truth, plain, factor=FORWARD)


def test_other_layouts_and_layers_go_to_onednn(monkeypatch):
    calls = counted(monkeypatch)
    x = picture(2, 32, 8, 8)
    with torch.inference_mode():
        for layer in (Conv2d(32, 16, 3, padding=1), Conv2d(32, 16, 5, padding=2), Upsample(32)):
            more = (None,) if isinstance(layer, Upsample) else ()
            twin = prepacked(layer, BF16)
            plain = copy.deepcopy(layer).to(BF16)(x, *more)
            for given in (x, x.contiguous(), x):
                calls.clear()
                assert torch.allclose(twin(given, *more), plain, atol=0.03, rtol=0.02)
                by_kernel = given is x and getattr(layer, "kernel_size", (3, 3)) == (3, 3)
                assert len(calls) == by_kernel
    monkeypatch.setenv("ENGINE_BACKEND", "eager")
    assert not conv2d_bf16.available()
