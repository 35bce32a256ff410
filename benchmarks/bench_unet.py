"""Our U-Net against diffusers' on the CPU: a denoising step, a training step, their memory.

The same weights, by load_diffusers, none at zero; bfloat16. Against diffusers' model as it is and
in channels_last memory, compiled by torch.compile, and by OpenVINO with static shapes where that is
installed (pip install --no-deps openvino openvino-telemetry); torch.compile without freezing, as
it comes. Ours is what engine.sample calls, the
prepacked twin, and what engine.train trains; beside it our model on PyTorch's ops alone, unpacked.
Parity is asserted before anything is timed; calls are
taken in blocks, A A A B B B A A A, as a sampler makes them.

    small    6.8 million parameters, 64/128/128 channels, attention at two levels with diffusers'
             default heads of 8, 1×32×32
    cifar10  35.7 million, Ho et al. 2020, 3×32×32
"""

import contextlib
import copy
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import profile_unet
import pytest
import torch

from engine.execution import keep_freed_memory
from engine.prepacked import prepacked
from engine.update import Update, choose_update

pytest.importorskip("diffusers")

from unet_cases import (
    BF16,
    Parameters,
    Training,
    as_sampled,
    inputs,
    openvino,
    pair,
    same,
    sampling,
    seconds,
)

EAGER, PLAINLY = "ours, PyTorch's ops", "ours, PyTorch's AdamW"
FOREACH, NOT_RECORDED = "ours, PyTorch's foreach AdamW", "ours, not recorded"
NO_AVERAGE = "ours without an average"
STEPS = [("small", 32), ("small", 1), ("cifar10", 8)]
GOALS = {
    ("small", 32): {"diffusers": 2.2, "compile": 1.5},
    ("small", 1): {"diffusers": 2.0, "compile": 1.3},
    ("cifar10", 8): {"diffusers": 1.5},
}


def record(benchmark, taken: dict, **more) -> None:
    median = {name: statistics.median(times) for name, times in taken.items()}
    benchmark.extra_info.update(
        median_us={name: round(m * 1e6) for name, m in median.items()},
        seconds={
            name: [round(q, 5) for q in (min(times), statistics.median(times), max(times))]
            for name, times in taken.items()
        },
        speedup={
            name: round(m / median["ours"], 3) for name, m in median.items() if name != "ours"
        },
        **more,
    )


@pytest.mark.parametrize("name, batch", STEPS, ids=[f"{n}-{b}" for n, b in STEPS])
def bench_denoising_step(benchmark, name, batch):
    """Contenders in one process, and a fresh one per case: what OpenVINO leaves behind in its
    process takes 4 ms more of every later step of batch 1. OpenVINO comes after the others, and our
    model on PyTorch's ops alone, which the environment asks for, has the process after theirs."""
    found = child("step", name, batch)
    if name == "small":
        eager = child("step on PyTorch's ops", name, batch, ENGINE_BACKEND="eager")
        found = {key: found[key] | eager[key] for key in found}
    record(benchmark, found["seconds"], batch=batch, goals=GOALS[name, batch], error=found["error"])
    if "openvino" not in found["seconds"]:
        benchmark.extra_info["not_measured"] = ["openvino"]
    benchmark.pedantic(lambda: None, rounds=1)


def denoising_step(name: str, batch: int) -> dict:
    """Seconds of every call of each contender, and its error against float32."""
    theirs, ours = pair(name)
    x, t = inputs(name, batch, one_step=True)
    plain = copy.deepcopy(theirs).eval()
    theirs, ours = theirs.to(BF16).eval(), ours.eval()
    last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    low, twin = x.to(BF16), prepacked(ours, BF16)
    sampled = as_sampled(ours, BF16, t)
    contenders = {
        "ours": lambda: sampled(low, t),
        NOT_RECORDED: lambda: twin(low, t),
        "diffusers": lambda: theirs(low, t).sample,
        "diffusers channels_last": lambda: last(low, t).sample,
    }
    if name == "small":
        compiled = torch.compile(copy.deepcopy(theirs), dynamic=False)
        contenders["compile"] = lambda: compiled(low, t).sample
        own = torch.compile(copy.deepcopy(ours).to(BF16), dynamic=False)
        contenders["ours, compiled"] = lambda: own(low, t)
    with torch.inference_mode():
        truth = ours(x, t)
        error = {}
        for each, call in contenders.items():
            for _ in range(3):  # the third is the recording's
                out = call()
            error[each] = same(out, truth, each, 0.03 if each in ("ours", NOT_RECORDED) else 0.1)
        turns = {"blocks": 5, "calls": 20 if batch == 1 else 3}
        taken = seconds(contenders, **turns)
        static = openvino(plain, x, t)  # made only now, and timed alone
        if static is not None:
            error["openvino"] = same(static(), truth, "openvino", 0.1)
            taken |= seconds({"openvino": static}, **turns)
    return {"seconds": taken, "error": error}


def eager_step(name: str, batch: int) -> dict:
    """The same of our model as it is, in bfloat16; run with ENGINE_BACKEND=eager."""
    ours = pair(name)[1].eval()
    x, t = inputs(name, batch, one_step=True)
    plain, low = copy.deepcopy(ours).to(BF16), x.to(BF16)
    with torch.inference_mode():
        error = same(plain(low, t), ours(x, t), EAGER, 0.1)
        taken = seconds({EAGER: lambda: plain(low, t)}, blocks=5, calls=20 if batch == 1 else 3)
    return {"seconds": taken, "error": {EAGER: error}}


@pytest.mark.parametrize("name, batch, steps", [("small", 32, 10), ("small", 1, 50)])
def bench_sampling_step(benchmark, name, batch, steps):
    """A whole engine.sample and a whole DDIMPipeline, divided by their steps."""
    found = child("sampling", name, batch, steps)
    record(benchmark, found["seconds"], batch=batch, steps=steps, error=found["error"])
    benchmark.pedantic(lambda: None, rounds=1)


def sampling_step(name: str, batch: int, steps: int) -> dict:
    runs = sampling(*pair(name), name, batch)
    x, _ = inputs(name, batch)
    found = [run(2, torch.float32, x) for run in runs.values()]
    error = {"ours": same(*found, "ours", 1e-3)}
    calls = {each: lambda run=run: run(steps, BF16, None) for each, run in runs.items()}
    taken = seconds(calls, blocks=3, calls=1)
    return {"seconds": {k: [s / steps for s in v] for k, v in taken.items()}, "error": error}


@pytest.mark.parametrize("name, batch", [("small", 32)])
def bench_training_step(benchmark, name, batch):
    theirs, ours = pair(name)
    steps = {"ours": Training(ours, name, batch), "diffusers": Training(theirs, name, batch)}
    losses = {each: torch.stack([step() for _ in range(3)]) for each, step in steps.items()}
    same(losses["ours"], losses["diffusers"], "losses", 0.01)
    taken = seconds(steps, blocks=3, calls=2)
    taken |= child("training on PyTorch's ops", name, batch, ENGINE_BACKEND="eager")["seconds"]
    record(benchmark, taken, batch=batch, goals={"diffusers": 1.8})
    peak = {each: peak_memory(each, name, batch) for each in (*steps, NO_AVERAGE)}
    benchmark.extra_info.update(
        peak_mb=peak,
        peak_of_diffusers=round(peak["ours"] / peak["diffusers"], 3),
        peak_of_diffusers_without_average=round(peak[NO_AVERAGE] / peak["diffusers"], 3),
        goal_peak=0.75,
    )
    benchmark.pedantic(steps["ours"], rounds=1)


@pytest.mark.parametrize("name, batch", [("small", 32), ("small", 8)])
def bench_update(benchmark, name, batch):
    """A training step with one pass of ours for clipping, AdamW, average and weights in bfloat16,
    and one with PyTorch's passes and autocast's casts."""
    found = child("update", name, batch)
    record(benchmark, found["seconds"], batch=batch, gained_ms=found["gained_ms"])
    benchmark.pedantic(lambda: None, rounds=1)


def update(name: str, batch: int, rounds: int = 20) -> dict:
    """Seconds of both in turns, and the median of what a pair of steps differs by."""
    ours = pair(name)[1]
    steps = {
        "ours": Training(copy.deepcopy(ours), name, batch),
        PLAINLY: Training(ours, name, batch, plainly=True),
    }
    assert steps["ours"].update.lows is not None
    taken, losses = ({each: [] for each in steps} for _ in range(2))
    before = torch.cat([p.detach().flatten() for p in ours.parameters()])
    for k in range(rounds + 2):
        for each in (list(steps), list(reversed(steps)))[k % 2]:
            start = time.perf_counter()
            losses[each].append(steps[each]())
            taken[each].append(time.perf_counter() - start)
    same(*map(torch.stack, losses.values()), "losses", 1e-3)
    models = [step.model for step in steps.values()]
    moved = [torch.cat([p.detach().flatten() for p in m.parameters()]) - before for m in models]
    same(*moved, "the way of the weights")  # a norm of other last bits clips otherwise
    taken = {each: times[2:] for each, times in taken.items()}
    gained = [1e3 * (b - a) for a, b in zip(*taken.values(), strict=True)]
    return {"seconds": taken, "gained_ms": round(statistics.median(gained), 2)}


def bench_update_alone(benchmark):
    """Clipping, AdamW and the average of the weights, with float32 gradients."""
    found = child("update alone", "small", 1)
    record(benchmark, found["seconds"])
    benchmark.pedantic(lambda: None, rounds=1)


def update_alone(name: str) -> dict:
    model = pair(name)[1]
    passes = {
        "ours": Parameters(model, choose_update, fused=True),
        PLAINLY: Parameters(model, Update, fused=True),
        FOREACH: Parameters(model, Update, foreach=True),
    }
    for call in passes.values():
        call()
    for tensors in zip(*(each.averages.values() for each in passes.values()), strict=True):
        for other in tensors[1:]:
            torch.testing.assert_close(tensors[0], other, rtol=1e-6, atol=1e-8)
    return {"seconds": seconds(passes, blocks=5, calls=5)}


@pytest.mark.parametrize("phase", ["forward", "training"])
def bench_profile(benchmark, phase):
    """Operator by operator; ours as it is called, diffusers as it is."""
    theirs, ours = pair("small")
    x, t = inputs("small", 32)
    if phase == "training":
        calls = {"ours": Training(ours, "small", 32), "diffusers": Training(theirs, "small", 32)}
        found = {each: profile_unet.times(call, 3) for each, call in calls.items()}
        benchmark.extra_info["copies"] = profile_unet.copies(calls["ours"])
    else:
        twin, low = prepacked(ours.eval(), BF16), x.to(BF16)
        theirs = theirs.to(BF16).eval()
        calls = {"ours": lambda: twin(low, t), "diffusers": lambda: theirs(low, t).sample}
        with torch.inference_mode():
            found = {each: profile_unet.times(call) for each, call in calls.items()}
    benchmark.extra_info.update(milliseconds=found, batch=32)
    benchmark.pedantic(lambda: None, rounds=1)


def peak_memory(whose: str, name: str, batch: int) -> int:
    """MB that three steps of training need at their peak beyond a process with the model in it."""
    return child("memory", whose, name, batch)["peak_mb"]


def child(*args, **environment) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **environment},
    )
    return json.loads(done.stdout.splitlines()[-1])


def bench_kept_memory(benchmark):
    """A training step that keeps the memory it frees, and one that gives it back (execution.py)."""
    found = {how: child("faults", how, "small", 32) for how in ("ours", "memory returned")}
    record(benchmark, {how: f["seconds"] for how, f in found.items()}, batch=32)
    benchmark.extra_info["page_faults_a_step"] = {how: f["faults"] for how, f in found.items()}
    benchmark.pedantic(lambda: None, rounds=1)


def without_avx512(benchmark, kind: str, goal: float | None = None) -> None:
    """float32, on the instructions of a machine without AVX-512, AMX and bfloat16.

    Of three processes together: between them diffusers' step differs by some percent.
    """
    environment = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    environment["MKL_ENABLE_INSTRUCTIONS"] = "AVX2"
    found = [child(kind, "small", 32, **environment)["seconds"] for _ in range(3)]
    taken = {name: [s for times in found for s in times[name]] for name in found[0]}
    goals = {} if goal is None else {"goals": {"diffusers": goal}}
    record(benchmark, taken, batch=32, capability="avx2", **goals)
    benchmark.pedantic(lambda: None, rounds=1)


def bench_denoising_step_without_avx512(benchmark):
    without_avx512(benchmark, "fp32", 1.2)


def bench_training_step_without_avx512(benchmark):
    without_avx512(benchmark, "fp32 training")


def fp32_step(name: str, batch: int) -> dict:
    theirs, ours = (model.eval() for model in pair(name))
    x, t = inputs(name, batch, one_step=True)
    sampled = as_sampled(ours, torch.float32, t)
    last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    contenders = {
        "ours": lambda: sampled(x, t),
        "diffusers": lambda: theirs(x, t).sample,
        "diffusers channels_last": lambda: last(x, t).sample,
    }
    with torch.inference_mode():
        for _ in range(3):  # the third is the recording's
            same(contenders["ours"](), contenders["diffusers"](), "ours", 1e-4)
        return {"seconds": seconds(contenders, blocks=3, calls=2)}


def fp32_training(name: str, batch: int) -> dict:
    theirs, ours = pair(name)
    last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    models = {"ours": ours, "diffusers": theirs, "diffusers channels_last": last}
    steps = {each: Training(model, name, batch, low=False) for each, model in models.items()}
    same(*(steps[each]().reshape(1) for each in ("ours", "diffusers")), "ours", 1e-4)
    return {"seconds": seconds(steps, blocks=3, calls=1)}


def resident(field: str) -> int:
    """Bytes. getrusage's peak would be that of the process that started this one, if larger."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def faults(how: str, name: str, batch: str) -> dict:
    if how == "ours":
        assert keep_freed_memory()
    step = Training(pair(name)[1], name, int(batch))
    for _ in range(3):
        step()
    before, taken = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
    for _ in range(5):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return {"seconds": taken, "faults": found // 5}


def main(kind: str, *args: str) -> dict:
    """What a process of its own measures."""
    if kind == "faults":
        return faults(*args)
    import conftest  # noqa: F401  the same malloc for all

    if kind == "memory":
        whose, name, batch = args
        theirs, ours = pair(name)
        model = theirs if whose == "diffusers" else ours
        del theirs, ours
        gc.collect()
        # Else what the other model has freed would count as this one's, and a step take it unseen.
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        step = Training(model, name, int(batch), averaged=whose != NO_AVERAGE)
        for _ in range(3):
            step()
        return {"peak_mb": round((resident("VmHWM") - before) / 1e6)}
    if kind == "sampling":
        return sampling_step(args[0], int(args[1]), int(args[2]))
    name, batch = args
    if kind == "step":
        return denoising_step(name, int(batch))
    if kind == "step on PyTorch's ops":
        return eager_step(name, int(batch))
    if kind == "training on PyTorch's ops":
        step = Training(pair(name)[1], name, int(batch))
        return {"seconds": seconds({EAGER: step}, blocks=3, calls=2)}
    if kind == "update":
        return update(name, int(batch))
    if kind == "update alone":
        return update_alone(name)
    return {"fp32": fp32_step, "fp32 training": fp32_training}[kind](name, int(batch))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
