"""Our schedulers in diffusers' hands: runs, pipelines, files, copies, gradients; and no waiting."""

import copy
import inspect
import pickle
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine
from engine import dispatch

diffusers = pytest.importorskip("diffusers")

from scheduler_pairs import (  # noqa: E402
    KINDS,
    assert_same_runs,
    originals,
    pair,
    seeded,
    seeded_run,
    tensors,
)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (4, 3, 6, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_runs_and_generators(kind, shape, monkeypatch):
    """Whole runs twice with one object, other numbers of steps after, and steps out of order."""
    original, mine = pair(kind, None)
    more = {"eta": 1.0} if kind == "DDIM" else {}
    for n, steps in ((10, None), (10, None), (6, None), (10, (0, 7, 3, 9, 1))):
        if steps and kind == "DPMSolverMultistep":  # it counts its steps itself
            continue
        expected = seeded_run(original, steps, n, shape, **more)
        with originals(monkeypatch, allowed=False):
            assert_same_runs(seeded_run(mine, steps, n, shape, **more), expected)


def test_lists_of_generators():
    original, mine = pair("DDPM")
    x, out, _ = tensors()
    a, b = (
        s.step(out, 500, x, generator=[seeded(1), seeded(2)]).prev_sample for s in (original, mine)
    )
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_in_the_middle_of_a_run(kind):
    original, mine = pair(kind, 8)
    x, out, _ = tensors()

    def go(scheduler, x, steps):
        for t in scheduler.timesteps[steps]:
            x = scheduler.step(out, t, x, generator=seeded()).prev_sample
        return x

    expected = go(original, x, slice(None))
    half = go(mine, x, slice(4))
    copies = (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), copy.copy(mine), mine)
    for scheduler in copies:
        assert torch.allclose(go(scheduler, half, slice(4, None)), expected, atol=5e-5)
        assert scheduler.config == mine.config
    assert "_tables" in vars(mine) and "_tables" not in vars(copy.deepcopy(mine))  # keyed by ids


@pytest.mark.parametrize("kind", KINDS)
def test_what_somebody_changes_is_seen(kind, monkeypatch):
    original, mine = pair(kind, clip_sample=False) if kind != KINDS[2] else pair(kind)

    def same(what):
        x, out, _ = tensors()
        for scheduler in (original, mine):
            scheduler._step_index = 3
        results = [
            s.step(out, original.timesteps[3], x, generator=seeded()).prev_sample
            for s in (original, mine)
        ]
        assert torch.allclose(*results, atol=1e-5), what
        return results[0]

    first = same("as made")
    for scheduler in (original, mine):
        scheduler.register_to_config(prediction_type="v_prediction")
    second = same("prediction_type")
    assert not torch.allclose(first, second)
    if kind == KINDS[2]:
        for scheduler in (original, mine):
            scheduler.sigmas[3:5] *= 1.5
        assert not torch.allclose(second, same("sigmas"))
        return
    for scheduler in (original, mine):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    third = same("alphas_cumprod")
    assert not torch.allclose(second, third)
    for scheduler in (original, mine):
        scheduler.alphas_cumprod *= 0.9
    fourth = same("alphas_cumprod in place")
    assert not torch.allclose(third, fourth)
    for scheduler in (original, mine):
        scheduler.timesteps = scheduler.timesteps + 7
        scheduler.register_to_config(thresholding=True, sample_max_value=1.2)
    assert not torch.allclose(fourth, same("timesteps and thresholding"))


def test_the_first_step_of_a_run():
    """Of two equal timesteps, of one that is none, and of a run that begins in the middle."""
    original, mine = pair("DPMSolverMultistep", 100, use_karras_sigmas=True)
    assert len(set(original.timesteps.tolist())) < 100
    for t in (*original.timesteps, int(original.timesteps[2]), 5000):
        for scheduler in (original, mine):
            scheduler._step_index = None
            scheduler._init_step_index(t)
        assert original.step_index == mine.step_index, t
    for scheduler in (original, mine):
        scheduler.set_begin_index(7)
        scheduler._init_step_index(original.timesteps[9])
        assert scheduler.step_index == 7


def test_only_options_of_its_own_count():
    """from_config keeps what another scheduler's configuration says beyond ours."""
    config = diffusers.DDPMScheduler(clip_sample=True, clip_sample_range=0.1).config
    original = diffusers.DPMSolverMultistepScheduler.from_config(config)
    mine = engine.EngineDPMSolverMultistepScheduler.from_config(config)
    assert "clip_sample" in mine.config
    assert_same_runs(seeded_run(mine), seeded_run(original))


class Watched(TorchDispatchMode):
    """Refuses whatever makes the host wait for a device; notes every call."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        assert name.split("::")[1] not in self.WAITS, f"{name} reads from the device"
        self.calls.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(
    bool(dispatch.absence("reverse_step", "native")), reason="the extension is not built"
)
@pytest.mark.parametrize("kind", KINDS)
def test_one_launch_and_no_wait(kind):
    """The timesteps lie on a device that has no data to be read: meta stands for a GPU."""
    original, mine = pair(kind, 6)
    mine.set_timesteps(6, device="meta")
    x, out, _ = tensors()
    y = x
    for k, (t, there) in enumerate(zip(original.timesteps, mine.timesteps, strict=True)):
        assert there.device.type == "meta"
        x = original.step(out, t, x, generator=seeded(k)).prev_sample
        with Watched() as watched:
            y = mine.step(out, there, y, generator=seeded(k)).prev_sample
        launches = [name for name in watched.calls if name.startswith("engine::")]
        assert launches == ["engine::reverse_step_general_fwd"], watched.calls
        beside = {"empty_like", "select", "view", "randn", "promote_types"}
        if k > 0:  # the first made the table
            assert {name.split("::")[1] for name in watched.calls} <= {
                *beside,
                "reverse_step_general_fwd",
            }
        assert torch.allclose(x, y, atol=1e-5)


def test_a_part_of_the_timesteps_and_a_stranger(monkeypatch):
    """Views of the timesteps are recognised; another tensor's number is read."""
    original, mine = pair("DDIM")
    mine.set_timesteps(10, device="meta")
    x, out, _ = tensors()
    for k, there in enumerate(mine.timesteps[4:]):
        expected = original.step(out, original.timesteps[4 + k], x).prev_sample
        assert torch.allclose(mine.step(out, there, x).prev_sample, expected, atol=1e-5)
    with pytest.raises(RuntimeError, match="meta"):
        mine.step(out, mine.timesteps[3] + 1, x)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    original, mine = pair(kind)
    grads = []
    for scheduler in (original, mine):
        x, out, _ = tensors()
        with torch.inference_mode():  # what is kept from here must not get in the way
            scheduler.step(out, scheduler.timesteps[0], x, generator=seeded())
        scheduler.set_timesteps(10)
        x, out, cotangent = tensors()
        x.requires_grad_(), out.requires_grad_()
        y = scheduler.step(out, scheduler.timesteps[5], x, generator=seeded()).prev_sample
        grads.append(torch.autograd.grad(y, (x, out), cotangent))
    for a, b in zip(*grads, strict=True):
        assert a.abs().max() > 0.01 and torch.allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_layouts_and_signatures(kind):
    original, mine = pair(kind)
    x, out, _ = tensors()
    kinds = [type(s.step(out, s.timesteps[0], x)) for s in (original, mine)]
    assert kinds[0] is kinds[1]
    for name in ("step", "set_timesteps"):
        a, b = (inspect.signature(getattr(s, name)).parameters for s in (original, mine))
        assert list(a) == list(b)
        assert [p.default for p in a.values()] == [p.default for p in b.values()]
    x = x.to(memory_format=torch.channels_last)
    cases = (x, out), (x, x.flip(0)), (out.transpose(2, 3), x.transpose(2, 3))
    for sample, model_output in cases:
        original, mine = pair(kind)
        t = original.timesteps[0]
        a, b = (s.step(model_output, t, sample, generator=seeded()) for s in (original, mine))
        assert torch.allclose(a.prev_sample, b.prev_sample, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    original, mine = pair(kind, None, beta_schedule="scaled_linear", steps_offset=1)
    mine.save_pretrained(tmp_path)
    again = type(mine).from_pretrained(tmp_path)
    assert type(again) is type(mine) and isinstance(again, type(original))
    back = type(original).from_pretrained(tmp_path)  # the original reads what ours wrote
    for scheduler in (again, back, type(original).from_config(mine.config)):
        for name, value in original.config.items():
            assert name.startswith("_") or scheduler.config[name] == value, name
    assert_same_runs(seeded_run(again), seeded_run(original))


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines(kind, monkeypatch, tmp_path):
    pipeline = diffusers.DDIMPipeline if kind == "DDIM" else diffusers.DDPMPipeline
    original, mine = pair(kind, None)
    options = dict(batch_size=2, num_inference_steps=6, output_type="np")
    more = {"eta": 0.3} if kind == "DDIM" else {}
    pipe = pipeline(unet(), original)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(generator=seeded(), **options, **more).images
    pipe.scheduler = type(mine).from_config(pipe.scheduler.config)
    with originals(monkeypatch, allowed=False):
        found = pipe(generator=seeded(), **options, **more).images
    assert expected.std() > 0.1 and abs(found - expected).max() < 1e-4

    pipe.save_pretrained(tmp_path)
    again = pipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    wanted = diffusers.DDIMScheduler if kind == "DDIM" else type(mine)  # its pipeline converts it
    assert type(again.scheduler) is wanted
    images = again(generator=seeded(), **options, **more).images
    assert abs(images - expected).max() < 1e-4


def test_without_diffusers(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "engine.diffusers_schedulers")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install diffusers$") as raised:
        engine.EngineDDPMScheduler  # noqa: B018
    assert raised.value.name == "diffusers"
    assert engine.UNet is not None
