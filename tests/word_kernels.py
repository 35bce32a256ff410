"""A Triton kernel for tests/test_noise.py: normals from words that are given, not drawn."""

import torch
import triton
import triton.language as tl
from engine.kernels.noise import _box_muller


@triton.jit
def _words_kernel(even_ptr, odd_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    even = tl.load(even_ptr + i, mask=i < n, other=0).to(tl.uint32)
    odd = tl.load(odd_ptr + i, mask=i < n, other=0).to(tl.uint32)
    cos, sin = _box_muller(even, odd)
    tl.store(out_ptr + i, cos, mask=i < n)
    tl.store(out_ptr + n + i, sin, mask=i < n)


def box_muller(
    even: torch.Tensor,  # (n,) int64 that hold 32-bit words, like odd
    odd: torch.Tensor,
) -> torch.Tensor:  # (2, n) float32
    n = len(even)
    out = torch.empty(2, n, device=even.device)
    block = triton.next_power_of_2(n)
    _words_kernel[(1,)](even, odd, out, n, BLOCK=block, enable_fp_fusion=False)
    return out
