"""python -m engine.verify: what it reads, what it prints, and how it ends."""

import importlib
import json

import pytest
import torch
from test_verify import channels_last, wrong_gradient

import engine
from engine import cli


def main(*args: str) -> int:
    return cli.main(importlib.import_module("engine.verify").command, args)


@pytest.fixture
def accelerate(monkeypatch):
    """→ a function that sets engine.accelerate."""
    calls = []

    def put(stand_in):
        def accelerate(model, inner, channels_last):
            calls.append((inner, channels_last))
            return stand_in(model)

        monkeypatch.setattr(engine, "accelerate", accelerate, raising=False)
        return calls

    return put


def test_command_with_a_function(accelerate, capsys, monkeypatch, tmp_path):
    (tmp_path / "my_models.py").write_text(
        "import torch, test_verify\n"
        "def build():\n    return test_verify.net(), *test_verify.inputs(), {'scale': 2.0}\n"
        "def nothing():\n    return 3\n"
        "def takes(size, *, depth=2, **more):\n    return build()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    calls = accelerate(channels_last)
    assert main("my_models:build", "--repeats", "1", "--inner", "inductor") == 0
    assert calls == [("inductor", True)]
    said = capsys.readouterr()
    assert said.out.startswith("Net on cpu, float32") and said.out.endswith("ok\n")
    accelerate(wrong_gradient("v.weight", 1.01))
    assert main("my_models:build", "--repeats", "1") == 1
    said = capsys.readouterr()
    assert "gradient of v.weight" in said.out and said.err.count("\n") == 1
    assert main("my_models:build", "--repeats", "1", "--no-gradients") == 0
    capsys.readouterr()
    bad = {
        ("my_models:nothing",): "returned int, expected a tuple",
        ("my_models:takes",): "is called without arguments, but needs size",
        ("my_models:missing",): "my_models has no function missing",
        ("my_models:build", "--batch", "3"): "--batch goes with a folder",
        ("no_such_module:build",): "there is no module no_such_module, here or on",
        ("no-folder",): "no-folder is no folder",
        ("my_models:build", "--repeats", "0"): "--repeats must be at least 1",
    }
    for args, sentence in bad.items():
        assert main(*args) == 2
        said = capsys.readouterr()
        assert sentence in said.err and said.err.count("\n") == 1 and not said.out


def test_command_with_a_folder(accelerate, capsys, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    small = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    attention = dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    crossed = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    models = {
        "unet2d": diffusers.UNet2DModel(**small, **attention, num_class_embeds=3),
        "condition": diffusers.UNet2DConditionModel(**small, **crossed),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
    }
    accelerate(channels_last)
    models["unet2d"].save_pretrained(tmp_path / "unet2d")
    assert main(str(tmp_path / "unet2d"), "--size", "7") == 2
    assert "--size 7 is not a multiple of 2, which this U-Net needs" in capsys.readouterr().err
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        options = ("--size", "16") if name == "vae" else ("--batch", "1")
        options += ("--precision", "bf16") if name == "condition" else ()
        folder = str(tmp_path / name)
        assert main(folder, "--repeats", "1", "--device", "cpu", *options) == 0
        said = capsys.readouterr()
        assert "low cpu memory" not in said.err
        said = said.out
        assert f"{type(model).__name__} on cpu, " in said and said.endswith("ok\n")
        assert ("bfloat16" in said) == (name == "condition")
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae").rename(tmp_path / "unet")
    assert main(str(tmp_path), "--repeats", "1", "--no-gradients", "--size", "8") == 0
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "DiT"}))
    assert main(str(tmp_path)) == 2
    assert "is a DiT, whose inputs are not known" in capsys.readouterr().err
    assert main(str(tmp_path / "condition" / "..")) == 2
