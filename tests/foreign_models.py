"""Models as other projects write them, small: what the graph rewriting is tested on.

Each is written from the description of its arithmetic, in the idiom of its project. `expected`
counts what is to be replaced, from the options alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class GroupNorm32(nn.GroupNorm):  # guided-diffusion: in float32, then back
    def forward(self, x):
        high = x if x.dtype == torch.float64 else x.float()
        return super().forward(high).type(x.dtype)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """model.to(dtype), but for norms that compute in float32."""
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, GroupNorm32) and dtype != torch.float64:
            module.float()
    return model


class HandSiLU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class GuidedBlock(nn.Module):
    def __init__(self, c_in, c_out, emb, adaptive, checkpointed, dropout=0.0, groups=4):
        super().__init__()
        self.adaptive, self.checkpointed = adaptive, checkpointed
        self.in_layers = nn.Sequential(
            GroupNorm32(groups, c_in), HandSiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(HandSiLU(), nn.Linear(emb, c_out * (2 if adaptive else 1)))
        self.out_layers = nn.Sequential(
            GroupNorm32(groups, c_out),
            HandSiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(c_out, c_out, 3, padding=1),
        )
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        if self.checkpointed:
            return checkpoint(self.inner, x, emb, use_reentrant=False)
        return self.inner(x, emb)

    def inner(self, x, emb):
        h = self.in_layers(x)
        out = self.emb_layers(emb).type(h.dtype)
        while out.dim() < h.dim():
            out = out[..., None]
        if not self.adaptive:
            return self.skip(x) + self.out_layers(h + out)
        scale, shift = torch.chunk(out, 2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        for layer in self.out_layers[1:]:
            h = layer(h)
        return self.skip(x) + h


def legacy_attention(qkv, heads):  # channels in the order (heads, 3, D)
    n, width, length = qkv.shape
    d = width // (3 * heads)
    q, k, v = qkv.reshape(n * heads, 3 * d, length).split(d, dim=1)
    scale = 1 / math.sqrt(math.sqrt(d))
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, v).reshape(n, -1, length)


def new_attention(qkv, heads):  # (3, heads, D)
    n, width, length = qkv.shape
    d = width // (3 * heads)
    q, k, v = qkv.chunk(3, dim=1)
    scale = 1 / math.sqrt(math.sqrt(d))
    q, k = ((t * scale).view(n * heads, d, length) for t in (q, k))
    weight = torch.einsum("bct,bcs->bts", q, k)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    a = torch.einsum("bts,bcs->bct", weight, v.reshape(n * heads, d, length))
    return a.reshape(n, -1, length)


class GuidedAttention(nn.Module):
    def __init__(self, c, heads, attend, groups=4):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm = GroupNorm32(groups, c)
        self.qkv = nn.Conv1d(c, 3 * c, 1)
        self.proj_out = nn.Conv1d(c, c, 1)

    def forward(self, x):
        n, c, *space = x.shape
        x = x.reshape(n, c, -1)
        return (x + self.proj_out(self.attend(self.qkv(self.norm(x)), self.heads))).reshape(
            n, c, *space
        )


class GuidedDiffusion(nn.Module):
    """Two levels; the concatenation of a skip is read by the shortcut too."""

    def __init__(
        self, adaptive=False, legacy=True, checkpointed=False, c=16, dropout=0.0, groups=4
    ):
        super().__init__()
        options = dict(
            emb=c, adaptive=adaptive, checkpointed=checkpointed, dropout=dropout, groups=groups
        )
        self.c = c
        self.embed = nn.Sequential(nn.Linear(c, c), HandSiLU(), nn.Linear(c, c))
        self.first = nn.Conv2d(2, c, 3, padding=1)
        self.down = GuidedBlock(c, c, **options)
        self.wide = GuidedBlock(c, 2 * c, **options)
        attend = legacy_attention if legacy else new_attention
        self.attention = GuidedAttention(2 * c, 4, attend, groups)
        self.up = GuidedBlock(3 * c, c, **options)
        self.out = nn.Sequential(GroupNorm32(groups, c), HandSiLU(), nn.Conv2d(c, 2, 3, padding=1))

    def forward(self, x, t):
        rate = torch.exp(-math.log(1e4) * torch.arange(self.c // 2, device=x.device) / self.c * 2)
        angle = t[:, None].float() * rate
        emb = self.embed(torch.cat([angle.cos(), angle.sin()], -1).to(x.dtype))
        h = self.down(self.first(x), emb)
        low = self.attention(self.wide(F.avg_pool2d(h, 2), emb))
        low = F.interpolate(low, scale_factor=2, mode="nearest")
        return self.out(self.up(torch.cat([low, h], dim=1), emb))

    def expected(self):
        middle = "add → GroupNorm → SiLU"
        if self.down.adaptive:
            middle = "GroupNorm → scale and shift → SiLU"
        return {"GroupNorm → SiLU": 4, middle: 3, "GroupNorm": 1, "attention": 1}


class RMSNorm(nn.Module):  # denoising-diffusion-pytorch
    def __init__(self, c):
        super().__init__()
        self.scale = c**0.5
        self.g = nn.Parameter(torch.ones(1, c, 1, 1))

    def forward(self, x):
        return F.normalize(x, dim=1) * self.g * self.scale


class DenoisingBlock(nn.Module):
    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * c_out))
        self.proj1, self.proj2 = (nn.Conv2d(c, c_out, 3, padding=1) for c in (c_in, c_out))
        self.norm1, self.norm2 = RMSNorm(c_out), RMSNorm(c_out)
        self.act, self.dropout = nn.SiLU(), nn.Dropout(0.0)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        scale, shift = self.mlp(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm1(self.proj1(x)) * (scale + 1) + shift
        h = self.dropout(self.act(h))
        return self.dropout(self.act(self.norm2(self.proj2(h)))) + self.skip(x)


class FullAttention(nn.Module):
    """Keys and values have some learned ones ahead of the picture's."""

    def __init__(self, c, heads=2, d=8):
        super().__init__()
        self.heads, self.norm = heads, RMSNorm(c)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, 3, d))
        self.to_qkv = nn.Conv2d(c, 3 * heads * d, 1, bias=False)
        self.to_out = nn.Conv2d(heads * d, c, 1)

    def forward(self, x):
        n, _, height, width = x.shape
        q, k, v = (
            t.reshape(n, self.heads, -1, height * width).transpose(2, 3)
            for t in self.to_qkv(self.norm(x)).chunk(3, dim=1)
        )
        k, v = (
            torch.cat((m.expand(n, -1, -1, -1), t), dim=-2)
            for m, t in zip(self.mem_kv, (k, v), strict=True)
        )
        sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("b h i j, b h j d -> b h i d", sim.softmax(dim=-1), v)
        return self.to_out(out.transpose(2, 3).reshape(n, -1, height, width))


class LinearAttention(nn.Module):
    """Softmax over other dimensions than the keys: to be left alone."""

    def __init__(self, c, heads=2, d=8):
        super().__init__()
        self.heads, self.norm = heads, RMSNorm(c)
        self.to_qkv = nn.Conv2d(c, 3 * heads * d, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * d, c, 1), RMSNorm(c))

    def forward(self, x):
        n, _, height, width = x.shape
        q, k, v = (
            t.reshape(n, self.heads, -1, height * width)
            for t in self.to_qkv(self.norm(x)).chunk(3, dim=1)
        )
        q, k = q.softmax(dim=-2) * q.shape[2] ** -0.5, k.softmax(dim=-1)
        context = torch.einsum("b h d n, b h e n -> b h d e", k, v)
        out = torch.einsum("b h d e, b h d n -> b h e n", context, q)
        return self.to_out(out.reshape(n, -1, height, width))


class DenoisingDiffusion(nn.Module):
    def __init__(self, c=12):
        super().__init__()
        self.c = c
        self.embed = nn.Sequential(nn.Linear(1, c), nn.GELU(), nn.Linear(c, c))
        self.first = nn.Conv2d(2, c, 7, padding=3)
        self.down, self.linear = DenoisingBlock(c, c, c), LinearAttention(c)
        self.middle, self.full = DenoisingBlock(c, 2 * c, c), FullAttention(2 * c)
        self.up = DenoisingBlock(3 * c, c, c)
        self.out = nn.Conv2d(c, 2, 1)

    def forward(self, x, t):
        emb = self.embed(t[:, None].to(x.dtype) / 1000)
        h = self.down(self.first(x), emb)
        h = self.linear(h) + h
        low = self.middle(F.avg_pool2d(h, 2), emb)
        low = F.interpolate(self.full(low) + low, scale_factor=2, mode="nearest")
        return self.out(self.up(torch.cat([low, h], dim=1), emb))

    def expected(self):
        return {
            "RMS norm → scale and shift → SiLU": 3,
            "RMS norm → SiLU": 3,
            "RMS norm": 3,
            "attention": 1,
        }


class Plain(nn.Sequential):
    """Nothing but layers."""

    def __init__(self, c=8):
        super().__init__(
            nn.Conv2d(2, c, 3, padding=1),
            nn.GroupNorm(2, c),
            nn.SiLU(inplace=True),
            nn.Conv2d(c, c, 3, padding=1),
            nn.GroupNorm(4, c, eps=1e-6, affine=False),
            nn.SiLU(),
            nn.Conv2d(c, 2, 3, padding=1),
        )

    def forward(self, x, t=None):
        return super().forward(x)

    def expected(self):
        return {"GroupNorm → SiLU": 2}
