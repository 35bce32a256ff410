"""engine.verify finds what is wrong, lets pass what is rounding, and leaves the model alone."""

import copy
import dataclasses
import importlib
import random
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import engine
from engine import verification

C = 16


class Net(nn.Module):
    """Convolutions, norms, attention whose key bias has no gradient, buffers, dropout."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, C, 3, padding=1)
        self.batch = nn.BatchNorm2d(C)
        self.norm = nn.GroupNorm(4, C)
        self.q, self.k, self.v = (nn.Linear(C, C) for _ in range(3))
        self.dropout = nn.Dropout(p)
        self.last = nn.Conv2d(C, 3, 3, padding=1)

    def body(self, x, t):
        h = self.batch(self.first(x) + t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000)
        tokens = F.silu(self.norm(h)).flatten(2).transpose(1, 2)
        q, k, v = (layer(tokens) for layer in (self.q, self.k, self.v))
        tokens = tokens + (q @ k.transpose(1, 2) / C**0.5).softmax(-1) @ v
        return self.last(self.dropout(tokens).transpose(1, 2).reshape(h.shape))

    def forward(self, x, t, scale=1.0):
        return self.body(x, t) * scale


def net(**options) -> Net:
    torch.manual_seed(0)
    model = Net(**options).eval()
    model.batch.running_mean.normal_()
    return model


def inputs(n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=g), torch.tensor([10, 700])[:n]


def nothing(model) -> None:
    """Accelerates nothing."""


def channels_last(model) -> None:
    """The same function, rounded otherwise."""
    model.to(memory_format=torch.channels_last)


class Fused(nn.Module):
    """Our op where the model has a norm, and nothing where SiLU was: what accelerating does."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.groups, self.eps = (
            norm.weight,
            norm.bias,
            norm.num_groups,
            1e-5,
        )

    def forward(self, x):
        norm = (self.weight, self.bias, self.groups)
        return engine.ops.group_norm_silu(x, *norm, eps=self.eps, activation="none")


def fused(model) -> types.SimpleNamespace:
    model.norm = Fused(model.norm)
    return types.SimpleNamespace(report="1 group_norm replaced")


def another(model) -> nn.Module:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    return Wrapped()


@pytest.mark.parametrize("accelerate", [nothing, channels_last, fused, another])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_what_is_faithful_passes(accelerate, precision):
    model, (x, t) = net(), inputs()
    if precision == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        found = engine.verify(model, x, t, accelerate=accelerate, repeats=1, scale=1.5)
    assert found.ok, found.table
    assert {row.kind for row in found.rows} == {"output", "input", "all", "parameter"}
    count = len([*model.parameters()])
    assert len([r for r in found.rows if r.kind == "parameter"]) == count
    low, high = (1e-9, 1e-5) if precision == "float32" else (1e-4, 0.1)
    assert all(low < r.relative(r.own) < high for r in found.rows if r.kind != "parameter")
    assert found.identical == (accelerate in (nothing, another))
    assert f"all {count} parameters" in found.table and found.table.endswith("\nok")
    assert ("1 group_norm replaced" in found.table) == (accelerate is fused)
    assert [*found.seconds] == ["forward", "forward and backward"]
    assert all(0 < s < 5 for pair in found.seconds.values() for s in pair)


def wrong_gradient(name: str, factor: float):
    def accelerate(model):
        model.get_parameter(name).register_hook(lambda g: factor * g)

    return accelerate


def noisy_key_bias(model):
    """A gradient that is zero by construction is a hundredth of the others."""
    model.k.bias.register_hook(lambda g: g + 0.01)


def detached(model):
    model.norm.weight.requires_grad_(False)


def added(change):
    """Changes what the model returns."""

    def accelerate(model):
        model.register_forward_hook(lambda module, args, out: change(out))

    return accelerate


def one_pixel(out):
    return out + torch.zeros_like(out).index_put((torch.tensor(0),) * 4, torch.tensor(3e-6))


class TwiceTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 1.001 * g


def wrong_input_gradient(model):
    model.register_forward_pre_hook(lambda m, args: (TwiceTheGradient.apply(args[0]), *args[1:]))


WRONG = {  # what is changed → what the table must name
    "a weight's gradient": (wrong_gradient("v.weight", 1.001), "gradient of v.weight .*WRONG"),
    "a small gradient": (wrong_gradient("norm.bias", 0.999), "gradient of norm.bias .*WRONG"),
    "all gradients": (wrong_gradient("last.weight", -1.0), "gradient of all 14 parameters .*WRONG"),
    "a zero gradient": (noisy_key_bias, "gradient of k.bias .*WRONG"),
    "a missing gradient": (detached, "gradient of norm.weight .*WRONG: is missing"),
    "an input's gradient": (wrong_input_gradient, "gradient of input 0 .*WRONG"),
    "the output": (added(lambda out: 1.00001 * out), "output .*WRONG"),
    "one pixel": (added(one_pixel), "output .*WRONG"),
    "nan": (added(lambda out: out + float("nan")), "output .* inf  WRONG"),
    "shape": (
        added(lambda out: out[:1]),
        r"output .*WRONG: has shape \(1, 3, 8, 8\) instead of \(2,",
    ),
    "dtype": (added(lambda out: out.bfloat16()), "output .*WRONG: is bfloat16 instead of float32"),
    "kind": (added(lambda out: (out,)), "output .*WRONG: is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found(case):
    accelerate, line = WRONG[case]
    found = engine.verify(net(), *inputs(), accelerate=accelerate, repeats=1)
    assert not found.ok and found.failures
    assert found.table.endswith("\nNOT OK")
    assert re.search(f"(?m)^{line}", found.table), found.table


def test_a_gradient_that_is_exactly_zero():
    """Rounding of the size of the others may take its place, and no more."""
    model = net()
    model.register_parameter("idle", nn.Parameter(torch.zeros(3, 1, 1)))
    model.register_forward_hook(lambda m, args, out: out + 0 * m.idle)
    for error, ok in ((1e-8, True), (1e-3, False)):

        def accelerate(model, error=error):
            model.idle.register_hook(lambda g: g + error)

        found = engine.verify(model, *inputs(), accelerate=accelerate, repeats=1)
        assert found.rows[-1].own == 0 or found.rows[-1].name != "idle"
        assert found.ok == ok, found.table


def test_what_is_wrong_is_found_in_half_precision():
    model, (x, t) = net().bfloat16(), inputs()
    for accelerate in (wrong_gradient("v.weight", 1.2), added(lambda out: 1.05 * out)):
        assert not engine.verify(model, x.bfloat16(), t, accelerate=accelerate, repeats=1).ok


def test_many_failures_are_a_short_table():
    def accelerate(model):
        for p in model.parameters():
            p.register_hook(lambda g: 1.01 * g)

    found = engine.verify(net(), *inputs(), accelerate=accelerate, repeats=1)
    assert len(found.failures) > 11 and "parameters more" in found.table
    assert len(found.table.splitlines()) < 25


def state(model, x, generator):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        [m.training for m in model.modules()],
        [x.clone(), x.grad, generator.get_state(), torch.get_rng_state()],
        (random.getstate(), str(np.random.get_state()), torch.get_default_dtype()),
    )


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


class Noisy(Net):
    """Draws from everything, writes into its input."""

    def forward(self, x, t, generator=None):
        x += 0.1 * torch.randn(x.shape, generator=generator) + 0.1 * torch.randn(x.shape)
        return self.body(x, t) + random.random() + np.random.rand()


def test_the_model_is_left_alone():
    torch.manual_seed(0)
    model = Noisy().train()
    model.k.eval()
    for p in [*model.parameters()][:4]:
        p.grad = torch.randn_like(p)
    x, t = inputs()
    x.requires_grad_()
    generator = torch.Generator().manual_seed(5)
    before = state(model, x.detach(), generator)
    with torch.no_grad():
        found = engine.verify(model, x, t, generator, accelerate=channels_last, repeats=2)
    assert found.ok, found.table
    assert all(same(a, b) for a, b in zip(before, state(model, x.detach(), generator), strict=True))
    assert x.grad is None
    with pytest.raises(AttributeError), torch.inference_mode():
        engine.verify(model, x, t, generator, accelerate=lambda m: 1 / torch.zeros(1).missing)
    assert all(same(a, b) for a, b in zip(before, state(model, x.detach(), generator), strict=True))


def test_under_inference_mode():
    with torch.inference_mode():
        x, t = inputs()
        assert engine.verify(net(), x, t, accelerate=channels_last, repeats=1).ok


class Casts(Net):
    """Casts that are written down, as in guided-diffusion's norms: float64 does not pass."""

    def forward(self, x, t):
        x = x.float()
        weight = self.norm.weight.float()
        h = F.group_norm(self.first(x).float(), 4, weight, self.norm.bias.to(torch.float32))
        return self.last(h) * torch.ones(3, 8, 8)


def test_casts_written_into_the_model():
    torch.manual_seed(0)
    model, (x, t) = Casts(), inputs()
    with pytest.raises(RuntimeError):
        copy.deepcopy(model).double()(x.double(), t)
    found = engine.verify(model, x, t, accelerate=channels_last, repeats=1)
    assert found.ok and found.truth == "float64", found.table
    assert 1e-8 < found.rows[0].relative(found.rows[0].own) < 1e-5
    wrong = added(lambda out: 1.0001 * out)
    assert not engine.verify(model, x, t, accelerate=wrong, repeats=1).ok
    assert torch.get_default_dtype() == torch.float32


def test_dropout_and_what_cannot_be_judged():
    model, (x, t) = net(p=0.3).train(), inputs()
    found = engine.verify(model, x, t, accelerate=channels_last, repeats=1)
    assert (
        not found.ok and "call model.eval() first" in found.notes[0]
    )  # other elements are dropped
    assert engine.verify(model, x, t, accelerate=fused, repeats=1).ok
    assert not engine.verify(model, x, t, accelerate=lambda m: m.eval(), repeats=1).ok

    class Unjudged(nn.Module):
        """Its random numbers depend on the dtype."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return torch.randn(x.shape, dtype=x.dtype) * self.weight

    found = engine.verify(Unjudged(), torch.ones(40, 3), accelerate=nothing, repeats=1)
    assert not found.ok and "cannot be judged" in found.notes[0]


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    rest: dict


class Nested(Net):
    def forward(self, x, t, more):
        y = self.body(x * more["scale"][0], t)
        loss = F.mse_loss(y, torch.zeros_like(y))
        return Pair(y, {"list": [t, (loss,)], "text": "as it is", "complex": y * 1j})


def test_nested_inputs_and_outputs():
    torch.manual_seed(0)
    model, (x, t) = Nested().eval(), inputs()
    more = {"scale": [torch.rand(3, 1, 1), None]}
    found = engine.verify(model, x, t, accelerate=channels_last, repeats=1, more=more)
    assert found.ok, found.table
    names = [r.what for r in found.rows if r.kind != "parameter"]
    outputs = ["first", "rest.list.0", "rest.list.1.0", "rest.complex"]
    assert names[:4] == [f"output {name}" for name in outputs]
    assert names[4:6] == ["gradient of input 0", "gradient of input more.scale.0"]

    def accelerate(model):
        model.register_forward_hook(
            lambda m, a, out: Pair(out.first, {**out.rest, "list": [t + 1, *out.rest["list"][1:]]})
        )

    found = engine.verify(model, x, t, accelerate=accelerate, repeats=1, more=more)
    assert [r.what for r in found.failures] == ["output rest.list.0"] and "differs" in found.table


def test_without_gradients_and_with_frozen_parameters():
    model, (x, t) = net(), inputs()
    found = engine.verify(model, x, t, accelerate=channels_last, gradients=False, repeats=1)
    assert found.ok and [r.kind for r in found.rows] == ["output"]
    assert [*found.seconds] == ["forward"]
    wrong = wrong_gradient("v.weight", 0.5)
    assert engine.verify(model, x, t, accelerate=wrong, gradients=False, repeats=1).ok
    model.requires_grad_(False)
    model.last.weight.requires_grad_()
    found = engine.verify(model, x, t, accelerate=channels_last, repeats=1)
    assert found.ok and [r.name for r in found.rows][2:] == ["all 1 parameters", "last.weight"]


@pytest.mark.parametrize("seed", range(4))
def test_rounding_alone_passes(seed):
    """Other weights, sizes and inputs; from one image and one channel a group on."""
    torch.manual_seed(seed)
    for n in (1, 2):
        x, t = inputs(n, seed)
        found = engine.verify(Net().eval(), x, t, accelerate=fused, repeats=1, seed=seed)
        assert found.ok, found.table


def test_function_and_module_have_one_name():
    module = importlib.import_module("engine.verify")
    assert engine.verify is verification.verify or engine.verify is module
    x = torch.ones(2, 3)
    assert module(nn.Linear(3, 3), x, accelerate=nothing, repeats=1).ok
    assert engine.verify(nn.Linear(3, 3), x, accelerate=nothing, repeats=1).ok
