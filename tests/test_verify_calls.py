"""What engine.verify is not made for gets one sentence."""

import pytest
import torch
from test_verify import inputs, net, nothing
from torch import nn

import engine


class Flat(nn.Module):
    """Takes for granted how a picture lies in memory."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)

    def forward(self, x):
        return torch.nn.functional.silu(self.norm(self.conv(x))).view(len(x), -1)


def test_a_model_that_does_not_run_accelerated():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"Flat runs as it is, but not acc.*Cannot view") as raised:
        engine.verify(Flat(), x, repeats=1)
    assert "channels_last memory: try without, or reshape" in str(raised.value)
    assert "\n" not in str(raised.value)


BAD = {
    "model": (dict(model=torch.sin), "model is builtin_function_or_method, expected an nn.Module"),
    "repeats": (dict(repeats=0), "repeats is 0, expected a whole number"),
    "float64": (dict(model=net().double()), "the model is float64, and there is no higher"),
    "meta": (dict(model=net().to("meta")), "the model is on meta, where tensors have no values"),
    "accelerate": (dict(accelerate=3), "accelerate is 3, expected a function of the model"),
    "seed": (dict(seed="a"), "seed is 'a', expected a whole number"),
    "nothing": (dict(model=nn.Identity(), inputs=("text",)), "returned no floating-point tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls(case):
    options, sentence = BAD[case]
    options = {"model": net(), "inputs": inputs(), "accelerate": nothing, **options}
    with pytest.raises(ValueError, match=sentence) as raised:
        engine.verify(options.pop("model"), *options.pop("inputs"), **options)
    assert "\n" not in str(raised.value)


def test_a_model_that_cannot_be_raised():
    class Half(nn.Linear):
        def forward(self, x):
            assert self.weight.dtype == torch.float32, "float32 alone"
            return super().forward(x)

    with pytest.raises(ValueError, match=r"Half does not run in float64.*float32 alone"):
        engine.verify(Half(3, 3), torch.ones(2, 3), accelerate=nothing)
