"""Attention as it is called and as it is written by hand: recognised, right, or left and why."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import check_function, fused

HEADS, KEYS = (2, 3, 6, 8), (2, 3, 5, 8)  # (N, heads, S, D), (N, heads, Sk, D)
FLAT, FLAT_K = (4, 6, 8), (4, 5, 8)  # (N · heads, S, D)
TURNED, TURNED_K = (4, 8, 6), (4, 8, 5)  # (N · heads, D, S)
E = torch.einsum


def legacy(q, k, v):  # guided-diffusion
    weight = E("bct,bcs->bts", q * 8**-0.25, k * 8**-0.25)
    weight = torch.softmax(weight if weight.dtype == torch.float64 else weight.float(), dim=-1)
    return E("bts,bcs->bct", weight.type(q.dtype), v)


def beta_zero(q, k, v):  # diffusers without SDPA
    unused = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(unused, q, k.transpose(-1, -2), beta=0, alpha=0.3)
    return torch.bmm(scores.softmax(dim=-1), v)


WRITTEN = {
    "sdpa": (F.scaled_dot_product_attention, (HEADS, KEYS, KEYS)),
    "sdpa, scale": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, scale=0.1),
        (HEADS, KEYS, KEYS),
    ),
    "bmm": (
        lambda q, k, v: torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, -1), v),
        (FLAT, FLAT_K, FLAT_K),
    ),
    "matmul": (
        lambda q, k, v: (q @ k.transpose(-2, -1) / 3.0).softmax(dim=-1) @ v,
        (HEADS, KEYS, KEYS),
    ),
    "baddbmm": (beta_zero, (FLAT, FLAT_K, FLAT_K)),
    "channels first, weights turned": (  # the first DDPM in PyTorch
        lambda q, k, v: torch.bmm(
            v, torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * 0.3, dim=2).permute(0, 2, 1)
        ),
        (TURNED, TURNED_K, TURNED_K),
    ),
    "guided-diffusion": (legacy, (TURNED, TURNED_K, TURNED_K)),
    "lucidrains": (
        lambda q, k, v: E(
            "b h i j, b h j d -> b h i d",
            (E("b h i d, b h j d -> b h i j", q, k) * 0.4).softmax(dim=-1),
            v,
        ),
        (HEADS, KEYS, KEYS),
    ),
    "lucidrains, old": (
        lambda q, k, v: E(
            "b h i j, b h d j -> b h i d",
            E("b h d i, b h d j -> b h i j", q * 0.3, k).softmax(dim=-1),
            v,
        ),
        ((2, 3, 8, 6), (2, 3, 8, 5), (2, 3, 8, 5)),
    ),
    "operands exchanged, other letters": (
        lambda q, k, v: E("zyx,zwy->zwx", v, E("abc,adc->adb", k, q * 0.3).softmax(-1)),
        (FLAT, FLAT_K, FLAT_K),
    ),
    "dropout of nothing": (
        lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.5, training=False) @ v,
        (FLAT, FLAT_K, FLAT_K),
    ),
}


def tensors(shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", WRITTEN)
def test_attention(name, dtype):
    function, shapes = WRITTEN[name]
    report = check_function(function, tensors(shapes), dtype)
    assert fused(report) == {"attention": 1} and not report.left, report


def linear(q, k, v):
    context = E("b h n d, b h n e -> b h d e", k.softmax(dim=-2), v)
    return E("b h n d, b h d e -> b h n e", q.softmax(dim=-1), context)


LEFT = {
    "mask": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        (HEADS, KEYS, KEYS, (6, 5)),
        "has a mask",
    ),
    "causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        (HEADS, HEADS, HEADS),
        "is causal",
    ),
    "three dimensions": (F.scaled_dot_product_attention, (FLAT, FLAT_K, FLAT_K), "expected (N,"),
    "other channels in v": (
        F.scaled_dot_product_attention,
        (HEADS, KEYS, (2, 3, 5, 4)),
        "(2, 3, 5, 4)",
    ),
    "bias on the scores": (
        lambda q, k, v, m: (q @ k.mT + m).softmax(-1) @ v,
        (FLAT, FLAT_K, FLAT_K, (6, 5)),
        "something is added",
    ),
    "other channels in v, by hand": (
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
        (FLAT, FLAT_K, (4, 5, 7)),
        "v has 7 channels a head",
    ),
    "weights read twice": (
        lambda q, k, v: (lambda p: p @ v + p.sum(-1, keepdim=True))((q @ k.mT).softmax(-1)),
        (FLAT, FLAT_K, FLAT_K),
        "read more than once",
    ),
    "linear attention": (linear, (HEADS, HEADS, HEADS), ""),
    "softmax over the queries": (
        lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
        (FLAT, FLAT_K, FLAT_K),
        "",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name):
    function, shapes, sentence = LEFT[name]
    report = check_function(function, tensors(shapes), torch.float32)
    assert fused(report) == {}, report
    assert len(report.left) == (1 if sentence else 0) and sentence in str(report), report
