"""Small cases of every CUDA kernel under compute-sanitizer: memcheck, then racecheck.

`make gpu-sanitize` on a machine with a GPU and a CUDA toolkit. The cases run once under each tool,
without the caching allocator, so that a byte past a tensor is a byte past an allocation; then under
PyTorch's profiler, which must have seen every `__global__` of csrc/cuda.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch

import engine
from engine import dispatch, ops, schedules

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)
# (N, C, H, W), groups: tiny groups, odd sizes, odd C/G, one group, wide, long enough for chunks
SHAPES = (
    ((2, 8, 1, 1), 4),
    ((2, 6, 5, 7), 2),
    ((1, 40, 7, 9), 4),
    ((2, 6, 5, 5), 1),
    ((2, 128, 4, 4), 32),
    ((1, 64, 33, 31), 32),
    ((1, 4, 64, 66), 2),
    ((1, 32, 128, 128), 1),
    ((1, 2048, 2, 2), 2048),
)
ERROR_STATUS = 9


def group_norm(device, impl) -> None:
    for (shape, groups), dtype, order in product(SHAPES, DTYPES, FORMATS):
        g = torch.Generator().manual_seed(0)
        n, c = shape[:2]
        for extra in ((), ("add", "scale", "shift")):
            x, dy = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(2))
            leaves = [x.contiguous(memory_format=order).requires_grad_()]
            leaves += [torch.randn(c, device=device, dtype=dtype, requires_grad=True)] * 2
            given = {
                k: torch.randn(n, c, device=device, dtype=dtype, requires_grad=True) for k in extra
            }
            y = ops.group_norm_silu(*leaves, groups, **given, impl=impl)
            for cotangent in (dy, dy.contiguous(memory_format=torch.channels_last)):
                wanted = [*leaves[:2], *given.values()]
                torch.autograd.grad(y, wanted, cotangent, retain_graph=True)
        y = ops.group_norm_silu(x, None, None, groups, activation="none", impl=impl)
        if c > 1:
            pair = [t.contiguous(memory_format=order) for t in x.split([c - c // 3, c // 3], 1)]
            pair = [t.requires_grad_() for t in pair]
            y = ops.group_norm_silu(pair, *leaves[1:], groups, impl=impl)
            torch.autograd.grad(y, pair, dy)
    if impl == "native" and device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 9:
        x = torch.randn(2, 8, 64, 64, device=device)  # 128 KB a group: two blocks or more
        args = (x, None, *[None] * 5, 1, 1e-5, True, True)
        torch.ops.engine.group_norm_silu_fwd_cluster(*args)
    if impl == "native" and device.type == "cuda":
        for dtype, order in product(DTYPES, FORMATS):
            x = torch.randn(2, 16, 128, 130, device=device, dtype=dtype)
            args = (x.contiguous(memory_format=order), None, *[None] * 5)
            y, *stats = torch.ops.engine.group_norm_silu_fwd_blocked(*args, 2, 1e-5, True, True)
            torch.ops.engine.group_norm_silu_bwd_blocked(y, *args, *stats, 2, True, True)


def diffusion(device, impl) -> None:
    process = engine.Diffusion(schedules.betas("linear", 100), prediction="v")
    rows = process.forward_rows().float().to(device)
    coeffs = torch.rand(10, 5, device=device)
    key, step = (torch.tensor(v, device=device) for v in (7, 3))
    for shape, dtype, order in product(((2, 3, 5, 7), (3, 1, 45, 47)), DTYPES, FORMATS):
        x, out = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        x, z = x.contiguous(memory_format=order), torch.randn(shape, device=device)
        t = torch.arange(shape[0], device=device)
        pictures = torch.randint(256, shape, device=device, dtype=torch.uint8)
        for given in ({"key": key, "offset": 3}, {"noise": z}):
            ops.reverse_step(x, out, coeffs, step, **given, impl=impl)
            variants(x, out, step, given, impl)
        for x0, loss in product((x, pictures), ("l1", "l2", "huber")):
            for given in ({"key": key, "step": step}, {"noise": z}):
                ops.forward_noise(x0, rows, t, **given, dtype=dtype, impl=impl)
                leaf = out.detach().requires_grad_()
                losses = ops.forward_noise_loss(leaf, x0, rows, t, loss=loss, **given, impl=impl)
                torch.autograd.grad(losses, leaf, torch.rand_like(losses))
    for count, offset, dtype in product((1, 1023, 4100), (0, 3), DTYPES):
        ops.noise(key, step, 0, (count,), device=device, dtype=dtype, offset=offset, impl=impl)


def variants(x, out, step, given, impl) -> None:
    """What the general reverse step reads and writes besides."""
    rows = torch.rand(10, 10, device=x.device)
    both = torch.cat([out, out], 1)  # the second half: the network's variance
    ops.reverse_step(x, out, rows, step, uncond=out, guidance=2.0, **given, impl=impl)
    ops.reverse_step(x, out, rows, step, dynamic_threshold=0.9, **given, impl=impl)
    ops.reverse_step(x, both, rows, step, learned_range=True, grad=out, **given, impl=impl)
    more = {"x0_prev": x, "return_x0": True, "model_dtype": torch.float16}
    ops.reverse_step(x, out, rows, step, **more, **given, impl=impl)


def attention(device, impl) -> None:
    for (s, sk, d), dtype in product(((17, 17, 16), (64, 77, 40), (130, 130, 64)), DTYPES):
        leaves = [
            torch.randn(1, 2, length, d, device=device, dtype=dtype, requires_grad=True)
            for length in (s, sk, sk)
        ]
        out = ops.attention(*leaves, impl=impl)
        torch.autograd.grad(out, leaves, torch.randn_like(out))
        if hasattr(ops, "attention_qkv"):
            qkv = torch.randn(1, s, 6 * d, device=device, dtype=dtype, requires_grad=True)
            out = ops.attention_qkv(qkv, 2, impl=impl)
            torch.autograd.grad(out, qkv, torch.randn_like(out))


def run_all(device, impl: str = "native") -> None:
    group_norm(device, impl)
    diffusion(device, impl)
    if not dispatch.absence("attention", impl):
        attention(device, impl)
    if device.type == "cuda":
        torch.cuda.synchronize()


def kernels() -> set[str]:
    """The names of all __global__ functions of csrc/cuda."""
    sources = [p for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in (".cu", ".h", ".cuh")]
    found = set()
    for source in sources:
        code = re.sub(r"//.*", "", source.read_text())
        for text in re.findall(r"__global__([^{;]*)", code):
            text = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", text)
            text = re.sub(r"__cluster_dims__\([^()]*\)", "", text)
            found |= set(re.findall(r"\bvoid\s+(\w+)\s*\(", text))
    return found


def seen_by_profiler(device, impl: str) -> set[str]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run_all(device, impl)
    names = " ".join(event.key for event in found.key_averages())
    return {name for name in kernels() if re.search(rf"\b{name}\b", names)}


def tool() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(home, "bin", "compute-sanitizer") for home in homes if home]
    return shutil.which("compute-sanitizer") or next(
        (str(path) for path in candidates if path.is_file()), None
    )


def sanitize(sanitizer: str, name: str, impl: str) -> int:
    command = [sanitizer, "--tool", name, "--error-exitcode", str(ERROR_STATUS)]
    command += [sys.executable, __file__, "--cases", "--impl", impl]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    print(f"{name}: {' '.join(command)}", flush=True)
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", action="store_true", help="only run the cases, without a tool")
    parser.add_argument("--impl", choices=("native", "triton"), default="native")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("make gpu-sanitize needs a CUDA GPU and a CUDA build of torch; torch finds none")
        return 2
    device = torch.device("cuda")
    if options.cases:
        run_all(device, options.impl)
        return 0
    sanitizer = tool()
    if sanitizer is None:
        print(
            "make gpu-sanitize needs compute-sanitizer of the CUDA toolkit: it is neither on the "
            "PATH nor in $CUDA_HOME/bin"
        )
        return 2
    status = {name: sanitize(sanitizer, name, options.impl) for name in options.tools}
    missed = kernels() - seen_in_another_process(options.impl) if options.impl == "native" else ()
    for name in sorted(missed):
        print(f"not run by any case: {name}")
    for name, code in status.items():
        verdict = {0: "clean", ERROR_STATUS: "errors, see above"}
        print(f"{name}: {verdict.get(code, f'did not finish (status {code})')}")
    return 1 if any(status.values()) or missed else 0


def seen_in_another_process(impl: str) -> set[str]:
    """A process that a kernel's error ends must not take the report with it."""
    code = "import sys, json, torch; sys.path.insert(0, sys.argv[1]); import sanitize;"
    code += "found = sanitize.seen_by_profiler(torch.device('cuda'), sys.argv[2]);"
    code += "open(sys.argv[3], 'w').write(json.dumps(sorted(found)))"
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "kernels.json")
        here = str(Path(__file__).resolve().parent)
        subprocess.run([sys.executable, "-c", code, here, impl, str(answer)], cwd=ROOT)
        return set(json.loads(answer.read_text())) if answer.exists() else set()


if __name__ == "__main__":
    sys.exit(main())
