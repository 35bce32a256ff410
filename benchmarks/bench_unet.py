"""Our U-Net against diffusers' on the CPU: a denoising step, a training step, their memory.

The same weights, by load_diffusers, none at zero; bfloat16. Against diffusers' model as it is and
in channels_last memory, compiled by torch.compile, and by OpenVINO with static shapes where that is
installed (pip install --no-deps openvino openvino-telemetry); torch.compile without freezing, as
it comes. Ours is what engine.sample calls, the
prepacked twin, and what engine.train trains. Parity is asserted before anything is timed; calls are
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
import tempfile
import time
from pathlib import Path

import profile_unet
import pytest
import torch

from engine.execution import keep_freed_memory
from engine.foreign import load_diffusers
from engine.prepacked import prepacked

diffusers = pytest.importorskip("diffusers")

SMALL = dict(
    sample_size=32,
    in_channels=1,
    out_channels=1,
    block_out_channels=(64, 128, 128),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)
CIFAR10 = dict(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    attention_head_dim=256,  # one head, as published
    freq_shift=1,
    flip_sin_to_cos=False,
    downsample_padding=0,
    norm_eps=1e-6,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)
MODELS = {"small": SMALL, "cifar10": CIFAR10}
STEPS = [("small", 32), ("small", 1), ("cifar10", 8)]
GOALS = {
    ("small", 32): {"diffusers": 2.2, "compile": 1.5},
    ("small", 1): {"diffusers": 2.0, "compile": 1.3},
    ("cifar10", 8): {"diffusers": 1.5},
}
BF16 = torch.bfloat16
PAUSE = 0.3  # seconds


def pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """diffusers' model and ours of the same weights, float32."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**MODELS[name])
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_diffusers(folder)


def inputs(name: str, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, MODELS[name].get("in_channels", 3), 32, 32, generator=generator)
    return x, torch.randint(0, 1000, (batch,), generator=generator)


def seconds(contenders: dict, blocks: int, calls: int) -> dict[str, list[float]]:
    """Seconds of every call; in turns, a block of calls each, the first of a block left out.

    A pause between: each library's threads look for work for a while after their last, on the two
    cores that the next contender is to have.
    """
    taken = {name: [] for name in contenders}
    for _ in range(blocks):
        for name, call in contenders.items():
            time.sleep(PAUSE)
            call()
            for _ in range(calls):
                start = time.perf_counter()
                call()
                taken[name].append(time.perf_counter() - start)
    return taken


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


def same(found: torch.Tensor, expected: torch.Tensor, whose: str, bound: float = 0.03) -> float:
    """The difference, asserted to be that of bfloat16 networks: the same but for their rounding."""
    difference = (found.float() - expected.float()).norm() / expected.float().norm()
    assert difference <= bound, f"{whose}: differs by {difference:.3f} of the norm"
    return round(difference.item(), 5)


def openvino(model: torch.nn.Module, x: torch.Tensor, t: torch.Tensor):
    """The model in OpenVINO, bfloat16, for this shape alone; None where it is not installed."""
    try:
        import openvino as ov
    except ImportError:
        return None

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, t):
            return self.model(x, t, return_dict=False)[0]

    shapes = [ov.PartialShape(x.shape), ov.PartialShape(t.shape)]
    converted = ov.convert_model(Plain(), example_input=(x, t), input=shapes)
    options = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.compile_model(converted, "CPU", options)
    arrays = [x.numpy(), t.numpy()]
    return lambda: torch.from_numpy(compiled(arrays)[0])


@pytest.mark.parametrize("name, batch", STEPS, ids=[f"{n}-{b}" for n, b in STEPS])
def bench_denoising_step(benchmark, name, batch):
    """All contenders in one process, and a fresh one per case: what OpenVINO leaves behind in its
    process takes 4 ms more of every later step of batch 1."""
    found = child("step", name, batch)
    goals = GOALS[name, batch]
    record(benchmark, found["seconds"], batch=batch, goals=goals, error=found["error"])
    benchmark.pedantic(lambda: None, rounds=1)


def denoising_step(name: str, batch: int) -> dict:
    """Seconds of every call of each contender, and its error against float32."""
    theirs, ours = pair(name)
    x, t = inputs(name, batch)
    plain = copy.deepcopy(theirs).eval()
    theirs, ours = theirs.to(BF16).eval(), ours.eval()
    last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    twin, low = prepacked(ours, BF16), x.to(BF16)
    contenders = {
        "ours": lambda: twin(low, t),
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
            error[each] = same(call(), truth, each, 0.03 if each == "ours" else 0.1)
        turns = {"blocks": 5, "calls": 20 if batch == 1 else 3}
        taken = seconds(contenders, **turns)
        static = openvino(plain, x, t)  # made only now, and timed alone
        if static is not None:
            error["openvino"] = same(static(), truth, "openvino", 0.1)
            taken |= seconds({"openvino": static}, **turns)
    return {"seconds": taken, "error": error}


class Training:
    """Steps of AdamW under autocast, as diffusers' examples and engine.train make them."""

    def __init__(self, model: torch.nn.Module, name: str, batch: int) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.x, self.t = inputs(name, batch)
        self.target = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(2))

    def __call__(self) -> torch.Tensor:
        with torch.autocast("cpu", BF16):
            out = self.model(self.x, self.t)
            out = out if isinstance(out, torch.Tensor) else out.sample
            loss = (out.float() - self.target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


@pytest.mark.parametrize("name, batch", [("small", 32)])
def bench_training_step(benchmark, name, batch):
    theirs, ours = pair(name)
    steps = {"ours": Training(ours, name, batch), "diffusers": Training(theirs, name, batch)}
    losses = {each: torch.stack([step() for _ in range(3)]) for each, step in steps.items()}
    same(losses["ours"], losses["diffusers"], "losses", 0.01)
    taken = seconds(steps, blocks=3, calls=2)
    record(benchmark, taken, batch=batch, goals={"diffusers": 1.8})
    peak = {each: peak_memory(each, name, batch) for each in steps}
    benchmark.extra_info.update(
        peak_mb=peak,
        peak_of_diffusers=round(peak["ours"] / peak["diffusers"], 3),
        goal_peak=0.75,
    )
    benchmark.pedantic(steps["ours"], rounds=1)


@pytest.mark.parametrize("phase", ["forward", "training"])
def bench_profile(benchmark, phase):
    """Operator by operator; ours as it is called, diffusers as it is."""
    theirs, ours = pair("small")
    x, t = inputs("small", 32)
    if phase == "training":
        calls = {"ours": Training(ours, "small", 32), "diffusers": Training(theirs, "small", 32)}
        found = {each: profile_unet.times(call, 3) for each, call in calls.items()}
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


@pytest.mark.parametrize("capability", ["avx2"])
def bench_denoising_step_without_avx512(benchmark, capability):
    """float32, on the instructions of a machine without AVX-512, AMX and bfloat16."""
    environment = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    environment["MKL_ENABLE_INSTRUCTIONS"] = "AVX2"
    found = child("fp32", "small", 32, **environment)
    record(benchmark, found["seconds"], batch=32, goals={"diffusers": 1.2}, capability=capability)
    benchmark.pedantic(lambda: None, rounds=1)


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
        model = ours if whose == "ours" else theirs
        del theirs, ours
        gc.collect()
        # Else what the other model has freed would count as this one's, and a step take it unseen.
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        step = Training(model, name, int(batch))
        for _ in range(3):
            step()
        return {"peak_mb": round((resident("VmHWM") - before) / 1e6)}
    name, batch = args
    if kind == "step":
        return denoising_step(name, int(batch))
    theirs, ours = (model.eval() for model in pair(name))
    x, t = inputs(name, int(batch))
    twin = prepacked(ours, torch.float32)
    contenders = {
        "ours": lambda: twin(x, t),
        "diffusers": lambda: theirs(x, t).sample,
    }
    with torch.inference_mode():
        same(contenders["ours"](), contenders["diffusers"](), "ours", 1e-4)
        return {"seconds": seconds(contenders, blocks=3, calls=2)}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
