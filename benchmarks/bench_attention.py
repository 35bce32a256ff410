"""attention_qkv on the CPU against the usual sequence: split, SDPA on views, merge.

The CPU has no kernel of ours: `auto` is PyTorch's SDPA on views of qkv, so about 1 is expected, and
less is what our front door costs. Bytes that must move: read qkv, write out: 4 · N·S·heads·D times
the element size.
"""

import pytest
import torch
import torch.nn.functional as F
from measure import compare

from engine import ops

# N, heads, S, D of U-Nets' attention, batches cut: CIFAR-10, ADM at 16×16 and 8×8, SD at 16×16.
SHAPES = [(4, 1, 256, 256), (2, 9, 256, 64), (8, 12, 64, 64), (1, 8, 256, 160)]


def sequence(qkv, heads):
    n, s, channels = qkv.shape
    q, k, v = (t.reshape(n, s, heads, -1).transpose(1, 2) for t in qkv.chunk(3, dim=2))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(n, s, channels // 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def bench_attention_qkv(benchmark, shape, dtype):
    torch.manual_seed(0)
    n, heads, s, d = shape
    qkv = torch.randn(n, s, 3 * heads * d).to(dtype)
    with torch.inference_mode():
        functions = {
            "ours": lambda: ops.attention_qkv(qkv, heads),
            "eager": lambda: sequence(qkv, heads),
        }
        a, b = functions["ours"](), functions["eager"]()
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert torch.allclose(a, b, atol=tolerance, rtol=tolerance)
        compare(benchmark, functions, 4 * n * s * heads * d * qkv.element_size())
