"""Every op on a GPU, case by case, into <results>/<device>.json: pytest benchmarks --gpu.

The cases stand in gpu_group_norm.py, gpu_rms_norm.py, gpu_attention.py and gpu_diffusion.py, the
method in gpu_measure.py. Headline cases come first, then the sections take turns, so that a run
that its time budget cuts short has something of everything. A process that dies is followed by
another one (gpu.py), which leaves out what is in the file already and what killed the first.
"""

import itertools
import time

import gpu_attention
import gpu_diffusion
import gpu_group_norm
import gpu_rms_norm
import pytest
from gpu_anchors import anchors
from gpu_measure import OURS, DeviceLost, failure, measure

BAD = ("wrong", "failed")
LOST = 75  # exit status: the GPU or this process's hold on it is gone, another process may go on


def all_cases(device, mode: str) -> list:
    modules = gpu_group_norm, gpu_attention, gpu_diffusion, gpu_rms_norm
    lists = [module.cases(device, mode) for module in modules]
    found = list(itertools.chain(*lists))
    headline = [case for case in found if case.headline]
    if mode == "quick":
        return headline
    sections: dict[str, list] = {}
    for case in found:
        if not case.headline:
            sections.setdefault(case.section, []).append(case)
    turns = itertools.chain(*itertools.zip_longest(*sections.values()))
    return headline + [case for case in turns if case is not None]


def pytest_generate_tests(metafunc) -> None:
    gpu = metafunc.config.gpu
    cases = all_cases(gpu.device, gpu.mode)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    gpu.results.data["planned"] = names
    metafunc.parametrize("case", cases, ids=names)


@pytest.fixture(scope="module", autouse=True)
def measured_anchors(request):
    """Before the first case, once per file."""
    gpu = request.config.gpu
    if "anchors" not in gpu.results.data:
        gpu.results.data["anchors"] = anchors(gpu.device, gpu.mode)
        gpu.results.save()


def bench_gpu(benchmark, case, request) -> None:
    gpu = request.config.gpu
    results, device = gpu.results, gpu.device
    if case.name in results.data["cases"]:
        pytest.skip("measured already")
    if time.monotonic() > gpu.until:
        pytest.skip("the time budget is spent")

    def host(call) -> None:
        """pytest-benchmark's own figures: one call as Python pays it, host and device."""

        def wait():
            call()
            device.synchronize()

        benchmark.pedantic(wait, rounds=20, warmup_rounds=2)

    def note(name: str) -> None:
        results.note(case.name, name)

    try:
        crashed = results.crashed(case.name)
        record = measure(case, device, gpu.until, note, crashed, host)
    except DeviceLost as error:
        results.crash(str(error))
        pytest.exit(f"{case.name}: {error}", returncode=LOST)
    except Exception as error:
        reason = failure(error)["reason"]
        results.add(case.name, {"section": case.section, "error": reason, "contenders": {}})
        if not device.healthy():
            pytest.exit(f"{case.name}: {reason}", returncode=LOST)
        device.free()
        raise
    if benchmark.stats:
        record["host_us"] = round(benchmark.stats.stats.median * 1e6, 2)
    results.add(case.name, record)
    benchmark.extra_info.update(record)
    bad = {n: r for n, r in record["contenders"].items() if n in OURS and r["status"] in BAD}
    if bad:
        pytest.fail("; ".join(f"{name}: {row['reason']}" for name, row in bad.items()))
