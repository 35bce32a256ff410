"""Which benchmarks run, on what; names the machine in every result, and nothing of whose it is.

`pytest benchmarks` measures on the CPU, `pytest benchmarks --gpu` on the GPU, and nothing else.
"""

import contextlib
import ctypes
import importlib.metadata
import platform
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent))

# glibc gives large blocks back to the system at every free, and each new result then costs a page
# fault per 4 KB. Keep them, for all contenders alike: M_MMAP_THRESHOLD (-3), M_TRIM_THRESHOLD (-1).
with contextlib.suppress(AttributeError, OSError):
    _libc = ctypes.CDLL(None)
    _libc.mallopt(-3, 32 * 2**20)
    _libc.mallopt(-1, 2**30)


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def capability() -> str:
    """PyTorch's vectors, and the instructions for bfloat16."""
    vectors = torch.backends.cpu.get_cpu_capability()
    if torch.cpu._is_amx_tile_supported():
        return f"{vectors} with AMX"
    return f"{vectors} with AVX512_BF16" if torch.cpu._is_avx512_bf16_supported() else vectors


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info.clear()
    machine_info.update(
        cpu=cpu_name(),
        capability=capability(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=version("triton"),
    )


def pytest_benchmark_update_commit_info(config, commit_info) -> None:
    for key in ("project", "branch", "author_time"):
        commit_info.pop(key, None)


def pytest_addoption(parser) -> None:
    group = parser.getgroup("benchmarks on a GPU")
    group.addoption("--gpu", action="store_true", help="the GPU's benchmarks instead of the CPU's")
    group.addoption("--stand-in", action="store_true", help="the CPU in the GPU's place: a test")
    group.addoption("--mode", choices=("quick", "default", "full"), default="default")
    group.addoption("--results", default=str(Path(__file__).parent / "results"), metavar="FOLDER")
    group.addoption("--until", type=float, help="nothing new begins after this time() (5 min)")
    group.addoption("--go-on", action="store_true", help="keep what an earlier process measured")


def pytest_configure(config) -> None:
    """config.gpu: the device, its results, and until when."""
    config.gpu = None
    if not config.getoption("--gpu"):
        return
    import pytest
    from gpu_device import Cuda, StandIn
    from gpu_results import Results, slug

    if not config.getoption("--stand-in") and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu needs a CUDA GPU and a CUDA build of torch; none is found")
    # pytest-benchmark's own table holds calls as Python pays them, no kernel's time. Its versions
    # before 5.2 know no such option.
    if hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True
    # A backward with retain_graph must not find its saved tensors given away.
    with contextlib.suppress(ImportError, AttributeError):
        import torch._functorch.config as functorch

        functorch.donated_buffer = False
    end = config.getoption("--until")
    until = time.monotonic() + (300 if end is None else end - time.time())
    device = StandIn() if config.getoption("--stand-in") else Cuda()
    results = Results(Path(config.getoption("--results"), f"{slug(device.name)}.json"))
    mode = config.getoption("--mode")
    if config.getoption("--go-on") and results.data.get("cases") is not None:
        results.crash("the process ended here")
    else:
        results.begin(device, mode)
    config.gpu = SimpleNamespace(device=device, results=results, mode=mode, until=until)


def pytest_ignore_collect(collection_path, config) -> bool | None:
    name, on_gpu = collection_path.name, bool(config.getoption("--gpu"))
    other = name.startswith("bench_") and name.startswith("bench_gpu") != on_gpu
    return True if other else None


def pytest_sessionfinish(session) -> None:
    gpu = getattr(session.config, "gpu", None)
    if gpu is not None:
        gpu.results.data["device"]["after"] = gpu.device.state()
        gpu.results.finish()
