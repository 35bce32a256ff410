"""Small U-Nets with every option, for the tests."""

import torch

SMALL = dict(
    image_size=8,
    in_channels=2,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_groups=4,
)
OPTIONS = {
    "plain": {},
    "ddpm": dict(embedding="sin_cos", asymmetric_padding=True, norm_eps=1e-6),
    "adm": dict(conditioning="scale_shift", resample="biggan", head_channels=8),
    "classes": dict(num_classes=5, conditioning="scale_shift"),
    "null label": dict(num_classes=5, label_dropout=0.5),
    "learned variance": dict(out_channels=4),
    "three levels": dict(channel_mult=(1, 1, 2), num_heads=2, attention_resolutions=(2, 4)),
}


def alive(model: torch.nn.Module) -> torch.nn.Module:
    """Random values in place of the zero-initialised weights, so that every branch is seen."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return model


def inputs(model, n=2):
    g = torch.Generator().manual_seed(2)
    size, channels = model.config["image_size"], model.config["in_channels"]
    x = torch.randn(n, channels, size, size, generator=g)
    y = torch.tensor([1, 3])[:n] if model.config["num_classes"] else None
    return x, torch.tensor([3, 900])[:n], y
