"""Medians of functions that do the same work, timed in turns in one process."""

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch

WARMUP_S, TIMED_S, MIN_ROUNDS = 0.2, 0.5, 15


def _once(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(
    functions: list[Callable], before: list[Callable | None] | None = None
) -> list[list[float]]:
    """All timings of each function in seconds, taken in turns A B A B, so that drift hits both.

    before: what runs, untimed, ahead of each timed call of its function.
    """
    before = before or [None] * len(functions)
    for function, prepare in zip(functions, before, strict=True):
        if prepare:
            prepare()
        end = time.perf_counter() + WARMUP_S
        while time.perf_counter() < end:
            function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + TIMED_S * len(functions)
    while time.perf_counter() < end or len(times[0]) < MIN_ROUNDS:
        for taken, function, prepare in zip(times, functions, before, strict=True):
            if prepare:
                prepare()
            taken.append(_once(function))
    return times


@cache
def copy_rate(megabytes: int = 256) -> float:
    """Bytes per second, read plus written, of a large copy on this machine: the memory's limit."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    seconds = statistics.median(_once(lambda: target.copy_(source)) for _ in range(9))
    return 2 * source.numel() * 4 / seconds


def compare(
    benchmark,
    functions: dict[str, Callable],
    useful_bytes: int,
    calls: int = 1,
    before: dict[str, Callable] | None = None,
) -> None:
    """Times `ours` against each of the others and leaves medians, ratios, bandwidth in the JSON.

    Each ratio comes from a pair timed in turns: a third function in the turn would leave its own
    cache, heap and thread state to the next. `ours` is reported from the turn with eager.
    useful_bytes: what any implementation must read and write once. calls: how often a function does
    the work; times are of one. before: what runs, untimed, ahead of each timed call.
    """
    before = before or {}
    ours = functions["ours"]
    median_us, speedup = {}, {}
    for name, other in functions.items():
        if name == "ours":
            continue
        mine, theirs = in_turns([ours, other], [before.get("ours"), before.get(name)])
        speedup[name] = round(statistics.median(theirs) / statistics.median(mine), 3)
        median_us[name] = round(statistics.median(theirs) / calls * 1e6, 2)
        if "ours" not in median_us:
            median_us["ours"] = round(statistics.median(mine) / calls * 1e6, 2)
            deciles = statistics.quantiles(mine, n=10)
            benchmark.extra_info.update(
                ours_p10_p90_us=[round(d / calls * 1e6, 2) for d in (deciles[0], deciles[-1])],
                rounds=len(mine),
            )
    seconds = median_us["ours"] / 1e6
    benchmark.extra_info.update(
        median_us=median_us,
        speedup=speedup,
        useful_mb=round(useful_bytes / 1e6, 3),
        gb_per_s=round(useful_bytes / seconds / 1e9, 2),
        share_of_copy=round(useful_bytes / seconds / copy_rate(), 3),
    )

    def prepare() -> None:  # pytest-benchmark's own statistics are of ours alone
        if "ours" in before:
            before["ours"]()

    benchmark.pedantic(ours, setup=prepare, rounds=MIN_ROUNDS, warmup_rounds=1)
