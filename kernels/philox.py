"""The noise contract in plain PyTorch: the same bits on every device and in every back end.

Normal number j of (seed, step, stream) is lane j % 4 of the quad j // 4. A quad is four words
  w = Philox4x32-10(counter = (quad lo, quad hi, step, stream), key = (seed lo, seed hi)),
two Box-Muller pairs, (w0, w1) and (w2, w3):
  z_even = r·cos θ, z_odd = r·sin θ,  r = √(-2 ln u(w_even)),  θ = 2π·w_odd / 2³².
Logarithm, sine and cosine are Cephes' single-precision polynomials. Every float operation is one
IEEE float32 operation and nothing is contracted, so other back ends can repeat it exactly.
|z| < 5.77; error against float64 < 1e-6. Streams: 0 step noise, 1 initial, 2 training noise.
Words are int64 tensors here that hold 32 bits. Source: Salmon et al. 2011 (Philox), Box-Muller.
"""

import math

import torch

MASK = 0xFFFFFFFF


def philox4x32(counter: tuple, key: tuple) -> tuple:
    """Ten rounds of Philox4x32 on int64 tensors (or ints) that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps in int64; its 64 bits are right, and the masks drop the sign.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((p1 >> 32) & MASK) ^ c1 ^ k0, ((p0 >> 32) & MASK) ^ c3 ^ k1
        c1, c3 = p1 & MASK, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def _log(u: torch.Tensor) -> torch.Tensor:
    """ln u for normal u in (0, 1), Cephes logf."""
    bits = u.view(torch.int32)
    e = (bits >> 23) - 126
    m = ((bits & 0x7FFFFF) | 0x3F000000).view(torch.float32)  # u = m · 2^e, m in [1/2, 1)
    low = m < 0.707106781186547524
    e = torch.where(low, e - 1, e).float()
    m = torch.where(low, m + m - 1.0, m - 1.0)
    z = m * m
    y = m * 7.0376836292e-2 - 1.1514610310e-1
    for coefficient in (
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ):
        y = y * m + coefficient
    y = y * m * z
    y = y + e * -2.12194440e-4
    y = y - z * 0.5
    return m + y + e * 0.693359375


def _cos_sin(word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of 2π·word / 2³², the octant taken off in integers."""
    j = ((word >> 29) + 1) & ~1
    k = word - (j << 29)  # |k| <= 2^29: no wrap in int64
    t = k.to(torch.int32).float() * (2 * math.pi / 2**32)
    zz = t * t
    s = ((zz * -1.9515295891e-4 + 8.3321608736e-3) * zz - 1.6666654611e-1) * zz * t + t
    c = (zz * 2.443315711809948e-5 - 1.388731625493765e-3) * zz + 4.166664568298827e-2
    c = c * zz * zz - zz * 0.5 + 1.0
    q = (j >> 1) & 3
    odd = (q & 1) == 1
    cos, sin = torch.where(odd, s, c), torch.where(odd, c, s)
    return torch.where((q == 1) | (q == 2), -cos, cos), torch.where(q >= 2, -sin, sin)


def box_muller(w_even: torch.Tensor, w_odd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two words (int64 tensors) → two standard normals (float32)."""
    u = ((w_even >> 9) * 2 + 1).float() * 2.0**-24
    # torch.sqrt on CPU is not correctly rounded in float32; through float64 it is.
    r = (_log(u) * -2.0).double().sqrt().float()
    cos, sin = _cos_sin(w_odd)
    return r * cos, r * sin


def _normals(
    seed: torch.Tensor, step: torch.Tensor, stream: int, n: int, offset: int
) -> torch.Tensor:
    first = offset // 4
    quad = torch.arange(first, (offset + n + 3) // 4, dtype=torch.int64, device=seed.device)
    counter = (quad & MASK, (quad >> 32) & MASK, step & MASK, stream & MASK)
    w0, w1, w2, w3 = philox4x32(counter, (seed & MASK, (seed >> 32) & MASK))
    normals = torch.stack((*box_muller(w0, w1), *box_muller(w2, w3)), dim=1).view(-1)
    return normals[offset - 4 * first :][:n].clone()


# One opaque node for compilers: Inductor took eight minutes to fuse the rounds for a CPU, and where
# it contracts a·b + c, as Triton does unless told not to, the bits would change.
_library = torch.library.Library("engine_eager", "FRAGMENT")
_library.define("normals(Tensor seed, Tensor step, int stream, SymInt n, SymInt offset) -> Tensor")
_library.impl("normals", _normals, "CompositeExplicitAutograd")
torch.library.register_fake(
    "engine_eager::normals",
    lambda seed, step, stream, n, offset: seed.new_empty((n,), dtype=torch.float32),
)


def normal_reference(
    seed: torch.Tensor | int,  # int64 (1,)
    step: torch.Tensor | int,  # int64 (1,); the low 32 bits count
    stream: int,
    n: int,
    offset: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:  # (n,) float32
    """Normals number offset … offset + n - 1 of (seed, step, stream)."""
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(())
    step = torch.as_tensor(step, dtype=torch.int64, device=device).reshape(())
    if torch.compiler.is_compiling():
        return torch.ops.engine_eager.normals(seed, step, stream, n, offset)
    return _normals(seed, step, stream, n, offset)
