"""The U-Net of DDPM (Ho et al. 2020, app. B) and ADM (Dhariwal & Nichol 2021), top to bottom.

    x ─ conv_in ─ down[0] ─ down[1] ─ … ─ mid ─ … ─ up[1] ─ up[0] ─ norm_out ─ conv_out ─ out
                     └─────────┴── skip connections ──┴────────┘
    t, y ─ embedding ─► every ResBlock

`Encoder` is its left half with the middle, of which the noisy classifier is made too; `blocks.py`
has the parts. Images are (N, C, H, W) in channels_last memory throughout, unless the model's
`memory_format` says otherwise.
"""

from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import (
    AttentionBlock,
    Conv2d,
    Downsample,
    GroupNormSiLU,
    Level,
    ResBlock,
    TimeEmbedding,
    Upsample,
    zero,
)
from .presets import PRESETS


class Encoder(nn.Module):
    """conv_in, the way down, and the middle: `encode(x, temb)` → h (N, C, H/2ⁱ, W/2ⁱ), skips.

    config  the options of UNet; kept as `self.config`, in types that JSON knows
    """

    memory_format = torch.channels_last  # of the images inside, and of the weights

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
        c, widths = self.config, check_options(self.config)
        self.time_embed = TimeEmbedding(
            c["model_channels"], 4 * c["model_channels"], c["embedding"]
        )
        self.embed_labels()
        self.conv_in = Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.skip_channels = [widths[0]]
        channels, resolution = widths[0], c["image_size"]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            blocks, attentions, downsample = nn.ModuleList(), nn.ModuleList(), None
            for _ in range(c["num_res_blocks"]):
                blocks.append(self.res_block(channels, width))
                attentions.append(self.attention(width, resolution))
                channels = width
                self.skip_channels.append(channels)
            if level < len(widths) - 1:
                if c["resample"] == "biggan":
                    downsample = self.res_block(channels, channels, "down")
                else:
                    downsample = Downsample(channels, c["asymmetric_padding"])
                self.skip_channels.append(channels)
                resolution //= 2
            self.down.append(Level(blocks, attentions, downsample))

        self.mid_block_1 = self.res_block(channels, channels)
        self.mid_attention = self.attention(channels)
        self.mid_block_2 = self.res_block(channels, channels)

    def embed_labels(self) -> None:
        """Makes what turns class labels into an embedding; here nothing."""

    def res_block(self, c_in: int, c_out: int, sampling: str = "") -> ResBlock:
        c = self.config
        temb_channels, norm = 4 * c["model_channels"], (c["num_groups"], c["norm_eps"])
        return ResBlock(
            c_in, c_out, temb_channels, *norm, c["dropout"], c["conditioning"], sampling
        )

    def attention(self, channels: int, resolution: int | None = None) -> nn.Module:
        """Self-attention at the named resolutions, elsewhere the identity; None: always."""
        c = self.config
        if resolution is not None and resolution not in c["attention_resolutions"]:
            return nn.Identity()
        heads = channels // c["head_channels"] if c["head_channels"] else c["num_heads"]
        return AttentionBlock(channels, heads, c["num_groups"], c["norm_eps"])

    def encode(self, x: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        h = self.conv_in(x.contiguous(memory_format=self.memory_format))
        skips = [h]
        for level in self.down:
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = attention(block(h, temb))
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h, temb)
                skips.append(h)
        return self.mid_block_2(self.mid_attention(self.mid_block_1(h, temb)), temb), skips

    def check_input(self, x: Tensor, t: Tensor) -> None:
        """Raises ValueError, one sentence, unless x is (N, in_channels, H, W) and t (N,)."""
        c = self.config
        factor = 2 ** (len(c["channel_mult"]) - 1)
        for name, value in (("x", x), ("t", t)):
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} is {type(value).__name__}, expected a tensor")
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


class UNet(Encoder):
    """ε_θ(x_t, t, y): (N, in_channels, H, W), (N,) → (N, out_channels, H, W).

    image_size             H = W that attention_resolutions refer to; other sizes run too
    channel_mult           width of each level in units of model_channels
    attention_resolutions  levels, named by their H = image_size / 2^i, that have self-attention
                           after each ResBlock
    head_channels          channels per head; None: num_heads heads whatever the width
    conditioning           "add": h + W·temb before the second norm (DDPM); "scale_shift": AdaGN
    resample               "conv": strided, and nearest + conv (DDPM); "biggan": in ResBlocks (ADM)
    num_classes            a learned embedding per class is added to temb; None: unconditional
    label_dropout          share of labels that training replaces by `null_label`, a class of its
                           own for "no class" (Ho & Salimans 2022); 0: there is none
    embedding              order of the sinusoids: "cos_sin" (ADM) or "sin_cos" (DDPM)
    asymmetric_padding     strided convolutions pad right and below only (DDPM)

    Raises ValueError for options that do not fit each other, and for inputs that do not fit.
    """

    drops_labels = True  # while training; False where a loop does it for several processes at once

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
        label_dropout: float = 0.0,
        embedding: str = "cos_sin",
        asymmetric_padding: bool = False,
    ) -> None:
        super().__init__({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        c, skips = self.config, self.skip_channels[:]
        resolution = c["image_size"] // 2 ** (len(channel_mult) - 1)
        channels = skips[-1]
        self.up = nn.ModuleList()
        for level in reversed(range(len(channel_mult))):
            blocks, attentions, upsample = nn.ModuleList(), nn.ModuleList(), None
            width = int(channel_mult[level] * model_channels)
            for _ in range(num_res_blocks + 1):
                blocks.append(self.res_block(channels + skips.pop(), width))
                attentions.append(self.attention(width, resolution))
                channels = width
            if level > 0:
                if resample == "biggan":
                    upsample = self.res_block(channels, channels, "up")
                else:
                    upsample = Upsample(channels)
                resolution *= 2
            self.up.append(Level(blocks, attentions, upsample))

        self.norm_out = GroupNormSiLU(num_groups, channels, norm_eps)
        self.conv_out = zero(Conv2d(channels, out_channels or in_channels, 3, padding=1))
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

    def embed_labels(self) -> None:
        c = self.config
        classes, p = c["num_classes"], c["label_dropout"]
        if isinstance(p, bool) or not isinstance(p, Real) or not 0 <= p <= 1:
            raise ValueError(f"label_dropout is {p!r}, expected a share of the labels, 0 to 1")
        if p and not classes:
            raise ValueError(f"label_dropout is {p} of a model without labels: give num_classes")
        self.null_label = classes if p else None
        rows = classes + 1 if p else classes
        self.label_embed = nn.Embedding(rows, 4 * c["model_channels"]) if classes else None

    def forward(
        self,
        x: Tensor,  # (N, in_channels, H, W), float
        t: Tensor,  # (N,) diffusion steps, any number type
        y: Tensor | None = None,  # (N,) int64, 0 … num_classes − 1, or null_label
    ) -> Tensor:
        self.check_input(x, t)
        self._check_labels(y, t)
        temb = self.time_embed(t, self.conv_in.weight.dtype)
        if y is not None:
            temb = temb + self.label_embed(self._drop_labels(y))
        temb = F.silu(temb)  # once, for all blocks

        h, skips = self.encode(x, temb)
        for level in self.up:
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = attention(block((h, skips.pop()), temb))
            if level.resample is not None:
                h = level.resample(h, temb)
        return self.conv_out(self.norm_out(h))

    def _drop_labels(self, y: Tensor) -> Tensor:
        return self.drop_labels(y) if self.training and self.drops_labels else y

    def drop_labels(self, y: Tensor, first: int = 0, whole: int | None = None) -> Tensor:
        """y with the share `label_dropout` of its labels, drawn anew, replaced by null_label.

        y (n,) are the labels of images first … first + n − 1 of a batch of `whole`: their draws are
        those that they have in it.
        """
        if self.null_label is None:
            return y
        draws = torch.rand(len(y) if whole is None else whole, device=y.device)
        dropped = draws[first : first + len(y)] < self.config["label_dropout"]
        return torch.where(dropped, self.null_label, y)

    def _check_labels(self, y: Tensor | None, t: Tensor) -> None:
        if (y is None) != (self.label_embed is None):
            need = "needs y, class labels (N,)" if y is None else "is unconditional and takes no y"
            raise ValueError(f"this model {need}")
        if y is not None and (y.shape != t.shape or y.dtype not in (torch.int64, torch.int32)):
            raise ValueError(
                f"y is {tuple(y.shape)} {y.dtype}, expected ({t.shape[0]},) int64: one per image"
            )
        # Elsewhere a look at the values would wait for the device.
        if y is not None and y.is_cpu and len(y) and not torch.compiler.is_compiling():
            low, high, rows = y.min().item(), y.max().item(), self.label_embed.num_embeddings
            if low < 0 or high >= rows:
                null = "" if self.null_label is None else f", {self.null_label} meaning no class"
                raise ValueError(f"y reaches from {low} to {high}, expected 0 … {rows - 1}{null}")


def check_options(c: dict) -> list[int]:
    """The channels of each level. Raises ValueError, one sentence, for what does not fit."""
    for name, choices in (
        ("conditioning", ("add", "scale_shift")),
        ("resample", ("conv", "biggan")),
        ("embedding", ("cos_sin", "sin_cos")),
    ):
        if c[name] not in choices:
            raise ValueError(f"{name} is {c[name]!r}, expected one of {', '.join(choices)}")
    counts = ("image_size", "in_channels", "model_channels", "num_res_blocks", "num_groups")
    optional = ("out_channels", "num_heads", "head_channels", "num_classes")
    for name in (*counts, *(name for name in optional if c.get(name) is not None)):
        if not isinstance(c[name], Integral) or isinstance(c[name], bool) or c[name] < 1:
            raise ValueError(f"{name} is {c[name]!r}, expected a whole number, at least 1")
        c[name] = int(c[name])  # JSON knows no NumPy
    for name in ("channel_mult", "attention_resolutions"):
        if not isinstance(c[name], list):
            raise ValueError(f"{name} is {c[name]!r}, expected a tuple, one number per level")
    if c["model_channels"] % 2 or c["model_channels"] < 4:  # as many sines as cosines
        raise ValueError(f"model_channels is {c['model_channels']}, expected an even number > 2")
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
