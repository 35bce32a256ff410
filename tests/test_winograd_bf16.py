"""Winograd's convolution in bfloat16, as samplers' twins use it where there is no AMX."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from budget import FORWARD, assert_within_budget
from small_unet import SMALL, alive, inputs

import engine
from engine import dispatch, winograd
from engine.blocks import Conv2d, Upsample
from engine.prepacked import prepacked

OP = winograd.OP  # on poisoned memory
LAST, BF16 = torch.channels_last, torch.bfloat16
NATIVE = None if dispatch.absence(winograd.OP, "native") else dispatch.module(winograd.OP, "native")
pytestmark = [
    pytest.mark.skipif(NATIVE is None, reason="extension not built"),
    pytest.mark.skipif(
        NATIVE is not None and NATIVE.conv2d_bf16_level() < 2,
        reason="this CPU, or its compiler, has no AVX512_BF16",
    ),
]

# Lavin & Gray 2016, eq. 9.
BT = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]).double()
G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]).double()
AT = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]]).double()


def low(t):
    return t.to(BF16)


def image(*shape, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return low(values).contiguous(memory_format=LAST)


def by_tiles(x, weight):
    """The algorithm in float64, but that both transforms are rounded to bfloat16."""
    n, _, h, w = x.shape
    x = F.pad(x.double(), (1, 1 + w % 2, 1, 1 + h % 2))
    d = x.unfold(2, 4, 2).unfold(3, 4, 2)
    v = torch.einsum("ai,nchwij,bj->abnhwc", BT, d, BT)
    u = torch.einsum("ai,kcij,bj->abkc", G, weight.double(), G)
    m = torch.einsum("abnhwc,abkc->nkhwab", low(v).double(), low(u).double())
    y = torch.einsum("pa,nkhwab,qb->nkhpwq", AT, m, AT)
    return y.flatten(4, 5).flatten(2, 3)[:, :, :h, :w]


# N, C, C2 (0: no pair), K, H, W
SHAPES = [
    (1, 32, 0, 32, 4, 4),
    (2, 64, 32, 96, 5, 7),
    (3, 32, 64, 32, 2, 3),
    (1, 32, 0, 64, 1, 1),
    (1, 128, 0, 128, 8, 8),  # few tiles: the channels of y are dealt out
    (2, 96, 0, 160, 1, 9),
    (2, 64, 0, 64, 14, 14),
    (5, 32, 0, 32, 17, 12),
    (1, 32, 32, 32, 32, 32),
]


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("bias, add", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, bias, add, upsample):
    n, c, c2, k, h, w = shape
    times = 2 if upsample else 1
    x = image(n, c + c2, h, w)
    weight = low(torch.randn(k, c + c2, 3, 3, generator=torch.Generator().manual_seed(1))) / 8
    bias = torch.randn(k, generator=torch.Generator().manual_seed(2)) if bias else None
    add = image(n, k, times * h, times * w, seed=3) if add else None
    parts = tuple(t.contiguous(memory_format=LAST) for t in x.split([c, c2], 1)) if c2 else x
    packed = winograd.packed_bf16(weight)
    found = winograd.conv2d(parts, packed, bias, add, upsample=upsample)
    assert found.dtype == BF16 and found.is_contiguous(memory_format=LAST)

    whole = F.interpolate(x.double(), scale_factor=2.0) if upsample else x.double()
    more = 0 if bias is None else bias.double()[:, None, None]
    more = more if add is None else more + add
    expected = by_tiles(whole, weight.float()) + more
    # One rounding to bfloat16, and a float32 sum of C terms sixteen times.
    step = expected.abs() * 2**-8 + 2**-20 * expected.abs().max()
    assert ((found - expected).abs() <= step).all()

    truth = F.conv2d(whole, weight.double(), padding=1) + more
    plain = F.conv2d(low(whole), weight, None if bias is None else low(bias), padding=1)
    plain = plain if add is None else plain + add
    assert_within_budget(found, truth, plain, factor=FORWARD)


def test_error_of_a_layer():
    """Above oneDNN's, which rounds the weights and y, by what winograd.py says."""
    layer, x = Conv2d(128, 128, 3, padding=1), image(4, 128, 16, 16)
    with torch.no_grad():
        truth = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
        found = winograd.conv2d(x, winograd.packed_bf16(layer.weight), layer.bias)
        plain = F.conv2d(x, low(layer.weight), low(layer.bias), padding=1)
    ours, theirs = ((y.double() - truth).norm() / truth.norm() for y in (found, plain))
    assert theirs < ours < 2.1 * theirs and ours < 0.005


def test_threads_and_batch_change_no_bit():
    x, weight = image(7, 64, 11, 13), winograd.packed_bf16(torch.randn(64, 64, 3, 3))
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(winograd.conv2d(x, weight))
            found.append(torch.cat([winograd.conv2d(one, weight) for one in x.split(1)]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_near(value):
    x = torch.ones(2, 32, 9, 9, dtype=BF16).contiguous(memory_format=LAST)
    x[0, 3, 4, 4] = value
    y = winograd.conv2d(x, winograd.packed_bf16(torch.ones(32, 32, 3, 3)))
    reached = ~y.isfinite().all(1)
    assert reached[0, 3:6, 3:6].all()
    reached[0, 2:7, 2:7] = False
    assert not reached.any()


X, WEIGHT = image(2, 32, 4, 4), torch.zeros(2, 16, 16, 16, 2, dtype=BF16)


@pytest.mark.parametrize(
    "x, weight, more, sentence",
    [
        (X.contiguous(), WEIGHT, {}, "x must be channels_last"),
        (X, WEIGHT.float(), {}, r"contiguous bfloat16 \(K / 16, 16, C / 2, 16, 2\)"),
        (X, winograd.packed(torch.zeros(32, 32, 3, 3)), {}, "weight must be contiguous bfloat16"),
        (X.float(), WEIGHT, {}, "weight must be contiguous float32"),
        (X[:, :16], WEIGHT, {}, "channels must be multiples of 32"),
        ((X, X.float()), torch.zeros(2, 16, 32, 16, 2).to(BF16), {}, "x2 must be bfloat16"),
        (X, WEIGHT, {"bias": torch.zeros(32).to(BF16)}, "bias must be float32"),
        (X, WEIGHT, {"add": X, "upsample": True}, r"add must be \(2, 32, 8, 8\)"),
    ],
)
def test_one_sentence(x, weight, more, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        winograd.conv2d(x, weight, **more)


def test_nothing():
    for shape in ((0, 32, 4, 4), (2, 32, 0, 4)):
        y = winograd.conv2d(image(*shape), winograd.packed_bf16(torch.zeros(64, 32, 3, 3)))
        assert y.shape == (shape[0], 64, *shape[2:])


@pytest.mark.parametrize("upsample", [False, True])
def test_opcheck(upsample):
    add = image(2, 32, 6, 8) if upsample else image(2, 32, 3, 4)
    weight = winograd.packed_bf16(torch.randn(32, 64, 3, 3))
    given = image(2, 32, 3, 4), image(2, 32, 3, 4, seed=1), weight, torch.zeros(32), add, upsample
    torch.library.opcheck(torch.ops.engine.conv2d_winograd_fwd.default, given)


@pytest.fixture
def without_amx():
    """AMX comes first where it is."""
    torch.ops.engine.limit_isa_level(2)
    yield
    torch.ops.engine.limit_isa_level(3)


@pytest.fixture
def calls(monkeypatch):
    found, conv2d = [], winograd.conv2d
    counted = lambda *args, **options: found.append(1) or conv2d(*args, **options)  # noqa: E731
    monkeypatch.setattr(winograd, "conv2d", counted)
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_twin_of_a_layer(without_amx, calls, dtype, bias):
    """Whatever the layer's own dtype; its images otherwise laid out are oneDNN's."""
    layer = Conv2d(64, 32, 3, padding=1, bias=bias).to(dtype).requires_grad_(False)
    twin, x, add = prepacked(layer, BF16), image(2, 64, 6, 6), image(2, 32, 6, 6, seed=1)
    bias = layer.bias.float() if bias else None
    truth = F.conv2d(x.float(), layer.weight.float(), bias, padding=1) + add
    halves = tuple(t.contiguous(memory_format=LAST) for t in x.split(32, dim=1))
    with torch.inference_mode():
        results = [twin(x, add), twin(halves, add)]
        assert len(calls) == 2
        odd = tuple(t.contiguous(memory_format=LAST) for t in x.split([48, 16], dim=1))
        results += [twin(x.contiguous(), add.contiguous()), twin(odd, add), twin(x.float(), add)]
        assert len(calls) == 2
    for found in results:
        assert found.dtype == BF16 and (found - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_twin_has_the_dtype_and_the_weights_it_was_made_with(without_amx, dtype):
    """Whatever the dtype of its images, and whatever becomes of the layer."""
    layer = Conv2d(64, 32, 3, padding=1).requires_grad_(False)
    with torch.inference_mode():
        for kind in (layer, Upsample(64).requires_grad_(False)):
            twin, more = prepacked(kind, dtype), (None,) if isinstance(kind, Upsample) else ()
            for x in (image(2, 64, 6, 6), image(2, 64, 6, 6).float()):
                assert twin(x, *more).dtype == dtype
        twin, x = prepacked(layer, dtype), image(2, 64, 6, 6).to(dtype)
        before = twin(x)
        for p in layer.parameters():
            p.add_(1)
        assert torch.equal(twin(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_weights_that_are_a_view(without_amx, dtype):
    layer = Conv2d(64, 32, 3, padding=1).requires_grad_(False)
    layer.weight.data = torch.randn(32, 64, 5, 5)[:, :, 1:4, 1:4] / 20
    x = image(2, 64, 6, 6).to(dtype)
    with torch.inference_mode():
        found, truth = prepacked(layer, dtype)(x), layer(x.float())
    assert (found - truth).norm() < 0.01 * truth.norm()


def test_upsampling(without_amx, calls):
    layer, x = Upsample(32).requires_grad_(False), image(3, 32, 5, 3)
    with torch.inference_mode():
        found = prepacked(layer, BF16)(x, None)
        truth = layer.double()(x.double(), None)
    assert len(calls) == 1 and (found - truth).norm() < 0.01 * truth.norm()


def test_other_layers(without_amx):
    for layer in (
        Conv2d(16, 32, 3, padding=1),
        Conv2d(32, 16, 3, padding=1),
        Conv2d(32, 32, 3, padding=1, stride=2),
        Conv2d(32, 32, 1),
    ):
        assert not winograd.serves(layer, BF16)
    assert winograd.serves(Conv2d(32, 32, 3, padding=1), BF16)
    assert not winograd.serves(Conv2d(32, 32, 3, padding=1), torch.float16)


def test_a_model_samples_by_it(without_amx, calls):
    """Error against float32: what PyTorch's bfloat16 has, not more than half of it above."""
    torch.manual_seed(0)
    model = alive(engine.UNet(**{**SMALL, "model_channels": 32})).eval()
    x, t, _ = inputs(model)
    with torch.inference_mode():
        truth = model(x, t)
        with torch.autocast("cpu", BF16):
            plain = model(x, t)
        found = prepacked(model, BF16)(low(x), t)
    assert calls
    ours, theirs = ((y.float() - truth).norm() / truth.norm() for y in (found, plain))
    assert ours < 1.5 * theirs


def test_without_avx512_it_is_pytorchs():
    code = (
        "import torch; from engine import winograd; from engine.blocks import Conv2d; "
        "print(winograd.serves(Conv2d(32, 32, 3, padding=1), torch.bfloat16))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]
