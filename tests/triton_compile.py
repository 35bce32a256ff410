"""Compiles every Triton kernel for one GPU architecture without a GPU: python triton_compile.py 90

The launchers run on meta tensors under a driver that only names a target, so that each kernel is
compiled with exactly the hints, constants and options of a real launch; nothing is executed.
Prints a JSON line per kernel: registers, stack (spills), shared memory, tensor-core and fma counts.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
WIDE = re.compile(
    r"\b(?:ld|st)\.global\S*\.(?:v4\.b32|v2\.b64)|cp\.async\.cg\.\S+ .*?, (?:0x10|16)"
)
TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")
HEAD_DIMS = (16, 32, 40, 48, 64, 80, 96, 128, 144, 160, 192, 256, 512)
ALL = os.environ.get("ENGINE_COMPILE_ALL", "0") != "0"  # every head dim in every way: minutes


class TargetOnly:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def report(arch: int, label: str, kernel, seconds: float) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        # Disassembling takes as long as compiling: only where instructions are looked for.
        products = "_attention" in kernel.name and "delta" not in kernel.name
        what = ["--dump-resource-usage"] + ["--dump-sass"] * (products and arch == 90)
        command = [CUOBJDUMP, *what, file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"\b(REG|STACK):(\d+)", dump))
    ptx = kernel.asm["ptx"]
    return {
        "label": label,
        "kernel": kernel.name,
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),  # bytes; registers are spilled there and nowhere else
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "tensor_core": len(TENSOR_CORE.findall(ptx)) if products else None,
        "hgmma": dump.count("HGMMA"),
        "wide_access": len(WIDE.findall(ptx)),
        "fma": ptx.count("fma.rn.f32"),
        "seconds": round(seconds, 2),
    }


def meta(*shape: int, dtype=torch.float32, last: bool = False) -> torch.Tensor:
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if last else t


def launches(arch: int):
    """(label, launcher, arguments): layouts, dtypes and sizes of real models, on meta tensors."""
    from engine.kernels import (
        attention,
        forward_noise,
        group_norm_silu,
        noise,
        reverse_step,
        rms_norm_silu,
    )

    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32

    def group_norm(n, c, side, groups, dtype, last, dy_last=None):
        x = meta(n, c, side, side, dtype=dtype, last=last)
        dy = meta(n, c, side, side, dtype=dtype, last=last if dy_last is None else dy_last)
        vectors = [meta(c, dtype=dtype) for _ in range(2)]
        vectors += meta(n, 3 * c, dtype=dtype).chunk(3, dim=1)
        stats = [meta(n, groups) for _ in range(2)]
        label = f"{n},{c},{side},{side} G{groups} {str(dtype)[6:]} {'NHWC' if last else 'NCHW'}"
        yield label, group_norm_silu.group_norm_silu_fwd, (x, None, *vectors, groups, 1e-5, True)
        backward = (dy, x, None, *vectors, *stats, groups, True)
        yield label, group_norm_silu.group_norm_silu_bwd, backward

    yield from group_norm(32, 128, 32, 32, bf16, False)  # resident
    yield from group_norm(32, 128, 32, 32, bf16, True)  # forward resident, backward large
    yield from group_norm(8, 128, 256, 32, bf16, False)  # large
    yield from group_norm(64, 384, 32, 32, bf16, True)  # large, C/G = 12
    yield from group_norm(32, 512, 4, 32, f16, True, dy_last=False)
    yield from group_norm(2, 96, 7, 1, f32, False)  # nothing is aligned
    yield from group_norm(8, 64, 1, 64, f32, False)  # groups of one element

    def pair(n, ca, cb, side, groups, dtype, last):
        x, x2 = (meta(n, c, side, side, dtype=dtype, last=last) for c in (ca, cb))
        dy = meta(n, ca + cb, side, side, dtype=dtype, last=last)
        operands = [meta(ca + cb, dtype=dtype) for _ in range(2)] + [None] * 3
        stats = [meta(n, groups) for _ in range(2)]
        label = f"{n},{ca}+{cb},{side},{side} G{groups} {'NHWC' if last else 'NCHW'}"
        forward = (x, x2, *operands, groups, 1e-5, True)
        yield label, group_norm_silu.group_norm_silu_fwd, forward
        backward = (dy, x, x2, *operands, *stats, groups, True)
        yield label, group_norm_silu.group_norm_silu_bwd, backward

    yield from group_norm(64, 192, 64, 32, bf16, False)  # walk, C/G = 6
    yield from group_norm(16, 640, 32, 32, f16, True)  # walk forward
    yield from pair(128, 256, 128, 32, 32, bf16, False)  # a group of 12 straddles the seam
    yield from pair(128, 256, 128, 32, 32, bf16, True)
    yield from pair(8, 320, 160, 64, 32, bf16, False)  # large

    def rms_norm(n, c, side, dtype, last, dy_last=None):
        x = meta(n, c, side, side, dtype=dtype, last=last)
        dy = meta(n, c, side, side, dtype=dtype, last=last if dy_last is None else dy_last)
        operands = (meta(c, dtype=dtype), *meta(n, 2 * c, dtype=dtype).chunk(2, dim=1))
        label = f"{n},{c},{side},{side} {str(dtype)[6:]} {'NHWC' if last else 'NCHW'}"
        yield label, rms_norm_silu.rms_norm_silu_fwd, (x, *operands, 1e-12, True)
        backward = (dy, x, *operands, meta(n, side * side), True)
        yield label, rms_norm_silu.rms_norm_silu_bwd, backward

    yield from rms_norm(32, 64, 32, bf16, False)
    yield from rms_norm(32, 512, 16, bf16, False)
    yield from rms_norm(32, 512, 16, bf16, True)
    yield from rms_norm(16, 1024, 8, f32, False)
    yield from rms_norm(8, 4096, 8, f16, False)  # walk
    yield from rms_norm(32, 256, 16, f16, True, dy_last=False)
    yield from rms_norm(2, 96, 7, f32, False)  # nothing is aligned

    def attend(n, heads, s, sk, d, dtype):
        q = meta(n, s, 3, heads, d, dtype=dtype)[:, :, 0].transpose(1, 2)
        k = meta(n, sk, 3, heads, d, dtype=dtype)[:, :, 1].transpose(1, 2)
        out, lse = meta(n, s, heads, d, dtype=dtype).transpose(1, 2), meta(n, heads, s)
        label = f"{n},{heads},{s},{sk},{d} {str(dtype)[6:]}"
        yield label, attention.attention_fwd, (q, k, k, d**-0.5)
        yield label, attention.attention_bwd, (out, q, k, k, out, lse, d**-0.5)

    # Each head dim in each way on one of the architectures.
    ways = ((1024, bf16), (256, f16), (1024, f32))
    for i, d in enumerate(HEAD_DIMS):
        for j, (s, dtype) in enumerate(ways):
            if ALL or (i + j) % 3 == (80, 90, 100).index(arch):
                yield from attend(8, 4, s, s, d, dtype)
    for s, d in ((64, 64), (128, 128), (77, 40)):  # the backward of few keys
        yield from attend(8, 4, s, s, d, bf16)
    yield from attend(2, 8, 4096, 77, 40, f16)
    yield from attend(2, 8, 1023, 1000, 128, bf16)  # ends of blocks are masked
    for order in ("3hd", "hd3"):
        qkv, out, lse = (
            meta(8, 256, 768, dtype=bf16),
            meta(8, 256, 256, dtype=bf16),
            meta(8, 4, 256),
        )
        label = f"qkv {order}"
        yield label, attention.attention_qkv_fwd, (qkv, 4, order, 0.1)
        yield label, attention.attention_qkv_bwd, (out, qkv, out, lse, 4, order, 0.1)

    key, step = meta(1, dtype=torch.int64), meta(1, dtype=torch.int64)
    yield "f32", noise.noise_fwd, (meta(1 << 20), key, step, 0, 0)
    yield "bf16 offset 3", noise.noise_fwd, (meta(1 << 20, dtype=bf16), key, step, 2, 3)
    x, coeffs = meta(128, 3, 32, 32), meta(1000, 5)
    last = meta(128, 3, 32, 32, dtype=bf16, last=True)
    yield "f32", reverse_step.reverse_step_fwd, (x, last, coeffs, step, key, None, 1.0, 0)
    yield "bf16 noise", reverse_step.reverse_step_fwd, (last, x, coeffs, step, None, x, 1.0, 0)
    wide, m, out = meta(1000, 10), meta(128), meta(256, 6, 32, 32, dtype=bf16)
    cond, uncond = out.chunk(2)
    results, step_of = (x, x, meta(128, 3, 32, 32, dtype=bf16)), reverse_step.general
    yield "2M", step_of.reverse_step_general_fwd, (
        x, x, None, x, last, None, None, x, None, wide, step, key, None, 1.0, 1.0, 0
    )  # fmt: skip
    yield "all", step_of.reverse_step_general_fwd, (
        *results, x, cond, uncond, x, x, m, wide, step, key, None, 2.5, 1.0, 0
    )  # fmt: skip
    yield "guided", step_of.reverse_step_threshold_fwd, (
        m, x, cond[:, :3], uncond[:, :3], None, wide, step, 2.5, 0.995
    )  # fmt: skip

    coeffs, t, weights = meta(1000, 4), meta(128, dtype=torch.int64), meta(128)
    pictures = meta(128, 3, 32, 32, dtype=torch.uint8)
    drawn, given = (key, step, None, 0), (None, None, x, 0)
    out = meta(128, 3, 32, 32, dtype=bf16)
    yield "bf16 of uint8", forward_noise.forward_noise_fwd, (out, pictures, coeffs, t, *drawn)
    yield "NHWC of f32, noise", forward_noise.forward_noise_fwd, (last, x, coeffs, t, *given)
    for name, rest in (("drawn", (None, *drawn)), ("weights, noise", (weights, *given))):
        arguments = (out, x, coeffs, t, *rest, 2)
        yield f"bf16 huber {name}", forward_noise.forward_noise_loss_fwd, arguments
        yield f"bf16 huber {name}", forward_noise.forward_noise_loss_bwd, (weights, *arguments)


def main(arch: int) -> None:
    triton.runtime.driver.set_active(TargetOnly(arch))
    from engine.kernels import attention_short, attention_tiles

    for module in (attention_short, attention_tiles):  # of a device that is not there
        module.has_wgmma = lambda device: arch in (90, 100)
    compile_only, label, seen = JITFunction.run, "", set()

    def run(self, *args, grid, warmup, **kwargs):
        start = time.perf_counter()
        kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            print(json.dumps(report(arch, label, kernel, time.perf_counter() - start)), flush=True)
        return kernel

    JITFunction.run = run
    for label, launcher, arguments in launches(arch):  # noqa: B007
        launcher(*arguments)


if __name__ == "__main__":
    main(int(sys.argv[1]))
