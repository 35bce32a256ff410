"""Named U-Nets and classifiers: options of `UNet` and `Classifier`, counts as published.

"iddpm" and "adm" learn the variance: twice as many channels out as in. A preset's options can be
overridden one by one: UNet.from_preset("adm-256", num_classes=None).
"""

_DDPM = dict(
    in_channels=3,
    model_channels=128,
    num_res_blocks=2,
    attention_resolutions=(16,),
    norm_eps=1e-6,
    embedding="sin_cos",
    asymmetric_padding=True,
)
_IDDPM = dict(
    in_channels=3,
    out_channels=6,
    model_channels=128,
    num_res_blocks=3,
    attention_resolutions=(16, 8),
    num_heads=4,
    conditioning="scale_shift",
)
_ADM = dict(
    in_channels=3,
    out_channels=6,
    model_channels=256,
    num_res_blocks=2,
    attention_resolutions=(32, 16, 8),
    head_channels=64,
    conditioning="scale_shift",
    resample="biggan",
    num_classes=1000,
)

PRESETS = {
    # 28×28 grey, 1.06 M parameters: small enough to train on two CPU cores in minutes.
    "fashion-mnist": dict(
        image_size=28,
        in_channels=1,
        model_channels=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        head_channels=32,
        num_groups=8,
    ),
    # Ho et al. 2020, app. B: 35,746,307 parameters, and 113,673,219 (LSUN, CelebA-HQ).
    "cifar10": dict(**_DDPM, image_size=32, channel_mult=(1, 2, 2, 2), dropout=0.1),
    "ddpm-256": dict(**_DDPM, image_size=256, channel_mult=(1, 1, 2, 2, 4, 4)),
    # 64×64 RGB folders such as Stanford Cars: ADM's parts at half of its width and two thirds of
    # its depth, 56,467,971 parameters.
    "images-64": dict(
        image_size=64,
        in_channels=3,
        model_channels=96,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=2,
        attention_resolutions=(16, 8),
        head_channels=32,
        dropout=0.1,
        conditioning="scale_shift",
        resample="biggan",
    ),
    # Nichol & Dhariwal 2021: 52,546,438; 121,063,942; 273,049,350 parameters.
    "iddpm-cifar10": dict(**_IDDPM, image_size=32, channel_mult=(1, 2, 2, 2), dropout=0.3),
    "iddpm-imagenet64": dict(**_IDDPM, image_size=64, channel_mult=(1, 2, 3, 4)),
    "iddpm-imagenet64-cond": dict(
        **{**_IDDPM, "model_channels": 192},
        image_size=64,
        channel_mult=(1, 2, 3, 4),
        num_classes=1000,
    ),
    # Dhariwal & Nichol 2021: 295,904,454; 421,529,606; 553,838,086; 552,814,086; 558,997,638.
    "adm-64": dict(
        **{**_ADM, "model_channels": 192, "num_res_blocks": 3},
        image_size=64,
        channel_mult=(1, 2, 3, 4),
        dropout=0.1,
    ),
    "adm-128": dict(
        **{**_ADM, "head_channels": None},
        num_heads=4,
        image_size=128,
        channel_mult=(1, 1, 2, 3, 4),
    ),
    "adm-256": dict(**_ADM, image_size=256, channel_mult=(1, 1, 2, 2, 4, 4)),
    "adm-256-uncond": dict(
        **{**_ADM, "num_classes": None}, image_size=256, channel_mult=(1, 1, 2, 2, 4, 4)
    ),
    "adm-512": dict(**_ADM, image_size=512, channel_mult=(0.5, 1, 1, 2, 2, 4, 4)),
}

# How the published checkpoints order the channels of qkv (ops.attention_qkv): all of OpenAI's have
# q, k, v of each head together, only ADM's at 64×64 has all of q first.
QKV_ORDER = {name: "h3d" for name in PRESETS if name.startswith(("iddpm", "adm"))}
QKV_ORDER["adm-64"] = "3hd"

_ADM_CLASSIFIER = dict(
    in_channels=3,
    num_classes=1000,
    model_channels=128,
    num_res_blocks=2,
    attention_resolutions=(32, 16, 8),
    head_channels=64,
)

# Options of `Classifier`; "adm" are the encoders that guide the models of the same name.
CLASSIFIERS = {
    "fashion-mnist": dict(
        image_size=28,
        in_channels=1,
        num_classes=10,
        model_channels=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        head_channels=32,
        num_groups=8,
    ),
    "adm-64": dict(
        **{**_ADM_CLASSIFIER, "num_res_blocks": 4}, image_size=64, channel_mult=(1, 2, 3, 4)
    ),
    "adm-128": dict(**_ADM_CLASSIFIER, image_size=128, channel_mult=(1, 1, 2, 3, 4)),
    "adm-256": dict(**_ADM_CLASSIFIER, image_size=256, channel_mult=(1, 1, 2, 2, 4, 4)),
    "adm-512": dict(**_ADM_CLASSIFIER, image_size=512, channel_mult=(0.5, 1, 1, 2, 2, 4, 4)),
}
