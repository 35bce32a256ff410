"""Medians of several functions that do the same work, timed in turns in one process."""

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


def medians(functions: dict[str, Callable]) -> dict[str, list[float]]:
    """name → all timings in seconds, taken in turns A B C A B C, so that drift hits all alike."""
    for function in functions.values():
        end = time.perf_counter() + WARMUP_S
        while time.perf_counter() < end:
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + TIMED_S * len(functions)
    while time.perf_counter() < end or len(next(iter(times.values()))) < MIN_ROUNDS:
        for name, function in functions.items():
            times[name].append(_once(function))
    return times


@cache
def copy_rate(megabytes: int = 256) -> float:
    """Bytes per second, read plus written, of a large copy on this machine: the memory's limit."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    seconds = statistics.median(_once(lambda: target.copy_(source)) for _ in range(9))
    return 2 * source.numel() * 4 / seconds


def compare(benchmark, functions: dict[str, Callable], useful_bytes: int) -> None:
    """Times `ours` against the others and leaves medians, ratios and bandwidth in the JSON.

    useful_bytes: what any implementation must read and write once.
    """
    times = medians(functions)
    median = {name: statistics.median(values) for name, values in times.items()}
    deciles = statistics.quantiles(times["ours"], n=10)
    benchmark.extra_info.update(
        median_us={name: round(value * 1e6, 2) for name, value in median.items()},
        ours_p10_p90_us=[round(deciles[0] * 1e6, 2), round(deciles[-1] * 1e6, 2)],
        rounds=len(times["ours"]),
        speedup={n: round(v / median["ours"], 3) for n, v in median.items() if n != "ours"},
        useful_mb=round(useful_bytes / 1e6, 3),
        gb_per_s=round(useful_bytes / median["ours"] / 1e9, 2),
        share_of_copy=round(useful_bytes / median["ours"] / copy_rate(), 3),
    )
    benchmark.pedantic(functions["ours"], rounds=MIN_ROUNDS, warmup_rounds=1)
