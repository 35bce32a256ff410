"""Builds the extension engine/_C: the CPU kernels always, the CUDA ones where a toolkit is found.

It is compiled against the torch of the environment it is installed into, through torch's stable
ABI, so one library serves every Python ≥ 3.10 and torch ≥ 2.11. Everything else about the package
stands in pyproject.toml.

    ENGINE_CUDA=0          leave the CUDA kernels out
    ENGINE_CUDA_ARCH=90a   GPU architectures, separated by ";" (default 80;90+PTX)
    CUDA_HOME, CXX, MAX_JOBS as usual
"""

import os
import shutil
import site
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

TORCH = "torch>=2.11"
TARGET_VERSION = 0x020B000000000000  # torch 2.11: the oldest libtorch the library runs on
HEADERS = [*glob("csrc/*.h"), *glob("csrc/cpu/*.h"), *glob("csrc/cuda/*.h")]


def import_torch():
    """The torch of this or, in pip's isolated build, of the target environment; None without."""
    target = [sysconfig.get_paths()[key] for key in ("platlib", "purelib")]
    sys.path += [p for p in (*target, site.getusersitepackages()) if p not in sys.path]
    try:
        import torch
    except ImportError:
        return None
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
        raise SystemExit(f"diffusion-engine needs {TORCH}, but found torch {torch.__version__}.")
    return torch


def cuda_home() -> str | None:
    """A CUDA toolkit with its compiler and headers; `which nvcc` alone may find a wrapper."""
    if os.environ.get("ENGINE_CUDA", "1") == "0":
        return None
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        str(Path(nvcc).resolve().parents[1]) if nvcc else None,
        "/usr/local/cuda",
    ]
    for home in filter(None, candidates):
        if Path(home, "bin/nvcc").is_file() and Path(home, "include/cuda_runtime.h").is_file():
            return home
    return None


def gencode_flags() -> list[str]:
    """Our own flags: torch's detection raises where no GPU is visible."""
    flags = []
    for arch in os.environ.get("ENGINE_CUDA_ARCH", "80;90+PTX").replace(",", ";").split(";"):
        number = arch.strip().replace(".", "").removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.strip().endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def extension(cpp_extension):
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi", "-fno-math-errno"]
    # GCC 12 warns of its own AVX-512 header.
    cxx += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    cxx += ["-fno-trapping-math", f"-DTORCH_TARGET_VERSION={TARGET_VERSION:#018x}ULL"]
    cxx += ["-ffp-contract=off"]  # the noise has the same bits everywhere: no silent fma
    sources = [*sorted(glob("csrc/*.cpp")), *sorted(glob("csrc/cpu/*.cpp"))]
    libraries, library_dirs, nvcc = [], [], []
    cuda_sources, home = sorted(glob("csrc/cuda/*.cu")), cuda_home()
    if home and cuda_sources:
        cpp_extension.CUDA_HOME = home  # None in CPU builds of torch
        sources += cuda_sources
        cxx += ["-DENGINE_CUDA"]
        nvcc = ["-O3", *gencode_flags()]
        # Static, so that the library loads where there is no CUDA runtime.
        libraries = ["cudart_static", "dl", "rt", "pthread"]
        library_dirs = [d for d in (f"{home}/lib64", f"{home}/lib") if os.path.isdir(d)]
    return cpp_extension.CppExtension(
        "engine._C",
        sources,
        depends=HEADERS,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        libraries=libraries,
        library_dirs=library_dirs,
        py_limited_api=True,
    )


def build_command(cpp_extension):
    class Build(cpp_extension.BuildExtension):
        def build_extensions(self):
            compiler = os.environ.get("CXX", "c++").split()[0]
            if shutil.which(compiler) is None:
                raise SystemExit(
                    f"diffusion-engine needs a C++ compiler for its kernels, but there is no "
                    f"{compiler!r}: install one (Debian: apt install g++) or set CXX."
                )
            super().build_extensions()

    return Build


torch = import_torch()
if torch is not None:
    from torch.utils import cpp_extension

    setup(
        ext_modules=[extension(cpp_extension)],
        cmdclass={"build_ext": build_command(cpp_extension)},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
elif sys.argv[1:2] == ["egg_info"]:  # pip's isolated build asks what it has to bring
    setup(setup_requires=[TORCH])
else:
    raise SystemExit(f"diffusion-engine needs {TORCH} to build: pip install torch, then repeat.")
