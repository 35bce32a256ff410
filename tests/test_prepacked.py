"""A prepacked twin computes what its model computes, and leaves the model alone."""

import copy

import pytest
import torch
from budget import FORWARD, assert_within_budget
from small_unet import OPTIONS, SMALL, alive, inputs

import engine
from engine import addend, schedules
from engine.blocks import Conv2d, Linear, ResBlock, Upsample
from engine.prepacked import for_sampling, prepacked

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(not BF16, reason="this CPU has no bfloat16 kernels of oneDNN")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]


def unet(**options):
    return alive(engine.UNet(**{**SMALL, **options})).eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_twin_within_budget(option, dtype):
    model = unet(**OPTIONS[option])
    x, t, y = inputs(model)
    with torch.inference_mode():
        twin = prepacked(model, dtype)
        found = [twin(x[:n].to(dtype), t[:n], y if y is None else y[:n]) for n in (2, 1, 2)]
        plain = copy.deepcopy(model).to(dtype)(x.to(dtype), t, y)
        truth = copy.deepcopy(model).double()(x.double(), t, y)
    for out, rows in zip(found, (2, 1, 2), strict=True):  # packed for two pictures, right for one
        assert out.dtype == dtype
        assert_within_budget(out, truth[:rows], plain[:rows], factor=FORWARD)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_upsampling_is_folded_into_its_convolution(size):
    """2×2 products of the small image in place of 3×3 of the large one, its edges included."""
    layer = Upsample(6).double()
    torch.nn.init.normal_(layer.conv.bias)
    layer.float()
    x = torch.randn(3, 6, size, 2 * size).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        found, expected = prepacked(layer, torch.float32)(x, None), layer(x, None)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found, expected, atol=1e-5)


def test_norms_go_straight_to_their_kernel(monkeypatch):
    """From the second call of a kind on; where `auto` takes no kernel, or with gradients, never."""
    model, asked = unet(), []
    front_door = engine.ops.group_norm_silu
    monkeypatch.setattr(
        engine.ops, "group_norm_silu", lambda *a, **k: asked.append(1) or front_door(*a, **k)
    )
    x, t, y = inputs(model)
    norms = sum(isinstance(m, torch.nn.GroupNorm) for m in model.modules())
    for backend, later in (("native", 0), ("eager", norms)):
        monkeypatch.setenv("ENGINE_BACKEND", backend)
        twin = prepacked(model, torch.float32)
        with torch.inference_mode():
            for expected in (norms, later, later):
                asked.clear()
                out = twin(x, t, y)
                assert len(asked) == expected
            assert torch.allclose(out, model(x, t, y), atol=1e-5)
            asked.clear()
            twin(x[:1], t[:1], y)
            assert len(asked) == norms
    with torch.no_grad():
        first = twin(x, t, y)
    assert torch.allclose(twin(x, t, y).detach(), first, atol=1e-5)


@pytest.mark.parametrize("small", [0, 2**18])
def test_pairs_are_concatenated_where_they_are_small(monkeypatch, small):
    """Either way the same; one twin may see both, as the batch changes."""
    monkeypatch.setattr("engine.prepacked.SMALL", small)
    model = unet()
    x, t, y = inputs(model)
    twin = prepacked(model, torch.float32)
    with torch.inference_mode():
        expected = model(x, t, y)
        assert torch.allclose(twin(x, t, y), expected, atol=1e-5)
        monkeypatch.setattr("engine.prepacked.SMALL", 2**18 - small)
        assert torch.allclose(twin(x, t, y), expected, atol=1e-5)


@needs_bf16
def test_twin_rounds_less_than_autocast(monkeypatch):
    """A residual is added before the convolution's result is rounded, not after. Over several
    models: of one, either may be nearer by chance."""
    monkeypatch.setattr(addend, "fits", lambda *_: False)  # else the model does as its twin
    errors = []
    for seed in range(6):
        torch.manual_seed(seed)
        model = unet(**OPTIONS["three levels"])
        x, t, y = inputs(model)
        with torch.inference_mode():
            truth = copy.deepcopy(model).double()(x.double(), t, y)
            with torch.autocast("cpu", torch.bfloat16):
                plain = model(x, t, y)
            found = prepacked(model, torch.bfloat16)(x, t, y)
        errors.append([(out - truth).norm().item() for out in (found, plain)])
    ours, theirs = map(sum, zip(*errors, strict=True))
    assert ours < theirs


def test_every_layer_is_packed_and_the_model_untouched():
    model = unet(**OPTIONS["adm"])
    keys, before = list(model.state_dict()), [type(m) for m in model.modules()]
    twin = prepacked(model, torch.float32)
    x, t, y = inputs(model)
    with torch.inference_mode():
        twin(x, t, y)
    layers = [m for m in model.modules() if isinstance(m, Conv2d | Linear)]
    blocks = [m for m in model.modules() if isinstance(m, ResBlock)]
    packed = {m for m in twin.modules() if hasattr(m, "packed")}
    assert len(packed) == len(layers) - len(blocks) + 1 > 10  # one for all time embeddings
    assert all(m.packed or m.transformed is not None for m in packed)  # the second by Winograd
    assert not [m for m in twin.modules() if isinstance(m, Conv2d | Linear)]
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    model.train()
    assert not twin.training
    norms = [m.norm[0] for m in twin.modules() if hasattr(m, "known")]  # nothing is copied
    assert {id(n) for n in norms} == {
        id(m) for m in model.modules() if isinstance(m, torch.nn.GroupNorm)
    }


def test_layers_with_hooks_stay_themselves():
    model = unet()
    calls = []
    model.conv_in.register_forward_hook(lambda *_: calls.append("conv_in"))
    torch.nn.utils.parametrizations.weight_norm(model.conv_out)
    twin = prepacked(model, torch.float32)
    assert twin.conv_in.weight is model.conv_in.weight and hasattr(
        twin.conv_out, "parametrizations"
    )
    x, t, y = inputs(model)
    with torch.inference_mode():
        assert torch.allclose(twin(x, t, y), model(x, t, y), atol=1e-5)
    assert calls == ["conv_in"] * 2


def weighted(layer):
    torch.nn.utils.parametrizations.weight_norm(layer)


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)


def patched(layer):
    plain = layer.forward
    layer.forward = lambda *args, **more: plain(*args, **more)


class WithMore(engine.UNet):
    """Somebody's own: a layer of PyTorch's behind ours."""

    def __init__(self, **options):
        super().__init__(**options)
        self.after = torch.nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, t, y=None):
        return self.after(super().forward(x, t, y))


@needs_bf16
@pytest.mark.parametrize("change", [hooked, patched, weighted])
@pytest.mark.parametrize("name", ["conv_in", "mid_attention.qkv", "mid_block_1.conv2", ""])
def test_sampling_under_autocast_with_layers_of_others(change, name):
    """What is not packed is still cast by autocast."""
    if change is weighted and not name:
        model = alive(WithMore(**SMALL)).eval()
    else:
        model = unet()
        change(model.get_submodule(name))
    process = engine.Diffusion(engine.schedules.betas("cosine", 50))
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = (
            engine.sample(model, process, (2, 2, 8, 8), sampler="ddim", steps=3, prepack=prepack)
            for prepack in (True, False)
        )
    assert (found - plain).abs().mean() < 0.03


def test_embeddings_of_two_widths():
    """Blocks of somebody's own need not take the model's time embedding."""

    class Other(engine.UNet):
        def __init__(self, **options):
            super().__init__(**options)
            self.more = ResBlock(2, 4, 8, 2, 1e-5, 0.0, "add")

        def forward(self, x, t, y=None):
            return self.more(super().forward(x, t, y), x.flatten(1)[:, :8]).mean(1, keepdim=True)

    model = alive(Other(**SMALL)).eval()
    x, t, y = inputs(model)
    with torch.inference_mode():
        assert torch.allclose(prepacked(model, torch.float32)(x, t), model(x, t), atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize("options", [{}, {"guidance": 2.0}], ids=["plain", "guided"])
def test_sampling_takes_the_twin(monkeypatch, precision, options):
    """The images are those of the plain model up to rounding; training=True afterwards is kept.

    Over 80 networks in bfloat16: rounding moves the mean by up to 0.026, other weights by 0.30 up.
    """
    from engine import prepacked as module

    torch.manual_seed(0)
    model = unet(num_classes=5, label_dropout=0.5).train()
    process = engine.Diffusion(engine.schedules.betas("cosine", 50))
    made = []
    monkeypatch.setattr(
        module, "prepacked", lambda *args: made.append(prepacked(*args)) or made[-1]
    )
    shape, y = (3, 2, 8, 8), torch.tensor([0, 1, 4])

    def draw(**more):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return engine.sample(
                model, process, shape, sampler="ddim", steps=5, y=y, **options, **more
            )

    found, plain = draw(), draw(prepack=False)
    assert len(made) == 1 and model.training and torch.equal(found, draw(prepack=True))
    near = 1e-5 if precision == "fp32" else 0.03
    assert (found - plain).abs().mean() < near  # the mean: an untrained network swings pixels
    with torch.no_grad():
        model.conv_in.weight.mul_(-2)  # trained on: the next samples are of the new weights
    assert (draw() - found).abs().mean() > 0.1


def test_auto_leaves_what_it_cannot_serve():
    model = unet()
    assert for_sampling(model, False) is model
    half = copy.deepcopy(model).half()
    assert for_sampling(half) is half

    def call(x, t):
        return x

    assert for_sampling(call) is call
    with torch.backends.mkldnn.flags(enabled=False):
        assert for_sampling(model) is model
        with pytest.raises(ValueError, match="prepack=True needs oneDNN"):
            for_sampling(model, True)


@needs_bf16
@pytest.mark.parametrize("how", ["accelerated", "compiled", "a compiled part"])
def test_compiled_models_are_sampled_as_they_are(how):
    """The twin of a compiled module called the module itself, without its autocast."""
    model, diffusion = unet(), engine.Diffusion(schedules.betas("cosine", 20))
    options = dict(sampler="ddim", steps=2, clip=False)
    shape = (2, SMALL["in_channels"], 8, 8)

    def draw(model):
        with torch.autocast("cpu", torch.bfloat16):
            return engine.sample(model, diffusion, shape, prepack="auto", **options)

    plain = draw(lambda x, t: model(x, t))
    x, t, _ = inputs(model)
    expected = model(x, t)
    if how == "accelerated":
        engine.accelerate(model)
    elif how == "compiled":
        model.compile(backend="eager")
    else:
        model.conv_out.compile(backend="eager")
    assert for_sampling(model) is model
    with pytest.raises(ValueError, match="neither accelerated nor compiled: leave prepack out"):
        for_sampling(model, True)
    assert (draw(model) - plain).norm() <= 0.02 * plain.norm()
    called = []
    model._compiled_call_impl = lambda *args: called.append(args)
    with torch.inference_mode():
        assert torch.allclose(prepacked(model, torch.float32)(x, t), expected, atol=1e-5)
    assert not called


def test_a_twin_of_a_twin():
    model = unet()
    x, t, y = inputs(model)
    twin = prepacked(model, torch.float32)
    with torch.inference_mode():
        expected = model(x, t, y)
        for each in (prepacked(twin, torch.float32), twin):  # the copy's first call packs for both
            assert torch.allclose(each(x, t, y), expected, atol=1e-5)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda m: for_sampling(m, "yes"), "prepack is 'yes', expected True, False or 'auto'"),
        (lambda m: for_sampling(m.forward, True), "needs a UNet, not method: leave prepack out"),
        (lambda m: for_sampling(m.half(), True), "needs float32 or bfloat16, not torch.float16"),
        (lambda m: prepacked(m, torch.float64), "float32 or bfloat16, not torch.float64"),
        (lambda m: prepacked(m.to("meta"), torch.float32), "for the CPU, the model is on meta"),
        (lambda m: prepacked(m.forward, torch.float32), "model is method, expected an nn.Module"),
    ],
)
def test_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(unet())


def test_every_part_keeps_its_mode():
    """A part that was frozen in eval mode is not in training mode after sampling."""
    model = unet(dropout=0.3).train()
    model.mid_block_1.eval()
    before = [m.training for m in model.modules()]
    process = engine.Diffusion(engine.schedules.betas("cosine", 50))
    for prepack in (True, False):
        engine.sample(model, process, (1, 2, 8, 8), sampler="ddim", steps=2, prepack=prepack)
        assert [m.training for m in model.modules()] == before
