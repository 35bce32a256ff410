"""The noisy classifier log p(y | x_t) of classifier guidance (Dhariwal & Nichol 2021, §4).

x_t ─ conv_in ─ down[0] ─ down[1] ─ … ─ mid ─ norm_out ─ pool ─ logits
t ─ time_embed ─► every ResBlock
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .blocks import GroupNormSiLU, zero
from .presets import CLASSIFIERS
from .unet import Encoder


class Classifier(Encoder):
    """logits(x_t, t): (N, in_channels, H, W), (N,) → (N, num_classes), float32 or autocast's dtype.

    pool  "attention": the mean position asks all positions, which are named by a learned embedding,
          so H = W = image_size; "adaptive": mean over the positions, of any size
    The other options are UNet's. Raises ValueError for options or inputs that do not fit.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        num_classes: int,
        model_channels: int = 64,
        channel_mult: tuple[float, ...] = (1, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (),
        num_heads: int = 1,
        head_channels: int | None = None,
        num_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        conditioning: str = "scale_shift",
        resample: str = "biggan",
        embedding: str = "cos_sin",
        asymmetric_padding: bool = False,
        pool: str = "attention",
    ) -> None:
        super().__init__({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        if num_classes is None:
            raise ValueError("num_classes is None, expected a whole number, at least 1")
        if pool not in ("attention", "adaptive"):
            raise ValueError(f"pool is {pool!r}, expected one of attention, adaptive")
        channels = self.skip_channels[-1]
        self.norm_out = GroupNormSiLU(num_groups, channels, norm_eps)
        if pool == "attention":
            side = image_size >> (len(channel_mult) - 1)
            heads = self.mid_attention.num_heads
            self.pool = AttentionPool(side**2, channels, heads, num_classes)
        else:
            self.pool = MeanPool(channels, num_classes)
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "Classifier":
        """The named architecture of CLASSIFIERS; overrides replace single options."""
        if name not in CLASSIFIERS:
            raise ValueError(
                f"unknown classifier preset {name!r}: choose one of {', '.join(CLASSIFIERS)}"
            )
        try:
            return cls(**{**CLASSIFIERS[name], **overrides})
        except TypeError as error:
            raise ValueError(f"classifier preset {name!r}: {error}") from None

    def forward(
        self,
        x: Tensor,  # (N, in_channels, H, W), float
        t: Tensor,  # (N,) diffusion steps, any number type
    ) -> Tensor:
        self.check_input(x, t)
        size = self.config["image_size"]
        if self.config["pool"] == "attention" and x.shape[2:] != (size, size):
            raise ValueError(
                f"x is {tuple(x.shape)}, but pool='attention' knows positions of {size}×{size} "
                "images only: resize them, or train with pool='adaptive'"
            )
        temb = F.silu(self.time_embed(t, self.conv_in.weight.dtype))
        h, _ = self.encode(x, temb)
        return self.pool(self.norm_out(h).permute(0, 2, 3, 1).flatten(1, 2))  # (N, S, C), a view


class AttentionPool(nn.Module):
    """W_o attention(mean token → all tokens), a learned embedding added to each (Radford 2021)."""

    def __init__(self, positions: int, channels: int, num_heads: int, num_classes: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.position = nn.Parameter(torch.randn(positions + 1, channels) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:  # (N, S, C)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.position
        n, s, c = tokens.shape
        weight, bias = self.qkv.weight.split([c, 2 * c]), self.qkv.bias.split([c, 2 * c])
        q = F.linear(tokens[:, :1], weight[0], bias[0])  # only the mean token asks
        k, v = F.linear(tokens, weight[1], bias[1]).chunk(2, 2)
        q, k, v = (h.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for h in (q, k, v))
        return self.proj_out(ops.attention(q, k, v).transpose(1, 2).flatten(1))


class MeanPool(nn.Module):
    """W mean(tokens), W zero at first: every class is as likely."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.proj_out = zero(nn.Linear(channels, num_classes))

    def forward(self, tokens: Tensor) -> Tensor:  # (N, S, C)
        return self.proj_out(tokens.mean(1))
