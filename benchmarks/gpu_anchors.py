"""What the device can do at all: copy rate, matrix rate, what a kernel costs. And the noise's bits,
and whether sampling as a CUDA graph draws the images of the plain loop.

Each anchor stands by itself: one that fails is recorded with its reason.
"""

import os
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from gpu_measure import failure

import engine
from engine import dispatch, ops, schedules

COPY_MB = (16, 32, 64, 256, 1024)  # bytes read plus written: half of it is one buffer
NODES = 200
MATRIX = 8192


def _seconds(device, calls: list[Callable], keep: int, turns: int = 9) -> float:
    """Median seconds of one call in a captured graph."""
    for call in calls:
        call()
    graph = device.capture(calls, keep)
    times = device.time({"": graph}, turns)[""]
    return statistics.median(times) / graph.calls


def copy_rate(device, megabytes: float) -> float:
    """Bytes per second, read plus written, cold: the better of a copy and an elementwise kernel."""
    n = max(int(megabytes * 1e6 / 2 / 4), 1)
    sets = min(max(3 * device.l2_bytes // (8 * n) + 1, 2), 64)
    pairs = [[torch.rand(n, device=device.device) for _ in range(2)] for _ in range(sets)]
    times = -(-10 // sets)
    copies = _seconds(device, [partial(b.copy_, a) for a, b in pairs] * times, sets)
    kernels = _seconds(device, [partial(torch.neg, a, out=b) for a, b in pairs] * times, sets)
    return 8 * n / min(copies, kernels)


def node_us(device) -> float:
    """µs per graph node of the smallest kernel: one element."""
    one = torch.zeros(1, device=device.device)
    return 1e6 * _seconds(device, [partial(one.add_, 1)] * NODES, 1)


def matrix_tflops(device, size: int) -> float:
    a, b = (torch.randn(size, size, device=device.device).bfloat16() for _ in range(2))
    c = torch.empty_like(a)
    return 2 * size**3 / _seconds(device, [partial(torch.mm, a, b, out=c)] * 10, 1, 5) / 1e12


def noise_bits(device, count: int = 2**20 + 3) -> dict[str, bool | str]:
    """Whether each back end on the device draws the CPU's bits: float32, an odd offset."""

    def draw(where, impl):
        key = [torch.tensor(v, device=where) for v in (7, 3)]
        z = ops.noise(*key, ops.STEP_NOISE, (count,), device=where, offset=5, impl=impl)
        return z.cpu().view(torch.int32)

    truth, found = draw(torch.device("cpu"), "eager"), {}
    for name, where, impl in (
        ("native CPU", torch.device("cpu"), "native"),
        ("eager", device.device, "eager"),
        ("native", device.device, "native"),
        ("triton", device.device, "triton"),
    ):
        try:
            found[name] = torch.equal(draw(where, impl), truth)
        except Exception as error:
            found[name] = failure(error)["reason"]
    return found


def host_us(device) -> dict[str, float | str]:
    """Wall µs of one reverse step, host included, as a sampler's loop pays it: CIFAR B128."""
    from gpu_diffusion import PICTURES, TINY, reverse_eager, reverse_inputs, reverse_ours

    shape = TINY["tiny"] if device.stand_in else PICTURES["CIFAR"]
    x, out, rows, step, key = reverse_inputs(device, shape, torch.float32, 0)
    loops = {impl: partial(reverse_ours, impl, x, out, rows, step, key) for impl in dispatch.IMPLS}
    del loops["auto"], loops["eager"]
    loops["eager"] = partial(reverse_eager, x, out, rows, step, key)
    found = {}
    try:
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(num_train_timesteps=1000, clip_sample=True)
        scheduler.set_timesteps(1000)
        loops["diffusers DDPMScheduler.step"] = partial(scheduler.step, out, 500, x)
    except Exception as error:  # not installed, or another version's interface
        found["diffusers DDPMScheduler.step"] = failure(error)["reason"]
    for name, call in loops.items():
        try:
            with torch.inference_mode():
                for _ in range(3):
                    call()
                device.synchronize()
                start, count = time.perf_counter(), 5 if device.stand_in else 100
                for _ in range(count):
                    call()
                device.synchronize()
            found[name] = round((time.perf_counter() - start) / count * 1e6, 2)
        except Exception as error:
            found[name] = failure(error)["reason"]
    return found


TINY_UNET = dict(
    image_size=16,
    in_channels=3,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    head_channels=32,
    num_groups=8,
)


def graph_sampling(device, batch: int = 16, few: int = 10, many: int = 40) -> dict[str, dict]:
    """sampler, back end → ms per step with graph=False and True, and whether the images agree.

    The warning that sampling gives where it cannot capture is an error here. From two counts of
    steps, so that the capture is no part of a step.
    """
    torch.manual_seed(0)
    model = engine.UNet(**TINY_UNET).to(device.device).eval()
    with torch.no_grad():  # what starts at zero would hide the network from the images
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    diffusion = engine.Diffusion(schedules.betas("linear", 1000))
    shape = (batch, 3, 16, 16)

    def draw(sampler, graph, steps):
        device.synchronize()
        start = time.perf_counter()
        x = engine.sample(
            model, diffusion, shape, sampler=sampler, steps=steps, seed=1, graph=graph
        )
        device.synchronize()
        return x, time.perf_counter() - start

    def row(sampler):
        images, ms = {}, {}
        for graph in (False, True):
            draw(sampler, graph, few)  # compiles, allocates
            _, short = draw(sampler, graph, few)
            images[graph], long = draw(sampler, graph, many)
            ms[graph] = round((long - short) / (many - few) * 1e3, 4)
        same = torch.equal(images[False], images[True]) and images[True].isfinite().all().item()
        return {"plain_ms": ms[False], "graph_ms": ms[True], "same_images": same}

    found, asked = {}, os.environ.get("ENGINE_BACKEND")
    try:
        for impl in dispatch.IMPLS[1:]:
            os.environ["ENGINE_BACKEND"] = impl  # the network's ops as well as the step
            for sampler in ("ddpm", "dpm++"):
                try:
                    with warnings.catch_warnings():
                        warnings.filterwarnings("error", "sampling without a CUDA graph")
                        found[f"{sampler}, {impl}"] = row(sampler)
                except Exception as error:
                    found[f"{sampler}, {impl}"] = {"error": failure(error)["reason"]}
    finally:
        os.environ.pop("ENGINE_BACKEND")
        if asked is not None:
            os.environ["ENGINE_BACKEND"] = asked
    return found


def anchors(device, mode: str = "default") -> dict:
    sizes = (0.01,) if device.stand_in else COPY_MB
    jobs = {f"copy {mb} MB": partial(copy_rate, device, mb) for mb in sizes}
    jobs["node_us"] = partial(node_us, device)
    jobs["matrix_tflops"] = partial(matrix_tflops, device, 256 if device.stand_in else MATRIX)
    jobs["noise_bits"] = partial(noise_bits, device)
    jobs["reverse_step_host_us"] = partial(host_us, device)
    jobs["graph_sampling"] = partial(graph_sampling, device)
    found, copies, failed = {}, {}, {}
    if device.stand_in or mode == "quick":  # its kernels may have to be compiled
        reason = "a CUDA graph needs a CUDA device" if device.stand_in else "not in a quick run"
        del jobs["graph_sampling"]
        found["graph_sampling"] = {"skipped": reason}
    for name, job in jobs.items():
        try:
            value = job()
            device.free()
        except Exception as error:
            failed[name] = failure(error)["reason"]
            continue
        if name == "matrix_tflops":
            found["under_load"] = device.state()
        if name.startswith("copy "):
            copies[name.removeprefix("copy ")] = round(value / 1e9, 1)
        else:
            found[name] = round(value, 3) if isinstance(value, float) else value
    found["copy_gb_per_s"] = copies
    if failed:
        found["failed"] = failed
    return found
