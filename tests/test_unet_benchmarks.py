"""What compares whole U-Nets: both sides compute the same, and the tables tell what was found."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_unet
import profile_unet
import unet_cases
import unet_report

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(not BF16, reason="this CPU has no bfloat16 kernels of oneDNN")
TINY = dict(
    sample_size=32,
    in_channels=1,
    out_channels=1,
    block_out_channels=(32, 32),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(unet_cases.MODELS, "tiny", TINY)
    monkeypatch.setattr(unet_cases, "PAUSE", 0)


@needs_bf16
def test_both_updates_are_the_same_training():
    found = bench_unet.update("tiny", 2, rounds=6)
    assert {name: len(times) for name, times in found["seconds"].items()} == {
        "ours": 6,
        "ours, PyTorch's AdamW": 6,
    }
    names = ["ours", "ours, PyTorch's AdamW", "ours, PyTorch's foreach AdamW"]
    assert list(bench_unet.update_alone("tiny")["seconds"]) == names


@needs_bf16
def test_both_samplings_are_the_same(monkeypatch):
    """DDIM from one x_T; neither's from another."""
    found = bench_unet.sampling_step("tiny", 2, 4)
    assert found["error"]["ours"] <= 1e-3
    assert [len(times) for times in found["seconds"].values()] == [3, 3]
    runs = unet_cases.sampling(*unet_cases.pair("tiny"), "tiny", 2)
    x, _ = unet_cases.inputs("tiny", 2)
    images = [run(5, torch.float32, x) for run in runs.values()]
    assert torch.allclose(*images, atol=1e-3) and images[0].std() > 0.05
    assert not torch.allclose(runs["ours"](5, torch.float32, -x), images[0], atol=0.1)


@pytest.mark.parametrize("measure, calls", [("fp32_step", 6), ("fp32_training", 3)])
def test_in_float32(measure, calls):
    """Ours computes what theirs does: the measurement itself asserts it."""
    found = getattr(bench_unet, measure)("tiny", 2)["seconds"]
    assert {name: len(times) for name, times in found.items()} == {
        "ours": calls,
        "diffusers": calls,
        "diffusers channels_last": calls,
    }


@needs_bf16
def test_pytorch_s_ops_alone(monkeypatch):
    monkeypatch.setenv("ENGINE_BACKEND", "eager")
    found = bench_unet.eager_step("tiny", 2)
    assert set(found["seconds"]) == set(found["error"]) == {"ours, PyTorch's ops"}
    assert found["error"]["ours, PyTorch's ops"] < 0.1


@needs_bf16
def test_every_copy_of_a_training_step_has_a_site():
    found = profile_unet.copies(unet_cases.Training(unet_cases.pair("tiny")[1], "tiny", 2), calls=1)
    assert set(found) <= {*profile_unet.SITES, "other"}
    plain = unet_cases.Training(unet_cases.pair("tiny")[1], "tiny", 2, plainly=True)
    before = profile_unet.copies(plain, calls=1)
    for site in ("weights to bfloat16, by autocast", "gradients of weights to float32"):
        assert before[site] > 0 and found.get(site, 0) < before[site] / 4


def row(name: str, us: dict, **more) -> dict:
    speedup = {k: v / us["ours"] for k, v in us.items() if k != "ours"}
    return {"name": name, "extra_info": {"median_us": us, "speedup": speedup, **more}}


def test_tables():
    step = {"ours": 1000, "diffusers": 2500, "ours, PyTorch's ops": 1500}
    rows = [
        row("bench_denoising_step[small-1]", step, not_measured=["openvino"]),
        row("bench_sampling_step[small-1-50]", {"ours": 1100, "diffusers": 3300}),
        row("bench_training_step[small-32]", {"ours": 4000, "diffusers": 9000}),
        {
            "name": "bench_profile[training]",
            "extra_info": {"milliseconds": {"ours": {"linear": 1.0}}, "copies": {"here": 2.5}},
        },
    ]
    assert all(map(unet_report.is_unet, rows))
    lines = unet_report.tables(rows)
    head, _, *cells = lines[:6]
    assert head == "| ms of a step | denoising_step small-1 | sampling_step small-1-50 | " + (
        "training_step small-32 |"
    )
    assert cells[0] == "| ours | 1.0 | 1.1 | 4.0 |"
    assert cells[1].endswith("alone (ENGINE_BACKEND=eager) | 1.5 (1.50×) | – | – |")
    assert cells[2] == "| diffusers | 2.5 (2.50×) | 3.3 (3.00×) | 9.0 (2.25×) |"
    assert cells[3] == "| diffusers' model in OpenVINO | not measured | – | – |"
    assert "| here | 2.5 |" in lines
    assert "| here | 2.5 |" not in unet_report.tables(rows, profiles=False)


@pytest.mark.parametrize("gained, told", [(4.0, "4.0 ms shorter"), (-2.0, "2.0 ms longer")])
def test_what_one_pass_gains(gained, told):
    us = {"ours": 500_000, "ours, PyTorch's AdamW": 495_000}
    measured = row("bench_update[small-32]", us, gained_ms=gained, batch=32)
    (line,) = [x for x in unet_report.tables([measured]) if x.startswith("Clipping, AdamW")]
    assert told in line and "batch 32" in line and "500 ms are left" in line
