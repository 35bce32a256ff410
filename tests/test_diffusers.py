"""diffusers' UNet2DModel: its folders load and compute the same here, and ours there."""

import json
import math

import pytest
import torch
from budget import FORWARD, GRADIENT, assert_within_budget

import engine
from engine import diffusers_config
from engine.checkpoint import CheckpointError, load_diffusers, save_diffusers

diffusers = pytest.importorskip("diffusers")

BASE = dict(
    sample_size=8,
    in_channels=2,
    out_channels=2,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
ADM = dict(
    resnet_time_scale_shift="scale_shift",
    attn_norm_num_groups=4,
    downsample_type="resnet",
    upsample_type="resnet",
    attention_head_dim=8,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
)
CONFIGS = {
    "ddpm": dict(
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        downsample_padding=0,
        attention_head_dim=None,
        layers_per_block=2,
    ),
    "defaults": {},
    "attention everywhere": dict(
        down_block_types=("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3,
        block_out_channels=(16, 24, 40),
    ),
    "adm": ADM,
    "adm, classes, learned variance": dict(ADM, num_class_embeds=3, out_channels=4),
    "no attention but the middle's": dict(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    ),
    "one level": dict(
        block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    ),
}


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """No parameter at its initial 0 or 1, so that each one matters."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() == 1 else 0.05))
    return model.eval()


def theirs(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return random_weights(diffusers.UNet2DModel(**{**BASE, **CONFIGS[name]}))


def inputs(config, n=2):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(n, config["in_channels"], 8, 8, generator=g)
    y = torch.tensor([0, 2]) if config["num_class_embeds"] else None
    return x, torch.tensor([7, 931]), y


class Sinusoids(torch.nn.Module):
    """The library's time embedding in float64: there it is computed in float32 always."""

    def __init__(self, config):
        super().__init__()
        self.flip, half = config.flip_sin_to_cos, config.block_out_channels[0] // 2
        index = torch.arange(half, dtype=torch.float64)
        self.rate = torch.exp(-math.log(1e4) * index / (half - config.freq_shift))

    def forward(self, t):
        angle = t.double()[:, None] * self.rate
        parts = (angle.cos(), angle.sin()) if self.flip else (angle.sin(), angle.cos())
        return torch.cat(parts, 1)


def in_float64(model):
    exact = diffusers.UNet2DModel(**model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    exact.time_proj = Sinusoids(model.config)
    return exact


def compare(reference, ours):
    """Output and the gradients of input and weights, within the budget of float32."""
    exact = in_float64(reference)
    x, t, y = inputs(reference.config)
    g = torch.Generator().manual_seed(3)
    cotangent = torch.randn(2, reference.config.out_channels, 8, 8, generator=g)

    def run(model, dtype):
        image = x.clone().to(dtype).requires_grad_()
        out = model(image, t, y)
        out = getattr(out, "sample", out)
        (out * cotangent).sum().backward()
        return {
            "output": out.detach(),
            "dx": image.grad,
            "dconv_in": model.conv_in.weight.grad,
        }

    plain, truth, got = run(reference, torch.float32), run(exact, torch.float64), run(ours, x.dtype)
    for what, factor in (("output", FORWARD), ("dx", GRADIENT), ("dconv_in", GRADIENT)):
        assert_within_budget(got[what], truth[what], plain[what], factor=factor, what=what)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_the_library_computes_the_same_here(name):
    reference = theirs(name)
    ours = load_diffusers(reference)
    assert not ours.training and ours.conv_in.weight.requires_grad
    compare(reference, ours)


@pytest.mark.parametrize("name", ["ddpm", "adm, classes, learned variance"])
def test_a_folder_of_the_library_loads_and_a_folder_of_ours_loads_there(name, tmp_path):
    reference = theirs(name)
    reference.save_pretrained(tmp_path / "pipeline" / "unet")
    ours = load_diffusers(tmp_path / "pipeline")
    compare(reference, ours)

    save_diffusers(ours, tmp_path / "back")
    back = diffusers.UNet2DModel.from_pretrained(tmp_path / "back")
    saved, found = (json.loads(m.to_json_string()) for m in (reference, back))
    assert [k for k in saved if k[0] != "_" and found[k] != saved[k]] == []
    assert back.state_dict().keys() == reference.state_dict().keys()
    for key, value in reference.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


@pytest.mark.parametrize(
    "options",
    [
        dict(embedding="sin_cos", asymmetric_padding=True, norm_eps=1e-6),
        dict(conditioning="scale_shift", resample="biggan", head_channels=8, num_classes=3),
        dict(num_heads=4, attention_resolutions=(4,), out_channels=2, dropout=0.1),
        dict(num_classes=2, label_dropout=0.1, channel_mult=(1, 1.5)),
    ],
)
def test_our_model_computes_the_same_there(options, tmp_path):
    small = dict(image_size=8, in_channels=2, model_channels=16, channel_mult=(1, 2))
    small |= dict(num_res_blocks=1, num_groups=4, attention_resolutions=(4,))
    ours = random_weights(engine.UNet(**{**small, **options}))
    save_diffusers(ours, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    there = diffusers.UNet2DModel.from_pretrained(tmp_path)
    compare(there, ours)
    again = load_diffusers(tmp_path)
    for key, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_weights_of_old_files_have_other_names():
    reference = theirs("ddpm")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for key, value in reference.state_dict().items():
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        weights[key] = value
    assert weights.keys() != reference.state_dict().keys()
    reference.state_dict = lambda: weights
    ours, plain = load_diffusers(reference), load_diffusers(theirs("ddpm"))
    for key, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(act_fn="gelu"), "act_fn is 'gelu'; this U-Net has 'silu' or 'swish' only"),
        (dict(center_input_sample=True), "center_input_sample is True"),
        (dict(freq_shift=1), "flip_sin_to_cos is True with freq_shift 1"),
        (dict(time_embedding_type="fourier"), "time_embedding_type is 'fourier'"),
        (dict(time_embedding_dim=32), "time_embedding_dim is 32"),
        (dict(ADM, attn_norm_num_groups=None), "the attention in the middle has no norm"),
        (dict(attn_norm_num_groups=8), "groups of its own"),
        (dict(ADM, upsample_type="conv"), "one way for all"),
        (dict(ADM, down_block_types=("DownBlock2D", "AttnDownBlock2D")), "one way for all"),
        (dict(up_block_types=("UpBlock2D", "UpBlock2D")), "the same levels on both ways"),
        (dict(down_block_types=("SkipDownBlock2D", "AttnDownBlock2D")), "SkipDownBlock2D is none"),
        (dict(attention_head_dim=5), "heads of head_channels=5"),
        (dict(later=1), "later is no option that is known here"),
        (dict(_class_name="UNet1DModel"), "_class_name is 'UNet1DModel'"),
    ],
)
def test_what_this_unet_does_not_have_is_named(change, sentence, tmp_path):
    theirs("defaults").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=sentence):
        load_diffusers(tmp_path)


@pytest.mark.parametrize(
    "preset, sentence",
    [
        ("adm-128", "num_heads=4 gives heads of 128, 192, 256 channels; UNet2DModel has one"),
        ("iddpm-cifar10", None),  # every level that attends is as wide
        ("iddpm-imagenet64", "num_heads=4 gives heads of 96, 128"),
        ("adm-512", "the first level has 128 channels and the time embedding model_channels=256"),
    ],
)
def test_what_the_library_does_not_have_is_named(preset, sentence, tmp_path):
    with torch.device("meta"):
        model = engine.UNet.from_preset(preset)
    if sentence is None:
        return diffusers_config.to_diffusers(model.config)
    with pytest.raises(CheckpointError, match=sentence):
        save_diffusers(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_damaged_folder_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json: give the folder of a UNet2D"):
        load_diffusers(tmp_path)
    theirs("defaults").save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        load_diffusers(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no diffusion_pytorch_model\.safetensors"):
        load_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no JSON"):
        load_diffusers(tmp_path)
    with pytest.raises(CheckpointError, match="has no config: give diffusers' UNet2DModel"):
        load_diffusers(torch.nn.Linear(2, 2))


def test_published_ddpm_config_is_the_preset():
    """What diffusers' google/ddpm-cifar10-32 says, as options, is our preset's architecture."""
    config = dict(
        _class_name="UNet2DModel",
        act_fn="silu",
        attention_head_dim=None,
        block_out_channels=[128, 256, 256, 256],
        center_input_sample=False,
        down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        downsample_padding=0,
        dropout=0.0,
        flip_sin_to_cos=False,
        freq_shift=1,
        in_channels=3,
        layers_per_block=2,
        mid_block_scale_factor=1,
        norm_eps=1e-06,
        norm_num_groups=32,
        out_channels=3,
        sample_size=32,
        time_embedding_type="positional",
        up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    )
    options = diffusers_config.from_diffusers(config)
    with torch.device("meta"):
        found, preset = engine.UNet(**options).config, engine.UNet.from_preset("cifar10").config
    assert {k for k in found if found[k] != preset[k]} == {"dropout", "out_channels"}


def test_a_null_label_comes_back(tmp_path):
    options = dict(image_size=8, in_channels=1, model_channels=8, num_groups=2, channel_mult=(1, 2))
    model = engine.UNet(**options, num_classes=3, label_dropout=0.1).eval()
    save_diffusers(model, tmp_path)
    again = load_diffusers(tmp_path)
    assert again.null_label == 3 and again.config["label_dropout"] == 0.1
    assert diffusers.UNet2DModel.from_pretrained(tmp_path).config.num_class_embeds == 4
