"""One GPU benchmark case, the CPU standing in: what is judged, captured, timed and left out."""

import gc
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu_group_norm
import gpu_measure
from gpu_device import Cuda, StandIn


def tiny(**changes):
    case = gpu_group_norm.cases(StandIn())[0]
    case.contenders.pop("triton")
    for name, value in changes.items():
        setattr(case, name, value)
    return case


def raising(one):
    def call():
        raise RuntimeError("boom")

    return call


def test_a_contender_that_raises_loses_nobody_else():
    case = tiny()
    case.contenders = {**case.contenders, "native": raising, "absent": not_there}
    rows = gpu_measure.measure(case, StandIn())["contenders"]
    assert rows["native"] == {"status": "failed", "reason": "RuntimeError: boom"}
    assert rows["absent"] == {"status": "not there", "reason": "not yet"}
    assert rows["eager"]["cold"]["us"] > 0 and rows["compile"]["warm"]["us"] > 0


def not_there(one):
    raise gpu_measure.NotThere("not yet")


@pytest.mark.parametrize("wrong", ["a little", "shape", "nan"])
def test_a_wrong_result_is_not_timed(wrong):
    case = tiny()
    plain = case.contenders["eager"]

    def spoiled(one):
        y = plain(one)().clone()
        if wrong == "a little":
            y[0, 0, 0, 0] += 0.25
        elif wrong == "nan":
            y[-1, -1, -1, -1] = math.nan
        return lambda: y[:, :1] if wrong == "shape" else y

    case.contenders = {**case.contenders, "native": spoiled}
    rows = gpu_measure.measure(case, StandIn())["contenders"]
    assert rows["native"]["status"] == "wrong" and "cold" not in rows["native"]
    assert rows["eager"]["status"] == "ok"


def test_memory_that_a_kernel_does_not_write_is_seen():
    case = tiny()
    case.contenders = {"native": lambda one: lambda: torch.empty_like(one[0][0])}
    rows = gpu_measure.measure(case, StandIn())["contenders"]
    assert rows["native"] == {"status": "wrong", "reason": "NaN or infinity in the result"}


def test_work_that_escapes_the_capture_is_seen():
    class Escaping(StandIn):
        def capture(self, calls, keep):
            graph = super().capture(calls, keep)
            graph.replay = lambda: None
            return graph

    rows = gpu_measure.measure(tiny(), Escaping())["contenders"]
    assert rows["native"]["status"] == "failed" and "does not write" in rows["native"]["reason"]


def test_nothing_begins_after_the_end():
    record = gpu_measure.measure(tiny(), StandIn(), until=time.monotonic() - 1)
    assert {row["status"] for row in record["contenders"].values()} == {"time"}


def test_the_rounds_begin_on_a_busy_device(monkeypatch):
    began, rounds = time.perf_counter(), []

    class Noting(StandIn):
        def time(self, graphs, turns, warm=False):
            if not warm:
                rounds.append((time.perf_counter() - began, turns))
            return super().time(graphs, turns, warm)

    monkeypatch.setattr(gpu_measure, "BURN_IN_S", 0.05)
    monkeypatch.setattr(gpu_measure, "MIN_TURNS", 3)
    row = gpu_measure.measure(tiny(), Noting())["contenders"]["eager"]
    *burnt, first, second = rounds
    assert burnt and {turns for _, turns in burnt} == {3} and first[1] == second[1] > 3
    assert first[0] - burnt[0][0] >= 0.05 and row["cold"]["n"] == 2 * first[1]


def test_a_compilation_is_stopped():
    def slow(one):
        time.sleep(5)

    case = tiny()
    case.contenders = {"compile": slow, "eager": case.contenders["eager"]}
    begin = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu_measure.COMPILE_S, "compile", 0.1)
        rows = gpu_measure.measure(case, StandIn())["contenders"]
    assert time.monotonic() - begin < 4
    assert "TimeoutError" in rows["compile"]["reason"] and rows["eager"]["cold"]


def test_the_instrument_never_leaves_its_stream_and_times_no_launch(monkeypatch):
    """Cuda with torch.cuda's parts exchanged: what it asks of them, in order."""
    log = []

    class Fake:
        def __init__(self, *args, **kwargs):
            self.kwargs = kwargs

        def replay(self):
            log.append("replay")

        def record(self):
            log.append("record")

        def elapsed_time(self, end):
            return 2.0  # ms

    class Capture:
        def __init__(self, graph, stream):
            assert stream is log[0]

        def __enter__(self):
            log.append("begin")

        def __exit__(self, *args):
            log.append("end")

    fakes = {
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(
            name="G", L2_cache_size=50 * 2**20, total_memory=2**36, multi_processor_count=132
        ),
        "Stream": Fake,
        "set_stream": log.append,
        "synchronize": lambda: None,
        "CUDAGraph": Fake,
        "graph": Capture,
        "Event": Fake,
        "_sleep": lambda cycles: log.append("sleep" if cycles > 0 else cycles),
        "empty_cache": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "compile", lambda function, **options: object())
    device = Cuda()
    assert isinstance(log[0], Fake)  # the side stream is current before anything is made
    x = torch.ones(3)
    graph = device.capture([lambda: log.append("call") or x * 2] * 5, keep=2)
    assert log[1:8] == ["begin", *["call"] * 5, "end"]
    assert log[8:] == ["replay", "replay", "sleep", "record", "replay", "record"]
    assert len(graph.results) == 2 and graph.calls == 5 and graph.seconds == 2e-3
    assert gc.isenabled()
    del log[1:]
    times = device.time({"a": graph, "b": graph}, 3, warm=True)
    assert times == {"a": [2e-3] * 3, "b": [2e-3] * 3}
    assert log[1:] == ["replay", "sleep", "record", "replay", "record"] * 6
    assert device.compile(raising) is device.compile(raising)
