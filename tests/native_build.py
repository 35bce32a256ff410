"""The CPU kernels as a NumPy module, built from csrc/cpu and tests/native_module.cpp.

No torch is in sight, which proves that the kernels need none.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import lock
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
# Of setup.py.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
EPS = {"f32": 2.0**-23, "bf16": 2.0**-7, "f16": 2.0**-10}


def build() -> Path:
    """Compiles the module into tests/build, once per state of its sources."""
    with lock.alone("native_module"):
        return _build()


def _build() -> Path:
    sources = [HERE / "native_module.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    headers = [CSRC / "kernels.h", CSRC / "philox.h", *sorted((CSRC / "cpu").glob("*.h"))]
    state = hashlib.sha256("".join(FLAGS).encode())
    for path in (*sources, *headers):
        state.update(path.read_bytes())
    folder = HERE / "build" / f"native_module-{state.hexdigest()[:16]}"
    library = folder / f"native_module{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists():
        return library
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    shutil.rmtree(HERE / "build", ignore_errors=True)
    folder.mkdir(parents=True)
    pybind11 = pytest.importorskip("pybind11")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def compile(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [*compiler, *FLAGS, *includes, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = [str(path) for path in pool.map(compile, sources)]
    linked = library.with_suffix(".linked")
    subprocess.run([*compiler, "-shared", *objects, "-pthread", "-o", str(linked)], check=True)
    assert b"libtorch" not in linked.read_bytes()
    linked.rename(library)
    return library


@cache
def load():
    """The built module."""
    spec = importlib.util.spec_from_file_location("native_module", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def encode(values, dtype: str):
    """float64 → the array type of a dtype, rounded to nearest even."""
    if dtype == "f32":
        return np.asarray(values, np.float32)
    if dtype == "f16":
        return np.asarray(values, np.float16)
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(array):
    """The array's values in float64."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def in_layout(array, channels_last: bool):
    return np.ascontiguousarray(array.transpose(0, 2, 1)) if channels_last else array
