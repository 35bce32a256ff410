"""group_norm_silu on every back end against the float64 reference, forward and backward."""

import pytest
import torch
from budget import FORWARD, GRADIENT, assert_within_budget
from conftest import DEVICE
from engine.kernels import reference

from engine import dispatch, ops

OP = "group_norm_silu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# name: (N, C, *S), groups
SHAPES = {
    "HW=1": ((2, 8, 1, 1), 4),
    "HW=1 C/G=1": ((3, 4, 1, 1), 4),
    "C/G=1": ((2, 6, 4, 4), 6),
    "one group": ((2, 6, 5, 5), 1),
    "C/G=3 odd S": ((2, 12, 7, 9), 4),
    "C/G=5": ((2, 20, 3, 5), 4),
    "C/G=6": ((2, 24, 4, 6), 4),
    "C/G=10 batch 1": ((1, 40, 7, 9), 4),
    "C/G=18 batch 1": ((1, 72, 5, 7), 4),
    "C/G=32 wide": ((2, 128, 4, 4), 4),
    "long rows": ((1, 4, 40, 41), 2),
    "several tiles": ((1, 6, 64, 66), 2),
    "sequence": ((2, 8, 63), 2),
    "vectors": ((3, 12), 3),
    "volume": ((2, 8, 2, 3, 5), 2),
}
VARIANTS = {
    "plain": (),
    "no affine": ("no affine",),
    "norm only": ("none",),
    "add": ("add",),
    "scale shift": ("scale", "shift"),
    "shift only": ("shift",),
    "everything": ("add", "scale", "shift"),
    "everything, norm only": ("add", "scale", "shift", "none"),
}


def as_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last" and x.dim() == 3:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels_last" and x.dim() in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.contiguous(memory_format=formats[x.dim()])
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]
    return x.contiguous()


def make_inputs(shape, dtype, variant, *, seed=0, mean=0.5, std=2.0, operand_dtype=None):
    g = torch.Generator().manual_seed(seed)

    def normal(*size, at=0.0, by=1.0, dtype=operand_dtype or dtype):
        return (torch.randn(size, generator=g) * by + at).to(dtype).to(DEVICE)

    n, c = shape[:2]
    x = normal(*shape, at=mean, by=std, dtype=dtype)
    inputs = {"x": x, "weight": normal(c, at=1.0, by=0.5), "bias": normal(c, by=0.7)}
    if "no affine" in variant:
        inputs["weight"] = inputs["bias"] = None
    embedding = normal(n, 3 * c, by=0.6)  # add, scale, shift are chunks: their rows have a stride
    for name, chunk in zip(("add", "scale", "shift"), embedding.chunk(3, dim=1), strict=True):
        inputs[name] = chunk if name in variant else None
    return inputs


def run(function, inputs, groups, dy, *, grad=True, **kwargs):
    """→ y and the gradients of every present input, from leaves that keep strides."""
    leaves = {k: None if t is None else t.detach().requires_grad_(grad) for k, t in inputs.items()}
    operands = {k: leaves[k] for k in ("add", "scale", "shift")}
    x = (leaves["x"], leaves["x2"]) if "x2" in leaves else leaves["x"]
    y = function(x, leaves["weight"], leaves["bias"], groups, **operands, **kwargs)
    present = {k: t for k, t in leaves.items() if t is not None}
    if not grad:
        return y, {}
    grads = torch.autograd.grad(y, list(present.values()), dy.to(y.dtype))
    return y, dict(zip(present, grads, strict=True))


def check(impl, inputs, groups, variant=(), *, dy_layout="contiguous", eps=1e-5, dy_scale=1.0):
    g = torch.Generator().manual_seed(99)
    x, shape = inputs["x"], list(inputs["x"].shape)
    shape[1] += inputs["x2"].shape[1] if "x2" in inputs else 0
    dy = torch.randn(shape, generator=g).to(DEVICE).mul(dy_scale).to(x.dtype)
    activation = "none" if "none" in variant else "silu"
    exact = {k: None if t is None else t.double() for k, t in inputs.items()}
    truth, true_grads = run(
        reference.group_norm_silu, exact, groups, dy.double(), eps=eps, silu=activation == "silu"
    )
    plain, plain_grads = run(
        ops.group_norm_silu, inputs, groups, dy, eps=eps, activation=activation, impl="eager"
    )
    got, grads = run(
        ops.group_norm_silu,
        inputs,
        groups,
        as_layout(dy, dy_layout),
        eps=eps,
        activation=activation,
        impl=impl,
    )
    assert got.dtype == x.dtype
    assert_within_budget(got, truth, plain, factor=FORWARD)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_within_budget(
            grad, true_grads[name], plain_grads[name], factor=GRADIENT, what=f"d{name}"
        )
    with torch.no_grad():  # the path without autograd gives the same bits
        free, _ = run(
            ops.group_norm_silu,
            inputs,
            groups,
            dy,
            grad=False,
            eps=eps,
            activation=activation,
            impl=impl,
        )
    assert torch.equal(free, got)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(impl, shape, layout, dtype):
    size, groups = SHAPES[shape]
    variant = VARIANTS["everything"]
    inputs = make_inputs(size, dtype, variant)
    inputs["x"] = as_layout(inputs["x"], layout)
    y = check(impl, inputs, groups, variant, dy_layout=layout)
    if len(size) >= 4 and impl != "eager":
        assert y.stride() == torch.empty_like(inputs["x"]).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(impl, variant, layout, dtype):
    inputs = make_inputs((2, 12, 5, 7), dtype, VARIANTS[variant])
    inputs["x"] = as_layout(inputs["x"], layout)
    check(impl, inputs, 4, VARIANTS[variant], dy_layout=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dy_layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_any_view_and_any_gradient_layout(impl, layout, dy_layout, dtype):
    inputs = make_inputs((2, 24, 5, 6), dtype, ("add",))
    inputs["x"] = as_layout(inputs["x"], layout)
    check(impl, inputs, 4, ("add",), dy_layout=dy_layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean, std", [(1e3, 1e-2), (-1e3, 1.0), (0.0, 1e-4), (100.0, 0.01)])
def test_large_mean_small_std(impl, mean, std, dtype, layout):
    inputs = make_inputs((2, 12, 7, 9), dtype, ("scale", "shift"), mean=mean, std=std)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(impl, inputs, 4, ("scale", "shift"), dy_layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float16_near_overflow(impl, layout):
    inputs = make_inputs((2, 12, 7, 9), torch.float16, (), mean=0.0, std=2e4)
    inputs["x"] = as_layout(inputs["x"].clamp(-65000, 65000), layout)
    check(impl, inputs, 4, dy_layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_rows(impl, layout):
    inputs = make_inputs((2, 8, 4, 5), torch.float32, ())
    inputs["x"] = as_layout(torch.full((2, 8, 4, 5), 3.25, device=DEVICE), layout)
    check(impl, inputs, 2, dy_layout=layout)


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-1])
def test_eps(impl, eps):
    check(impl, make_inputs((2, 8, 4, 5), torch.float32, (), mean=0, std=1e-3), 2, eps=eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float32_operands_with_a_low_precision_x(impl, dtype, layout):
    variant = ("add", "scale", "shift")
    inputs = make_inputs((2, 12, 5, 7), dtype, variant, operand_dtype=torch.float32)
    inputs["x"] = as_layout(inputs["x"], layout)
    check(impl, inputs, 4, variant, dy_layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_stays_in_its_group(impl, layout):
    inputs = make_inputs((2, 8, 4, 5), torch.float32, ())
    inputs["x"][1, 3, 2, 2] = float("nan")
    x = as_layout(inputs["x"], layout)
    y = ops.group_norm_silu(x, inputs["weight"], inputs["bias"], 4, impl=impl)
    bad = torch.zeros(2, 8, 4, 5, dtype=torch.bool)
    bad[1, 2:4] = True
    assert torch.equal(y.isnan().cpu(), bad)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_again_and_on_one_thread(impl, layout):
    variant = ("add", "scale", "shift")
    inputs = make_inputs((2, 24, 17, 9), torch.float32, variant)
    inputs["x"] = as_layout(inputs["x"], layout)
    dy = torch.randn(2, 24, 17, 9, device=DEVICE)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (2, 2, 1):
            torch.set_num_threads(count)
            y, grads = run(ops.group_norm_silu, inputs, 4, dy, impl=impl)
            results.append([y, *grads.values()])
    finally:
        torch.set_num_threads(threads)
    if impl == "eager":
        results.pop()  # PyTorch promises nothing across thread counts
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty_batch(impl):
    x = torch.empty(0, 8, 4, 4, device=DEVICE, requires_grad=True)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    y = ops.group_norm_silu(x, weight, None, 2, impl=impl)
    assert y.shape == x.shape
    y.sum().backward()
    assert weight.grad.eq(0).all()


def test_only_some_gradients(impl):
    inputs = make_inputs((2, 8, 4, 4), torch.float32, ("add",))
    weight = inputs["weight"].requires_grad_()
    y = ops.group_norm_silu(inputs["x"], weight, inputs["bias"], 2, add=inputs["add"], impl=impl)
    dy = torch.randn_like(y)
    y.backward(dy)
    other = inputs["weight"].detach().double().requires_grad_()
    rest = [inputs[k].detach().double() for k in ("bias", "add")]
    truth = reference.group_norm_silu(inputs["x"].double(), other, rest[0], 2, add=rest[1])
    truth.backward(dy.double())
    assert inputs["x"].grad is None and inputs["add"].grad is None
    assert torch.allclose(weight.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_of_one_element_has_no_gradient(impl, dtype):
    """x̂ = dx = 0 exactly, though rstd is 316 and the mean that was saved is a rounding off."""
    if impl == "eager":
        pytest.skip("PyTorch leaves a rounding")
    inputs = make_inputs((3, 40, 1, 1), dtype, ("add", "scale", "shift"))
    operands = [inputs[k] for k in ("weight", "bias", "add", "scale", "shift")]
    fwd, bwd = (dispatch.function("group_norm_silu", stage, impl) for stage in ("fwd", "bwd"))
    y, mean, rstd = fwd(inputs["x"], None, *operands, 40, 1e-5, False)
    h = operands[1].float() * (1 + operands[3].float()) + operands[4].float()
    assert torch.allclose(y.flatten(1).float(), h, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    off = torch.nextafter(mean, mean + 1)
    dy = torch.randn(3, 40, 1, 1).to(dtype).to(DEVICE)
    dx, _, dweight, _, dadd, *_ = bwd(dy, inputs["x"], None, *operands, off, rstd, 40, True)
    # No rounding is left to multiply: even an infinite rstd changes nothing.
    infinite = torch.full_like(rstd, float("inf"))
    dx2, _, dweight2, *_ = bwd(dy, inputs["x"], None, *operands, mean, infinite, 40, True)
    zeros = {"x": dx, "weight": dweight, "add": dadd, "x, any rstd": dx2, "weight, too": dweight2}
    for name, grad in zeros.items():
        assert grad.eq(0).all(), f"d{name}: {grad.abs().max()}"


@pytest.mark.parametrize("groups", [1024, 2048])
def test_many_small_groups(impl, groups):
    check(impl, make_inputs((2, 2048, 1, 1), torch.float32, ()), groups)


def directional(function, leaves, dy):
    """Central difference of Σ dy·f along a random direction of all leaves, in float64."""
    g = torch.Generator().manual_seed(5)
    ways = [torch.randn(t.shape, generator=g).to(t) for t in leaves]
    h = 2.0**-8
    ends = []
    for sign in (1, -1):
        moved = [t.detach() + sign * h * w for t, w in zip(leaves, ways, strict=True)]
        ends.append((function(*moved).double() * dy.double()).sum())
    return (ends[0] - ends[1]) / (2 * h), ways


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_are_those_of_the_forward(impl, layout):
    """A finite difference of the kernel's own forward, in float32."""
    inputs = make_inputs((2, 12, 5, 7), torch.float32, ("add", "scale", "shift"))
    inputs["x"] = as_layout(inputs["x"], layout)
    leaves = [t.detach().clone().requires_grad_() for t in inputs.values()]
    dy = torch.randn(2, 12, 5, 7, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def f(x, weight, bias, *rest):
        rest = dict(zip(("add", "scale", "shift"), rest, strict=True))
        return ops.group_norm_silu(x, weight, bias, 4, **rest, impl=impl)

    grads = torch.autograd.grad(f(*leaves), leaves, dy)
    slope, ways = directional(f, leaves, dy)
    along = sum((g * w).double().sum() for g, w in zip(grads, ways, strict=True))
    assert abs(along - slope) < 2e-3 * sum(g.double().norm() for g in grads)


def test_a_second_derivative_is_right_or_refused(impl):
    x = torch.randn(2, 8, 4, 4, device=DEVICE, requires_grad=True)
    c = torch.randn(2, 8, 4, 4, device=DEVICE)

    def second():
        y = ops.group_norm_silu(x, None, None, 2, impl=impl)
        (g,) = torch.autograd.grad((y * c).sum(), x, create_graph=True)
        return torch.autograd.grad((g * g).sum(), x)[0]

    if impl == "eager":
        assert second().abs().max() > 0
    else:
        with pytest.raises(RuntimeError, match="no second derivative"):
            second()


def test_gradcheck_float64():
    inputs = make_inputs((2, 6, 3, 3), torch.float64, ("add", "scale", "shift"))
    names = list(inputs)
    leaves = [inputs[k].detach().clone().requires_grad_() for k in names]

    def f(*tensors):
        t = dict(zip(names, tensors, strict=True))
        rest = {k: t[k] for k in ("add", "scale", "shift")}
        return ops.group_norm_silu(t["x"], t["weight"], t["bias"], 2, **rest, impl="eager")

    assert torch.autograd.gradcheck(f, leaves)


BAD = {
    "groups": (dict(num_groups=3), "8 channels cannot be split into num_groups=3"),
    "weight": (dict(weight=torch.ones(7)), r"weight is \(7,\).*expected \(8,\)"),
    "add": (dict(add=torch.ones(8)), r"add is \(8,\).*expected \(2, 8\)"),
    "activation": (dict(activation="relu"), "'relu', expected 'silu' or 'none'"),
    "eps": (dict(eps=0.0), "expected eps > 0"),
    "dtype": (dict(x=torch.ones(2, 8, 4, 4, dtype=torch.int64)), "floating point"),
    "device": (dict(weight=torch.ones(8, device="meta")), "weight is on meta, expected cpu"),
    "pair of other N": (dict(x=(torch.ones(2, 3, 4, 4), torch.ones(3, 5, 4, 4))), "is a pair of"),
    "pair of other S": (dict(x=(torch.ones(2, 3, 4, 4), torch.ones(2, 5, 4, 1))), "is a pair of"),
    "pair of dtypes": (dict(x=(torch.ones(2, 3, 4), torch.ones(2, 5, 4).half())), "of one dtype"),
    "pair of devices": (
        dict(x=(torch.ones(2, 3, 4), torch.ones(2, 5, 4, device="meta"))),
        r"\(2, 5, 4\) torch.float32 on meta, expected .* on one device",
    ),
    "half a pair": (
        dict(x=(torch.ones(2, 8, 4), None)),
        r"\(Tensor, NoneType\), expected a tensor or a pair",
    ),
    "three": (dict(x=(torch.ones(2, 8, 4),) * 3), "x is a tuple of .*expected a tensor or a pair"),
    "weight of a pair": (
        dict(x=(torch.ones(2, 3, 4), torch.ones(2, 6, 4)), num_groups=3),
        r"weight is \(8,\).*expected \(9,\).* for x \(2, 3, 4\) and \(2, 6, 4\)",
    ),
    "impl": (dict(impl="cudnn"), "impl='cudnn' is unknown: choose one of auto, eager"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case):
    arguments, sentence = BAD[case]
    defaults = dict(x=torch.ones(2, 8, 4, 4), weight=torch.ones(8), bias=None, num_groups=2)
    with pytest.raises(ValueError, match=sentence):
        ops.group_norm_silu(**{**defaults, **arguments})


def test_float64_is_refused_by_name_and_served_by_auto():
    x = torch.ones(1, 4, 2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="native was requested and cannot serve"):
        ops.group_norm_silu(x, None, None, 2, impl="native")
    assert ops.group_norm_silu(x, None, None, 2).dtype == torch.float64
