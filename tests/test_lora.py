"""LoRA layers in an accelerated model: put in before or after `accelerate`, switched, merged, taken
out. Output, and the adapters' gradients, against the same model untouched.
"""

import copy

import foreign_models
import pytest
import torch
from budget import FORWARD, GRADIENT, assert_within_budget
from rewriting import cast_inputs, check_model, fused, run_model
from torch import nn

import engine

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ORDERS = pytest.mark.parametrize("adapters_first", [True, False], ids=["after", "before"])


class Lora(nn.Module):
    """W x + up(down(x)) · scale beside a frozen layer, as adapters do it."""

    def __init__(self, base, rank=2, scale=0.5):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        if isinstance(base, nn.Linear):
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)
        else:
            kind, geometry = type(base), (base.kernel_size, base.stride, base.padding)
            self.down = kind(base.in_channels, rank, *geometry, bias=False)
            self.up = kind(rank, base.out_channels, 1, bias=False)
        self.to(base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * self.scale


def wrap(model: nn.Module) -> None:
    """Every linear layer and convolution; everything else is frozen."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Lora(layer))


def unwrap(model: nn.Module) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Lora):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base)


@DTYPES
@ORDERS
def test_wrapped_layers(adapters_first, dtype):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = foreign_models.cast(foreign_models.GuidedDiffusion(), dtype)
    plain = copy.deepcopy(model)
    inputs = cast_inputs((torch.randn(2, 2, 8, 8), torch.tensor([7, 931])), dtype)
    call, times = nn.Module.__call__, 1
    if adapters_first:
        wrap(model)
        handle = check_model(model, inputs, call, dtype, foreign_models.cast, engine.accelerate)
    else:
        handle = engine.accelerate(model)
        model(*inputs)
        wrap(model)
        times = 2  # compiled with and without
        check_model(model, inputs, call, dtype, foreign_models.cast, lambda model: handle)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all(".up." in name or ".down." in name for name in trained)
    assert handle.report.graphs == times
    expected = {pattern: times * n for pattern, n in model.expected().items()}
    assert fused(handle.report) == expected, handle.report
    unwrap(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        a, p, t = model(*inputs), plain(*inputs), foreign_models.cast(plain, torch.float64)
        assert_within_budget(a, t(*cast_inputs(inputs, torch.float64)), p, factor=FORWARD)


def agree(model, untouched, inputs, dtype, trains=True) -> None:
    """Output, and the gradients of what is trained."""

    def run(model, inputs):
        return run_model(model, inputs, sample) if trains else (model(*inputs).sample,)

    truth = run(copy.deepcopy(untouched).double(), cast_inputs(inputs, torch.float64))
    plain, got = run(untouched, inputs), run(model, inputs)
    for a, t, p, factor in zip(got, truth, plain, (FORWARD, GRADIENT), strict=False):
        assert_within_budget(a, t, p, factor=factor)
    assert list(model.state_dict()) == list(untouched.state_dict())


def sample(model, *inputs):
    return model(*inputs).sample


@pytest.mark.parametrize(
    "adapters_first, dtype",
    [(True, torch.bfloat16), (False, torch.float32)],
    ids=["after, bf16", "before, fp32"],
)
def test_peft(adapters_first, dtype):
    """diffusers' own use of peft, on attention projections and convolutions."""
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
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
    ).to(dtype)
    untouched = copy.deepcopy(model)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([7, 931]), torch.randn(2, 5, 12))
    inputs = cast_inputs(inputs, dtype)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_shortcut", "proj_in"]
    config = peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=layers)

    def both(step, *args, **kwargs):
        for m in (model, untouched):
            torch.manual_seed(5)
            getattr(m, step)(*args, **kwargs)

    if adapters_first:
        both("add_adapter", config)
        handle = engine.accelerate(model)
    else:
        handle = engine.accelerate(model)
        agree(model, untouched, inputs, dtype)
        both("add_adapter", config)
    agree(model, untouched, inputs, dtype)
    compiled = handle.report.graphs
    assert fused(handle.report)["attention"] == 8 * compiled == 8 * (2 - adapters_first)
    assert all(".lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    if adapters_first:
        both("fuse_lora")
        agree(model, untouched, inputs, dtype, trains=False)
        both("unload_lora")
        assert not any("lora" in key for key in model.state_dict())
        agree(model, untouched, inputs, dtype, trains=False)
    else:
        both("disable_lora")
        agree(model, untouched, inputs, dtype, trains=False)
        both("enable_lora")
        agree(model, untouched, inputs, dtype)
