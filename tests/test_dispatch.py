"""Which back end `auto` takes: on a GPU only what passed the op's tests on that kind of GPU."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import conftest
import proof
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import engine
from engine import dispatch

GPU = "NVIDIA Test GPU"
CONFTEST = Path(__file__).with_name("conftest.py")
OPS = sorted(dispatch.ORDER)


class OnGpu:
    """As much of a CUDA tensor as the choice looks at."""

    device = torch.device("cuda", 0)
    shape, dtype = (2, 4), torch.float32


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "evidence.json"
    monkeypatch.setattr(dispatch, "EVIDENCE_FILE", path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(dispatch, "refusals", lambda op, backend, args: [])
    monkeypatch.delenv("ENGINE_BACKEND", raising=False)
    dispatch._evidence.cache_clear()
    yield path
    dispatch._evidence.cache_clear()


@pytest.mark.parametrize("op", OPS)
def test_unproved_on_this_gpu(file, op):
    assert dispatch.pick(op, "auto", OnGpu()) == "eager"
    proof.record("another GPU", Counter({(op, "triton"): 9}), Counter(), file)
    assert dispatch.pick(op, "auto", OnGpu()) == "eager"
    assert "not yet proved right" in dispatch.table(op, OnGpu())


@pytest.mark.parametrize("op", OPS)
def test_proved_on_this_gpu(file, op):
    proof.record(GPU, Counter({(op, "triton"): 9, (op, "eager"): 9}), Counter(), file)
    assert dispatch.pick(op, "auto", OnGpu()) == "triton"
    assert "passed 9 cases on this kind of GPU" in dispatch.table(op, OnGpu())
    assert list(json.loads(file.read_text())[GPU][op]) == ["triton"]


def test_asking_for_native_by_name_leaves_ops_that_it_lacks(file, monkeypatch):
    monkeypatch.setenv("ENGINE_BACKEND", "native")
    for op in OPS:
        expected = "eager" if op in conftest.NO_CUDA_KERNEL else "native"
        assert dispatch.pick(op, "auto", OnGpu()) == expected, op
        assert dispatch.pick(op, "native", OnGpu()) == "native", op


class OnGpuHeads(OnGpu):
    shape = (2, 8, 1024, 64)


def test_sdpa_where_it_is_faster(file, monkeypatch, tmp_path):
    """A committed benchmark sends `auto` to PyTorch's SDPA at its shapes, and explain names it."""
    proof.record(GPU, Counter({("attention", "triton"): 9}), Counter(), file)
    table = tmp_path / "sdpa_faster.json"
    monkeypatch.setattr(dispatch, "SDPA_FASTER_FILE", table)
    entry = {"D": [64, 64], "S": [512, 4096], "source": "benchmarks/results/gpu.json"}
    for gpu, sizes, expected in (
        (GPU, {}, "eager"),
        ("another GPU", {}, "triton"),
        (GPU, {"S": [2048, 4096]}, "triton"),
        (GPU, {"D": [80, 80]}, "triton"),
        (GPU, {"Sk": [77, 77]}, "triton"),
    ):
        table.write_text(json.dumps({gpu: [entry | sizes]}))
        dispatch._sdpa_faster.cache_clear()
        call = (OnGpuHeads(), OnGpuHeads(), OnGpuHeads(), 0.1)
        assert dispatch.pick("attention", "auto", *call) == expected, (gpu, sizes)
        assert ("SDPA (eager) is faster: benchmarks" in dispatch.table("attention", *call)) == (
            expected == "eager"
        )
    dispatch._sdpa_faster.cache_clear()


@pytest.mark.parametrize(
    "s, d, dtype, gradient, expected",
    [
        (16, 64, torch.float32, False, "native"),
        (15, 64, torch.float32, True, "eager"),
        (15, 64, torch.bfloat16, False, "eager"),
        (15, 64, torch.bfloat16, True, "native"),
        (64, 257, torch.float32, True, "eager"),
        (64, 512, torch.float16, True, "native"),
    ],
)
def test_sdpa_where_it_is_faster_on_the_cpu(s, d, dtype, gradient, expected, monkeypatch):
    monkeypatch.delenv("ENGINE_BACKEND", raising=False)
    if dispatch.absence("attention", "native"):
        pytest.skip("the extension is not built")
    q = torch.zeros(1, 1, s, d, dtype=dtype, requires_grad=gradient)
    call = (q, q, q, 0.1)
    assert dispatch.pick("attention", "auto", *call) == expected
    assert ("SDPA (eager) is faster" in dispatch.table("attention", *call)) == (expected == "eager")
    assert "(;" not in dispatch.table("attention", *call)
    assert dispatch.pick("attention", "native", *call) == "native"


def test_a_failure_takes_the_proof_away(file):
    both = Counter({("noise", "triton"): 5, ("noise", "native"): 5})
    proof.record(GPU, both, Counter(), file)
    proof.record(GPU, both, Counter({("noise", "triton"): 1}), file)
    assert dispatch.pick("noise", "auto", OnGpu()) == "native"


def test_a_library_without_cuda_is_no_back_end_of_a_gpu(monkeypatch, pytestconfig):
    """Its tests would all fail there, for want of a build."""
    plugins = pytestconfig.pluginmanager.get_plugins()
    conftest = next(p for p in plugins if getattr(p, "__file__", "") == str(CONFTEST))
    native = SimpleNamespace(has_cuda=lambda: there)
    monkeypatch.setattr(conftest, "DEVICE", "cuda")
    monkeypatch.setattr(dispatch, "absence", lambda op, backend: "")
    monkeypatch.setattr(dispatch, "module", lambda op, backend: native)
    there = True
    assert conftest.backends("noise") == ["eager", "native", "triton"]
    there = False
    assert conftest.backends("noise") == ["eager", "triton"]


@pytest.mark.parametrize("op", OPS)
def test_sources(op):
    """The digest covers the kernel's own files and all that they include or import."""
    files = proof.sources(op, "triton")
    assert {f"{op}.py", "triton_base.py"} <= {path.name for path in files}
    for file in files:
        for name in re.findall(
            r"^from \.(\w+) import|^from \. import (\w+)", file.read_text(), re.M
        ):
            assert file.with_name(f"{''.join(name)}.py") in files, (file, name)
    if op not in conftest.NO_CUDA_KERNEL:
        native = {path.name for path in proof.sources(op, "native")}
        assert {f"{op}.cu", f"ops_{op}.cpp", "launch.h", "ops.h", "ops.cpp", "philox.h"} <= native


def test_committed_evidence_is_of_these_sources():
    """A kernel that changed since it ran on a GPU must run there again, or lose its entry."""
    for gpu, ops in json.loads(dispatch.EVIDENCE_FILE.read_text()).items():
        for op, proved in ops.items():
            for backend, entry in proved.items():
                assert entry["sources"] == proof.digest(op, backend), (gpu, op, backend)


def test_a_tangent_is_not_dropped():
    """Forward-mode differentiation goes to eager, which has it or says that it has not."""
    x, tangent = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)

    def normed(x, impl="auto"):
        return engine.ops.group_norm_silu(x, None, None, 2, 1e-5, impl=impl)

    _, found = torch.func.jvp(normed, (x,), (tangent,))
    _, expected = torch.func.jvp(lambda x: F.silu(F.group_norm(x, 2)), (x,), (tangent,))
    assert torch.allclose(found, expected, atol=1e-5)
    q = torch.randn(1, 1, 20, 8)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(normed(x)).tangent is None  # nobody asked
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        assert dispatch.pick("attention", "auto", dual, q, q, 0.3) == "eager"
        if not dispatch.absence("attention", "native"):
            with pytest.raises(dispatch.BackendError, match="no forward-mode derivative"):
                engine.ops.attention(q, dual, q, impl="native")
