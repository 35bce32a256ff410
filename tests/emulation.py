"""The CUDA kernels on the CPU: csrc/ops*.cpp and csrc/cuda/*.cu under tests/cuda_on_cpu.h.

`backend()` has the functions of kernels/native.py, but its ops are torch.ops.engine_emu: the same
bindings, with the CUDA launchers registered for CPU tensors. Objects are kept in build/emulation
under the hash of what they were made from.
"""

import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import lock
import torch
from engine.kernels import native
from engine.kernels.boundary import mixed, register_fakes
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "emulation"
HEADER = ROOT / "tests" / "cuda_on_cpu.h"
HEADERS = ("tests/cuda_on_cpu*.h", "csrc/*.h", "csrc/*/*.h")
OPS = tuple(op for op in native.OPS if op not in native.CPU_OPS)
OPS += native.BLOCKED_OPS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# -fno-gnu-unique: a second build in the same process must not share the first one's variables.
# -U_FORTIFY_SOURCE: its longjmp check knows one stack only. -ffp-contract=off: the noise's bits.
FLAGS = ["-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
FLAGS += ["-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-Wno-psabi", "-Wno-unknown-pragmas"]


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def _compile(source: Path, text: str, flags: list[str], headers: bytes) -> Path:
    """→ the object of `text`, which stands where `source` stands."""
    command = [*compiler(), *FLAGS, *flags, "-I", str(source.parent), "-c", "-x", "c++", "-"]
    key = hashlib.sha256(" ".join(command).encode() + headers + text.encode()).hexdigest()[:16]
    target = BUILD / f"{source.stem}-{key}.o"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        command = [*command, "-o", str(partial)]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr}"
        partial.replace(target)
    return target


def build(namespace: str = "engine_emu", patch: dict[str, tuple[str, str]] | None = None) -> Path:
    """→ the library whose ops live in `namespace`; patch: file name → (text, its replacement), of
    .cu files and of headers beside them."""
    with lock.alone("emulation"):
        return _build(namespace, patch)


def _build(namespace: str, patch: dict[str, tuple[str, str]] | None) -> Path:
    headers = b"".join(
        p.read_bytes() for p in sorted([p for where in HEADERS for p in ROOT.glob(where)])
    )
    torch_flags = [f"-I{p}" for p in cpp_extension.include_paths()]
    torch_flags += [f"-DENGINE_NS={namespace}", "-DENGINE_EMULATE"]
    torch_flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", f"-I{ROOT / 'csrc'}"]
    jobs = [(p, torch_flags) for p in sorted(ROOT.glob("csrc/ops*.cpp"))]
    jobs += [(p, ["-include", str(HEADER)]) for p in sorted(ROOT.glob("csrc/cuda/*.cu"))]

    def compile_job(job):
        source, flags = job
        return _compile(source, _patched(source, patch or {}), flags, headers)

    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        objects = [str(o) for o in pool.map(compile_job, jobs)]
    key = hashlib.sha256(" ".join(objects).encode()).hexdigest()[:16]
    library = BUILD / f"{namespace}-{key}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        torch_lib = str(Path(torch.__file__).parent / "lib")
        link = [*compiler(), "-shared", "-Wl,-Bsymbolic", *objects, "-o", str(partial)]
        link += [f"-L{torch_lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_lib}"]
        done = subprocess.run(link, capture_output=True, text=True)
        assert done.returncode == 0, f"the emulation does not link:\n{done.stderr}"
        partial.replace(library)
    return library


def _patched(source: Path, patch: dict[str, tuple[str, str]]) -> str:
    """The text of a file, headers that the patch concerns in place of their #include."""
    text = source.read_text()
    if source.name in patch:
        before, after = patch[source.name]
        assert before in text, f"{source.name} has no {before!r}"
        text = text.replace(before, after, 1)
    for line in re.findall(r'^#include "\w+\.h"$', text, re.M) if patch else ():
        header = source.parent / line.split('"')[1]
        if header.exists() and (inner := _patched(header, patch)) != header.read_text():
            text = text.replace(line, inner.replace("#pragma once", ""), 1)
    return text


@cache
def backend(namespace: str = "engine_emu") -> SimpleNamespace:
    """A back end like kernels/native.py whose ops are the emulated CUDA kernels."""
    return load(build(namespace), namespace)


def load(library: Path, namespace: str) -> SimpleNamespace:
    torch.ops.load_library(library)
    register_fakes(namespace, OPS)
    functions = {op: getattr(getattr(torch.ops, namespace), op).default for op in OPS}
    return SimpleNamespace(**functions, refusals=refusals, available=lambda: None)


def refusals(op: str, *args) -> list[str]:
    """Why the emulation does not serve this call: as kernels/native.py for CUDA tensors."""
    if args[0].device.type != "cpu":
        return [f"needs a CPU tensor, got {args[0].device.type}"]
    for t in args:
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype not in DTYPES:
            return [f"needs float32, bfloat16 or float16, got {t.dtype}"]
    if op == "group_norm_silu" and args[1] is not None:
        return ["needs both halves of x in one layout"] if mixed(args[0], args[1]) else []
    return []
