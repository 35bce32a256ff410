"""One case on the GPU: every contender judged against float64, then all timed in turns.

Kernel time is that of a captured graph of ten or more calls, so no launch of Python's is in it.
Cold: the calls rotate over buffers, inputs and outputs, three times the L2 cache's size. Warm: all
calls read one buffer, and a replay goes before the timed one. Two rounds; their difference and the
spread of the turns say which differences mean nothing.
"""

import contextlib
import math
import re
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_device import Graph, tensors
from torch import Tensor

OURS = ("triton", "native")
UNPROVEN = ("blocked",)  # kernels of ours that `auto` never takes: judged as ours, in no verdict
MIN_CALLS, MIN_GRAPH_S = 10, 300e-6
BURN_IN_S = 0.15  # before the rounds: until then the clocks rise
ROUND_S, MIN_TURNS, MAX_TURNS = 0.25, 4, 20
MAX_SETS = 512
COMPILE_S = {"compile": 40, "compile-max": 60}  # longest that a torch.compile may take
OVERTIME_S = 12  # a compilation that has begun may go on so long past the end
NO_SDPA = re.compile("No available kernel|No viable backend")
LOOSE = 16  # a baseline that is this much over our kernels' budget computes something else


class NotThere(Exception):
    """This contender does not exist here: an op not built yet, a package not installed."""


class DeviceLost(Exception):
    """After this error nothing more runs in this process."""


@dataclass
class Case:
    name: str
    section: str
    facts: dict  # op, direction, shape, dtype, layout … as dispatch would look them up
    useful_bytes: int  # what any implementation must read and write once
    resident_bytes: int  # inputs and outputs of a call
    inputs: Callable  # seed → one set of inputs
    contenders: dict[str, Callable]  # name → prepare(inputs) → call() → result(s)
    plain: Callable  # prepare, as above: plain PyTorch in the tested dtype, the error's yardstick
    truth: Callable  # inputs → result(s) in float64
    grad: bool = False
    flop: int = 0
    random: tuple[str, ...] = ()  # contenders that draw their own noise: shape and finiteness only
    headline: bool = False
    remarks: Callable | None = None  # inputs → more facts


@contextlib.contextmanager
def at_most(seconds: float):
    """Raises TimeoutError in the body after so long; Python code alone can be stopped so."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def poisoned(on: bool):
    """torch.empty is NaN inside, so that an element that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    if on:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def failure(error: BaseException) -> dict:
    from engine.dispatch import BackendError

    lines = str(error).strip().splitlines()
    if isinstance(error, BackendError):
        lines = lines[:1]  # the table of back ends follows
    text = " ".join(" ".join(lines).split())[:300] or type(error).__name__
    if isinstance(error, NotThere):
        return {"status": "not there", "reason": text}
    if isinstance(error, (BackendError, ValueError)) or NO_SDPA.search(text):
        return {"status": "refused", "reason": text}
    reason = f"{type(error).__name__}: {text}"
    if error.__context__ is not None:  # the end of a broken capture complains of the capture alone
        before = " ".join(str(error.__context__).split())[:200]
        reason += f"; before it {type(error.__context__).__name__}: {before}"
    return {"status": "failed", "reason": reason}


def error(got: Tensor, truth: Tensor) -> float:
    return (got.double() - truth).abs().max().item() if truth.numel() else 0.0


def budgets(plain, truth, factor: float) -> list[float]:
    """As the tests have it: factor × (error of plain PyTorch + one rounding of the result)."""
    return [
        factor * (error(p, t) + torch.finfo(p.dtype).eps * t.abs().max().item())
        for p, t in zip(plain, truth, strict=True)
    ]


def judge(name: str, result, truth, allowed, random: bool) -> dict:
    """→ {} or why this result is wrong, with its worst error as a share of what is allowed."""
    if len(result) != len(truth) or any(
        r.shape != t.shape for r, t in zip(result, truth, strict=True)
    ):
        return {"status": "wrong", "reason": "results of other shapes than the reference's"}
    if not all(r.isfinite().all().item() for r in result):
        return {"status": "wrong", "reason": "NaN or infinity in the result"}
    if random:
        return {}
    shares = [
        error(r, t) / a if a else math.inf if error(r, t) else 0.0
        for r, t, a in zip(result, truth, allowed, strict=True)
    ]
    worst = min(max(shares), 1e9)
    if worst > (1 if name in OURS + UNPROVEN else LOOSE):
        return {
            "status": "wrong",
            "reason": f"error is {worst:.3g} of what is allowed",
            "error_share": worst,
        }
    return {"error_share": round(worst, 4)}


def measure(
    case: Case,
    device,
    until: float = math.inf,  # time.monotonic() after which nothing new begins
    note: Callable[[str], None] = lambda contender: None,  # what is about to run
    crashed: dict[str, str] | None = None,  # contenders that ended an earlier process
    host: Callable[[Callable], None] | None = None,  # gets the call of our fastest at the end
) -> dict:
    """→ the case's record. Raises DeviceLost when the GPU is gone: then `note` said where."""
    start = time.monotonic()
    rows = {n: {"status": "time", "reason": "no time was left"} for n in case.contenders}
    record = {**case.facts, "section": case.section, "headline": case.headline}
    record |= {"useful_bytes": case.useful_bytes, "contenders": rows}
    if case.flop:
        record["flop"] = case.flop
    for name, reason in (crashed or {}).items():
        if name in rows:
            rows[name] = {"status": "failed", "reason": reason}
    torch.compiler.reset()
    with torch.set_grad_enabled(case.grad):
        first = case.inputs(0)
        if case.remarks:
            record |= case.remarks(first)
        good = _check(case, device, first, rows, until, note, crashed or {})
        device.free()
        if good:
            _time(case, device, first, good, rows, record, note, host)
        del first
    device.free()
    record["seconds"] = round(time.monotonic() - start, 2)
    return record


def _check(case, device, first, rows, until, note, crashed) -> list[str]:
    """Runs every contender once; → those whose results are right."""
    note("reference")
    truth = tensors(case.truth(first))
    plain = tensors(case.plain(first)())
    allowed = budgets(plain, truth, 3.0 if case.grad else 2.0)
    del plain
    good = []
    for name, prepare in case.contenders.items():
        if name in crashed or time.monotonic() > until:
            continue
        note(name)
        start = time.monotonic()
        try:
            limit = contextlib.nullcontext()
            if name in COMPILE_S:
                limit = at_most(min(COMPILE_S[name], max(until - start, 0) + OVERTIME_S))
            with poisoned(name in OURS + UNPROVEN), limit:
                result = tensors(prepare(first)())
                device.synchronize()
            verdict = judge(name, result, truth, allowed, name in case.random)
            rows[name] = {"status": "ok", **verdict}
            del result
        except Exception as problem:
            rows[name] = failure(problem)
            _or_lost(device, name, problem)
        if name in COMPILE_S:
            rows[name]["compile_s"] = round(time.monotonic() - start, 2)
        if rows[name]["status"] == "ok":
            good.append(name)
    return good


def _or_lost(device, name: str, problem: BaseException) -> None:
    if not device.healthy():
        raise DeviceLost(f"{name}: {failure(problem)['reason']}") from problem


def _time(case, device, first, good, rows, record, note, host) -> None:
    sets = math.ceil(3 * device.l2_bytes / case.resident_bytes) + 1
    sets = min(max(sets, 2), MAX_SETS)
    record["rotation"] = {"sets": sets, "mb": round(sets * case.resident_bytes / 1e6, 1)}
    note("inputs")
    inputs = [first, *(case.inputs(i) for i in range(1, sets))]
    calls: dict[str, list[Callable]] = {}
    graphs = _graphs(case, device, good, rows, note, inputs, calls)
    turns = _turns(graphs)
    record["turns"] = 2 * turns
    note("timing")
    _burn_in(device, graphs)
    rounds = [device.time(graphs, turns) for _ in range(2)]
    for name in graphs:
        count = graphs[name].calls
        samples = [[s / count * 1e6 for s in r[name]] for r in rounds]
        rows[name]["cold"] = {
            **summary(samples[0] + samples[1]),
            "rounds_us": [round(statistics.median(s), 3) for s in samples],
            "calls": count,
        }
    graphs.clear()  # and with the graphs their memory
    device.free()
    calls = {name: calls[name][:1] for name in rows if rows[name].get("cold")}
    graphs = _graphs(case, device, list(calls), {}, note, inputs[:1], calls)
    for name, times in device.time(graphs, _turns(graphs), warm=True).items():
        rows[name]["warm"] = summary([s / graphs[name].calls * 1e6 for s in times])
    mine = [name for name in OURS if rows.get(name, {}).get("cold")]
    if host and mine:
        host(calls[min(mine, key=lambda name: rows[name]["cold"]["us"])][0])


def _burn_in(device, graphs: dict[str, Graph]) -> None:
    """What the rounds do, thrown away."""
    end = time.perf_counter() + BURN_IN_S
    while graphs and time.perf_counter() < end:
        device.time(graphs, MIN_TURNS)


def _turns(graphs: dict[str, Graph]) -> int:
    total = sum(g.seconds + 3 * g.lead + 50e-6 for g in graphs.values()) or 1.0
    return min(max(int(ROUND_S / total), MIN_TURNS), MAX_TURNS)


def _graphs(case, device, names, rows, note, inputs, calls) -> dict[str, Graph]:
    """A graph per contender that can be captured; the others get their reason in `rows`."""
    graphs = {}
    for name in names:
        note(name)
        try:
            if name not in calls:
                calls[name] = [case.contenders[name](one) for one in inputs]
            graphs[name] = _capture(device, calls[name])
            _verify(device, graphs[name], calls[name][-1], name in case.random)
        except Exception as problem:
            graphs.pop(name, None)
            rows[name] = failure(problem)
            _or_lost(device, name, problem)
    return graphs


def _capture(device, calls: list[Callable]) -> Graph:
    for call in calls:
        call()
    times = math.ceil(MIN_CALLS / len(calls))
    graph = device.capture(calls * times, len(calls))
    if graph.seconds < MIN_GRAPH_S:  # short graphs would be measured in ticks of the events' clock
        times = min(math.ceil(times * MIN_GRAPH_S / max(graph.seconds, 1e-6)), 2000 // len(calls))
        if times * len(calls) > graph.calls:
            del graph
            graph = device.capture(calls * times, len(calls))
    return graph


def _verify(device, graph: Graph, call: Callable, random: bool) -> None:
    """A replay writes what the call returns: else the work escaped the capture."""
    expected, found = tensors(call()), graph.results[-1]
    for t in found:
        t.fill_(math.nan)
    graph.replay()
    device.synchronize()
    for a, b in zip(found, expected, strict=True):
        near = 0.02 * b.double().abs().max().item() if b.numel() else 0.0
        if not a.isfinite().all().item() or (not random and error(a, b.double()) > near):
            raise RuntimeError("a replay of the captured graph does not write the call's result")


def summary(samples: list[float]) -> dict:
    fifths = statistics.quantiles(samples, n=5) if len(samples) > 1 else samples * 4
    return {
        "us": round(statistics.median(samples), 3),
        "p20": round(fifths[0], 3),
        "p80": round(fifths[-1], 3),
        "n": len(samples),
    }
