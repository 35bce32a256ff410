"""Runs every op test on every back end present, on poisoned memory, and counts the cases."""

import json
import os
from collections import Counter

# Side by side (pytest-xdist) each process takes one thread: pools that spin would take each other's
# cores. Tests of threads ask for two.
if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

# Without a GPU, Triton kernels run in the interpreter; it must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import emulation
import native_build
import numpy as np
import proof
import pytest

from engine import dispatch, unet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMULATED = "cuda-emulated"
NO_CUDA_KERNEL = ("attention", "rms_norm_silu")  # in C++
_ran: Counter = Counter()
_passed: Counter = Counter()  # per (op, back end)
_failed: Counter = Counter()
_whole = True  # no case was left out
_unknown = False  # something failed that names no op


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--on-device",
        action="store_true",
        help="every op test that can run on this device, and nothing else",
    )


def pytest_ignore_collect(collection_path, config) -> bool | None:
    """--on-device leaves whole files out: those that count for no op, and the emulation's."""
    if not config.getoption("--on-device") or not collection_path.name.startswith("test_"):
        return None
    counts = "\nOP = " in collection_path.read_text()
    emulated = collection_path.stem.startswith("test_cuda_emulated")
    return None if counts and not emulated else True


def on_cuda(op: str) -> bool:
    """Whether the library has a CUDA kernel; not one of before the toolkit was there."""
    return op not in NO_CUDA_KERNEL and dispatch.module(op, "native").has_cuda()


def backends(op: str) -> list[str]:
    """Back ends of an op that this machine can run."""
    found = ["eager"] + [b for b in ("native", "triton") if not dispatch.absence(op, b)]
    if DEVICE == "cuda" and "native" in found and not on_cuda(op):
        found.remove("native")
    if op not in NO_CUDA_KERNEL and DEVICE == "cpu":  # the emulation takes CPU tensors
        found.append(EMULATED)
    return found


def pytest_generate_tests(metafunc) -> None:
    if "impl" in metafunc.fixturenames and hasattr(metafunc.module, "OP"):
        metafunc.parametrize("backend", backends(metafunc.module.OP), indirect=True)


@pytest.fixture
def backend(request) -> str:
    return request.param


@pytest.fixture
def impl(backend, monkeypatch) -> str:
    """The `impl` argument for this back end; for the emulation, native with its ops exchanged."""
    if backend != EMULATED:
        return backend
    emulated = emulation.backend()
    module, absence = dispatch.module, dispatch.absence
    monkeypatch.setattr(
        dispatch, "module", lambda op, name: emulated if name == "native" else module(op, name)
    )
    monkeypatch.setattr(
        dispatch, "absence", lambda op, name: "" if name == "native" else absence(op, name)
    )
    return "native"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current folder, with 24 pictures in pictures/a and /b; preset cifar10 is a tiny U-Net."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8)).astype(np.uint8)).save(path)
    tiny = {
        "image_size": 8,
        "in_channels": 1,
        "model_channels": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "num_groups": 4,
        "dropout": 0.2,  # its random numbers must resume too
    }
    monkeypatch.setitem(unet.PRESETS, "cifar10", tiny)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take ages
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poison(request):
    """Uninitialised memory is NaN in op tests, C++ allocations included."""
    if not hasattr(request.module, "OP"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().item()
    yield
    torch.use_deterministic_algorithms(before)


def pytest_collectreport(report) -> None:
    global _unknown
    _unknown |= report.failed


def pytest_runtest_logreport(report) -> None:
    global _unknown
    _unknown |= proof.unknown(report)
    properties = dict(report.user_properties)
    if "backend" not in properties:
        return
    if report.when == "call" and report.passed:
        _ran[properties["backend"]] += 1
    if "op" in properties and report.failed:
        _failed[properties["op"], properties["backend"]] += 1
    elif "op" in properties and report.when == "call" and report.passed:
        _passed[properties["op"], properties["backend"]] += 1


def pytest_itemcollected(item) -> None:
    """Notes back end and op of every case, before a fixture of it can fail."""
    chosen = item.callspec.params if hasattr(item, "callspec") else {}
    backend = chosen.get("backend") or chosen.get("impl_name")
    if backend is None and item.path.stem.startswith("test_cuda_emulated"):
        backend = EMULATED
    if backend is None or not hasattr(item.module, "OP"):
        return
    item.user_properties.append(("backend", backend))
    op = item.module.OP if item.module.OP != "all" else chosen.get("op", "")
    for name in dispatch.ORDER:
        if op.startswith(name):
            item.user_properties.append(("op", name))


def pytest_deselected(items) -> None:
    global _whole
    _whole = False


def pytest_sessionfinish(session, exitstatus) -> None:
    """A whole run on a GPU is what `auto` rests on there; a part of the tests proves nothing."""
    stopped = session.shouldstop or session.shouldfail
    interpreted = os.environ.get("TRITON_INTERPRET", "0") != "0"
    whole = _whole and not stopped and not interpreted
    if DEVICE == "cuda" and whole and proof.counts(session.config, exitstatus, _unknown):
        proof.record(torch.cuda.get_device_name(), _passed, _failed, dispatch.EVIDENCE_FILE)


def pytest_terminal_summary(terminalreporter) -> None:
    for backend in ("eager", "native", "triton", EMULATED):
        terminalreporter.write_line(f"back end {backend}: {_ran[backend]} cases")
    path = os.environ.get("ENGINE_TEST_COUNTS")
    if path:
        with open(path, "w") as file:
            json.dump(dict(_ran), file)


@pytest.fixture
def built():
    """The CPU kernels as a NumPy module."""
    return native_build.load()


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "avx2", "avx512"])
def kernels(built, request):
    """The same on one instruction set."""
    built.limit_isa_level(request.param)
    if built.isa_level() != request.param:
        built.limit_isa_level(3)
        pytest.skip("this machine has no such instructions")
    yield built
    built.limit_isa_level(3)  # no limit
