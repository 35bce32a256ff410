"""The U-Net: parameter counts, options, and the whole model fused against eager."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from budget import error
from small_unet import OPTIONS, SMALL, alive, inputs

import engine
from engine import schedules

# name: parameters, tensors where they were published too.
PUBLISHED = {
    "cifar10": (35_746_307, None),
    "ddpm-256": (113_673_219, None),
    "iddpm-cifar10": (52_546_438, 446),
    "iddpm-imagenet64": (121_063_942, None),
    "iddpm-imagenet64-cond": (273_049_350, None),
    "adm-64": (295_904_454, 541),
    "adm-128": (421_529_606, 493),
    "adm-256": (553_838_086, 567),
    "adm-256-uncond": (552_814_086, 566),
    "adm-512": (558_997_638, 645),
}
# attention sites: sequence × heads × channels per head, from the top of the way down to the middle
SITES = {
    "cifar10": ["256x1x256", "16x1x256"],
    "iddpm-imagenet64": ["256x4x96", "64x4x128"],
    "iddpm-imagenet64-cond": ["256x4x144", "64x4x192"],
    "adm-64": ["1024x6x64", "256x9x64", "64x12x64"],
    "adm-128": ["1024x4x128", "256x4x192", "64x4x256"],
    "adm-256": ["1024x8x64", "256x16x64", "64x16x64"],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_of_the_published_models(name):
    with torch.device("meta"):
        model = engine.UNet.from_preset(name)
    count, tensors = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == count
    assert tensors is None or len(model.state_dict()) == tensors
    levels = [level.attentions[0] for level in model.down] + [model.mid_attention]
    size, found = model.config["image_size"], []
    for i, site in enumerate(levels):
        side = size >> min(i, len(model.down) - 1)
        if hasattr(site, "num_heads"):
            heads = site.num_heads
            found.append(f"{side**2}x{heads}x{site.proj_out.in_features // heads}")
    if name in SITES:
        assert list(dict.fromkeys(found)) == SITES[name]


def test_presets_are_all_published_or_ours():
    assert set(engine.unet.PRESETS) == {*PUBLISHED, "fashion-mnist", "images-64"}


def test_images_64_parameter_count():
    with torch.device("meta"):
        model = engine.UNet.from_preset("images-64")
    assert sum(p.numel() for p in model.parameters()) == 56_467_971
    assert model.config["image_size"] == 64


def test_a_published_model_runs_when_its_width_is_divided():
    """Everything of ADM-512 but its width, at a size at which it takes a second."""
    small = dict(image_size=64, model_channels=8, num_groups=2, head_channels=4)
    small["attention_resolutions"] = (4, 2)
    model = alive(engine.UNet.from_preset("adm-512", **small, num_classes=5))
    x, t, y = inputs(model)
    assert model.conv_in.out_channels == 4 and model.time_embed.channels == 8
    assert model(x, t, y).shape == (2, 6, 64, 64)


def test_label_dropout_trains_a_null_label():
    torch.manual_seed(0)
    model = alive(engine.UNet(**SMALL, num_classes=5, label_dropout=0.25))
    assert model.null_label == 5 and model.label_embed.num_embeddings == 6
    n = 4000
    y = torch.arange(n) % 5
    model.train()
    kept = model._drop_labels(y)
    assert set(kept[kept != y].tolist()) == {5}
    assert abs((kept == 5).float().mean().item() - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5
    torch.manual_seed(1)
    again = model._drop_labels(y)
    torch.manual_seed(1)
    assert torch.equal(again, model._drop_labels(y)) and not torch.equal(again, kept)

    model.eval()
    assert torch.equal(model._drop_labels(y), y)
    x, t, y = inputs(model)
    null = torch.full_like(y, model.null_label)
    assert not torch.equal(model(x, t, y), model(x, t, null))
    model.train()
    model.config["label_dropout"] = 1.0
    assert torch.equal(model(x, t, y), model(x, t, null))


def test_labels_that_are_none():
    model = engine.UNet(**SMALL, num_classes=5, label_dropout=0.25)
    x, t, y = inputs(model)
    with pytest.raises(ValueError, match="y reaches from 6 to 6, expected 0 … 5, 5 meaning no cl"):
        model(x, t, torch.full_like(y, 6))
    with pytest.raises(ValueError, match="y reaches from -1 to -1, expected 0 … 5"):
        model(x, t, torch.full_like(y, -1))


def test_without_label_dropout_there_is_no_null_label():
    assert engine.UNet(**SMALL).null_label is None
    model = engine.UNet(**SMALL, num_classes=5)
    assert model.null_label is None and model.label_embed.num_embeddings == 5
    again = engine.UNet(**engine.UNet(**SMALL, num_classes=5, label_dropout=0.1).config)
    assert again.null_label == 5


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
def test_attention_is_at_the_named_level_of_every_image_size(size):
    """A preset at another size keeps its attention at 16×16, or says that it has no such level."""
    if size == 8:
        with pytest.raises(ValueError, match="names 16, but image_size 8 gives the levels 8, 4"):
            engine.UNet.from_preset("cifar10", image_size=size)
        return
    with torch.device("meta"):
        model = engine.UNet.from_preset("cifar10", image_size=size)
    attends = [any(type(a).__name__ == "AttentionBlock" for a in d.attentions) for d in model.down]
    assert attends == [size // 2**level == 16 for level in range(4)]


def test_preset_overrides_and_config_round_trip():
    model = engine.UNet.from_preset("fashion-mnist", num_classes=10)
    again = engine.UNet(**model.config)
    assert again.config == model.config and again.label_embed.num_embeddings == 10
    again.load_state_dict(model.state_dict())
    numbers = engine.UNet.from_preset("fashion-mnist", image_size=np.int64(28)).config
    assert json.loads(json.dumps(numbers)) == engine.UNet.from_preset("fashion-mnist").config


@pytest.mark.parametrize("option", OPTIONS)
def test_starts_at_zero_and_has_gradients_everywhere(option):
    model = engine.UNet(**{**SMALL, **OPTIONS[option]})
    x, t, y = inputs(model)
    out = model(x, t, y)
    assert out.shape == (2, model.config["out_channels"] or 2, 8, 8)
    assert not out.any()
    alive(model)(x, t, y).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    # A shift of all keys changes no softmax; every other parameter must matter.
    dead = [n for n, p in model.named_parameters() if not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("option", OPTIONS)
def test_fused_and_eager_agree(option, impl, monkeypatch):
    if impl == "triton" and option not in ("plain", "adm"):
        pytest.skip("the interpreter is slow: two models are enough")
    model = alive(engine.UNet(**{**SMALL, **OPTIONS[option]}))
    x, t, y = inputs(model)

    def run(backend, net=model, dtype=torch.float32):
        monkeypatch.setenv("ENGINE_BACKEND", backend)
        net.zero_grad()
        out = net(x.to(dtype), t, y)
        out.square().mean().backward()
        return out.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])

    exact = run("eager", copy.deepcopy(model).double(), torch.float64)
    plain, fused = run("eager"), run(impl)
    for truth, a, b in zip(exact, plain, fused, strict=True):
        step = torch.finfo(torch.float32).eps * truth.abs().max().item()
        assert error(b, truth) <= 2 * (error(a, truth) + step)


def test_output_and_hidden_layout_is_channels_last(monkeypatch):
    model = alive(engine.UNet(**SMALL))
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, out: seen.append((*parts(i[0]), out)))
    x, t, y = inputs(model)
    model(x, t, y)
    assert len(seen) == sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    assert {len(images) for images in seen} == {2, 3}  # 3: a shortcut on the way up
    for images in seen:
        for h in images:
            assert h.is_contiguous(memory_format=torch.channels_last)


def parts(x) -> tuple:
    """A layer's input, one image or a pair of them, as a tuple."""
    return x if isinstance(x, tuple) else (x,)


def test_ten_training_steps_agree(monkeypatch):
    """Losses of ten AdamW steps, fused against eager, same data and noise."""
    process = engine.Diffusion(schedules.betas("cosine", 100))

    def train(backend):
        monkeypatch.setenv("ENGINE_BACKEND", backend)
        torch.manual_seed(0)
        model = engine.UNet(**SMALL)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(10):
            loss = process.loss(model, torch.rand(4, 2, 8, 8) * 2 - 1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    assert train("native") == pytest.approx(train("eager"), rel=1e-4)


def test_sampling_agrees_with_injected_noise(monkeypatch):
    model = alive(engine.UNet(**SMALL)).eval()
    process = engine.Diffusion(schedules.betas("cosine", 50))

    def draw(backend):
        monkeypatch.setenv("ENGINE_BACKEND", backend)
        return engine.sample(model, process, (2, 2, 8, 8), steps=8, seed=3)

    assert torch.allclose(draw("native"), draw("eager"), atol=1e-3)


def test_compiles_as_one_graph():
    model = alive(engine.UNet(**SMALL))
    x, t, y = inputs(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, t), model(x, t), atol=1e-4)


def test_label_dropout_compiles_as_one_graph():
    model = alive(engine.UNet(**SMALL, num_classes=5, label_dropout=1.0)).train()
    x, t, y = inputs(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    null = torch.full_like(y, model.null_label)
    assert torch.allclose(compiled(x, t, y), model.eval()(x, t, null), atol=1e-4)


def test_autocast_keeps_bfloat16_between_convolutions():
    model = alive(engine.UNet(**SMALL))
    x, t, y = inputs(model)
    dtypes = set()
    for module in model.modules():
        if type(module).__name__ == "GroupNormSiLU":
            module.register_forward_hook(
                lambda m, i, out: dtypes.update(h.dtype for h in (*parts(i[0]), out))
            )
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t)
    assert dtypes == {torch.bfloat16} and out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: engine.UNet.from_preset("mnist"), "choose one of fashion-mnist, cifar10, "),
        (lambda: engine.UNet.from_preset("cifar10", width=3), "preset 'cifar10'"),
        (lambda: engine.UNet(**{**SMALL, "image_size": 7}), "cannot be halved"),
        (
            lambda: engine.UNet(**{**SMALL, "attention_resolutions": (4, 16)}),
            "names 16, but image_size 8 gives the levels 8, 4: name some of these",
        ),
        (
            lambda: engine.UNet.from_preset("cifar10", image_size=24),
            "names 16, but image_size 24 gives the levels 24, 12, 6, 3: .* an image_size of 16 tim",
        ),
        (lambda: engine.UNet(**{**SMALL, "attention_resolutions": 4}), "expected a tuple"),
        (lambda: engine.UNet(**{**SMALL, "attention_resolutions": ("4",)}), "names '4'"),
        (lambda: engine.UNet(**{**SMALL, "image_size": None}), "image_size is None, expected a wh"),
        (lambda: engine.UNet(**{**SMALL, "image_size": 8.0}), "image_size is 8.0, expected a wh"),
        (lambda: engine.UNet(**{**SMALL, "num_res_blocks": 0}), "num_res_blocks is 0, expected"),
        (lambda: engine.UNet(**SMALL, label_dropout=0.1), "without labels: give num_classes"),
        (lambda: engine.UNet(**SMALL, num_classes=3, label_dropout=2), "label_dropout is 2, exp"),
        (lambda: engine.UNet(**SMALL, num_classes=0), "num_classes is 0, expected a whole number"),
        (lambda: engine.UNet(**{**SMALL, "channel_mult": ()}), "channel_mult is empty"),
        (lambda: engine.UNet(**{**SMALL, "model_channels": 5}), "expected an even number > 2"),
        (lambda: engine.UNet(**{**SMALL, "num_groups": 5}), "cannot be split into num_groups=5"),
        (lambda: engine.UNet(**{**SMALL, "num_heads": 7}), "num_heads=7"),
        (lambda: engine.UNet(**{**SMALL, "conditioning": "film"}), "expected one of add"),
        (lambda: engine.UNet(**SMALL)(torch.ones(1, 3, 8, 8), torch.ones(1)), "x is"),
        (lambda: engine.UNet(**SMALL)(torch.ones(1, 2, 9, 8), torch.ones(1)), "multiples of 2"),
        (lambda: engine.UNet(**SMALL)(torch.ones(2, 2, 8, 8), torch.ones(1)), "one step per image"),
        (lambda: engine.UNet(**SMALL)(torch.ones(2, 2, 8, 8), 5), "t is int, expected a tensor"),
        (lambda: engine.UNet(**SMALL)([0.0], torch.ones(1)), "x is list, expected a tensor"),
        (
            lambda: engine.UNet(**SMALL)(torch.ones(1, 2, 8, 8), torch.ones(1), torch.ones(1)),
            "takes no y",
        ),
        (
            lambda: engine.UNet(**SMALL, num_classes=3)(torch.ones(1, 2, 8, 8), torch.ones(1)),
            "needs y",
        ),
        (
            lambda: engine.UNet(**SMALL, num_classes=3)(
                torch.ones(1, 2, 8, 8), torch.ones(1), torch.ones(1)
            ),
            r"y is \(1,\) torch.float32, expected \(1,\) int64",
        ),
    ],
)
def test_bad_input(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("attend", ["attention", "attention_qkv"])
def test_gradient_checkpointing(attend):
    """torch.utils.checkpoint hands out what was saved once."""
    g = torch.Generator().manual_seed(0)
    if attend == "attention":
        shapes, call = [(2, 2, 6, 8)] * 3, engine.ops.attention
    else:
        shapes, call = [(2, 6, 48)], lambda qkv: engine.ops.attention_qkv(qkv, 2)
    leaves = [torch.randn(s, generator=g).requires_grad_() for s in shapes]
    again = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False)
    dy = torch.randn(again.shape, generator=g)
    found, expected = (torch.autograd.grad(y, leaves, dy) for y in (again, call(*leaves)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradient_checkpointing_of_the_model():
    model = alive(engine.UNet(**SMALL))
    x, t, _ = inputs(model)
    process = engine.Diffusion(schedules.betas("linear", 1000))

    def gradients(network):
        loss = process.loss(network, x, t=t, key=0, reduction="none")
        return torch.autograd.grad(loss @ torch.tensor([1.0, 0.3]), list(model.parameters()))

    def again(x, t):
        return torch.utils.checkpoint.checkpoint(model, x, t, use_reentrant=False)

    pairs = zip(gradients(again), gradients(model), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
