"""Every Triton kernel compiled, not run, for sm_80, sm_90 and sm_100: registers, spills, memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parent.parent
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# All fit 99 KB, so that they also run on the smaller chips of each generation (sm_86, 89, 120).
SHARED_BUDGET = 99 * 1024
KERNELS = {
    "_attention_delta_kernel",
    "_attention_dkdv_kernel",
    "_attention_dq_kernel",
    "_attention_fwd_kernel",
    "_attention_short_bwd_kernel",
    "_attention_short_fwd_kernel",
    "_forward_noise_fwd_kernel",
    "_forward_noise_loss_bwd_kernel",
    "_forward_noise_loss_kernel",
    "_forward_noise_loss_sum_kernel",
    "_group_norm_silu_apply_kernel",
    "_group_norm_silu_bwd_kernel",
    "_group_norm_silu_bwd_walk_kernel",
    "_group_norm_silu_dx_kernel",
    "_group_norm_silu_fwd_kernel",
    "_group_norm_silu_merge_kernel",
    "_group_norm_silu_small_kernel",
    "_group_norm_silu_stats_kernel",
    "_group_norm_silu_sums_kernel",
    "_group_norm_silu_walk_kernel",
    "_noise_kernel",
    "_reverse_step_fwd_kernel",
    "_reverse_step_general_kernel",
    "_reverse_step_threshold_kernel",
    "_rms_norm_silu_bwd_kernel",
    "_rms_norm_silu_bwd_walk_kernel",
    "_rms_norm_silu_fwd_kernel",
    "_rms_norm_silu_merge_kernel",
    "_rms_norm_silu_weight_kernel",
}


@pytest.fixture(scope="module")
def reports():
    """arch → report of every kernel, from processes without the interpreter, side by side."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), environment.get("PYTHONPATH")])
    )
    running = {
        arch: subprocess.Popen(
            [sys.executable, ROOT / "tests/triton_compile.py", str(arch)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arch in SHARED_LIMIT
    }
    found = {}
    for arch, process in running.items():
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-4000:]
        found[arch] = [json.loads(line) for line in out.splitlines()]
    return found


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_registers_spills_and_shared_memory(arch, reports):
    print(f"\nsm_{arch}: registers, stack, shared memory, warps, tensor-core instructions")
    for r in reports[arch]:
        print(
            f"{r['kernel']:34s} {r['label']:32s} {r['registers']:4d} {r['stack']:3d}"
            f" {r['shared']:7d} {r['warps']:3d} {r['tensor_core'] or 0:4d}"
        )
    assert {r["kernel"] for r in reports[arch]} == KERNELS
    for r in reports[arch]:
        assert r["stack"] == 0, f"spills: {r}"
        assert r["shared"] <= min(SHARED_LIMIT[arch], SHARED_BUDGET), f"shared memory: {r}"
        assert r["registers"] * 32 * r["warps"] <= 65536, f"registers: {r}"


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_attention_uses_tensor_cores(arch, reports):
    products = [r for r in reports[arch] if r["tensor_core"] is not None]
    assert {r["kernel"] for r in products} == {k for k in KERNELS if "attention" in k} - {
        "_attention_delta_kernel"
    }
    for r in products:
        if "float32" in r["label"]:
            assert r["tensor_core"] == 0, f"float32 must stay in full precision: {r}"
        else:
            assert r["tensor_core"] > 0, f"no tensor cores: {r}"
            # The warp-group instructions, wherever a program owns the 64 rows that they need.
            if arch == 90:
                assert r["hgmma"] > 0, f"no wgmma: {r}"


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_noise_is_not_contracted(arch, reports):
    drawing = {"_noise_kernel", "_reverse_step_fwd_kernel", "_reverse_step_general_kernel"}
    drawing |= {name for name in KERNELS if "forward_noise" in name} - {
        "_forward_noise_loss_sum_kernel"
    }
    found = [r for r in reports[arch] if r["kernel"] in drawing]
    assert found and all(r["fma"] == 0 for r in found)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_memory_is_read_16_bytes_at_a_time(arch, reports):
    for r in reports[arch]:
        odd = ("2,96,7,7", "8,64,1,1", "1023,1000", "offset", "hd3", "77,77")
        # A float32 head so narrow leaves each of 256 threads fewer than four elements.
        if "_attention" in r["kernel"] and r["label"].endswith(
            (",16 float32", ",32 float32", ",40 float32", ",48 float32")
        ):
            continue
        aligned = not any(text in r["label"] for text in odd)
        if aligned and "merge" not in r["kernel"] and "_sum_kernel" not in r["kernel"]:
            assert r["wide_access"] > 0, f"narrow loads: {r}"
