"""Every CUDA source compiles for sm_80, sm_90 and sm_100 and keeps to its registers: no GPU needed.

The report of ptxas is kept in build/cuda_report under the hash of the sources. Print it with -s.
"""

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "build" / "cuda_report"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100)

# Registers a thread may use: 65536 / (threads of the largest block × blocks a processor should
# hold). Static shared memory: a launch has 48 KB; with 16 KB three blocks share a processor.
REGISTERS = {
    "forward_noise_kernel": 64,  # 256 threads, four blocks a processor
    "forward_noise_loss_kernel": 64,
    "forward_noise_loss_sum_kernel": 40,
    "forward_noise_grad_kernel": 64,
    "group_norm_silu_fwd_planes_kernel": 80,  # 768 threads
    "group_norm_silu_fwd_cluster_kernel": 80,  # 384 threads, two blocks a processor
    "group_norm_silu_fwd_blocked_planes_kernel": 128,  # 256 threads, two blocks a processor
    "group_norm_silu_fwd_blocked_slabs_kernel": 128,
    "group_norm_silu_bwd_blocked_planes_kernel": 128,
    "group_norm_silu_bwd_blocked_slabs_kernel": 168,  # 192 threads, two blocks
    "group_norm_silu_fwd_slabs_kernel": 104,  # 512 threads
    "group_norm_silu_merge_kernel": 64,
    "group_norm_silu_bwd_planes_kernel": 80,
    "group_norm_silu_bwd_slabs_kernel": 128,  # 512 threads
    "group_norm_silu_bwd_merge_kernel": 64,
    "group_norm_silu_bwd_operands_kernel": 64,
    "transpose_kernel": 40,
    "noise_kernel": 40,
    "reverse_step_contiguous_kernel": 56,
    "reverse_step_channels_last_kernel": 40,
    "reverse_step_general_planes_kernel": 56,
    "reverse_step_general_quads_kernel": 40,
    "reverse_step_threshold_kernel": 40,
}
SHARED = 16 * 1024

PROPERTIES = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\d+)\w*'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((path for path in found if path and Path(path).is_file()), None)


def compile_report(source: Path) -> str:
    """What ptxas says of a source, for all architectures."""
    command = [nvcc(), "-std=c++17", "-O3", "-Xptxas", "-v", "-fatbin", str(source)]
    command += ["-o", os.devnull]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    headers = sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.h")])
    content = b"".join(path.read_bytes() for path in [source, *headers])
    key = hashlib.sha256(" ".join(command).encode() + content).hexdigest()[:16]
    kept = REPORTS / f"{source.stem}-{key}.txt"
    if not kept.exists():
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr}"
        REPORTS.mkdir(parents=True, exist_ok=True)
        kept.write_text(done.stderr)
    return kept.read_text()


def readable(symbols: list[str]) -> list[str]:
    """kernel<T, ...> of mangled names; the names themselves where there is no c++filt."""
    if not shutil.which("c++filt"):
        return symbols
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True)
    names = re.sub(r"engine::|\(anonymous namespace\)::|^void ", "", text.stdout, flags=re.M)
    return [name.split("(")[0] for name in names.splitlines()]


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    """One row per kernel and architecture."""
    if nvcc() is None:
        pytest.skip("nvcc is not installed: the CUDA sources are not compiled for a device here")
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        reports = list(pool.map(compile_report, SOURCES))
    rows = [m.groupdict() for report in reports for m in PROPERTIES.finditer(report)]
    for row, name in zip(rows, readable([r["symbol"] for r in rows]), strict=True):
        row["name"] = name
        row["stem"] = max((k for k in REGISTERS if k in name), key=len, default=name)
        for number in ("arch", "stack", "stores", "loads", "registers"):
            row[number] = int(row[number])
        shared = re.search(r"(\d+) bytes smem", row["rest"])
        row["shared"] = int(shared.group(1)) if shared else 0
    return rows


def test_every_kernel_is_compiled_for_every_architecture(kernels):
    assert {row["stem"] for row in kernels} == set(REGISTERS)
    for architecture in ARCHITECTURES:
        names = [row["name"] for row in kernels if row["arch"] == architecture]
        assert len(names) == len(set(names)) == len(kernels) // len(ARCHITECTURES)


def test_registers_spills_and_shared_memory(kernels):
    print(f"\n{'kernel':56s}" + "".join(f"{f'sm_{a}':>8s}" for a in ARCHITECTURES) + "  shared")
    for name in sorted({row["name"] for row in kernels}):
        rows = {row["arch"]: row for row in kernels if row["name"] == name}
        cells = "".join(f"{rows[a]['registers']:8d}" for a in ARCHITECTURES)
        print(f"{name:56s}{cells}{rows[ARCHITECTURES[0]]['shared']:8d}")
    for row in kernels:
        what = f"{row['name']} for sm_{row['arch']}"
        spilled = (row["stack"], row["stores"], row["loads"])
        assert spilled == (0, 0, 0), f"{what} spills: stack, stores, loads = {spilled} bytes"
        cap = REGISTERS[row["stem"]]
        assert row["registers"] <= cap, f"{what} uses {row['registers']} registers, over {cap}"
        assert row["shared"] <= SHARED, f"{what} uses {row['shared']} bytes of shared memory"


def test_clusters_use_distributed_shared_memory(tmp_path):
    """And compile for sm_90a, as `ENGINE_CUDA_ARCH=90a` builds them, without spills."""
    if nvcc() is None:
        pytest.skip("nvcc is not installed: there is no PTX to look at")
    out = tmp_path / "cluster.ptx"
    source = str(ROOT / "csrc" / "cuda" / "group_norm_silu_cluster.cu")
    command = [nvcc(), "-std=c++17", "-O3", "-arch=sm_90a", source]
    subprocess.run([*command, "-ptx", "-o", str(out)], check=True)
    entries = out.read_text().split(".entry ")[1:]
    assert len(entries) == 3  # dtypes
    for text in entries:
        assert "mapa" in text and text.count("barrier.cluster.arrive") == 2
        assert text.count("barrier.cluster.wait") == 2
    done = subprocess.run(
        [*command, "-Xptxas", "-v", "-cubin", "-o", os.devnull], capture_output=True, text=True
    )
    found = [m.groupdict() for m in PROPERTIES.finditer(done.stderr)]
    assert len(found) == 3
    for row in found:
        assert row["stores"] == row["loads"] == row["stack"] == "0", row["symbol"]
        assert int(row["registers"]) <= REGISTERS["group_norm_silu_fwd_cluster_kernel"]


def test_noise_is_made_of_single_roundings(tmp_path):
    """No fma, and no operation that ptxas may still contract: the noise's bits depend on it."""
    if nvcc() is None:
        pytest.skip("nvcc is not installed: there is no PTX to look at")
    out = tmp_path / "noise.ptx"
    source = ROOT / "csrc" / "cuda" / "noise.cu"
    command = [nvcc(), "-std=c++17", "-O3", "-ptx", "-arch=sm_90", str(source), "-o", str(out)]
    subprocess.run(command, check=True)
    found = set(re.findall(r"\b((?:fma|mul|add|sub|sqrt|div|rcp)\.[\w.]*f32)\b", out.read_text()))
    assert found == {"mul.rn.f32", "add.rn.f32", "sqrt.rn.f32"}
