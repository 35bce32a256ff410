"""reverse_step(out=): results in the caller's memory, on every back end, or one clear sentence."""

import math

import pytest
import torch
from conftest import DEVICE
from test_group_norm_silu import as_layout
from test_reverse_step_general import make, table

from engine import ops

OP = "reverse_step"
TABLE = table()
BOTH = dict(return_x0=True, model_dtype=torch.bfloat16)
WANTED = {"x_next": {}, "x0": dict(return_x0=True), "both": BOTH}


def poisoned(t: torch.Tensor) -> torch.Tensor:
    return torch.full_like(t, math.nan)


def call(impl, x, model_out, z, step=2, **more):
    return ops.reverse_step(x, model_out, TABLE, step, noise=z, impl=impl, **more)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    "variant, wanted",
    [("results", "x_next"), ("results", "x0"), ("guided learned", "x_next"), ("all", "both")],
)
def test_the_same_values_where_they_are_wanted(impl, variant, wanted, layout):
    x, out, z, more = make(variant, (2, 3, 5, 6))
    x, out = as_layout(x, layout), as_layout(out, "channels_last")
    more |= WANTED[wanted]
    expected = call(impl, x, out, z, **more)
    each = expected if isinstance(expected, tuple) else (expected,)
    memory = [torch.empty_like(x if layout != "sliced" else x.contiguous()) for _ in each]
    memory = [m.to(t.dtype).fill_(math.nan) for m, t in zip(memory, each, strict=True)]
    given = tuple(memory) if isinstance(expected, tuple) else memory[0]
    assert call(impl, x, out, z, **more, out=given) is given
    # A plain call has a kernel of its own on CUDA, which may round differently.
    for mine, theirs in zip(memory, each, strict=True):
        assert torch.allclose(mine.float(), theirs.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 6), (1, 2, 3, 4, 5), (2, 3, 7, 9)])
@pytest.mark.parametrize("variant", ["results", "guided learned"])
def test_x_itself_takes_x_next(impl, variant, shape):
    for layout in ("contiguous", "channels_last"):
        for dtype, wanted in ((torch.float32, {}), (torch.bfloat16, BOTH)):
            x, out, z, more = make(variant, shape, dtype)
            x = as_layout(x, layout)
            more |= wanted
            expected = call(impl, x, out, z, **more)
            each = expected if wanted else (expected,)
            given = (x, *(poisoned(t) for t in each[1:]))
            call(impl, x, out, z, **more, out=given if wanted else x)
            for mine, theirs in zip(given, each, strict=True):
                assert torch.allclose(mine.float(), theirs.float(), rtol=1e-6, atol=1e-6)


def test_native_gives_the_same_bits():
    """With and without noise, from a key, over many ranges and tiles: sampling counts on it."""
    for shape in ((1, 1, 7, 9), (3, 2, 40, 41)):
        for layouts in (
            ("contiguous",) * 2,
            ("channels_last",) * 2,
            ("contiguous", "channels_last"),
        ):
            x, out, z, _ = make("results", shape)
            x, out = (as_layout(t, layout) for t, layout in zip((x, out), layouts, strict=True))
            rows = table()[:, :5].contiguous()
            rows[1, 4] = 0
            for step, noise in ((0, dict(key=5, offset=3)), (1, dict(key=5)), (2, dict(noise=z))):
                more = dict(**noise, impl="native")
                expected = ops.reverse_step(x, out, rows, step, **more)
                found = ops.reverse_step(x, out, rows, step, **more, out=poisoned(x))
                assert torch.equal(found, expected)


X = torch.zeros(2, 3, 4, 4)
ROWS = torch.zeros(10, 10)
PAIR = torch.zeros(2, 2, 3, 4, 4)  # two tensors of one memory
BAD = {
    "nothing of it": (dict(out=1), "out is int, expected a tensor, x_next"),
    "list": (
        dict(out=[X], return_x0=True),
        "out is list, expected a tuple of 2 tensors, x_next, x0",
    ),
    "alone": (dict(out=X.clone(), return_x0=True), "out is Tensor, expected a tuple of 2"),
    "tuple": (dict(out=(X.clone(),)), "out is a tuple of Tensor, expected a tensor, x_next"),
    "short": (dict(out=(), **BOTH), "out is a tuple of nothing, expected a tuple of 3 tensors"),
    "none": (dict(out=(X.clone(), None), return_x0=True), "out is a tuple of Tensor, NoneType"),
    "shape": (dict(out=X[:1].clone()), r"out's x_next is \(1, 3, 4, 4\).*expected \(2, 3, 4, 4\)"),
    "dtype": (dict(out=X.double()), "out's x_next is .*float64 on cpu.*expected .*float32 on cpu"),
    "dtype of x0": (dict(out=(X.clone(), X.half()), return_x0=True), "out's x0 is .*float16"),
    "dtype for the network": (
        dict(out=(X.clone(), X.clone()), model_dtype=torch.bfloat16),
        "out's x_next in model_dtype is .* torch.float32.*expected .* torch.bfloat16",
    ),
    "device": (dict(out=X.to("meta")), "on meta.*expected .* on cpu"),
    "layout": (dict(out=as_layout(X, "channels_last")), r"strides \(48, 1, 12, 3\), expected"),
    "gaps": (dict(out=torch.zeros(2, 6, 4, 4)[:, ::2]), "as torch.empty_like.x. lies"),
    "model_out": (dict(model_out=PAIR[0], out=PAIR[0]), "out's x_next lies in the memory of a"),
    "shifted": (
        dict(x=PAIR.view(-1)[:96].view_as(X), out=PAIR.view(-1)[16:112].view_as(X)),
        "out's x_next lies in the memory of a tensor that the call reads",
    ),
    "noise": (dict(key=None, noise=PAIR[1], out=PAIR[1]), "x_next lies in the memory"),
    "x0 in x": (dict(x=PAIR[0], out=(PAIR[1], PAIR[0]), return_x0=True), "out's x0 lies in the"),
    "x0 in x_next": (dict(out=(PAIR[1], PAIR[1]), return_x0=True), "out's x0 lies in the memory"),
    "x0 in x0_prev": (
        dict(x0_prev=PAIR[0], out=(PAIR[1], PAIR[0]), return_x0=True),
        "out's x0 lies in the memory",
    ),
    "rows": (
        dict(coeffs=PAIR.view(-1)[:100].view(10, 10), out=PAIR[0]),
        "x_next lies in the memory of a tensor",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case):
    arguments, sentence = BAD[case]
    defaults = dict(x=X, model_out=X, coeffs=ROWS, step=0, key=1)
    for give in (ops.reverse_step, lambda **more: ops.explain("reverse_step", **more)):
        with pytest.raises(ValueError, match=sentence) as raised:
            give(**{**defaults, **arguments})
        assert "\n" not in str(raised.value)
    assert not X.any() and not PAIR.any()


def test_there_is_no_gradient_through_it(impl):
    x, out, z, _ = make("results", (2, 3, 4, 4))
    memory = torch.empty_like(x)
    for which in range(3):
        given = [t.clone() for t in (x, out, memory)]
        given[which].requires_grad_()
        with pytest.raises(RuntimeError, match="out= has no gradient, and one of the"):
            call(impl, given[0], given[1], z, out=given[2])
        with torch.no_grad():
            assert call(impl, given[0], given[1], z, out=given[2]) is given[2]


def test_a_backward_pass_sees_that_its_tensor_was_overwritten(impl):
    x, out, z, _ = make("results", (2, 3, 4, 4))
    a = torch.ones_like(x).requires_grad_()
    saved = torch.zeros_like(x)
    product = (a * saved).sum()
    call(impl, x, out, z, out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_tensors_are_written_in_inference_mode_alone(impl):
    x, out, z, _ = make("results", (2, 3, 4, 4))
    with torch.inference_mode():
        memory = torch.empty_like(x)
        expected = call(impl, x, out, z, out=memory).clone()
    with pytest.raises(ValueError, match="out's x_next was made under"):
        call(impl, x, out, z, out=memory)
    assert torch.allclose(expected, call(impl, x, out, z), rtol=1e-6, atol=1e-6)


def test_empty_batches(impl):
    x, out, z, _ = make("results", (2, 3, 4, 4))
    memory = (x[:0].clone(), x[:0].clone())
    assert call(impl, x[:0], out[:0], z[:0], return_x0=True, out=memory) is memory


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_compiled(backend):
    """In one graph: into memory of its own, and into x, in an order that shows."""
    x, out, z, _ = make("results", (2, 3, 4, 4))

    def steps(x, memory):
        first = call(backend, x, out, z, out=memory[0])
        call(backend, first, out, z, 1, return_x0=True, out=(first, memory[1]))
        return first * 2 + memory[1]

    results = []
    for run in (steps, torch.compile(steps, fullgraph=True, backend="aot_eager")):
        memory = torch.full((2, *x.shape), math.nan, device=DEVICE).unbind()
        memory = [m.clone() for m in memory]
        results.append((run(x.clone(), memory), *memory))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-6)
