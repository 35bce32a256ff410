"""The U-Net of DDPM (Ho et al. 2020, app. B) and ADM (Dhariwal & Nichol 2021), top to bottom.

    x ─ conv_in ─ down[0] ─ down[1] ─ … ─ mid ─ … ─ up[1] ─ up[0] ─ norm_out ─ conv_out ─ out
                     └─────────┴── skip connections ──┴────────┘
    t ─ time_embed ─► every ResBlock

Images are (N, C, H, W) in channels_last memory throughout; norms and attention are our ops.
"""

import math
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops

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
    # Ho et al. 2020, app. B: 35,746,307 parameters at 3 channels.
    "cifar10": dict(
        image_size=32,
        in_channels=3,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        dropout=0.1,
        norm_eps=1e-6,
        embedding="sin_cos",
        asymmetric_padding=True,
    ),
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
}


class UNet(nn.Module):
    """ε_θ(x_t, t, y): (N, in_channels, H, W), (N,) → (N, out_channels, H, W).

    image_size             H = W that attention_resolutions refer to; other sizes run too
    channel_mult           width of each level in units of model_channels
    attention_resolutions  levels, named by their H = image_size / 2^i, that have self-attention
                           after each ResBlock
    head_channels          channels per head; None: num_heads heads whatever the width
    conditioning           "add": h + W·temb before the second norm (DDPM); "scale_shift": AdaGN
    resample               "conv": strided, and nearest + conv (DDPM); "biggan": in ResBlocks (ADM)
    num_classes            a learned embedding per class is added to temb; None: unconditional
    embedding              order of the sinusoids: "cos_sin" (ADM) or "sin_cos" (DDPM)
    asymmetric_padding     strided convolutions pad right and below only (DDPM)

    Raises ValueError for options that do not fit each other, and for inputs that do not fit.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        out_channels: int | None = None,
        model_channels: int = 64,
        channel_mult: tuple[float, ...] = (1, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (),
        num_heads: int = 1,
        head_channels: int | None = None,
        num_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        conditioning: str = "add",
        resample: str = "conv",
        num_classes: int | None = None,
        embedding: str = "cos_sin",
        asymmetric_padding: bool = False,
    ) -> None:
        self_arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = {k: list(v) if isinstance(v, tuple) else v for k, v in self_arguments.items()}
        widths = self._check()
        temb_channels = 4 * model_channels
        self.time_embed = TimeEmbedding(model_channels, temb_channels, embedding)
        self.label_embed = nn.Embedding(num_classes, temb_channels) if num_classes else None

        def res_block(c_in: int, c_out: int, sampling: str = "") -> ResBlock:
            return ResBlock(
                c_in, c_out, temb_channels, num_groups, norm_eps, dropout, conditioning, sampling
            )

        def attention(channels: int, resolution: int) -> nn.Module:
            if resolution not in attention_resolutions:
                return nn.Identity()
            heads = channels // head_channels if head_channels else num_heads
            return AttentionBlock(channels, heads, num_groups, norm_eps)

        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        skips, channels, resolution = [widths[0]], widths[0], image_size
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            blocks, attentions, downsample = nn.ModuleList(), nn.ModuleList(), None
            for _ in range(num_res_blocks):
                blocks.append(res_block(channels, width))
                attentions.append(attention(width, resolution))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                if resample == "biggan":
                    downsample = res_block(channels, channels, "down")
                else:
                    downsample = Downsample(channels, asymmetric_padding)
                skips.append(channels)
                resolution //= 2
            self.down.append(Level(blocks, attentions, downsample))

        self.mid_block_1 = res_block(channels, channels)
        heads = channels // head_channels if head_channels else num_heads
        self.mid_attention = AttentionBlock(channels, heads, num_groups, norm_eps)
        self.mid_block_2 = res_block(channels, channels)

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            blocks, attentions, upsample = nn.ModuleList(), nn.ModuleList(), None
            for _ in range(num_res_blocks + 1):
                blocks.append(res_block(channels + skips.pop(), width))
                attentions.append(attention(width, resolution))
                channels = width
            if level > 0:
                if resample == "biggan":
                    upsample = res_block(channels, channels, "up")
                else:
                    upsample = Upsample(channels)
                resolution *= 2
            self.up.append(Level(blocks, attentions, upsample))

        self.norm_out = GroupNormSiLU(num_groups, channels, norm_eps)
        self.conv_out = zero(nn.Conv2d(channels, out_channels or in_channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "UNet":
        """The named architecture of PRESETS; overrides replace single options."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        try:
            return cls(**{**PRESETS[name], **overrides})
        except TypeError as error:
            raise ValueError(f"preset {name!r}: {error}") from None

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self._check_input(x, t, y)
        temb = self.time_embed(t, self.conv_in.weight.dtype)
        if y is not None:
            temb = temb + self.label_embed(y)
        temb = F.silu(temb)  # once, for all blocks

        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for level in self.down:
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = attention(block(h, temb))
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h, temb)
                skips.append(h)

        h = self.mid_block_2(self.mid_attention(self.mid_block_1(h, temb)), temb)

        for level in self.up:
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = attention(block(torch.cat([h, skips.pop()], dim=1), temb))
            if level.resample is not None:
                h = level.resample(h, temb)
        return self.conv_out(self.norm_out(h))

    def _check(self) -> list[int]:
        """The channels of each level. Raises ValueError, one sentence, for what does not fit."""
        c = self.config
        for name, choices in (
            ("conditioning", ("add", "scale_shift")),
            ("resample", ("conv", "biggan")),
            ("embedding", ("cos_sin", "sin_cos")),
        ):
            if c[name] not in choices:
                raise ValueError(f"{name} is {c[name]!r}, expected one of {', '.join(choices)}")
        counts = ("image_size", "in_channels", "model_channels", "num_res_blocks", "num_groups")
        optional = ("out_channels", "num_heads", "head_channels", "num_classes")
        for name in (*counts, *(name for name in optional if c[name] is not None)):
            if not isinstance(c[name], Integral) or isinstance(c[name], bool) or c[name] < 1:
                raise ValueError(f"{name} is {c[name]!r}, expected a whole number, at least 1")
            c[name] = int(c[name])  # JSON knows no NumPy
        for name in ("channel_mult", "attention_resolutions"):
            if not isinstance(c[name], list):
                raise ValueError(f"{name} is {c[name]!r}, expected a tuple, one number per level")
        if c["model_channels"] % 2 or c["model_channels"] < 4:  # as many sines as cosines
            raise ValueError(
                f"model_channels is {c['model_channels']}, expected an even number > 2"
            )
        if not c["channel_mult"]:
            raise ValueError("channel_mult is empty, expected one number per level")
        widths = [int(mult * c["model_channels"]) for mult in c["channel_mult"]]
        size, factor = c["image_size"], 2 ** (len(widths) - 1)
        if size % factor:
            raise ValueError(
                f"image_size {size} cannot be halved {len(widths) - 1} times: "
                f"use a multiple of {factor}, or fewer levels in channel_mult"
            )
        levels = [size // 2**level for level in range(len(widths))]
        for resolution in c["attention_resolutions"]:
            if resolution not in levels:
                raise ValueError(
                    f"attention_resolutions names {resolution!r}, but image_size {size} gives the "
                    f"levels {', '.join(map(str, levels))}: name some of these, or choose an "
                    f"image_size of {resolution!r} times a power of two"
                )
        for level, width in zip(levels, widths, strict=True):
            if width < 1 or width % c["num_groups"]:
                raise ValueError(
                    f"a level of {width} channels cannot be split into num_groups={c['num_groups']}"
                    ": choose another model_channels or num_groups"
                )
            attends = level in c["attention_resolutions"] or level == levels[-1]
            heads_of = c["head_channels"] or c["num_heads"]
            if attends and width % heads_of:
                split = "of head_channels" if c["head_channels"] else "for num_heads"
                raise ValueError(
                    f"attention over {width} channels cannot be split into heads {split}="
                    f"{heads_of}: choose another model_channels"
                )
        return widths

    def _check_input(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        c = self.config
        factor = 2 ** (len(c["channel_mult"]) - 1)
        if (
            x.dim() != 4
            or x.shape[1] != c["in_channels"]
            or x.shape[2] % factor
            or x.shape[3] % factor
        ):
            raise ValueError(
                f"x is {tuple(x.shape)}, expected (N, {c['in_channels']}, H, W) "
                f"with H and W multiples of {factor}"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(f"t is {tuple(t.shape)}, expected ({x.shape[0]},): one step per image")
        if (y is None) != (self.label_embed is None):
            need = "needs y, class labels (N,)" if y is None else "is unconditional and takes no y"
            raise ValueError(f"this model {need}")
        if y is not None and (y.shape != t.shape or y.dtype not in (torch.int64, torch.int32)):
            raise ValueError(
                f"y is {tuple(y.shape)} {y.dtype}, expected ({x.shape[0]},) int64: one per image"
            )


class Level(nn.Module):
    """What belongs to one resolution; UNet.forward says how it is used."""

    def __init__(self, blocks: nn.ModuleList, attentions: nn.ModuleList, resample) -> None:
        super().__init__()
        self.blocks, self.attentions, self.resample = blocks, attentions, resample


class TimeEmbedding(nn.Module):
    """temb = W₂ silu(W₁ sinusoids(t)); sinusoids as in Vaswani et al. 2017, §3.5."""

    def __init__(self, channels: int, temb_channels: int, order: str) -> None:
        super().__init__()
        self.channels, self.order = channels, order
        self.dense_0 = nn.Linear(channels, temb_channels)
        self.dense_1 = nn.Linear(temb_channels, temb_channels)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.channels // 2
        # DDPM's frequencies end exactly at 1/10000, ADM's one step before it.
        last = half - 1 if self.order == "sin_cos" else half
        index = torch.arange(half, dtype=torch.float32, device=t.device)
        angle = t.float()[:, None] * torch.exp(-math.log(10000.0) / last * index)
        parts = [angle.sin(), angle.cos()]
        sinusoids = torch.cat(parts if self.order == "sin_cos" else parts[::-1], dim=1)
        return self.dense_1(F.silu(self.dense_0(sinusoids.to(dtype))))


class GroupNormSiLU(nn.GroupNorm):
    """act(GN(x + add)·(1 + scale) + shift) by our op; the parameters of nn.GroupNorm."""

    def __init__(
        self, num_groups: int, channels: int, eps: float, activation: str = "silu"
    ) -> None:
        super().__init__(num_groups, channels, eps)
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        return ops.group_norm_silu(
            x,
            self.weight,
            self.bias,
            self.num_groups,
            self.eps,
            add=add,
            scale=scale,
            shift=shift,
            activation=self.activation,
        )


class ResBlock(nn.Module):
    """x + conv2(drop(silu(norm2(conv1(silu(norm1(x))) ⊕ W·temb)))), ⊕ added or AdaGN.

    sampling "up" or "down" resamples both branches before conv1 (BigGAN; Brock et al. 2019).
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        temb_channels: int,
        num_groups: int,
        norm_eps: float,
        dropout: float,
        conditioning: str,
        sampling: str = "",
    ) -> None:
        super().__init__()
        self.adaptive, self.sampling = conditioning == "scale_shift", sampling
        self.norm1 = GroupNormSiLU(num_groups, c_in, norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.temb_proj = nn.Linear(temb_channels, 2 * c_out if self.adaptive else c_out)
        self.norm2 = GroupNormSiLU(num_groups, c_out, norm_eps)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.norm1(x)
        if self.sampling == "up":
            h, x = upsample_nearest(h), upsample_nearest(x)
        elif self.sampling == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        h = self.conv1(h)
        temb = self.temb_proj(temb)
        if self.adaptive:
            scale, shift = temb.chunk(2, dim=1)
            h = self.norm2(h, scale=scale, shift=shift)
        else:
            h = self.norm2(h, add=temb)
        return self.shortcut(x) + self.conv2(self.dropout(h))


class AttentionBlock(nn.Module):
    """x + W_o attention(W_qkv norm(x)) over the H·W positions (Wang et al. 2018)."""

    def __init__(self, channels: int, num_heads: int, num_groups: int, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNormSiLU(num_groups, channels, norm_eps, activation="none")
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n, height * width, c)  # a view
        out = ops.attention_qkv(self.qkv(tokens), self.num_heads)
        return x + self.proj_out(out).view(n, height, width, c).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """3×3 convolution of stride 2."""

    def __init__(self, channels: int, asymmetric_padding: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric_padding
        self.conv = nn.Conv2d(channels, channels, 3, 2, padding=0 if asymmetric_padding else 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest neighbour ×2, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.conv(upsample_nearest(x))


def upsample_nearest(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def zero(module: nn.Module) -> nn.Module:
    """Zero weights, so that each residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
