"""torch.compile(backend="engine") and engine.accelerate: how they are called, what they leave."""

import copy
import gc
import io
import pickle
import weakref
from types import SimpleNamespace

import foreign_models
import pytest
import torch
import torch.nn.functional as F
from rewriting import fused
from torch import nn

import engine
from engine.backend import Backend
from engine.rewrite import rewrite

X, T = torch.randn(2, 2, 8, 8), torch.tensor([7, 931])


@pytest.fixture
def model():
    torch.compiler.reset()
    torch.manual_seed(0)
    return foreign_models.Plain()


def test_options(model):
    with pytest.raises(ValueError, match="inner is 'fast', expected one of inductor, eager"):
        Backend("fast")
    with pytest.raises(ValueError, match="max_autotune is for inner='inductor'"):
        Backend("eager", max_autotune=True)
    backend = Backend(mode="reduce-overhead", shape_padding=False)
    assert (backend.inner, backend.options) == ("inductor", {"shape_padding": False})
    compiled = torch.compile(model, backend="engine", options={"inner": "eager"})
    assert torch.allclose(compiled(X), model(X), atol=1e-5)


def test_accelerate_and_undo(model):
    keys, expected = list(model.state_dict()), model(X)
    layouts = [p.stride() for p in model.parameters()]
    handle = engine.accelerate(model)
    assert not handle.report.replaced  # before the first call
    assert torch.allclose(model(X), expected, atol=1e-5)
    assert fused(handle.report) == {"GroupNorm → SiLU": 2}
    assert "2 × GroupNorm → SiLU" in str(handle.report) and "1, 4" in str(handle.report)
    assert list(model.state_dict()) == keys
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert engine.accelerate(model) is handle
    assert engine.accelerate(model, channels_last=False) is not handle  # takes its place
    assert [p.stride() for p in model.parameters()] == layouts
    engine.accelerate(model).undo()
    assert model._compiled_call_impl is None
    assert [p.stride() for p in model.parameters()] == layouts
    assert torch.equal(model(X), expected)
    with engine.accelerate(model) as handle:
        model(X)
    assert handle.report.replaced and torch.equal(model(X), expected)
    handle.undo()  # twice is once


def test_a_convolution_of_one_channel_is_laid_too():
    """Its weight is contiguous in both ways; only its strides tell a convolution the layout."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
    engine.accelerate(model)
    assert model(X[:, :1]).is_contiguous(memory_format=torch.channels_last)


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = layers()

    def forward(self, x):
        return self.layers(x)


def layers():
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())


@pytest.mark.parametrize("make", [layers, Held])
def test_every_model_of_a_class(make):
    """A container of PyTorch's own too; hooks of the model itself are seen, early or late."""
    torch.compiler.reset()
    for _ in range(10):
        model = make()
        expected = model(X)
        handle = engine.accelerate(model)
        assert torch.allclose(model(X), expected, atol=1e-5)
        assert fused(handle.report) == {"GroupNorm → SiLU": 1}
    hook = model.register_forward_hook(lambda module, args, out: out * 3)
    assert torch.allclose(model(X), expected * 3, atol=1e-5)
    hook.remove()
    assert torch.allclose(model(X), expected, atol=1e-5)


def test_weights_that_were_laid_in_inference_mode_can_be_trained(model):
    with torch.inference_mode():
        handle = engine.accelerate(model)
    model(X).sum().backward()
    with torch.inference_mode():
        handle.undo()
    model(X).sum().backward()


def test_memory_that_others_hold_stays_where_it_is(model):
    flat = torch.randn(2, *model[0].weight.shape)
    model[0].weight = nn.Parameter(flat[1])
    model[3].share_memory()
    engine.accelerate(model)
    flat.zero_()
    assert not model[0].weight.any() and model[3].weight.is_shared()
    assert not model[6].weight.is_contiguous()


def test_a_model_of_layers_alone():
    """Its frames are all PyTorch's own, which Dynamo does not enter. Many such: it keeps and counts
    compiled versions per code, of which eight would be the end."""
    torch.compiler.reset()
    for c in range(2, 22, 2):
        model = nn.Sequential(nn.Conv2d(2, c, 3), nn.Sequential(nn.GroupNorm(2, c), nn.SiLU()))
        expected = model(X)
        handle = engine.accelerate(model)
        assert torch.allclose(model(X), expected, atol=1e-5)
        assert handle.report.graphs == 1 and fused(handle.report) == {"GroupNorm → SiLU": 1}
    assert "GroupNorm → SiLU                     1.0" in str(handle.report)
    assert copy.deepcopy(model)._compiled_call_impl is None
    reference = weakref.ref(model)
    del model, handle
    gc.collect()
    assert reference() is None


class Numbers(nn.Module):
    """Whatever number a norm or an attention takes is a float of the module's own."""

    def __init__(self, eps, scale):
        super().__init__()
        self.eps, self.scale, self.root = eps, scale, 2.0**0.5
        self.g = nn.Parameter(torch.rand(1, 2, 1, 1))

    def forward(self, x):
        x = F.group_norm(x, 2, eps=self.eps)
        x = F.normalize(x, dim=1, eps=self.eps) * self.g * self.root
        x = F.scaled_dot_product_attention(x, x, x, scale=self.scale)
        y = x.flatten(0, 1)
        y = torch.bmm((torch.bmm(y, y.transpose(1, 2)) * self.scale).softmax(-1), y)
        scores = torch.baddbmm(torch.empty_like(y), y, y, beta=0, alpha=self.scale)
        y = torch.bmm(scores.softmax(-1), y)
        return torch.bmm((torch.bmm(y, y.transpose(1, 2)) / self.scale).softmax(-1), y)


def test_models_of_one_class_with_other_numbers():
    """Of the second on, Dynamo makes the floats in which they differ inputs of the graph."""
    torch.compiler.reset()
    models = [Numbers(*numbers).eval() for numbers in ((1e-5, 0.3), (0.1, 0.7), (0.4, 0.9))]
    models[2].root = 1.0  # not the square root of two: no RMS norm, and the others' stay right
    expected = [model(X) for model in models]
    handles = [engine.accelerate(model) for model in models]
    for _ in range(2):
        for model, truth, handle in zip(models, expected, handles, strict=True):
            assert torch.allclose(model(X), truth, atol=1e-5)
            rms = {} if model.root == 1.0 else {"RMS norm": 1}
            assert fused(handle.report) == {"GroupNorm": 1, "attention": 4, **rms}, handle.report
    assert all(handle.report.graphs == 1 for handle in handles)


def test_an_old_handle_does_not_undo_a_newer_one(model):
    old = engine.accelerate(model)
    engine.accelerate(model, channels_last=False)
    old.undo()
    assert model._compiled_call_impl is not None


def test_what_cannot_be_accelerated(model):
    with pytest.raises(ValueError, match="inner is 'jit'"):
        engine.accelerate(model, inner="jit")
    assert model._compiled_call_impl is None
    with pytest.raises(
        ValueError, match=r"model is function, expected an nn\.Module or a pipeline"
    ):
        engine.accelerate(layers)
    with pytest.raises(ValueError, match="already compiled"):
        engine.accelerate(torch.compile(model))
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="Plain is already compiled"):
        engine.accelerate(model)


def test_copies_and_pickles_are_plain_models(model):
    expected = model(X)
    handle = engine.accelerate(model)
    model(X)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    averaged.update_parameters(model)
    fresh = foreign_models.Plain()
    fresh.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), loaded, averaged, fresh):
        assert torch.allclose(other(X), expected, atol=1e-5)
        assert other._compiled_call_impl is None
    assert fused(handle.report) == {"GroupNorm → SiLU": 2}  # of the model alone


def test_a_changed_model_stays_right(model):
    """New sizes and batches, another dtype, training, hooks, weights that are loaded or trained."""
    model[2].register_forward_hook(lambda module, args, out: out * 2)
    twin = copy.deepcopy(model)
    engine.accelerate(model)

    def agree(x, tolerance=1e-5):
        assert torch.allclose(model(x), twin(x), atol=tolerance)

    for n, side in ((2, 8), (3, 8), (5, 6), (1, 9)):
        agree(torch.randn(n, 2, side, side))
    for m in (model, twin):
        m.eval()
    agree(X)
    state = {k: torch.randn_like(v) for k, v in twin.state_dict().items()}
    for m in (model, twin):
        m.load_state_dict(state)
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        m(X).square().mean().backward()
        optimizer.step()
        m.requires_grad_(False)
    agree(X, 1e-3)
    with torch.inference_mode():
        agree(X, 1e-3)
    for m in (model, twin):
        m.bfloat16()
    assert model(X.bfloat16()).dtype == torch.bfloat16
    agree(X.bfloat16(), 0.5)


def test_dtypes_and_sizes_of_one_compiled_function():
    torch.compiler.reset()
    backend = Backend("eager")
    compiled = torch.compile(lambda x: F.silu(F.group_norm(x, 2)), backend=backend, dynamic=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for n in (2, 3, 4):
            x = torch.randn(n, 6, n + 8, 5, dtype=dtype)
            expected = F.silu(F.group_norm(x, 2))
            assert compiled(x).dtype == dtype
            assert torch.allclose(compiled(x), expected, atol=3e-2 if dtype.itemsize == 2 else 1e-5)
    assert fused(backend.report) == {"GroupNorm → SiLU": 2} and backend.report.graphs == 3


def test_a_view_of_a_norm_that_keeps_its_layout():
    """PyTorch's norm of a transposed tensor is contiguous, ours is not: a view must still work."""

    def function(x):
        return F.group_norm(x.transpose(1, 2), 2).view(2, -1)

    torch.compiler.reset()
    x = torch.randn(2, 6, 4)
    compiled = torch.compile(function, backend="engine", options={"inner": "eager"})
    assert torch.allclose(compiled(x), function(x), atol=1e-5)


def test_a_graph_of_another_tracer_is_left_alone():
    """Without Dynamo's example values nothing is known of shapes and dtypes."""
    gm = torch.fx.symbolic_trace(foreign_models.Plain())
    assert not rewrite(gm).replaced


def test_pipeline():
    diffusers = pytest.importorskip("diffusers")
    torch.compiler.reset()
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=10))
    pipeline.set_progress_bar_config(disable=True)

    def pictures():
        generator = torch.Generator().manual_seed(1)
        return torch.tensor(pipeline(2, generator, num_inference_steps=2, output_type="np").images)

    expected = pictures()
    with engine.accelerate(pipeline) as handle:
        assert torch.allclose(pictures(), expected, atol=1e-4)
    assert fused(handle.report)["GroupNorm → SiLU"] > 3
    assert torch.equal(pictures(), expected)
    nothing = "no part of SimpleNamespace has a GroupNorm or a channel RMS norm"
    with pytest.raises(ValueError, match=nothing):
        engine.accelerate(SimpleNamespace(components={"head": nn.Linear(2, 2)}))


def test_parts_of_a_pipeline():
    """Those with a norm of ours, each once; the report says why the others were left."""
    torch.compiler.reset()
    unet = foreign_models.DenoisingDiffusion()  # no GroupNorm in it
    image_encoder = nn.Sequential(nn.Conv2d(3, 1, 1), nn.LayerNorm(4), nn.Embedding(2, 4))
    components = {"unet": unet, "prior": unet, "image_encoder": image_encoder, "tokenizer": str}
    expected = unet(X, T)
    with engine.accelerate(SimpleNamespace(components=components)) as handle:
        assert torch.allclose(unet(X, T), expected, atol=1e-4)
        assert image_encoder._compiled_call_impl is None
    assert fused(handle.report) == unet.expected() and handle.report.graphs == 1
    (left,) = handle.report.left
    assert left.where == "image_encoder"
    assert left.why == "Sequential has neither a GroupNorm nor a channel RMS norm"


def test_save_and_load_of_a_diffusers_model(tmp_path):
    """And what its own tests do with a model: tuples, attention processors, checkpointing."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    torch.compiler.reset()
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    ).eval()
    inputs = (torch.randn(2, 4, 8, 8), T, torch.randn(2, 5, 12))
    with torch.no_grad():
        expected = model(*inputs).sample
        handle = engine.accelerate(model)
        (found,) = model(*inputs, return_dict=False)
        assert torch.allclose(found, expected, atol=1e-4)
        model.save_pretrained(tmp_path)
        loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
        assert torch.allclose(loaded(*inputs).sample, expected, atol=1e-4)
        before = handle.report.counts()["attention"]
        for processor in (AttnProcessor(), AttnProcessor2_0()):  # by hand, then SDPA again
            model.set_attn_processor(processor)
            assert torch.allclose(model(*inputs).sample, expected, atol=1e-4)
        assert handle.report.counts()["attention"] >= 2 * before, handle.report
