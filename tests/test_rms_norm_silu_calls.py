"""Calls of rms_norm_silu that are refused, what is said of them, and tensors of any size."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from engine.kernels import boundary, native

from engine import ops

OP = "rms_norm_silu"

BAD = {
    "weight": (dict(weight=torch.ones(7)), r"weight is \(7,\).*expected \(8,\)"),
    "scale": (dict(scale=torch.ones(8)), r"scale is \(8,\).*expected \(2, 8\)"),
    "shift": (dict(shift=torch.ones(1, 8)), r"shift is \(1, 8\).*expected \(2, 8\)"),
    "activation": (dict(activation="relu"), "'relu', expected 'silu' or 'none'"),
    "eps": (dict(eps=0.0), "expected eps > 0"),
    "dtype": (dict(x=torch.ones(2, 8, 4, 4, dtype=torch.int64)), "floating point"),
    "one dimension": (dict(x=torch.ones(8)), r"x is \(8,\).*expected \(N, C, \*S\)"),
    "device": (dict(weight=torch.ones(8, device="meta")), "weight is on meta, expected cpu"),
    "impl": (dict(impl="cudnn"), "impl='cudnn' is unknown: choose one of auto, eager"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case):
    arguments, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence) as raised:
        ops.rms_norm_silu(**{"x": torch.ones(2, 8, 4, 4), "weight": torch.ones(8), **arguments})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "dtype, eps, sentence",
    [
        (torch.float64, 1e-12, "needs float32, bfloat16 or float16"),
        (torch.float32, 1e-19, "needs eps >= 1e-18"),
    ],
    ids=["float64", "eps"],
)
def test_refused_by_name_and_served_by_auto(dtype, eps, sentence):
    x = torch.ones(1, 4, 2, 2, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"native was requested and cannot serve.*{sentence}"):
        ops.rms_norm_silu(x, None, eps=eps, impl="native")
    assert torch.allclose(ops.rms_norm_silu(x, None, eps=eps), F.silu(x))


def test_native_has_no_kernel_for_a_gpu():
    x = SimpleNamespace(is_cpu=False, is_cuda=True)
    (sentence,) = native.refusals(OP, x, None, None, None, 1e-12, True)
    assert sentence == "has no rms_norm_silu kernel for CUDA tensors: triton has"


def test_explain(capsys):
    x = torch.ones(2, 8, 4, 6)[..., ::2]
    ops.explain(OP, x, None, scale=torch.ones(2, 8))
    said = capsys.readouterr().out
    assert "rms_norm_silu on (2, 8, 4, 3) float32 cpu" in said
    assert "native and triton copy them once" in said and said.count("← auto") == 1


def test_large_tensors():
    """More than 2³¹ elements: shapes and strides; what 32-bit offsets in a sample do not reach."""
    last = torch.empty(2**16 + 1, 64, 32, 32, device="meta", dtype=torch.float16)
    last = last.contiguous(memory_format=torch.channels_last)
    y, rstd = boundary.FAKES["rms_norm_silu_fwd"](last, None, None, None, 1e-12, True)
    assert y.stride() == last.stride() and rstd.shape == (2**16 + 1, 1024)
    dx, dweight, dscale, _ = boundary.FAKES["rms_norm_silu_bwd"](
        last, last, None, rstd[:, :64], None, rstd, True
    )
    assert dx.stride() == last.stride() and dweight.shape == (0,)
    assert dscale.shape == (2**16 + 1, 64)
    pytest.importorskip("triton")
    from engine.kernels import rms_norm_silu

    huge = torch.empty(1, 64, 2**13, 2**12, device="meta")
    refused = rms_norm_silu.refusals(OP, huge, None, None, None, 1e-12, True)
    assert "has 32-bit offsets: needs fewer than 2^31 elements a sample" in refused
