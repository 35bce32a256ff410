"""rms_norm_silu on every back end against the float64 reference, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from budget import FORWARD, GRADIENT, assert_within_budget
from conftest import DEVICE
from engine.kernels import reference
from test_group_norm_silu import as_layout, directional

from engine import ops

OP = "rms_norm_silu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last")

SHAPES = {
    "S=1": (2, 8, 1, 1),
    "C=1": (2, 1, 5, 7),
    "C=1 S=1": (3, 1, 1, 1),
    "odd C and S": (2, 13, 7, 9),
    "vectors of positions": (2, 24, 4, 4),
    "wide": (2, 160, 4, 5),
    "odd and wide": (1, 70, 9, 11),
    "pieces": (1, 48, 37, 39),
    "sequence": (2, 8, 63),
    "no positions": (3, 12),
    "volume": (2, 8, 2, 3, 5),
}
VARIANTS = {
    "no weight": (),
    "weight": ("weight",),
    "scale": ("weight", "scale"),
    "shift": ("shift",),
    "scale shift": ("weight", "scale", "shift"),
    "norm only": ("none",),
    "everything, norm only": ("weight", "scale", "shift", "none"),
}
EVERYTHING = VARIANTS["scale shift"]


def make_inputs(shape, dtype, variant=EVERYTHING, *, std=2.0, operand_dtype=None):
    g = torch.Generator().manual_seed(0)

    def normal(*size, at=0.0, by=1.0, dtype=operand_dtype or dtype):
        return (torch.randn(size, generator=g) * by + at).to(dtype).to(DEVICE)

    n, c = shape[:2]
    inputs = {"x": normal(*shape, at=0.3 * std, by=std, dtype=dtype)}
    weight, wide = normal(c, at=1.0, by=0.5), normal(n, 2 * c, by=0.6)
    operands = {"weight": weight, "scale": wide[:, :c], "shift": wide[:, c:]}  # rows with a stride
    return {**inputs, **{k: t if k in variant else None for k, t in operands.items()}}


def run(function, inputs, dy, **kwargs):
    """→ y and the gradients of every present input, from leaves that keep strides."""
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in inputs.items()}
    operands = {k: leaves[k] for k in ("scale", "shift")}
    y = function(leaves["x"], leaves["weight"], **operands, **kwargs)
    present = {k: t for k, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(y, list(present.values()), dy.to(y.dtype))
    return y, dict(zip(present, grads, strict=True))


def random_like(x, seed=99):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=g).to(DEVICE).to(x.dtype)


def check(impl, inputs, variant=EVERYTHING, *, dy_layout="contiguous", eps=1e-12):
    x = inputs["x"]
    dy = random_like(x)
    activation = "none" if "none" in variant else "silu"
    exact = {k: None if t is None else t.double() for k, t in inputs.items()}
    truth, true_grads = run(
        reference.rms_norm_silu, exact, dy.double(), eps=eps, silu=activation == "silu"
    )
    call = {"eps": eps, "activation": activation}
    plain, plain_grads = run(ops.rms_norm_silu, inputs, dy, impl="eager", **call)
    got, grads = run(ops.rms_norm_silu, inputs, as_layout(dy, dy_layout), impl=impl, **call)
    assert got.dtype == x.dtype
    assert_within_budget(got, truth, plain, factor=FORWARD)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_within_budget(
            grad, true_grads[name], plain_grads[name], factor=GRADIENT, what=f"d{name}"
        )
    with torch.no_grad():  # the path without autograd gives the same bits
        operands = {k: inputs[k] for k in ("scale", "shift")}
        free = ops.rms_norm_silu(x, inputs["weight"], **operands, impl=impl, **call)
    assert torch.equal(free, got)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(impl, shape, layout, dtype):
    size = SHAPES[shape]
    if (shape, impl) == ("pieces", "triton"):
        size = (1, 48, 11, 13)  # pieces are the CPU's
    inputs = make_inputs(size, dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    y = check(impl, inputs, dy_layout=layout)
    if len(size) >= 4 and impl != "eager":
        assert y.stride() == torch.empty_like(inputs["x"]).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(impl, variant, layout, dtype):
    inputs = make_inputs((2, 12, 5, 7), dtype, VARIANTS[variant])
    inputs["x"] = as_layout(inputs["x"], layout)
    check(impl, inputs, VARIANTS[variant], dy_layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dy_layout", [*LAYOUTS, "transposed", "sliced"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "transposed", "sliced"])
def test_any_view_and_any_gradient_layout(impl, layout, dy_layout, dtype):
    inputs = make_inputs((2, 24, 5, 6), dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(impl, inputs, dy_layout=dy_layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_operands_with_a_low_precision_x(impl, dtype, layout):
    inputs = make_inputs((2, 12, 5, 7), dtype, operand_dtype=torch.float32)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(impl, inputs, dy_layout=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 9])
def test_vectors_shorter_than_eps(impl, channels, layout, dtype):
    """Some norms lie below eps = 0.5, some above, two vectors are zero."""
    inputs = make_inputs((2, channels, 6, 7), dtype, std=0.5 / channels**0.5)
    inputs["x"][0, :, 2, 3] = inputs["x"][1, :, 0, 0] = 0
    norms = inputs["x"].double().norm(dim=1)
    assert (norms < 0.49).sum() > 5 and (norms > 0.51).sum() > 5
    inputs["x"] = as_layout(inputs["x"], layout)
    check(impl, inputs, dy_layout=layout, eps=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_vectors_have_the_gradient_of_normalize(impl, layout, dtype):
    """√C / eps · weight · (1 + scale) · dv: 1e12 times their neighbours', which keep theirs."""
    inputs = make_inputs((2, 8, 3, 5), dtype)
    zero = torch.zeros(2, 1, 3, 5, dtype=torch.bool, device=DEVICE)
    zero[0, :, 1, 2] = zero[1, :, 0, 0] = True
    inputs["x"] = as_layout(inputs["x"].masked_fill(zero, 0), layout)
    dy = random_like(inputs["x"])
    exact = {k: t.double() for k, t in inputs.items()}
    truth, true_grads = run(reference.rms_norm_silu, exact, dy.double())
    plain, plain_grads = run(ops.rms_norm_silu, inputs, dy, impl="eager")
    got, grads = run(ops.rms_norm_silu, inputs, dy, impl=impl)
    assert_within_budget(got, truth, plain, factor=FORWARD)
    for at in (zero, ~zero):
        parts = [t["x"].masked_select(at) for t in (grads, true_grads, plain_grads)]
        assert_within_budget(*parts, factor=GRADIENT, what="dx")
    for name in ("weight", "scale", "shift"):
        results = (t[name] for t in (grads, true_grads, plain_grads))
        assert_within_budget(*results, factor=GRADIENT, what=f"d{name}")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter is NumPy
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float16_zero_vectors(impl, layout):
    """Where eps is 0 in the dtype, the kernels still know it; PyTorch's 0 / 0 is NaN."""
    if impl == "eager":
        pytest.skip("PyTorch in float16")
    inputs = make_inputs((2, 8, 3, 5), torch.float16)
    inputs["x"][1, :, 1, 2] = 0
    inputs["x"] = as_layout(inputs["x"], layout)
    y, grads = run(ops.rms_norm_silu, inputs, random_like(inputs["x"]), impl=impl)
    shift = inputs["shift"][1].float()
    assert torch.allclose(y[1, :, 1, 2].float(), F.silu(shift), rtol=2e-3, atol=1e-4)
    assert y.isfinite().all() and grads["weight"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_and_small_values(impl, layout, dtype):
    """Norms that overflow or underflow in float16 do not here: squares are summed in float32."""
    if impl == "eager" and dtype == torch.float16:
        pytest.skip("PyTorch's norm overflows")
    inputs = make_inputs((2, 24, 3, 5), dtype)
    size = torch.tensor([3e4, 1e-3, 1.0], device=DEVICE)[:, None]
    inputs["x"] = as_layout((inputs["x"].float().clamp(-2, 2) * size).to(dtype), layout)
    dy = random_like(inputs["x"])
    wide = {k: t.float() for k, t in inputs.items()}
    truth, true_grads = run(
        reference.rms_norm_silu, {k: t.double() for k, t in inputs.items()}, dy.double()
    )
    plain, plain_grads = run(ops.rms_norm_silu, wide, dy.float(), impl="eager")
    got, grads = run(ops.rms_norm_silu, inputs, dy, impl=impl)
    assert_within_budget(got, truth, plain.to(dtype), factor=FORWARD)
    for name, grad in grads.items():
        near = plain_grads[name].to(dtype)
        assert_within_budget(grad, true_grads[name], near, factor=GRADIENT, what=f"d{name}")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_pixel_stays_alone(impl, layout, bad):
    inputs = make_inputs((2, 10, 5, 7), torch.float32)
    dy = random_like(inputs["x"])
    results = []
    for value in (1.0, bad):
        x = inputs["x"].clone()
        x[1, 3, 2, 2] = value
        case = {**inputs, "x": as_layout(x, layout)}
        results.append(run(ops.rms_norm_silu, case, dy, impl=impl))
    (clean, clean_grads), (y, grads) = results
    others = torch.ones(2, 5, 7, dtype=torch.bool, device=DEVICE)
    others[1, 2, 2] = False
    for a, b in ((clean, y), (clean_grads["x"], grads["x"])):
        assert torch.equal(a.movedim(1, -1)[others], b.movedim(1, -1)[others])
        assert b.movedim(1, -1)[~others].isnan().any()
    assert torch.equal(clean_grads["scale"][0], grads["scale"][0])
    if bad == float("inf"):  # x / |x| is 0 in the other channels
        finite = y[1, :, 2, 2].isfinite()
        assert finite.sum() == 9 and not finite[3]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_again_and_on_one_thread(impl, layout):
    shape = (2, 48, 9, 11) if impl == "triton" else (2, 48, 39, 37)  # native: in pieces
    inputs = make_inputs(shape, torch.float32)
    inputs["x"] = as_layout(inputs["x"], layout)
    dy, results, threads = random_like(inputs["x"]), [], torch.get_num_threads()
    try:
        for count in (2, 2, 1):
            torch.set_num_threads(count)
            y, grads = run(ops.rms_norm_silu, inputs, dy, impl=impl)
            results.append([y, *grads.values()])
    finally:
        torch.set_num_threads(threads)
    if impl == "eager":
        results.pop()  # PyTorch promises nothing across thread counts
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4), (2, 0, 4, 4)])
def test_empty(impl, shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    weight = torch.ones(shape[1], device=DEVICE, requires_grad=True)
    y = ops.rms_norm_silu(x, weight, impl=impl)
    assert y.shape == x.shape
    y.sum().backward()
    assert weight.grad.eq(0).all()


def test_only_some_gradients(impl):
    inputs = make_inputs((2, 8, 4, 4), torch.float32)
    scale = inputs["scale"].detach().requires_grad_()
    rest = {"shift": inputs["shift"]}
    y = ops.rms_norm_silu(inputs["x"], inputs["weight"], scale=scale, **rest, impl=impl)
    dy = random_like(y)
    y.backward(dy)
    exact = {k: t.double() for k, t in inputs.items()}
    _, truth = run(reference.rms_norm_silu, exact, dy.double())
    assert inputs["x"].grad is None and inputs["weight"].grad is None
    assert torch.allclose(scale.grad.double(), truth["scale"], rtol=1e-5, atol=1e-5)


def test_one_channel_has_no_gradient(impl):
    """x̂ = ±1: dx = 0 exactly, though rstd is 1e6."""
    if impl == "eager":
        pytest.skip("PyTorch leaves a rounding")
    inputs = make_inputs((3, 1, 5, 7), torch.float32, std=1e-6)
    _, grads = run(ops.rms_norm_silu, inputs, random_like(inputs["x"]), impl=impl)
    assert grads["x"].eq(0).all() and grads["weight"].ne(0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_forward(impl, layout):
    """A finite difference of the kernel's own forward, in float32."""
    inputs = make_inputs((2, 12, 5, 7), torch.float32)
    inputs["x"] = as_layout(inputs["x"], layout)
    leaves = [t.detach().clone().requires_grad_() for t in inputs.values()]
    dy = random_like(inputs["x"], 3)

    def f(x, weight, scale, shift):
        return ops.rms_norm_silu(x, weight, scale=scale, shift=shift, impl=impl)

    grads = torch.autograd.grad(f(*leaves), leaves, dy)
    slope, ways = directional(f, leaves, dy)
    along = sum((g * w).double().sum() for g, w in zip(grads, ways, strict=True))
    assert abs(along - slope) < 2e-3 * sum(g.double().norm() for g in grads)


def test_a_second_derivative_is_right_or_refused(impl):
    x = torch.randn(2, 8, 4, 4, device=DEVICE, requires_grad=True)
    c = torch.randn(2, 8, 4, 4, device=DEVICE)

    def second():
        y = ops.rms_norm_silu(x, None, impl=impl)
        (g,) = torch.autograd.grad((y * c).sum(), x, create_graph=True)
        return torch.autograd.grad((g * g).sum(), x)[0]

    if impl == "eager":
        assert second().abs().max() > 0
    else:
        with pytest.raises(RuntimeError, match="no second derivative"):
            second()


@pytest.mark.parametrize("eps", [1e-12, 2.0])
def test_gradcheck_float64(eps):
    inputs = make_inputs((2, 6, 3, 3), torch.float64)
    inputs["x"][0, :, 1, 1] *= 0.1  # shorter than the larger eps
    leaves = [t.detach().clone().requires_grad_() for t in inputs.values()]

    def f(x, weight, scale, shift):
        return ops.rms_norm_silu(x, weight, eps=eps, scale=scale, shift=shift, impl="eager")

    assert torch.autograd.gradcheck(f, leaves)
