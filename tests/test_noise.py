"""The noise contract: the same bits from plain torch, Triton and C++, and what the bits must be."""

import math

import pytest
import torch
from conftest import DEVICE
from engine.kernels import philox

from engine import dispatch, ops

OP = "noise"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Random123's known answers: counter, key → words
KNOWN = [
    ("00000000" * 4, "00000000" * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff" * 4, "ffffffff" * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a8885a308d313198a2e03707344", "a4093822299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
KEYS = {
    "zero": (0, 0, 0, 0),
    "small": (1, 2, 3, 0),
    "negative seed": (-1234567890123456789, 7, 1, 0),
    "largest": (2**63 - 1, 2**32 - 1, 2**32 - 1, 0),
    "offset 3": (5, 9, 2, 3),
    "offset past 2^34": (5, 9, 2, 2**34 + 1),  # the quad's number needs its upper word
}


def words(text: str) -> list[int]:
    text = text.replace(" ", "")
    return [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]


def draw(impl, n, dtype, seed, step, stream, offset):
    """noise_fwd of a back end into memory that holds NaN."""
    out = torch.full((n,), math.nan, dtype=dtype, device=DEVICE)
    key = [torch.tensor([v], dtype=torch.int64, device=DEVICE) for v in (seed, step)]
    dispatch.function("noise", "fwd", impl)(out, *key, stream, offset)
    return out.cpu()


def same_bits(a, b):
    assert a.dtype == b.dtype
    view = torch.int32 if a.dtype == torch.float32 else torch.int16
    different = (a.view(view) != b.view(view)).sum().item()
    assert different == 0, f"{different} of {a.numel()} normals differ"


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_philox_known_answers(counter, key, answer):
    found = philox.philox4x32(
        tuple(torch.tensor(w) for w in words(counter)), tuple(torch.tensor(w) for w in words(key))
    )
    assert [int(w) for w in found] == words(answer)


# Octants' edges (k = 0), both sides of them, and the ends; radii: largest, smallest, middle.
ANGLES = sorted({(o * 2**29 + d) % 2**32 for o in range(9) for d in (-1, 0, 1)})
RADII = (0, 0xFFFFFFFF, 0x80000000)


def test_hand_made_words():
    """cos and sin are ±0 at quarter turns (k = 0), with the signs that the contract gives them."""
    even = torch.tensor([r for r in RADII for _ in ANGLES])
    odd = torch.tensor(ANGLES * len(RADII))
    cos, sin = philox.box_muller(even, odd)
    quarter = (odd + 2**29 >> 30) % 4
    at_edge = odd % 2**30 == 0
    assert cos[at_edge & (quarter % 2 == 1)].eq(0).all()
    assert sin[at_edge & (quarter % 2 == 0)].eq(0).all()
    # (c, s), (-s, c), (-c, -s), (s, -c) with s = +0
    assert torch.equal(cos.signbit()[at_edge], ((quarter == 1) | (quarter == 2))[at_edge])
    assert torch.equal(sin.signbit()[at_edge], (quarter >= 2)[at_edge])
    r = torch.sqrt(-2 * torch.log((torch.floor(even.double() / 512) * 2 + 1) * 2.0**-24))
    angle = 2 * math.pi * odd.double() / 2**32
    assert (cos - r * torch.cos(angle)).abs().max() < 1e-6
    assert (sin - r * torch.sin(angle)).abs().max() < 1e-6
    expected = torch.stack((cos, sin))
    for found in (triton_box_muller(even, odd), cpp_box_muller(even, odd)):
        if found is not None:
            same_bits(found, expected)


def triton_box_muller(even, odd):
    """The Triton functions on given words."""
    pytest.importorskip("triton")
    import word_kernels

    return word_kernels.box_muller(even.to(DEVICE), odd.to(DEVICE)).cpu()


WORDS = """
#include "philox.h"
extern "C" void from_words(const uint32_t* even, const uint32_t* odd, int n, float* out) {
  for (int i = 0; i < n; ++i) {
    const uint32_t words[4] = {even[i], odd[i], even[i], odd[i]};
    float z[4];
    engine::philox::normals(words, z);
    out[i] = z[0], out[n + i] = z[1];
  }
}
"""


def cpp_box_muller(even, odd):
    """csrc/philox.h, which the CPU kernels' scalar path and the CUDA kernels share."""
    import ctypes

    import emulation
    from test_cuda_emulated import compile_library

    library = compile_library(WORDS, f"-I{emulation.ROOT / 'csrc'}")
    w = [t.to(torch.int64).numpy().astype("uint32") for t in (even, odd)]
    out = torch.empty(2, len(even))
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in w]
    library.from_words(*pointers, len(even), ctypes.c_void_p(out.data_ptr()))
    return out


def box_muller_float64(seed, step, stream, n):
    """The contract in float64 from the same words."""
    quad = torch.arange((n + 3) // 4)
    counter = (quad, torch.zeros_like(quad), torch.tensor(step), torch.tensor(stream))
    key = (torch.tensor(seed & philox.MASK), torch.tensor(seed >> 32 & philox.MASK))
    w = [t.double() for t in philox.philox4x32(counter, key)]
    pairs = []
    for even, odd in ((w[0], w[1]), (w[2], w[3])):
        r = torch.sqrt(-2 * torch.log((torch.floor(even / 512) * 2 + 1) * 2.0**-24))
        angle = 2 * math.pi * odd / 2**32
        pairs += [r * torch.cos(angle), r * torch.sin(angle)]
    return torch.stack(pairs, dim=1).view(-1)[:n]


def test_reference_is_box_muller():
    z = philox.normal_reference(11, 4, 2, 1 << 18)
    assert (z.double() - box_muller_float64(11, 4, 2, 1 << 18)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_every_back_end_draws_the_same_bits(impl, key, dtype):
    seed, step, stream, offset = KEYS[key]
    for n in (1, 2, 1023, 4100):
        expected = philox.normal_reference(seed, step, stream, n, offset).to(dtype)
        same_bits(draw(impl, n, dtype, seed, step, stream, offset), expected)


def test_a_million_bits_and_their_statistics(impl):
    n = 1 << 20
    z = draw(impl, n, torch.float32, 3, 5, 0, 0)
    same_bits(z, philox.normal_reference(3, 5, 0, n))
    z = z.double()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.std() - 1) < 5 / math.sqrt(2 * n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert z.abs().max() < 5.77
    assert abs((z[:-1] * z[1:]).mean()) < 5 / math.sqrt(n)  # neighbours share a radius, no more


def test_parts_of_a_batch_are_parts_of_its_noise(impl):
    whole = draw(impl, 1000, torch.float32, 1, 2, 0, 0)
    for cut in (1, 3, 4, 250, 999):
        parts = [
            draw(impl, cut, torch.float32, 1, 2, 0, 0),
            draw(impl, 1000 - cut, torch.float32, 1, 2, 0, cut),
        ]
        same_bits(torch.cat(parts), whole)


def test_steps_streams_and_seeds_are_independent(impl):
    n = 1 << 14
    base = draw(impl, n, torch.float32, 1, 2, 0, 0)
    for other in ((2, 2, 0), (1, 3, 0), (1, 2, 1), (1 + 2**32, 2, 0)):
        z = draw(impl, n, torch.float32, *other, 0)
        assert abs((base * z).mean()) < 5 / math.sqrt(n)
    same_bits(draw(impl, n, torch.float32, 1, 2, 0, 0), base)  # any step can be drawn again


def test_reverse_step_uses_the_same_normals(impl):
    x = torch.zeros(2, 3, 5, 7, device=DEVICE)
    coeffs = torch.tensor([[0.0, 0, 0, 0, 1.0]] * 9, device=DEVICE)
    z = ops.reverse_step(x, x, coeffs, 8, key=77, offset=5, impl=impl)
    expected = philox.normal_reference(77, 8, ops.STEP_NOISE, x.numel(), 5).view(x.shape)
    same_bits(z.cpu() + 0.0, expected + 0.0)  # + 0: the sum 0 + z has no negative zero


def test_public_noise(impl):
    z = ops.noise(7, 3, 1, (2, 3, 4, 5), device=DEVICE, dtype=torch.float16, impl=impl)
    assert z.shape == (2, 3, 4, 5)
    same_bits(z.cpu().view(-1), philox.normal_reference(7, 3, 1, 120).half())
