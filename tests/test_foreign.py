"""Checkpoints of OpenAI's and DDPM's layouts, against their architecture written down again."""

import copy
import math

import numpy as np
import openai_unet
import pytest
import torch
import torch.nn.functional as F
from budget import FORWARD, GRADIENT, assert_within_budget

import engine
from engine.checkpoint import CheckpointError, load_ddpm_tf, load_openai, load_openai_classifier
from engine.presets import PRESETS, QKV_ORDER

SIZES = dict(image_size=8, model_channels=16, channel_mult=(1, 2), num_res_blocks=1)
# Options of the published architecture, and the same for our U-Net.
MODELS = {
    "iddpm": (
        dict(attention_resolutions=(4,), heads=lambda c: 2, adaptive=True),
        dict(attention_resolutions=(4,), num_heads=2, conditioning="scale_shift"),
    ),
    "adm": (
        dict(
            attention_resolutions=(8, 4),
            heads=lambda c: c // 8,
            adaptive=True,
            resblock_updown=True,
            num_classes=3,
            out_channels=4,
        ),
        dict(
            attention_resolutions=(8, 4),
            head_channels=8,
            conditioning="scale_shift",
            resample="biggan",
            num_classes=3,
            out_channels=4,
        ),
    ),
    "lsun": (
        dict(attention_resolutions=(4,), num_res_blocks=2),
        dict(attention_resolutions=(4,), num_res_blocks=2),
    ),
    "half width": (
        dict(channel_mult=(0.5, 1, 2), heads=lambda c: 2, resblock_updown=True),
        dict(channel_mult=(0.5, 1, 2), num_heads=2, resample="biggan"),
    ),
}


def published(name):
    theirs, ours = MODELS[name]
    spec = openai_unet.Spec(**{**SIZES, **theirs})
    return spec, {**SIZES, "in_channels": 2, "out_channels": 2, "num_groups": 4, **ours}


def inputs(spec):
    g = torch.Generator().manual_seed(2)
    y = torch.tensor([0, 2]) if spec.o["num_classes"] else None
    return torch.randn(2, 2, 8, 8, generator=g), torch.tensor([7, 931]), y


@pytest.mark.parametrize("order", ["h3d", "3hd", "hd3"])
@pytest.mark.parametrize("name", MODELS)
def test_openai_checkpoint_computes_the_same(name, order):
    spec, options = published(name)
    state = openai_unet.random_state(spec)
    model = load_openai(state, options, order)
    x, t, y = inputs(spec)
    cotangent = torch.randn(2, spec.o["out_channels"], 8, 8, generator=torch.Generator())

    def run(forward, dtype):
        image = x.clone().to(dtype).requires_grad_()
        out = forward(image)
        (out * cotangent).sum().backward()
        return out.detach(), image.grad

    def theirs(image):
        return openai_unet.forward(spec, state, order, image, t, y)

    truth, plain = run(theirs, torch.float64), run(theirs, torch.float32)
    got = run(lambda image: model(image, t, y), torch.float32)
    for i, factor in enumerate((FORWARD, GRADIENT)):
        assert_within_budget(got[i], truth[i], plain[i], factor=factor, what=f"{name} {i}")

    # The two wrong orders load as well, and compute something else: hence they must be named. With
    # one head, h3d and 3hd are the same.
    for wrong in {"h3d", "3hd", "hd3"} - {order}:
        other = load_openai(state, options, wrong)(x, t, y)
        differs = (other - truth[0]).abs().max() > 1e-3 * truth[0].abs().max()
        assert differs == (name != "lsun" or "hd3" in (order, wrong)), wrong


@pytest.mark.parametrize("pool", ["attention", "adaptive"])
def test_openai_classifier_computes_the_same(pool):
    theirs, ours = MODELS["adm"]
    changes = dict(num_classes=None, out_channels=5, pool=pool)
    spec = openai_unet.Spec(**{**SIZES, **theirs, **changes})
    options = {**SIZES, **ours, "in_channels": 2, "num_groups": 4, "num_classes": 5, "pool": pool}
    del options["out_channels"]
    state = openai_unet.random_state(spec)
    x, t, _ = inputs(spec)
    truth = openai_unet.forward(spec, state, "h3d", x.double(), t)
    plain = openai_unet.forward(spec, state, "h3d", x, t)
    got = load_openai_classifier(state, options, "h3d")(x, t)
    assert got.shape == (2, 5)
    assert_within_budget(got, truth, plain, factor=FORWARD)
    other = load_openai_classifier(state, options, "3hd")(x, t)
    assert (other - truth).abs().max() > 1e-3 * truth.abs().max()
    with pytest.raises(CheckpointError, match="qkv_order is not known for a model of these opt"):
        load_openai_classifier(state, options)
    with pytest.raises(CheckpointError, match="checkpoints of 'adm-64' have 'h3d'"):
        load_openai_classifier(state, "adm-64", "3hd")


def test_gradients_reach_the_weights_in_their_order():
    """dL/dW_qkv of ours is that of theirs, in another order of rows."""
    spec, options = published("iddpm")
    state = openai_unet.random_state(spec)
    x, t, _ = inputs(spec)
    name = "middle_block.1.qkv.weight"
    grads = {}
    for dtype in (torch.float32, torch.float64):
        leaf = state[name].clone().to(dtype).requires_grad_()
        state_here = {**{k: v.to(dtype) for k, v in state.items()}, name: leaf}
        openai_unet.forward(spec, state_here, "h3d", x.to(dtype), t).square().mean().backward()
        # (heads 2, 3, d 16) → (3, heads, d)
        grads[dtype] = leaf.grad[..., 0].view(2, 3, 16, 32).transpose(0, 1).reshape(96, 32)
    model = load_openai(state, options, "h3d")
    model(x, t).square().mean().backward()
    got = model.mid_attention.qkv.weight.grad
    plain, truth = grads[torch.float32], grads[torch.float64]
    assert_within_budget(got, truth, plain, factor=GRADIENT, what="dqkv")


def test_a_file_loads_as_its_state_dict(tmp_path):
    spec, options = published("adm")
    state = openai_unet.random_state(spec)
    half = {k: v.half() for k, v in state.items()}
    torch.save(half, tmp_path / "model.pt")
    np.savez(tmp_path / "model.npz", **{k: v.numpy() for k, v in half.items()})
    want = load_openai(half, options, "h3d").state_dict()
    for file in ("model.pt", "model.npz"):
        found = load_openai(tmp_path / file, options, "h3d").state_dict()
        assert all(torch.equal(found[k], v) and v.dtype == torch.float32 for k, v in want.items())


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_files_that_are_no_weights(tmp_path, capsys):
    spec, options = published("iddpm")
    state = openai_unet.random_state(spec)
    torch.save({**state, "x": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "evil.pt").read_bytes()[:500])
    np.savez(tmp_path / "objects.npz", a=np.array([Evil()], dtype=object))
    for file in ("evil.pt", "cut.pt", "objects.npz"):
        with pytest.raises(CheckpointError, match="cannot be read as tensors alone"):
            load_openai(tmp_path / file, options, "h3d")
    assert "executed" not in capsys.readouterr().out
    torch.save({"state_dict": state}, tmp_path / "nested.pt")
    for source, sentence in (
        (tmp_path / "nested.pt", "has under 'state_dict' a dict.*: give the state dict itself"),
        (tmp_path / "none.pt", "none.pt does not exist"),
        (tmp_path, "is a folder: give its file"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            load_openai(source, options, "h3d")


def test_the_order_of_qkv_is_the_presets_or_named(monkeypatch):
    assert {name for name, order in QKV_ORDER.items() if order == "3hd"} == {"adm-64"}
    spec, options = published("adm")
    state = openai_unet.random_state(spec)
    monkeypatch.setitem(PRESETS, "adm-64", options)  # 300 M weights would take long
    monkeypatch.setitem(PRESETS, "adm-256", options)
    for preset in ("adm-64", "adm-256"):
        known = QKV_ORDER[preset]
        want = load_openai(state, options, known).state_dict()
        for found in (load_openai(state, preset), load_openai(state, preset, known)):
            assert all(torch.equal(want[k], v) for k, v in found.state_dict().items())
        other = "3hd" if known == "h3d" else "h3d"
        with pytest.raises(CheckpointError, match=f"checkpoints of '{preset}' have '{known}'"):
            load_openai(state, preset, other)
    for preset in ("fashion-mnist", options):
        with pytest.raises(CheckpointError, match="name the order of its qkv channels"):
            load_openai(state, preset)
    with pytest.raises(CheckpointError, match="qkv_order is 'new', expected one of 3hd, h3d, hd3"):
        load_openai(state, options, "new")
    with pytest.raises(ValueError, match="unknown preset 'adm'"):
        load_openai(state, "adm", "h3d")


def test_what_does_not_fit_is_named():
    spec, options = published("iddpm")
    state = openai_unet.random_state(spec)
    less = {k: v for k, v in state.items() if not k.startswith("out.")}
    more = {**state, "low.weight": state["out.0.bias"]}
    wide = {**state, "out.2.weight": torch.zeros(6, 16, 3, 3)}
    theirs = {"down_blocks.0.resnets.0.conv1.weight": state["out.0.bias"]}
    tf = {"model/conv_in/W": state["out.0.bias"]}
    for weights, changes, sentence in (
        (less, {}, r"it lacks out\.0\.bias, out\.0\.weight, out\.2\.bias and 1 more$"),
        (more, {}, r"it has low\.weight$"),
        (wide, {}, r"out\.2\.weight is \(6, 16, 3, 3\).*, expected \(2, 16, 3, 3\)"),
        (state, {"num_res_blocks": 2}, r"it lacks input_blocks\.\d.* more$"),
        (state, {"model_channels": 32}, r"is \(.*\), which gives \(.*\), expected \("),
        (theirs, {}, "its names are of diffusers' layout: use load_diffusers"),
        (tf, {}, "TensorFlow layout: use load_ddpm_tf"),
        (engine.UNet(**options).state_dict(), {}, "of this engine's own layout: use load"),
        (state, {"width": 3}, "these are no options of a UNet"),
        (state, {"image_size": 7}, "cannot be halved"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_openai(weights, {**options, **changes}, "h3d")


# --- the original DDPM --------------------------------------------------------------------------

DDPM = dict(
    image_size=8,
    in_channels=2,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_groups=4,
    norm_eps=1e-6,
    embedding="sin_cos",
    asymmetric_padding=True,
)


def ddpm_forward(w, x, t):
    """DDPM's network of the options above over TensorFlow's variables, with its layouts."""

    def dense(name, h):  # NIN too: channels last, W (in, out)
        return torch.einsum("...i,io->...o", h, w[f"{name}/W"]) + w[f"{name}/b"]

    def conv(name, h, stride=1):  # (N, H, W, C), W HWIO, "SAME"
        size, k = h.shape[1], w[f"{name}/W"].shape[0]
        pad = max((math.ceil(size / stride) - 1) * stride + k - size, 0)
        h = F.pad(h, (0, 0, pad // 2, pad - pad // 2, pad // 2, pad - pad // 2))
        patches = h.unfold(1, k, stride).unfold(2, k, stride)  # (N, H, W, C, kh, kw)
        return torch.einsum("nhwcij,ijco->nhwo", patches, w[f"{name}/W"]) + w[f"{name}/b"]

    def norm(name, h):
        n, height, width, c = h.shape
        g = h.reshape(n, height, width, 4, c // 4)
        mean = g.mean((1, 2, 4), keepdim=True)
        var = g.var((1, 2, 4), keepdim=True, correction=0)
        g = ((g - mean) / (var + 1e-6).sqrt()).reshape(h.shape)
        return g * w[f"{name}/gamma"] + w[f"{name}/beta"]

    def res(name, h):
        x = h
        h = conv(f"{name}/conv1", F.silu(norm(f"{name}/norm1", h)))
        h = h + dense(f"{name}/temb_proj", F.silu(temb))[:, None, None]
        h = conv(f"{name}/conv2", F.silu(norm(f"{name}/norm2", h)))
        return h + (dense(f"{name}/nin_shortcut", x) if f"{name}/nin_shortcut/W" in w else x)

    def attention(name, h):
        n, height, width, c = h.shape
        q, k, v = (dense(f"{name}/{part}", norm(f"{name}/norm", h)) for part in "qkv")
        score = torch.einsum("bhwc,bHWc->bhwHW", q, k) * c**-0.5
        score = score.flatten(3).softmax(-1).reshape(score.shape)
        out = torch.einsum("bhwHW,bHWc->bhwc", score, v)
        return h + dense(f"{name}/proj_out", out)

    half = 8
    rate = torch.exp(-math.log(10000) * torch.arange(half, dtype=x.dtype) / (half - 1))
    angle = t.to(x.dtype)[:, None] * rate
    temb = dense("model/temb/dense0", torch.cat([angle.sin(), angle.cos()], 1))
    temb = dense("model/temb/dense1", F.silu(temb))
    h = conv("model/conv_in", x.permute(0, 2, 3, 1))
    skips = [h]
    skips.append(res("model/down_0/block_0", h))
    skips.append(conv("model/down_0/downsample/conv", skips[-1], 2))
    h = attention("model/down_1/attn_0", res("model/down_1/block_0", skips[-1]))
    skips.append(h)
    h = attention("model/mid/attn_1", res("model/mid/block_1", h))
    h = res("model/mid/block_2", h)
    for i in range(2):
        h = res(f"model/up_1/block_{i}", torch.cat([h, skips.pop()], -1))
        h = attention(f"model/up_1/attn_{i}", h)
    h = h.repeat_interleave(2, 1).repeat_interleave(2, 2)
    h = conv("model/up_1/upsample/conv", h)
    for i in range(2):
        h = res(f"model/up_0/block_{i}", torch.cat([h, skips.pop()], -1))
    return conv("model/conv_out", F.silu(norm("model/norm_out", h))).permute(0, 3, 1, 2)


def ddpm_variables():
    g = torch.Generator().manual_seed(6)
    w = {}

    def put(name, *shape):
        w[f"{name}/W"] = torch.randn(shape, generator=g) / math.prod(shape[:-1]) ** 0.5
        w[f"{name}/b"] = 0.3 * torch.randn(shape[-1], generator=g)

    def norm(name, c):
        w[f"{name}/gamma"] = 1 + 0.3 * torch.randn(c, generator=g)
        w[f"{name}/beta"] = 0.3 * torch.randn(c, generator=g)

    def res(name, c_in, c_out):
        norm(f"{name}/norm1", c_in)
        put(f"{name}/conv1", 3, 3, c_in, c_out)
        put(f"{name}/temb_proj", 64, c_out)
        norm(f"{name}/norm2", c_out)
        put(f"{name}/conv2", 3, 3, c_out, c_out)
        if c_in != c_out:
            put(f"{name}/nin_shortcut", c_in, c_out)

    def attention(name):
        norm(f"{name}/norm", 32)
        for part in ("q", "k", "v", "proj_out"):
            put(f"{name}/{part}", 32, 32)

    put("model/temb/dense0", 16, 64)
    put("model/temb/dense1", 64, 64)
    put("model/conv_in", 3, 3, 2, 16)
    res("model/down_0/block_0", 16, 16)
    put("model/down_0/downsample/conv", 3, 3, 16, 16)
    res("model/down_1/block_0", 16, 32)
    for name in ("down_1/attn_0", "mid/attn_1", "up_1/attn_0", "up_1/attn_1"):
        attention(f"model/{name}")
    res("model/mid/block_1", 32, 32)
    res("model/mid/block_2", 32, 32)
    res("model/up_1/block_0", 64, 32)
    res("model/up_1/block_1", 48, 32)
    put("model/up_1/upsample/conv", 3, 3, 32, 32)
    res("model/up_0/block_0", 48, 16)
    res("model/up_0/block_1", 32, 16)
    norm("model/norm_out", 16)
    put("model/conv_out", 3, 3, 16, 2)
    return w


def test_ddpm_variables_compute_the_same(tmp_path):
    w = ddpm_variables()
    np.savez(tmp_path / "ddpm.npz", **{k: v.numpy() for k, v in w.items()})
    model = load_ddpm_tf(tmp_path / "ddpm.npz", DDPM)
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([7, 931])
    truth = ddpm_forward({k: v.double() for k, v in w.items()}, x.double(), t)
    plain = ddpm_forward(w, x, t)
    assert_within_budget(model(x, t), truth, plain, factor=FORWARD)


def test_ddpm_moving_averages_are_taken_where_there_are_any():
    w = ddpm_variables()
    both = {**w, **{f"{k}/ExponentialMovingAverage": v + 1 for k, v in w.items()}}
    found, want = (load_ddpm_tf(each, DDPM) for each in (both, {k: v + 1 for k, v in w.items()}))
    for key, value in want.state_dict().items():
        assert torch.equal(found.state_dict()[key], value)


def test_ddpm_layouts_that_do_not_fit():
    w = ddpm_variables()
    torch_layout = copy.copy(w)
    torch_layout["model/conv_in/W"] = w["model/conv_in/W"].permute(3, 2, 0, 1)
    for weights, changes, sentence in (
        (torch_layout, {}, r"model/conv_in/W is \(16, 2, 3, 3\)"),
        (w, {"num_heads": 2}, "attention of several heads"),
        (w, {"resample": "biggan"}, "it lacks model/down_0/downsample/"),
        (w, {"num_classes": 3}, "load_ddpm_tf has no names for this model's label_embed.weight"),
        ({"input_blocks.0.0.weight": w["model/conv_in/W"]}, {}, "OpenAI's layout: use load_openai"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            load_ddpm_tf(weights, {**DDPM, **changes})


def test_the_presets_of_ddpm_fit_its_layout():
    """Names for each of cifar10's 328 and ddpm-256's tensors, q, k and v apart."""
    for name in ("cifar10", "ddpm-256"):
        with torch.device("meta"):
            model = engine.UNet.from_preset(name)
        from engine import layouts

        pairs = layouts.table(model, layouts.ddpm_tf(model), layouts.DDPM_TF, "/")
        names = [each for theirs in pairs.values() for each in theirs]
        assert pairs.keys() == model.state_dict().keys() and len(names) == len(set(names))
        assert name != "cifar10" or len(names) == 328
