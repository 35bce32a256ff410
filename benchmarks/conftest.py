"""Names the machine in every result, and nothing that identifies whose it is."""

import contextlib
import ctypes
import importlib.metadata
import platform

import torch

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


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info.clear()
    machine_info.update(
        cpu=cpu_name(),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=version("triton"),
    )


def pytest_benchmark_update_commit_info(config, commit_info) -> None:
    for key in ("project", "branch", "author_time"):
        commit_info.pop(key, None)
