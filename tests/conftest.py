"""Runs every op test on every back end present, on poisoned memory, and counts the cases."""

import json
import os
from collections import Counter

import torch

# Without a GPU, Triton kernels run in the interpreter; it must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import emulation
import pytest

from engine import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMULATED = "cuda-emulated"
_ran: Counter = Counter()


def backends(op: str) -> list[str]:
    """Back ends of an op that this machine can run."""
    found = ["eager"] + [b for b in ("native", "triton") if not dispatch.absence(op, b)]
    if op != "attention" and DEVICE == "cpu":  # the emulation takes CPU tensors
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


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" and report.passed:
        properties = dict(report.user_properties)
        if "backend" in properties:
            _ran[properties["backend"]] += 1


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item) -> None:
    backend = getattr(item, "funcargs", {}).get("backend")
    if backend is None and item.path.stem == "test_cuda_emulated":
        backend = EMULATED
    if backend is not None:
        item.user_properties.append(("backend", backend))


def pytest_terminal_summary(terminalreporter) -> None:
    for backend in ("eager", "native", "triton", EMULATED):
        terminalreporter.write_line(f"back end {backend}: {_ran[backend]} cases")
    path = os.environ.get("ENGINE_TEST_COUNTS")
    if path:
        with open(path, "w") as file:
            json.dump(dict(_ran), file)
