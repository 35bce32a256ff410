"""The CUDA kernels on the CPU: the paths that small shapes do not reach, the noise's bits, and the
emulation itself. The shapes and variants of every op run on the emulation in the op's own tests."""

import ctypes
import hashlib
import math
import subprocess

import emulation
import pytest
import torch
from budget import FORWARD, GRADIENT, assert_within_budget
from engine.kernels import eager, native, reference

OP = "group_norm_silu"  # poisoned memory, see conftest.py
OPERANDS = ("weight", "bias", "add", "scale", "shift")


@pytest.fixture(scope="module")
def cuda():
    return emulation.backend()


def as_layout(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    form = torch.channels_last if channels_last else torch.contiguous_format
    return t.contiguous(memory_format=form)


def normal(*shape, seed, at=0.0, by=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * by + at).to(dtype)


def check_norm(
    cuda,
    shape,  # (N, C, H, W)
    groups,
    dtype,
    channels_last,
    *,
    other_dy=False,
    mean=0.5,
    std=2.0,
    misaligned=False,
    bwd=True,
    second=0,
):
    """Forward and backward of one call against the float64 reference, all operands present. The
    last `second` channels are a tensor of their own."""
    n, c = shape[:2]
    x = normal(*shape, seed=1, at=mean, by=std).clamp(-65000, 65000).to(dtype)
    x = as_layout(x, channels_last)
    dy = as_layout(normal(*shape, seed=2, dtype=dtype), channels_last != other_dy)
    if misaligned:  # the same values one element further on in memory
        x, dy = (
            t.new_empty(t.numel() + 1)[1:].as_strided(t.shape, t.stride(), 1).copy_(t)
            for t in (x, dy)
        )
    chunks = normal(n, 3 * c, seed=3, by=0.6).chunk(3, dim=1)
    operands = [normal(c, seed=4, at=1.0, by=0.5), normal(c, seed=5, by=0.7), *chunks]

    a, b = x, None
    if second:
        a, b = (as_layout(t.clone(), channels_last) for t in x.split([c - second, second], 1))
    y, stat_mean, stat_rstd = cuda.group_norm_silu_fwd(a, b, *operands, groups, 1e-5, True)
    assert y.stride() == torch.empty_like(x).stride() or misaligned or second
    assert stat_mean.isfinite().all() and stat_rstd.isfinite().all()

    def run(function, x, operands):
        leaves = [t.detach().requires_grad_() for t in (x, *operands)]
        result = function(*leaves)
        return result.detach(), torch.autograd.grad(result, leaves, dy.to(result.dtype))

    def truth_of(x, weight, bias, add, scale, shift):
        kwargs = {"add": add, "scale": scale, "shift": shift}
        return reference.group_norm_silu(x, weight, bias, groups, 1e-5, **kwargs)

    def plain_of(x, *operands):
        return eager.group_norm_silu(x, None, *operands, groups, 1e-5, True)

    truth, true_grads = run(truth_of, x.double(), [t.double() for t in operands])
    plain, plain_grads = run(plain_of, x, operands)
    assert_within_budget(y, truth, plain, factor=FORWARD)
    if not bwd:
        return
    dx, dx2, *grads = cuda.group_norm_silu_bwd(
        dy, a, b, *operands, stat_mean, stat_rstd, groups, True
    )
    dx = torch.cat((dx, dx2), 1) if second else dx
    for name, got, true, of_plain in zip(
        ("x", *OPERANDS), (dx, *grads), true_grads, plain_grads, strict=True
    ):
        assert_within_budget(got, true, of_plain, factor=GRADIENT, what=f"d{name}")


# Groups larger than a block: (shape, groups), float32 unless the name says otherwise.
LARGE = {
    "planes in pieces": ((1, 4, 128, 129), 2),
    "odd planes in pieces": ((1, 2, 181, 183), 2),
    "groups in pieces": ((1, 1600, 3, 1), 2),
    "groups in pieces, batch": ((2, 1000, 2, 2), 1),
    "an empty last piece": ((1, 2, 129, 127), 1),
    "slabs in pieces": ((2, 24, 50, 52), 4),
    "wide groups": ((1, 1536, 5, 2), 2),
    "wide odd groups": ((1, 1030, 3, 3), 2),
    "wide groups that share vectors": ((1, 4168, 1, 2), 8),
    "one group": ((1, 520, 12, 12), 1),
}


@pytest.mark.parametrize("other_dy", [False, True], ids=["same dy", "other dy"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_groups_larger_than_a_block(cuda, name, dtype, channels_last, other_dy):
    shape, groups = LARGE[name]
    check_norm(cuda, shape, groups, dtype, channels_last, other_dy=other_dy)


@pytest.mark.parametrize("first", [False, True], ids=["short first half", "long first half"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", LARGE)
def test_pairs_of_groups_larger_than_a_block(cuda, name, channels_last, first):
    shape, groups = LARGE[name]
    second = max(1, shape[1] // 4 // 8 * 8) if first else shape[1] - 1
    dtype = torch.bfloat16 if first else torch.float32
    check_norm(cuda, shape, groups, dtype, channels_last, other_dy=first, second=second)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_large_groups_of_large_mean_and_small_spread(cuda, channels_last):
    shape = (1, 2, 184, 184)
    check_norm(cuda, shape, 1, torch.float32, channels_last, mean=1e3, std=1e-2, bwd=False)
    check_norm(cuda, shape, 1, torch.float16, channels_last, mean=0.0, std=1.5e4)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_the_rounding_of_the_mean_is_corrected(cuda, channels_last):
    """A float32 mean of 1e3 is off by up to 3e-5: 3e-3 of a spread of 1e-2, far over the budget of
    a kernel that keeps what the rounding lost."""
    x = as_layout(normal(2, 16, 7, 9, seed=1, at=1e3, by=1e-2), channels_last)
    y = cuda.group_norm_silu_fwd(x, *[None] * 6, 4, 1e-8, False)[0]
    truth = reference.group_norm_silu(x.double(), None, None, 4, 1e-8, silu=False)
    assert (y - truth).abs().max() < 2e-6


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, groups", [((2, 16, 8, 8), 4), ((2, 15, 7, 9), 3)], ids=str)
def test_tensors_that_do_not_start_at_16_bytes(cuda, shape, groups, dtype, channels_last):
    check_norm(cuda, shape, groups, dtype, channels_last, misaligned=True)


def test_more_than_65535_groups(cuda):
    check_norm(cuda, (16500, 4, 1, 2), 4, torch.float32, False)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_opcheck_of_a_pair(cuda, channels_last):
    a, b = (as_layout(normal(2, c, 4, 6, seed=c), channels_last) for c in (3, 5))
    dy, w = as_layout(normal(2, 8, 4, 6, seed=1), not channels_last), normal(8, seed=2)
    stats = [torch.rand(2, 2) for _ in range(2)]
    rest = (w, *[None] * 4)
    torch.library.opcheck(cuda.group_norm_silu_fwd, (a, b, *rest, 2, 1e-5, True))
    torch.library.opcheck(cuda.group_norm_silu_bwd, (dy, a, b, *rest, *stats, 2, True))


def test_same_bits_again(cuda):
    x = as_layout(normal(2, 24, 50, 52, seed=1), True)
    weight, dy = normal(24, seed=2), torch.randn_like(x)
    results = []
    for _ in range(2):
        y, mean, rstd = cuda.group_norm_silu_fwd(x, None, weight, *[None] * 4, 4, 1e-5, True)
        grads = cuda.group_norm_silu_bwd(dy, x, None, weight, *[None] * 4, mean, rstd, 4, True)
        results.append((y, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- Noise --------------------------------------------------------------------------------------

HOST_NOISE = """
#include "philox.h"
extern "C" void host_noise(float* out, int64_t n, int64_t seed, uint32_t step, uint32_t stream,
                           int64_t offset) {
  for (int64_t i = 0; i < n; ++i) {
    float z[4];
    engine::philox::normal_quad(seed, step, stream, (offset + i) / 4, z);
    out[i] = z[(offset + i) % 4];
  }
}
extern "C" void host_words(const uint32_t* counter, const uint32_t* key, uint32_t* words) {
  engine::philox::philox4x32_10(counter, key, words);
}
"""


def compile_library(text: str, *flags: str):
    """→ a ctypes library of C++ text, kept in build/emulation."""
    command = [
        *emulation.compiler(),
        *emulation.FLAGS,
        "-shared",
        "-fvisibility=default",
        *flags,
        "-x",
        "c++",
        "-",
    ]
    found = [emulation.HEADER, *emulation.ROOT.glob("csrc/*.h"), *emulation.ROOT.glob("csrc/*/*.h")]
    headers = b"".join(path.read_bytes() for path in sorted(found))
    key = hashlib.sha256(" ".join(command).encode() + text.encode() + headers).hexdigest()[:16]
    target = emulation.BUILD / f"text-{key}.so"
    if not target.exists():
        emulation.BUILD.mkdir(parents=True, exist_ok=True)
        subprocess.run([*command, "-o", str(target)], input=text, text=True, check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def host():
    return compile_library(HOST_NOISE, f"-I{emulation.ROOT / 'csrc'}")


def host_noise(host, n, seed, step, stream, offset) -> torch.Tensor:
    out = torch.zeros(n)
    host.host_noise(
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(n),
        ctypes.c_int64(seed),
        ctypes.c_uint32(step & 0xFFFFFFFF),
        ctypes.c_uint32(stream),
        ctypes.c_int64(offset),
    )
    return out


KNOWN = (  # Random123: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox_known_answers(host, counter, key, words):
    got = (ctypes.c_uint32 * 4)()
    host.host_words((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), got)
    assert tuple(got) == words


def test_normals_of_the_host_are_normal(host):
    z = host_noise(host, 1 << 20, 11, 3, 0, 0).double()
    assert abs(z.mean()) < 4e-3 and abs(z.std() - 1) < 3e-3
    assert abs((z**4).mean() - 3) < 0.03 and z.abs().max() < 5.78


KEYS = [  # n, seed, step, stream, offset
    (1, 0, 0, 0, 0),
    (70001, 7, 12, 1, 0),
    (1023, -5, -1, 2, 3),
    (4096, 2**62 + 12345, 2**31 + 7, 0, 4 * (2**32 - 300)),  # quads pass 2^32
    (257, 1, 999, 0, 2**40 + 1),
]


@pytest.mark.parametrize("n, seed, step, stream, offset", KEYS)
def test_noise_has_the_bits_of_the_contract(cuda, host, n, seed, step, stream, offset):
    expected = host_noise(host, n, seed, step, stream, offset)
    key, at = torch.tensor(seed), torch.tensor(step)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for start in (0, 1):  # a tensor may begin anywhere
            out = torch.empty(n + start, dtype=dtype)[start:]
            cuda.noise_fwd(out, key, at, stream, offset)
            assert torch.equal(out, expected.to(dtype))
    if native.available() is None:
        out = torch.empty(n)
        native.noise_fwd(out, key, at, stream, offset)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("offset", [0, 1, 6, 2**34 + 3])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 2, 1, 1), (1, 6, 8, 8)], ids=str)
def test_a_step_draws_the_bits_of_the_contract(cuda, host, shape, channels_last, offset):
    x = as_layout(torch.zeros(shape), channels_last)
    coeffs = torch.tensor([[0.0, 0, 0, 0, 0], [0, 0, 0, 0, 1]])  # row 1: x_next = z
    step, seed = torch.tensor(1), torch.tensor(99)
    drawn = cuda.reverse_step_fwd(x, x, coeffs, step, seed, None, math.inf, offset)
    expected = host_noise(host, x.numel(), 99, 1, 0, offset).view(shape)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("out_last", [False, True])
def test_a_step_keeps_nan_and_refuses_rows_outside_the_table(cuda, x_last, out_last):
    x, out, z = (normal(2, 3, 5, 7, seed=s) for s in (1, 2, 3))
    out[1, 2, 3, 4] = math.nan
    coeffs = torch.tensor([[1.5, -0.7, 0.4, 0.6, 0.0], [1.5, -0.7, 0.4, 0.6, 0.3]])
    args = as_layout(x, x_last), as_layout(out, out_last), coeffs
    got = cuda.reverse_step_fwd(*args, torch.tensor(1), None, z, 1.0, 0)
    assert torch.equal(got.isnan(), out.isnan())
    exact = reference.reverse_step(x.double(), out.double(), coeffs.double(), 1, z.double(), 1.0)
    assert torch.allclose(got.double(), exact, rtol=0, atol=2e-6, equal_nan=True)
    poisoned = torch.full_like(z, math.nan)  # s = 0: noise is not read
    quiet = cuda.reverse_step_fwd(*args, torch.tensor(0), None, poisoned, 1.0, 0)
    assert torch.equal(quiet.isnan(), out.isnan())
    for step in (-1, 2, 2**40):
        assert cuda.reverse_step_fwd(*args, torch.tensor(step), None, z, 1.0, 0).isnan().all()


# ---- The emulation itself -----------------------------------------------------------------------


def test_the_emulation_catches_broken_barriers():
    """The first barrier of the forward's slabs deleted, one of the backward not reached by all."""
    namespace = "engine_emu_broken"
    deleted = ("__syncthreads();", "")
    divergent = ("__syncthreads();", "if (threadIdx.x < 32) __syncthreads();")
    library = emulation.build(
        namespace, {"group_norm_silu_slabs.h": deleted, "group_norm_silu_bwd_pieces.h": divergent}
    )
    broken = emulation.load(library, namespace)
    x, dy = normal(1, 4, 48, 48, seed=1), normal(1, 4, 48, 48, seed=2)
    y, mean, rstd = broken.group_norm_silu_fwd(as_layout(x, True), *[None] * 6, 2, 1e-5, True)
    assert y.isnan().any()  # a warp read what another one had not yet written
    good = emulation.backend()
    y, mean, rstd = good.group_norm_silu_fwd(x, *[None] * 6, 2, 1e-5, True)
    with pytest.raises(RuntimeError, match="deadlock"):
        broken.group_norm_silu_bwd(dy, x, *[None] * 6, mean, rstd, 2, True)
    assert good.group_norm_silu_bwd(dy, x, *[None] * 6, mean, rstd, 2, True)[0].isfinite().all()


KERNELS = """
namespace {
// Sums 64 numbers: into out[0] by shuffles and a barrier; `fault` breaks one thing.
__global__ void sum_kernel(const float* in, float* out, int fault) {
  ENGINE_SHARED(float, halves, [2]);
  ENGINE_DYNAMIC_SHARED(float, copy);
  float value = in[threadIdx.x];
  if (fault == 1 && threadIdx.x == 5) return;  // the others wait for its shuffle for ever
  for (int i = 16; i > 0; i /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, i);
  if (threadIdx.x % 32 == 0) halves[threadIdx.x / 32] = value;
  copy[fault == 2 ? threadIdx.x + 1 : threadIdx.x] = value;
  if (fault != 3) __syncthreads();
  if (threadIdx.x == 0) out[0] = halves[0] + halves[1];
}
std::string said;
}
extern "C" const char* run(const float* in, float* out, int fault) {
  said = "";
  const dim3 grid(1, fault == 4 ? 65536 : 1);
  try {
    ENGINE_LAUNCH(sum_kernel, grid, 64, 64 * sizeof(float), nullptr, in, out, fault);
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}
"""
FAULTS = {
    0: "",
    1: "deadlock",
    2: "wrote past its dynamic shared memory",
    3: "",  # no sentence, but a NaN: the second half was read before it was written
    4: "a device would refuse",
}


@pytest.mark.parametrize("fault", [*FAULTS, 0])
def test_the_emulation_says_what_is_wrong(fault):
    library = compile_library(KERNELS, "-include", str(emulation.HEADER))
    library.run.restype = ctypes.c_char_p
    values, out = torch.arange(64.0), torch.zeros(1)
    said = library.run(
        ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()), fault
    ).decode()
    assert FAULTS[fault] in said and bool(said) == bool(FAULTS[fault])
    if fault == 0:
        assert out.item() == 2016
    if fault == 3:
        assert out.isnan().item()
