"""A device that is not there is answered by one sentence, whoever asks for it."""

import pytest
import torch

import engine
from engine import checkpoint, schedules
from engine.device import choose_device, usable_device

PLACES = {  # what torch says of itself, and what we say of cuda:1
    "no build": (
        None,
        0,
        "cuda:1: this torch .* is built without CUDA: use cpu, or install a CUDA",
    ),
    "no GPU": ("13.0", 0, "cuda:1: torch finds no GPU: use cpu, or see with nvidia-smi"),
    "one GPU": ("13.0", 1, None),
}


@pytest.mark.parametrize("place", PLACES)
def test_cuda_that_is_not_there(place, monkeypatch):
    build, count, sentence = PLACES[place]
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if sentence is None:
        assert choose_device("cuda") == torch.device("cuda")
        sentence = r"cuda:1: torch finds 1 GPU\(s\), the last is cuda:0"
    for choose in (choose_device, usable_device):
        for name in ("cuda:1", torch.device("cuda:1")):
            with pytest.raises(ValueError, match=sentence):
                choose(name)


def test_other_names():
    assert choose_device("cpu") == usable_device("cpu") == torch.device("cpu")
    for name in ("toaster", "cuda:x", "", 3.5):
        with pytest.raises(ValueError, match="is no device: give cpu, cuda or cuda:1"):
            choose_device(name)
    with pytest.raises(ValueError, match="device meta is not supported: give cpu or cuda"):
        choose_device("meta")
    assert usable_device("meta") == torch.device("meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is needed")
def test_load_and_sample_say_so(tmp_path):
    model = engine.UNet(
        image_size=8, in_channels=1, model_channels=8, channel_mult=(1,), num_groups=4
    )
    weights = model.state_dict()
    tensors = {f"{part}.{k}": v.clone() for part in ("model", "ema") for k, v in weights.items()}
    tensors["diffusion.betas"] = schedules.betas("cosine", 10)
    options = {"prediction": "v", "variance": "small", "loss": "l2"}
    info = {"model": model.config, "diffusion": options, "train": {}, "step": 0, "skipped": 0}
    checkpoint.save(tmp_path / checkpoint.FILE, tensors, info)
    with pytest.raises(ValueError, match=r"device cuda: .*use cpu"):
        engine.load(tmp_path, device="cuda")
    model, diffusion, _ = engine.load(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"device cuda: .*use cpu"):
        engine.sample(model, diffusion, (1, 1, 8, 8), device="cuda")
