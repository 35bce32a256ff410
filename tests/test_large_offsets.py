"""More than 2³¹ elements: the ends of such calls on every back end, their fakes, their launches."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import emulation
import pytest
import torch
from engine.kernels import boundary

HERE = Path(__file__).resolve().parent


def native_library() -> Path:
    pytest.importorskip("pybind11")
    import native_build

    return native_build.build()


def no_library() -> str:
    pytest.importorskip("triton")
    return ""


# Back end → what makes its library for tests/large_offsets.py.
LIBRARIES = {"native": native_library, "triton": no_library, "cuda-emulated": emulation.build}


@pytest.mark.parametrize("backend", LIBRARIES)
def test_the_last_elements_are_right(backend):
    """In a process of its own: a wrapped offset may end it."""
    library = LIBRARIES[backend]()
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, HERE / "large_offsets.py", backend, str(library)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [f"{r['case']}: {r['wrong']}" for r in reports if "wrong" in r]
    assert not wrong, "\n".join(wrong)
    last = reports[-1]["case"] if reports else "the first case"
    assert done.returncode == 0, (
        f"after {last!r} an access outside its tensors ended the process ({done.returncode}):\n"
        f"{done.stderr[-2000:]}"
    )
    assert sum(r["megabytes"] for r in reports) < 200, reports
    skipped = [f"{r['case']}: {r['skip']}" for r in reports if "skip" in r]
    if skipped:
        pytest.skip("; ".join(skipped))


def meta(*shape: int, dtype=torch.float16, last: bool = False) -> torch.Tensor:
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if last else t


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_fakes(last):
    x, rows = meta(2**16 + 1, 64, 32, 32, last=last), meta(2**16 + 1, 64)
    stats = meta(2**16 + 1, 8, dtype=torch.float32)
    y, mean, rstd = boundary.FAKES["group_norm_silu_fwd"](
        x, None, None, None, rows, rows, rows, 8, 1e-5, True
    )
    assert y.shape == x.shape and y.stride() == x.stride()
    assert mean.shape == rstd.shape == stats.shape
    dx, _, dweight, _, dadd, *_ = boundary.FAKES["group_norm_silu_bwd"](
        x, x, None, None, None, rows, None, None, stats, stats, 8, True
    )
    assert dx.stride() == x.stride() and dweight.shape == (0,) and dadd.shape == rows.shape
    step = boundary.FAKES["reverse_step_fwd"](x, x, None, None, None, None, 1.0, 0)
    assert step.stride() == x.stride()


def test_fakes_of_attention():
    q = meta(2**12 + 1, 1024, 8, 64).transpose(1, 2)
    out, lse = boundary.FAKES["attention_fwd"](q, q, q, 0.125)
    assert out.shape == q.shape and out.stride() == q.stride() and lse.shape == q.shape[:3]
    for gradient in boundary.FAKES["attention_bwd"](out, q, q, q, out, lse, 0.125):
        assert gradient.stride() == q.stride()


@pytest.fixture
def grids(monkeypatch) -> list:
    """The grids of Triton launches, which then do not run."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    found = []
    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(
            kind, "__getitem__", lambda self, grid: lambda *_, **__: found.append(grid)
        )
    return found


def norm(shape, groups, last=False):
    from engine.kernels import group_norm_silu

    x, stats = meta(*shape, last=last), meta(shape[0], groups, dtype=torch.float32)
    operands = (None, None, None, *[meta(*shape[:2])] * 3)
    group_norm_silu.group_norm_silu_fwd(x, *operands, groups, 1e-5, True)
    group_norm_silu.group_norm_silu_bwd(x, x, *operands, stats, stats, groups, True)


def rms(*shape, last=False):
    from engine.kernels import rms_norm_silu

    x, operands = meta(*shape, last=last), (meta(shape[1]), *[meta(*shape[:2])] * 2)
    _, rstd = rms_norm_silu.rms_norm_silu_fwd(x, *operands, 1e-12, True)
    rms_norm_silu.rms_norm_silu_bwd(x, x, *operands, rstd, True)


def attend(n, heads, s, d):
    from engine.kernels import attention

    q = meta(n, s, heads, d).transpose(1, 2)
    out, lse = attention.attention_fwd(q, q, q, 0.1)
    attention.attention_bwd(out, q, q, q, out, lse, 0.1)


def draw(n, offset=0):
    from engine.kernels import noise

    noise.noise_fwd(meta(n), *[meta(1, dtype=torch.int64)] * 2, 0, offset)


def step(*shape):
    from engine.kernels import reverse_step

    x, key = meta(*shape), [meta(1, dtype=torch.int64)] * 2
    reverse_step.reverse_step_fwd(x, x, meta(9, 5), *key, None, 1.0, 0)


def test_triton_refuses_positions_past_32_bits():
    pytest.importorskip("triton")
    from engine.kernels import group_norm_silu

    for positions, sentences in ((2**31 - 1, 0), (2**31, 1)):
        x = torch.empty(1, 4, positions, 1, device="meta")
        found = group_norm_silu.refusals("group_norm_silu", x, *[None] * 6, 2, 1e-5, True)
        assert sum("2^31" in reason for reason in found) == sentences


LAUNCHES = {  # of 2³² elements and more, cut in every way
    "many samples": partial(norm, (2**21, 64, 8, 8), 32),
    "many samples, channels_last": partial(norm, (2**21, 64, 8, 8), 32, last=True),
    "a long sample": partial(norm, (1, 8, 2**17, 2**14), 4),
    "a long sample, channels_last": partial(norm, (1, 8, 2**17, 2**14), 4, last=True),
    "a wide sample": partial(norm, (1, 2**24, 32, 32), 2**12),
    "many pixels": partial(rms, 2**21, 64, 8, 8),
    "many pixels, channels_last": partial(rms, 2**21, 64, 8, 8, last=True),
    "many channels": partial(rms, 2**10, 2**18, 4, 4),
    "many heads": partial(attend, 2**20, 16, 64, 32),
    "long rows": partial(attend, 1, 1, 2**26, 128),
    "noise": partial(draw, 2**34, 2**35),
    "step": partial(step, 2**20, 64, 16, 16),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_triton_grids_are_within_a_launch(name, grids):
    LAUNCHES[name]()
    assert grids and all(len(grid) == 1 and 0 < grid[0] < 2**31 for grid in grids)


def test_more_programs_than_a_launch_has(grids):
    with pytest.raises(RuntimeError, match="more programs than one launch has"):
        draw(2**42)
    assert not grids
