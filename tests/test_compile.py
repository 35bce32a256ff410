"""Every op on every back end under torch.compile(fullgraph=True), and through opcheck."""

import pytest
import torch
import torch._dynamo.testing
from conftest import DEVICE
from engine.kernels import boundary, native
from test_group_norm_silu import as_layout, make_inputs

from engine import ops

OP = "all"
PRESENT = [
    (op, backend)
    for op in (
        "group_norm_silu",
        "rms_norm_silu",
        "attention",
        "attention_qkv",
        "reverse_step",
        "forward_noise",
        "noise",
    )
    for backend in ("eager", "native", "triton")
]


def call(op: str, impl: str):
    """→ function, leaf inputs."""
    if op == "group_norm_silu":
        inputs = make_inputs((2, 8, 4, 6), torch.float32, ("add", "scale", "shift"))
        inputs["x"] = as_layout(inputs["x"], "channels_last")
        leaves = [t.detach().requires_grad_() for t in inputs.values()]

        def function(x, weight, bias, add, scale, shift):
            rest = {"add": add, "scale": scale, "shift": shift}
            return ops.group_norm_silu(x * 1, weight, bias, 2, **rest, impl=impl)

    elif op == "rms_norm_silu":
        inputs = make_inputs((2, 8, 4, 6), torch.float32, ("scale", "shift"))
        inputs["x"] = as_layout(inputs["x"], "channels_last")
        leaves = [inputs[k].detach().requires_grad_() for k in ("x", "weight", "scale", "shift")]

        def function(x, weight, scale, shift):
            return ops.rms_norm_silu(x * 1, weight, scale=scale, shift=shift, impl=impl)

    elif op == "attention":
        leaves = [torch.randn(1, 2, 9, 16, device=DEVICE, requires_grad=True) for _ in range(3)]

        def function(q, k, v):
            return ops.attention(q * 1, k, v, impl=impl)

    elif op == "attention_qkv":
        leaves = [torch.randn(1, 9, 96, device=DEVICE, requires_grad=True)]

        def function(qkv):
            return ops.attention_qkv(qkv * 1, 2, "hd3", impl=impl)

    elif op == "reverse_step":
        leaves = [torch.randn(2, 3, 4, 4, device=DEVICE) for _ in range(2)]
        coeffs = torch.rand(10, 5, device=DEVICE)

        step = torch.tensor(3, device=DEVICE)

        wide = torch.rand(10, 10, device=DEVICE)

        def function(x, out):
            x = ops.reverse_step(x * 1, out, coeffs, step, key=5, impl=impl)
            x, x0 = ops.reverse_step(
                *(x, out, wide, step), key=5, uncond=x, guidance=1.5, grad=out, x0_prev=x,
                dynamic_threshold=0.9, return_x0=True, impl=impl,
            )  # fmt: skip
            return ops.reverse_step(x, x0, coeffs, 3, key=5, impl=impl)

    elif op == "forward_noise":
        leaves = [torch.randn(2, 3, 4, 4, device=DEVICE, requires_grad=True)]
        x0, coeffs = torch.randn(2, 3, 4, 4, device=DEVICE), torch.rand(10, 4, device=DEVICE)
        t = torch.tensor([2, 7], device=DEVICE)

        def function(w):
            x_t = ops.forward_noise(x0 * 1, coeffs, t, key=5, step=2, impl=impl)
            return ops.forward_noise_loss(x_t * w, x0, coeffs, t, key=5, step=2, impl=impl)

    else:
        leaves = [torch.randn(2, 3, 4, 4, device=DEVICE)]

        def function(x):
            return x + ops.noise(1, 2, 3, x.shape, device=x.device, impl=impl)

    return function, leaves


@pytest.fixture
def backend(request):
    return request.getfixturevalue("impl_name")


@pytest.mark.parametrize("op, impl_name", PRESENT)
def test_fullgraph(op, impl_name, backend):
    function, leaves = call(op, impl_name)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*leaves), function(*leaves)
    assert torch.equal(out, expected) or torch.allclose(out, expected, rtol=1e-5, atol=1e-6)
    if expected.requires_grad:
        dout = torch.randn_like(expected)
        grads = torch.autograd.grad(out, leaves, dout)
        for a, b in zip(grads, torch.autograd.grad(expected, leaves, dout), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl_name", ["eager", "native"])
@pytest.mark.parametrize("op", ["group_norm_silu", "rms_norm_silu", "attention"])
def test_one_tensor_for_several_operands(op, impl_name, backend):
    """Dynamo refuses an autograd.Function that gets a tensor twice."""
    impl = backend
    x = torch.randn(2, 8, 4, 6, device=DEVICE, requires_grad=True)
    w, s = (torch.randn(n, device=DEVICE, requires_grad=True) for n in ((8,), (2, 8)))

    def function(x, w, s):
        if op == "attention":
            return ops.attention(x, x, x, impl=impl)
        if op == "rms_norm_silu":
            return ops.rms_norm_silu(x, w, scale=s, shift=s, impl=impl)
        pair = ops.group_norm_silu((x, x), torch.cat([w, w]), None, 2, impl=impl)
        return pair[:, :8] + ops.group_norm_silu(x, w, w, 2, add=s, scale=s, impl=impl)

    leaves = (x,) if op == "attention" else (x, w, s)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = (f(x, w, s) for f in (compiled, function))
    grad = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(y, leaves, grad) for y in (found, expected)), strict=True)
    for a, b in [(found, expected), *pairs]:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", [op for op, backend in PRESENT if backend == "eager"])
def test_inductor(op):
    """The default backend of torch.compile, which fuses what eager does: forward and backward."""
    function, leaves = call(op, "eager")
    torch.compiler.reset()
    out, expected = torch.compile(function, fullgraph=True)(*leaves), function(*leaves)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)
    if expected.requires_grad:
        dout = torch.randn_like(expected)
        grads = torch.autograd.grad(out, leaves, dout)
        for a, b in zip(grads, torch.autograd.grad(expected, leaves, dout), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl_name", ["eager", "native", "triton"])
def test_inductor_keeps_the_bits_of_the_noise(impl_name, backend):
    """The noise is one opaque node: what Inductor contracted or reordered would change its bits."""

    def function(x):
        return x * 2, ops.noise(7, 3, 1, (4100,), device=DEVICE, offset=3, impl=impl_name)

    torch.compiler.reset()
    x = torch.ones(3, device=DEVICE)
    found = torch.compile(function, fullgraph=True)(x)[1]
    assert torch.equal(found.view(torch.int32), function(x)[1].view(torch.int32))


def test_the_capability_of_a_device_is_a_constant(monkeypatch):
    pytest.importorskip("triton")
    from engine.kernels import triton_base

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    triton_base._cached_capability.cache_clear()
    torch.compiler.reset()

    def function(x):
        return x * (2 if triton_base._capability(x.device) < (8, 0) else 3)

    x = torch.ones(3, device=DEVICE)
    try:
        assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), x * 2)
    finally:
        triton_base._cached_capability.cache_clear()


@pytest.mark.parametrize("impl_name", ["eager", "native"])
def test_another_batch_size_compiles_nothing_new(impl_name, backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()

    def function(x, w):
        return ops.group_norm_silu(x, w, None, 2, impl=impl_name)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    w = torch.rand(8, device=DEVICE)
    counts = []
    for n in (2, 3, 5):
        x = torch.randn(n, 8, 4, 4, device=DEVICE)
        assert torch.allclose(compiled(x, w), function(x, w), atol=1e-6)
        counts.append(counter.frame_count)
    # The first call may compile twice: Dynamo restarts when it finds that eps must be a constant.
    assert counts[0] == counts[-1] > 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("impl_name", ["eager", "native", "triton"])
def test_fullgraph_of_a_pair(impl_name, backend, layout):
    inputs = make_inputs((2, 8, 4, 6), torch.float32, ("add",))
    operands = [inputs[k] for k in ("weight", "bias", "add")]
    halves = (as_layout(t.clone(), layout) for t in inputs["x"].split([3, 5], 1))
    leaves = [t.detach().requires_grad_() for t in (*halves, *operands)]

    def function(a, b, weight, bias, add):
        return ops.group_norm_silu((a * 1, b), weight, bias, 2, add=add, impl=impl_name)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*leaves), function(*leaves)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert impl_name == "eager" or out.stride() == expected.stride()
    dout = torch.randn_like(expected)
    grads = torch.autograd.grad(out, leaves, dout)
    for a, b in zip(grads, torch.autograd.grad(expected, leaves, dout), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def opcheck_arguments(op: str):
    x = torch.randn(2, 8, 4, 6, device=DEVICE)
    inputs = make_inputs((2, 8, 4, 6), torch.float32, ("add", "scale", "shift"))
    operands = [inputs[k].detach() for k in ("weight", "bias", "add", "scale", "shift")]
    stats = [torch.rand(2, 2, device=DEVICE) for _ in range(2)]
    q = torch.randn(1, 2, 9, 16, device=DEVICE)
    step, seed = (torch.tensor(v, device=DEVICE) for v in (3, 7))
    coeffs, wide = torch.rand(10, 5, device=DEVICE), torch.rand(10, 10, device=DEVICE)
    lse, qkv = torch.zeros(1, 2, 9, device=DEVICE), torch.randn(1, 9, 96, device=DEVICE)
    quads, t = torch.rand(10, 4, device=DEVICE), torch.tensor([1, 9], device=DEVICE)
    last = x.contiguous(memory_format=torch.channels_last)
    results, results_last = [torch.empty_like(x) for _ in range(3)], torch.empty_like(last)
    both, m, guided = torch.cat([x, last], 1), torch.rand(2, device=DEVICE), (2.5, 1.0, 0)
    return {
        "group_norm_silu_fwd": [
            (x, None, *operands, 2, 1e-5, True),
            (last, *[None] * 6, 2, 1e-5, False),
            (x[:, :3].contiguous(), x[:, 3:].contiguous(), *operands, 2, 1e-5, True),
            (last, last, *[None] * 5, 2, 1e-5, False),
        ],
        "group_norm_silu_bwd": [
            (x, x, None, *operands, *stats, 2, True),
            (x, last, *[None] * 6, *stats, 2, False),
            (x, x[:, :3].contiguous(), x[:, 3:].contiguous(), *operands, *stats, 2, True),
            (torch.cat((x, x), 1), last, last, *[None] * 5, *stats, 2, False),
        ],
        "group_norm_silu_bwd_add": [
            (x, x, None, *operands, *stats, 2, True, x, None),
            (torch.cat((x, x), 1), last, last, *[None] * 5, *stats, 2, False, last, last),
        ],
        "rms_norm_silu_fwd": [
            (x, operands[0], *operands[3:], 1e-12, True),
            (last, None, None, None, 1e-12, False),
        ],
        "rms_norm_silu_bwd": [
            (x, last, operands[0], *operands[3:], torch.rand(2, 24, device=DEVICE), True),
            (last, x, None, None, None, torch.rand(2, 24, device=DEVICE), False),
        ],
        "attention_fwd": [(q, q, q, 0.25)],
        "attention_bwd": [(q, q, q, q, q, lse, 0.25)],
        "attention_qkv_fwd": [(qkv, 2, "h3d", 0.25)],
        "attention_qkv_bwd": [(qkv[:, :, :32], qkv, qkv[:, :, :32], lse, 2, "hd3", 0.25)],
        "reverse_step_fwd": [
            (x, x, coeffs, step, seed, None, 1.0, 0),
            (last, x, coeffs, step, None, x, 1.0, 0),
        ],
        "reverse_step_general_fwd": [
            (*results, x, both, None, last, x, m, wide, step, seed, None, 1.0, 1.0, 0),
            (results_last, None, None, last, x, x, *[None] * 3, wide, step, None, x, *guided),
        ],
        "reverse_step_threshold_fwd": [(m, x, x, last, None, wide, step, 2.5, 0.9)],
        "forward_noise_fwd": [(torch.empty_like(last), x, quads, t, seed, step, None, 0)],
        "forward_noise_loss_fwd": [
            (last, x, quads, t, None, None, None, x, 0, 2),
            (x, x, quads, t, stats[0][0], seed, step, None, 0, 0),
        ],
        "forward_noise_loss_grad_fwd": [
            (last, x, quads, t, None, None, None, x, 0, 2, True),
            (x, x, quads, t, stats[0][0], seed, step, None, 0, 0, False),
        ],
        "forward_noise_loss_bwd": [
            (stats[0][0], last, x, quads, t, None, None, None, x, 0, 2),
            (stats[0][0], x, x, quads, t, stats[1][0], seed, step, None, 0, 0),
        ],
        "noise_fwd": [(torch.empty(3, 5, device=DEVICE), seed, step, 0, 0)],
    }[op]


@pytest.mark.parametrize("op", boundary.SCHEMAS)
@pytest.mark.parametrize("impl_name", ["native", "triton"])
def test_opcheck(op, impl_name, backend):
    if impl_name == "triton" and op in ("forward_noise_loss_grad_fwd", "group_norm_silu_bwd_add"):
        pytest.skip("native alone has this op")
    function, leaves = call(next(name for name, _ in PRESENT if op.startswith(name)), impl_name)
    function(*leaves)  # loads and registers
    namespace = {"native": boundary.NATIVE, "triton": boundary.TRITON}[impl_name]
    overload = getattr(getattr(torch.ops, namespace), op).default
    for arguments in opcheck_arguments(op):
        if op.startswith("group_norm_silu"):
            x, x2 = arguments["bwd" in op :][:2]
            if impl_name == "native" and x2 is not None and native.pair_refusals(x, x2):
                continue
        torch.library.opcheck(overload, arguments)
