"""The cooperative kernel of group_norm_silu on the CPU: its waves, its barriers, its numbers."""

import ctypes
from types import SimpleNamespace

import emulation
import pytest
import torch
from test_cuda_emulated import as_layout, check_norm, compile_library, normal

OP = "group_norm_silu"  # poisoned memory, see conftest.py
L2 = 1 << 20
SHARE = 6  # of the L2 that one wave takes: kWavesInL2 of csrc/cuda/group_norm_silu_waves.h


@pytest.fixture
def device():
    """device(blocks, l2, order): blocks that run at once, bytes of L2, seed of the warps' order."""
    library = ctypes.CDLL(str(emulation.build())).cuda_on_cpu_device

    def set_device(*wanted):
        library(*wanted)
        set_device.last = wanted

    yield set_device
    library(2, L2, 0)


@pytest.fixture
def blocked(device):
    cuda = emulation.backend()

    def bwd(*args):
        blocks, l2, order = device.last
        device(blocks, 2 * l2, order)  # as many waves as the forward: x and dy are read twice
        return cuda.group_norm_silu_bwd_blocked(*args, True)

    return SimpleNamespace(
        group_norm_silu_fwd=lambda *args: cuda.group_norm_silu_fwd_blocked(*args, True),
        group_norm_silu_bwd=bwd,
    )


def l2_for(shape, dtype, waves: int) -> int:
    n, c, h, w = shape
    return SHARE * -(-n * c * h * w * dtype.itemsize // waves)


SHAPES = {  # (N, C, H, W), groups; the most waves that the groups allow, contiguous and the other
    "planes in pieces": ((2, 4, 128, 129), 2, (4, 2)),
    "odd planes": ((1, 2, 181, 183), 2, (2, 1)),
    "three channels a group": ((1, 15, 97, 103), 5, (5, 1)),
    "groups in pieces": ((2, 1000, 2, 2), 1, (2, 2)),
    "an empty last piece": ((1, 2, 129, 127), 1, (1, 1)),
    "three slabs": ((1, 96, 33, 35), 6, (0, 3)),
    "slabs of three groups": ((2, 24, 50, 52), 4, (0, 2)),
    "wide groups": ((1, 1536, 5, 2), 2, (0, 2)),
    "wide odd groups": ((1, 1030, 3, 3), 2, (0, 2)),
    "one group": ((1, 520, 12, 12), 1, (1, 1)),
}
LAYOUTS = [(name, last) for name in SHAPES for last in (False, True) if SHAPES[name][2][last]]
DEVICES = {"one block": (1, 1, 0), "two blocks": (2, 9, 0), "five blocks, any order": (5, 3, 7)}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name, last", LAYOUTS)
def test_waves(blocked, device, name, last, on):
    shape, groups, waves = SHAPES[name]
    blocks, most, order = DEVICES[on]
    dtype = torch.bfloat16 if blocks == 2 and shape[1] > 900 else torch.float32
    device(blocks, l2_for(shape, dtype, min(most, waves[last])), order)
    check_norm(blocked, shape, groups, dtype, last, other_dy=blocks == 2)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(blocked, device, dtype, last):
    shape = (2, 8, 128, 130)
    device(3, l2_for(shape, dtype, 2), 1)
    check_norm(blocked, shape, 2, dtype, last)
    device(3, l2_for(shape, dtype, 2), 1)
    check_norm(blocked, shape, 2, dtype, last, misaligned=True)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("second", [1, 7, 8])
def test_pairs_with_a_seam_in_a_group(blocked, device, second, last):
    shape = (2, 12, 97, 101)
    device(3, l2_for(shape, torch.float32, 2), 5)
    check_norm(blocked, shape, 4, torch.float32, last, other_dy=second == 7, second=second)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_large_mean_and_small_spread(blocked, device, last):
    shape = (1, 2, 184, 184)
    device(3, l2_for(shape, torch.float32, 1), 2)
    check_norm(blocked, shape, 1, torch.float32, last, mean=1e3, std=1e-2, bwd=False)
    check_norm(blocked, shape, 1, torch.float16, last, mean=0.0, std=1.5e4, bwd=False)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_the_same_bits_on_every_grid(blocked, device, last):
    """The pieces of x do not depend on the blocks that take them, nor on their order in time."""
    x = as_layout(normal(3, 64, 33, 61, seed=1, at=1.0), last)
    dy = as_layout(normal(3, 64, 33, 61, seed=4), last)
    args = (None, normal(64, seed=2), normal(64, seed=3), *[None] * 3, 4, 1e-5, True)
    found = []
    for blocks, waves, order in ((1, 1, 0), (2, 3, 1), (5, 2, 2), (7, 3, 3), (16, 1, 4)):
        device(blocks, l2_for(x.shape, x.dtype, waves), order)
        y, mean, rstd = blocked.group_norm_silu_fwd(x, *args)
        rest = (None, *args[1:6], mean, rstd, 4, True)
        found.append((y, mean, rstd, *blocked.group_norm_silu_bwd(dy, x, *rest)))
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0], strict=True))


def test_what_it_leaves_to_the_portable_path(device):
    cuda = emulation.backend()
    for shape, l2 in (((2, 8, 16, 16), L2), ((1, 4, 128, 129), SHARE * 4 * 2 * 128 * 129 - 1)):
        x = normal(*shape, seed=1)
        args = (x, None, *[None] * 5, 2, 1e-5, True)
        device(2, l2, 0)
        with pytest.raises(RuntimeError, match="cooperative grid"):
            cuda.group_norm_silu_fwd_blocked(*args, True)
        got = cuda.group_norm_silu_fwd_blocked(*args, False)
        expected = cuda.group_norm_silu_fwd(*args)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        args = (expected[0], *args[:-3], *expected[1:], 2, True)
        with pytest.raises(RuntimeError, match="cooperative grid"):
            cuda.group_norm_silu_bwd_blocked(*args, True)
        got, expected = (
            cuda.group_norm_silu_bwd_blocked(*args, False),
            cuda.group_norm_silu_bwd(*args),
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    device(2, l2 + 1, 0)  # one byte more, and a group fits
    args = (x, None, *[None] * 5, 2, 1e-5, True)
    assert cuda.group_norm_silu_fwd_blocked(*args, True)[0].isfinite().all()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_opcheck(device, last):
    a, b = (as_layout(normal(1, c, 64, 65, seed=c), last) for c in (5, 7))
    device(2, l2_for((1, 12, 64, 65), a.dtype, 1), 0)
    cuda, rest = emulation.backend(), (a, b, normal(12, seed=1), *[None] * 4)
    torch.library.opcheck(cuda.group_norm_silu_fwd_blocked, (*rest, 1, 1e-5, True, True))
    dy, stats = as_layout(normal(1, 12, 64, 65, seed=2), not last), [torch.rand(1, 1)] * 2
    device(2, 2 * device.last[1], 0)
    torch.library.opcheck(cuda.group_norm_silu_bwd_blocked, (dy, *rest, *stats, 1, True, True))


# ---- The plan -----------------------------------------------------------------------------------

PLAN = """
#include "cuda/group_norm_silu_waves.h"
extern "C" int plan(int64_t samples, int64_t per_sample, int64_t pieces, int64_t bytes, int64_t l2,
                    int64_t blocks, int64_t* found) {
  engine::Waves waves;
  const engine::Bundles all = {samples, per_sample, 1, pieces, bytes};
  if (!engine::choose_waves(all, {l2, blocks}, &waves)) return 0;
  found[0] = waves.pieces, found[1] = waves.length, found[2] = waves.count;
  found[3] = waves.blocks;
  return 1;
}
"""


@pytest.fixture(scope="module")
def plan():
    library = compile_library(PLAN, f"-I{emulation.ROOT / 'csrc'}")
    plan = library.plan
    plan.argtypes = [ctypes.c_int64] * 6 + [ctypes.POINTER(ctypes.c_int64)]

    def call(*args):
        found = (ctypes.c_int64 * 4)()
        return tuple(found) if plan(*args, found) else None

    return call


H100 = 50 << 20, 132 * 2
MB = 1 << 20


def test_the_plan_covers_every_piece_and_keeps_to_the_l2(plan):
    g = torch.Generator().manual_seed(0)
    for _ in range(2000):
        samples, per_sample, pieces, kib, l2, blocks = (
            int(torch.randint(1, most, (), generator=g)) for most in (9, 40, 200, 9000, 60, 600)
        )
        found = plan(samples, per_sample, pieces, kib << 10, l2 * MB, blocks)
        if SHARE * (kib << 10) > l2 * MB:
            assert found is None
            continue
        total, length, count, grid = found
        assert total == samples * per_sample * pieces and length % pieces == 0
        assert (count - 1) * length < total <= count * length
        assert SHARE * (length // pieces) * (kib << 10) <= l2 * MB
        assert 1 <= grid <= min(blocks, length)
        assert -(-length // grid) == -(-length // blocks)  # no block has more than it must
    assert plan(1, 4, 4, MB, 50 * MB, 0) is None


@pytest.mark.parametrize(
    "samples, per_sample, pieces, bytes, expected",
    [
        (8, 32, 16, MB // 2, (4096, 256, 16, 256)),  # LSUN-a, contiguous
        (8, 32, 32, MB, (8192, 256, 32, 256)),  # ADM256-a, contiguous
        (8, 2, 256, 8 * MB, (4096, 256, 16, 256)),  # LSUN-a, channels_last: slabs of 128 bytes
        (1, 32, 64, 2 * MB, (2048, 256, 8, 256)),  # VAE-a, contiguous
        (1, 4, 512, 16 * MB, None),  # VAE-a, channels_last, even of 64 bytes
        (1, 1, 24, 3 * MB // 4, (24, 24, 1, 24)),
    ],
)
def test_the_plan_of_an_h100(plan, samples, per_sample, pieces, bytes, expected):
    assert plan(samples, per_sample, pieces, bytes, *H100) == expected


# ---- Faults, so that the tests above are known to find them -------------------------------------

FAULTS = {
    1: ("        grid.barrier_wait(", "        if (fault != 1) grid.barrier_wait("),
    2: ("        __syncthreads();  // the next", "        if (fault != 2) __syncthreads();  //"),
    3: ("tile.parts * tile.s_parts, p.eps", "tile.parts * tile.s_parts - (fault == 3), p.eps"),
    4: ("if (apply && turn <= waves", "if ((fault != 4 || blockIdx.x) && apply && turn <= waves"),
    5: ("turn - 2 : turn", "turn - 2 + (fault == 5 && turn > 1) : turn"),
}
CALL = """
}  // namespace
}  // namespace engine
extern "C" __attribute__((visibility("default"))) const char* run(
    int number, int last, const float* x, float* y, float* statistics, float* partials) {
  static std::string said;
  said = "";
  engine::fault = number;
  engine::GroupNormSilu p = {2, 32, 65 * 63, 4, 1e-5f, true, last != 0, engine::DType::f32, x};
  const auto allocate = [&](int64_t) { return partials; };
  try {
    auto* launch = last ? engine::launch_blocked_slabs<float, 4>
                        : engine::launch_blocked_planes<float, false>;
    if (!launch(p, y, statistics, statistics + 8, allocate, nullptr)) said = "refused";
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}
"""


@pytest.fixture(scope="module")
def faulty():
    folder = emulation.ROOT / "csrc" / "cuda"
    text = (folder / "group_norm_silu_blocked.cu").read_text().split("\n}  // namespace\n\nbool")[0]
    shared = (folder / "group_norm_silu_cooperative.h").read_text().replace("#pragma once", "")
    text = text.replace('#include "group_norm_silu_cooperative.h"', shared)
    for before, after in FAULTS.values():
        assert before in text, f"the kernel has no {before!r}"
        text = text.replace(before, after, 1)
    text = text.replace("constexpr int", "int fault = 0;\nconstexpr int", 1)
    library = compile_library(text + CALL, "-include", str(emulation.HEADER), f"-I{folder}")
    library.run.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_faults_are_found(faulty, last):
    """A barrier, a piece of the merge, an arrival left out; an apply before the merge."""
    x = as_layout(normal(2, 32, 65, 63, seed=1, at=1.0), last)
    truth = emulation.backend().group_norm_silu_fwd(x, *[None] * 6, 4, 1e-5, True)[0]

    def error(fault, order) -> float:
        y, partials = torch.full_like(x, torch.nan), torch.full((1 << 16,), torch.nan)
        tensors = (x, y, torch.zeros(16), partials)
        faulty.cuda_on_cpu_device(3, l2_for(x.shape, x.dtype, 2), order)
        said = faulty.run(fault, int(last), *(ctypes.c_void_p(t.data_ptr()) for t in tensors))
        if fault == 4:
            assert b"deadlock" in said
            return torch.inf
        assert said == b""
        difference = (y - truth).abs().nan_to_num(nan=torch.inf)
        return difference.max().item()

    orders = range(4)
    assert all(error(0, order) < 1e-5 for order in orders)
    for fault in FAULTS if last else (1, 4, 5):  # planes have barriers enough between pieces
        assert any(error(fault, order) > 1e-4 for order in orders), f"fault {fault} is not seen"
    assert error(0, 1) < 1e-5  # after a deadlock too
