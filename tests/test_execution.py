"""What "auto" chooses, what is said of it, and that it can be overridden."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from small_unet import OPTIONS, SMALL, alive, inputs

import engine
from engine import execution
from engine.execution import choose, describe

CPU = dict(device="cpu")


def test_auto_on_the_cpu():
    e = choose(**CPU, sampling=True)
    assert e.device.type == "cpu" and e.layout == "channels_last"
    assert e.prepacked and not e.compiled and not choose(**CPU).prepacked
    assert not choose(**CPU, compiled=True, sampling=True).prepacked
    with torch.backends.mkldnn.flags(enabled=False):
        assert not choose(**CPU, sampling=True).prepacked, "said only where it is done"
    assert choose(**CPU, precision="fp32").precision == torch.float32
    assert choose(**CPU, precision="bf16").precision == torch.bfloat16


@pytest.mark.parametrize("avx512_bf16, amx", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("onednn", [False, True])
def test_bf16_only_where_the_cpu_has_arithmetic_for_it(monkeypatch, avx512_bf16, amx, onednn):
    """AVX-512 without it emulates: fp32 is faster."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    expected = torch.bfloat16 if onednn and (avx512_bf16 or amx) else torch.float32
    assert choose(**CPU).precision == expected


def test_one_line_names_every_choice():
    line = describe(engine.UNet(**SMALL), choose("cpu", "fp32", "contiguous", True))
    assert "\n" not in line
    for word in ("cpu (", "float32", "contiguous", "torch.compile", "U-Net of", "attention: "):
        assert word in line
    line = describe(engine.UNet(**SMALL), choose("cpu", "fp32", sampling=True))
    assert "float32, channels_last, not compiled, prepacked weights" in line


@pytest.mark.parametrize("option", ["plain", "adm", "three levels"])
def test_layouts_agree(option):
    model = alive(engine.UNet(**{**SMALL, **OPTIONS[option]}))
    x, t, y = inputs(model)
    found = {}
    for layout, memory_format in execution.LAYOUTS.items():
        moved = choose("cpu", "fp32", layout).prepared(model)
        assert all(
            p.is_contiguous(memory_format=memory_format) for p in moved.parameters() if p.dim() == 4
        )
        inside, _ = moved.encode(x, moved.time_embed(t, x.dtype))
        assert inside.is_contiguous(memory_format=memory_format)
        out = moved(x, t, y)
        grads = torch.autograd.grad(out.square().sum(), list(moved.parameters()))
        found[layout] = [out, *grads]
    whole = torch.cat([g.flatten() for g in found["contiguous"]]).norm()
    for a, b in zip(*found.values(), strict=True):  # some gradients are zero but for rounding
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6 * whole


CHURN = """
import resource, torch
from engine.execution import choose
e = choose("cpu")
def step():
    kept = [torch.ones(2_000_000) for _ in range(20)]
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): step()
after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
e.tidy()
step()
again = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - after
print(e.keeps_memory, (after - before) // 5, again)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")
def test_freed_memory_stays():
    """160 MB taken and freed again are 39,000 pages, each a fault where it went to the system; as
    it does, once, on `tidy`."""

    def faults(**environment):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        done = subprocess.run(
            [sys.executable, "-c", CHURN],
            capture_output=True,
            text=True,
            check=True,
            env={**clean, **environment},
        )
        kept, count, again = done.stdout.split()
        return kept == "True", int(count), int(again)

    kept, ours, tidied = faults()
    if not kept:
        pytest.skip("this C library has no mallopt")
    left, theirs, _ = faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert not left, "what the user has set up stays"
    assert ours < 2_000 < 20_000 < min(theirs, tidied)


@pytest.mark.parametrize("extra", [[], ["--layout", "contiguous", "--precision", "fp32"]])
def test_commands_say_what_they_chose(tmp_path, capfd, extra):
    from engine import train

    sample = importlib.import_module("engine.sample")  # engine.sample is the function
    run = tmp_path / "run"
    options = "--width 16 --image-size 8 --steps 2 --batch 4 --samples 0 --sample-every 0"
    data = tmp_path / "pictures"
    data.mkdir()
    from PIL import Image

    for k in range(4):
        Image.new("L", (8, 8), 40 * k).save(data / f"{k}.png")
    train_options = f"--dataset {data} --channels 1 --out {run} --device cpu {options}".split()
    assert train.main([*train_options, "--no-tensorboard", "--no-cache", *extra]) == 0
    said = capfd.readouterr().err
    layout = "contiguous" if extra else "channels_last"
    assert re.search(rf"cpu \(\d+ threads\), (bfloat16|float32), {layout}, not compiled;", said)
    drawn = [str(run), "--n", "2", "--steps", "2", "--device", "cpu", "--out"]
    assert sample_main(sample, [*drawn, str(tmp_path / "a.png"), *extra]) == 0
    said = capfd.readouterr().err
    assert f"{layout}, not compiled, prepacked weights" in said
    assert sample_main(sample, [*drawn, str(tmp_path / "b.png"), "--no-prepack", *extra]) == 0
    assert "prepacked" not in capfd.readouterr().err


def sample_main(module, args):
    from engine import cli

    return cli.main(module.command, args)


def test_compile_is_asked_for(monkeypatch):
    """The trainer's network is then the compiled model, its weights the model's own."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda m, **_: asked.append(m) or m)
    model = engine.UNet(**SMALL)
    assert choose("cpu").network(model) is model and not asked
    assert choose("cpu", compiled=True).network(model) is model and asked == [model]


def test_prepacked_only_where_sampling_will_do_it():
    assert not execution.choose("cpu", sampling=False).prepacked
    with torch.backends.mkldnn.flags(enabled=False):
        assert not execution.choose("cpu", "fp32", sampling=True).prepacked
