"""3×3 convolutions in float32: Winograd's F(2×2, 3×3) against oneDNN's, which PyTorch calls.

`eager` has its weights in oneDNN's own layout, packed for the shape: F.conv2d packs them at every
call. Ours are packed too, but in `training`, where F.conv2d is what a layer calls and ours packs as
well: there a call is forward and both gradients. Both capabilities in processes of their own: avx2
is a machine without AVX-512, for PyTorch, oneDNN and us. GFLOP/s are those of the direct sum.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from measure import in_turns

from engine import winograd
from engine.blocks import Conv2d

# N, C, K, H and W: the small U-Net's at batch 32 and 1, and wider ones.
SHAPES = [
    (32, 64, 64, 32),
    (32, 192, 64, 32),
    (32, 128, 128, 16),
    (32, 256, 128, 16),
    (32, 128, 128, 8),
    (8, 256, 256, 16),
    (1, 64, 64, 32),
    (1, 128, 128, 16),
    (1, 128, 128, 8),
]
TRAINING = SHAPES[:6]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
SETS = {"avx2": AVX2, "avx512": {}}
GEOMETRY = (1, 1), (1, 1), (1, 1), 1


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found - truth).norm() / truth.norm()).item()


def forward(n: int, c: int, k: int, size: int) -> dict:
    layer = Conv2d(c, k, 3, padding=1).requires_grad_(False)
    x = torch.randn(n, c, size, size).to(memory_format=torch.channels_last)
    mine = winograd.packed(layer.weight)
    theirs = torch._C._nn.mkldnn_reorder_conv2d_weight(layer.weight.to_mkldnn(), *GEOMETRY, x.shape)
    pointwise = torch.ops.mkldnn._convolution_pointwise
    functions = {
        "ours": lambda: winograd.conv2d(x, mine, layer.bias),
        "eager": lambda: pointwise(x, theirs, layer.bias, *GEOMETRY, "none", [], ""),
    }
    truth = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    errors = {name: error(function(), truth) for name, function in functions.items()}
    return {"functions": functions, "error": errors, "flop": 2 * 9 * n * c * k * size * size}


def training(n: int, c: int, k: int, size: int) -> dict:
    layer = Conv2d(c, k, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(n, c, size, size).to(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(n, k, size, size).to(memory_format=torch.channels_last)
    leaves = [x, layer.weight, layer.bias]

    def gradients(call) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(call(x), leaves, dy)

    plain = lambda x: F.conv2d(x, layer.weight, layer.bias, padding=1)  # noqa: E731
    functions = {"ours": lambda: gradients(layer), "eager": lambda: gradients(plain)}
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch.autograd.grad(F.conv2d(*wide, padding=1), wide, dy.double())
    errors = {
        name: max(error(a, b) for a, b in zip(function(), truth, strict=True))
        for name, function in functions.items()
    }
    return {"functions": functions, "error": errors, "flop": 6 * 9 * n * c * k * size * size}


def main(kind: str, *sizes: str) -> dict:
    import conftest  # noqa: F401  the same malloc for all

    torch.manual_seed(0)
    with torch.inference_mode(kind == "forward"):
        case = {"forward": forward, "training": training}[kind](*map(int, sizes))
        times = in_turns(list(case["functions"].values()))
    found = dict(zip(case["functions"], map(statistics.median, times), strict=True))
    assert case["error"]["ours"] < 1e-5, case["error"]
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "median_us": {name: round(s * 1e6, 2) for name, s in found.items()},
        "speedup": {"eager": round(found["eager"] / found["ours"], 3)},
        "gflop_per_s": {name: round(case["flop"] / s / 1e9) for name, s in found.items()},
        "relative_error": {name: float(f"{e:.3g}") for name, e in case["error"].items()},
        "rounds": len(times[0]),
    }


def record(benchmark, kind: str, shape: tuple, isa: str) -> None:
    if isa == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this machine has no AVX-512")
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, __file__, kind, *map(str, shape)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root, **SETS[isa]},
    )
    benchmark.extra_info.update(json.loads(done.stdout.splitlines()[-1]))
    benchmark.pedantic(lambda: None, rounds=1)


def ids(shape) -> str:
    return "x".join(map(str, shape)) if isinstance(shape, tuple) else shape


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def bench_conv2d_winograd_forward(benchmark, shape, isa):
    record(benchmark, "forward", shape, isa)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("shape", TRAINING, ids=ids)
def bench_conv2d_winograd_training(benchmark, shape, isa):
    record(benchmark, "training", shape, isa)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
