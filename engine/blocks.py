"""The U-Net's parts: time embedding, norm, residual block, attention, resampling.

Images are (N, C, H, W) in channels_last memory throughout; norms and attention are our ops.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import addend, ops, winograd
from .low_weights import weight_and_bias


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
        self.dense_0 = Linear(channels, temb_channels)
        self.dense_1 = Linear(temb_channels, temb_channels)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.channels // 2
        # DDPM's frequencies end exactly at 1/10000, ADM's one step before it.
        last = half - 1 if self.order == "sin_cos" else half
        index = torch.arange(half, dtype=torch.float32, device=t.device)
        angle = t.float()[:, None] * torch.exp(-math.log(10000.0) / last * index)
        parts = [angle.sin(), angle.cos()]
        sinusoids = torch.cat(parts if self.order == "sin_cos" else parts[::-1], dim=1)
        return self.dense_1(F.silu(self.dense_0(sinusoids.to(dtype))))


class Conv2d(nn.Conv2d):
    """W x + b + add; x may be a pair, whose channels then follow each other: W [x₁; x₂] is
    W₁ x₁ + W₂ x₂, so that nobody concatenates them."""

    low = None  # while it trains: low_weights.py

    def forward(self, x: Tensor | tuple[Tensor, Tensor], add: Tensor | None = None) -> Tensor:
        weight, bias = weight_and_bias(self)
        if isinstance(x, tuple):
            x, skip = x
            first, second = weight.split((x.shape[1], skip.shape[1]), dim=1)
            add = self.convolve(x, first, None, add)
            return self.convolve(skip, second, bias, add)
        return self.convolve(x, weight, bias, add)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None):
        """W x + b + add, the sum within the convolution where there is a kernel for that."""
        if winograd.trains(self, x, weight, add):
            return winograd.convolve(x, weight, bias, add)
        if add is None:
            return self._conv_forward(x, weight, bias)
        if addend.fits(self, x, weight, add):
            geometry = self.padding, self.stride, self.dilation, self.groups
            return addend.convolution(x, weight, bias, add, *geometry)
        return add + self._conv_forward(x, weight, bias)


class Linear(nn.Linear):
    """x Wᵀ + b + add."""

    low = None

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = F.linear(x, *weight_and_bias(self))
        return y if add is None else add + y


class GroupNormSiLU(nn.GroupNorm):
    """act(GN(x + add)·(1 + scale) + shift) by our op; the parameters of nn.GroupNorm.

    x may be a pair, normalised as if its channels followed each other.
    """

    def __init__(
        self, num_groups: int, channels: int, eps: float, activation: str = "silu"
    ) -> None:
        super().__init__(num_groups, channels, eps)
        self.activation = activation

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        return_input: bool = False,
    ) -> Tensor | tuple:
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
            return_input=return_input,
        )


def norm_and_input(norm: nn.Module, x: Tensor | tuple) -> tuple[Tensor, Tensor | tuple]:
    """norm(x), and x for the residual's branch, whose gradient the norm's backward then adds to its
    own: a pass over every image less, 13 of a training step's 510 ms (two cores, batch 32)."""
    hooks = norm._forward_hooks, norm._forward_pre_hooks
    hooks += norm._backward_hooks, norm._backward_pre_hooks
    if type(norm) is not GroupNormSiLU or any(hooks) or not torch.is_grad_enabled():
        return norm(x), x  # hooks expect one tensor
    return norm(x, return_input=True)


class ResBlock(nn.Module):
    """x + conv2(drop(silu(norm2(conv1(silu(norm1(x))) ⊕ W·temb)))), ⊕ added or AdaGN.

    x may be a pair (h, skip), for its concatenation.
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
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.temb_proj = Linear(temb_channels, 2 * c_out if self.adaptive else c_out)
        self.norm2 = GroupNormSiLU(num_groups, c_out, norm_eps)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = zero(Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor | tuple[Tensor, Tensor], temb: Tensor) -> Tensor:
        h, x = norm_and_input(self.norm1, x)
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
        return self.conv2(self.dropout(h), add=self.shortcut(x))


class AttentionBlock(nn.Module):
    """x + W_o attention(W_qkv norm(x)) over the H·W positions (Wang et al. 2018)."""

    def __init__(self, channels: int, num_heads: int, num_groups: int, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNormSiLU(num_groups, channels, norm_eps, activation="none")
        self.qkv = Linear(channels, 3 * channels)
        self.proj_out = zero(Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens, x = norm_and_input(self.norm, x)
        tokens = as_tokens(tokens)
        out = ops.attention_qkv(self.qkv(tokens), self.num_heads)
        out = self.proj_out(out, add=as_tokens(x)).view(n, height, width, c).permute(0, 3, 1, 2)
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return out if channels_last else out.contiguous()


def as_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) in channels_last memory as (N, H·W, C): a view."""
    n, c, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, height * width, c)


class Downsample(nn.Module):
    """3×3 convolution of stride 2."""

    def __init__(self, channels: int, asymmetric_padding: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric_padding
        self.conv = Conv2d(channels, channels, 3, 2, padding=0 if asymmetric_padding else 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest neighbour ×2, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.conv(upsample_nearest(x))


def upsample_nearest(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def zero(module: nn.Module) -> nn.Module:
    """Zero weights, so that each residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
