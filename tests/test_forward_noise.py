"""forward_noise and its loss on every back end against the float64 reference."""

import pytest
import torch
from budget import FORWARD, GRADIENT, assert_within_budget
from conftest import DEVICE
from engine.kernels import reference
from test_group_norm_silu import as_layout

import engine
from engine import ops, schedules

OP = "forward_noise"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PICTURES = (*DTYPES, torch.uint8)
# One element; odd sizes; several chunks a sample (2048 elements), one of them short.
SHAPES = (
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 1, 9, 9),
    (2, 6),
    (2, 3, 8),
    (1, 2, 3, 4, 5),
    (2, 3, 45, 37),
)
LAYOUTS = ("contiguous", "channels_last")


def rows(prediction="v"):
    process = engine.Diffusion(schedules.betas("cosine", 100), prediction=prediction)
    return process.forward_rows().float().to(DEVICE)


def make(shape, dtype=torch.float32, out_dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.rand(shape, generator=g)
    x0 = (x0 * 255).to(torch.uint8) if dtype == torch.uint8 else (2 * x0 - 1).to(dtype)
    out, z = (torch.randn(shape, generator=g) for _ in range(2))
    t = torch.randint(100, shape[:1], generator=g)
    return x0.to(DEVICE), out.to(out_dtype).to(DEVICE), z.to(DEVICE), t.to(DEVICE)


def exact(x0):
    return x0 if x0.dtype == torch.uint8 else x0.double()


def check_loss(impl, x0, out, z, t, coeffs, loss="l2", weights=None, **key):
    """Forward and backward, with a random cotangent. z: the noise, given or of the key."""
    given = key or {"noise": z}
    dloss = torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def run(**kwargs):
        leaf = out.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        losses = ops.forward_noise_loss(
            leaf, x0, coeffs, t, loss=loss, weights=weights, **given, **kwargs
        )
        (grad,) = torch.autograd.grad(losses, leaf, dloss)
        return losses.detach(), grad

    truth_out = out.double().requires_grad_()
    _, target = reference.forward_noise(exact(x0), coeffs.double(), t, z.double())
    heavy = None if weights is None else weights.double()
    truth = reference.forward_noise_loss(truth_out, target, loss, heavy)
    (truth_grad,) = torch.autograd.grad(truth, truth_out, dloss.double())
    got, plain = run(impl=impl), run(impl="eager")
    assert got[0].dtype == torch.float32 and got[1].dtype == out.dtype
    assert impl == "eager" or got[1].stride() == out.stride()
    assert_within_budget(got[0], truth.detach(), plain[0], factor=FORWARD, what="loss")
    assert_within_budget(got[1], truth_grad, plain[1], factor=GRADIENT, what="dmodel_out")


@pytest.mark.parametrize("dtype", PICTURES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_x_t(impl, shape, dtype):
    x0, _, z, t = make(shape, dtype)
    truth, _ = reference.forward_noise(exact(x0), rows().double(), t, z.double())
    for layout in LAYOUTS:
        view = as_layout(x0, layout)
        plain = ops.forward_noise(view, rows(), t, noise=z, impl="eager")
        got = ops.forward_noise(view, rows(), t, noise=as_layout(z, layout), impl=impl)
        assert got.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
        assert_within_budget(got, truth, plain, factor=FORWARD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_t_dtype(impl, dtype):
    x0, _, z, t = make((2, 3, 6, 5), torch.uint8)
    truth, _ = reference.forward_noise(x0, rows().double(), t, z.double())
    plain = ops.forward_noise(x0, rows(), t, noise=z, dtype=dtype, impl="eager")
    got = ops.forward_noise(x0, rows(), t, noise=z, dtype=dtype, impl=impl)
    assert got.dtype == dtype
    assert_within_budget(got, truth, plain, factor=FORWARD)


@pytest.mark.parametrize("offset", [0, 1, 6, 2**33 + 3])
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (2, 1, 50, 43)], ids=str)
def test_noise_of_the_key(impl, shape, offset):
    """The very normals that ops.noise gives, whatever the layouts, in x_t and in the loss."""
    x0, out, _, t = make(shape)
    z = ops.noise(-5, 7, ops.TRAINING_NOISE, shape, offset=offset, impl="eager", device=DEVICE)
    key = {"key": -5, "step": 7, "offset": offset}
    for layout in LAYOUTS:
        view = as_layout(x0, layout)
        given = ops.forward_noise(view, rows(), t, noise=z, impl=impl)
        drawn = ops.forward_noise(view, rows(), t, impl=impl, **key)
        assert torch.equal(given, drawn)
        check_loss(impl, view, out, z, t, rows(), **key)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss(impl, shape, loss, weighted):
    x0, out, z, t = make(shape)
    weights = torch.linspace(0.5, 2, len(t), device=DEVICE) if weighted else None
    check_loss(impl, x0, out, z, t, rows(), loss, weights)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
def test_mean(impl, loss, dtype, weighted):
    """reduction="mean" is the mean, with its gradient, a scaled loss included."""
    x0, out, z, t = make((3, 2, 9, 7), out_dtype=dtype)
    weights = torch.linspace(0.5, 2, len(t), device=DEVICE) if weighted else None
    call = {"loss": loss, "weights": weights, "noise": z}

    def run(impl):
        leaf = out.detach().requires_grad_()
        mean = ops.forward_noise_loss(leaf, x0, rows(), t, **call, reduction="mean", impl=impl)
        return mean.detach(), *torch.autograd.grad(512 * mean, leaf)

    leaf = out.double().requires_grad_()
    _, target = reference.forward_noise(x0.double(), rows().double(), t, z.double())
    heavy = None if weights is None else weights.double()
    truth = reference.forward_noise_loss(leaf, target, loss, heavy).mean()
    got, plain = run(impl), run("eager")
    assert got[0].shape == () and got[1].dtype == dtype
    assert_within_budget(got[0], truth.detach(), plain[0], factor=FORWARD, what="loss")
    (slope,) = torch.autograd.grad(512 * truth, leaf)
    assert_within_budget(got[1], slope, plain[1], factor=GRADIENT, what="dmodel_out")


def test_no_second_derivative(impl, backend):
    x0, out, z, t = make((2, 3, 4, 4))
    out.requires_grad_()
    losses = ops.forward_noise_loss(out, x0, rows(), t, noise=z, impl=impl)
    if backend == "eager":
        torch.autograd.grad(losses.sum(), out, create_graph=True)[0].sum().backward()
        assert out.grad is not None
    else:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(losses.sum(), out, create_graph=True)


@pytest.mark.parametrize("dtype", PICTURES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_dtypes(impl, out_dtype, dtype):
    x0, out, z, t = make((2, 3, 9, 7), dtype, out_dtype)
    for layout in LAYOUTS:
        for out_layout in LAYOUTS:
            check_loss(impl, as_layout(x0, layout), as_layout(out, out_layout), z, t, rows())


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_rows_are_the_process(impl, prediction):
    """x_t and target as Diffusion writes them, and its mean loss."""
    process = engine.Diffusion(schedules.betas("cosine", 100), prediction=prediction, loss="huber")
    x0, out, z, t = make((3, 2, 6, 6))
    coeffs = process.forward_rows().float().to(DEVICE)
    x_t = ops.forward_noise(x0, coeffs, t, noise=z, impl=impl)
    torch.testing.assert_close(x_t, process.q_sample(x0, t, z))
    losses = ops.forward_noise_loss(out, x0, coeffs, t, loss="huber", noise=z, impl=impl)
    expected = process.loss(lambda x, t: out, x0, t=t, noise=z)
    torch.testing.assert_close(losses.mean(), expected)


def test_wrong_t_is_nan(impl):
    x0, out, z, t = make((3, 2, 5, 5))
    t[1], t[2] = -1, 100
    x_t = ops.forward_noise(x0, rows(), t, noise=z, impl=impl)
    losses = ops.forward_noise_loss(out, x0, rows(), t, noise=z, impl=impl)
    for result in (x_t, losses):
        nan = result.flatten(1).isnan() if result.dim() > 1 else result[:, None].isnan()
        assert nan.all(1).tolist() == [False, True, True] and not nan[0].any()


def test_same_bits_every_run(impl):
    x0, out, _, t = make((2, 3, 45, 37))
    out.requires_grad_()

    def run():
        losses = ops.forward_noise_loss(out, x0, rows(), t, key=3, impl=impl)
        return losses, *torch.autograd.grad(losses, out, torch.ones_like(losses))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_residual_at_the_edges(impl):
    """r = 0, ±1 exactly, infinite and NaN: the slopes of l1 and huber there."""
    out = torch.tensor([[0.0, 1.0, -1.0, 2.0, -3.0, float("inf"), float("nan")]], device=DEVICE)
    x0 = torch.zeros_like(out)
    coeffs = torch.tensor([[1.0, 0.0, 1.0, 0.0]], device=DEVICE)
    t = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for loss, slope in (("l1", [0, 1, -1, 1, -1, 1]), ("huber", [0, 1, -1, 1, -1, 1])):
        leaf = out.clone().requires_grad_()
        losses = ops.forward_noise_loss(leaf, x0, coeffs, t, loss=loss, noise=x0, impl=impl)
        assert losses.isnan().all()
        (grad,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))
        torch.testing.assert_close(grad[0, :6] * 7, torch.tensor(slope, device=DEVICE).float())


def test_gradient_to_the_images_is_eagers(impl, backend):
    x0, out, z, t = make((2, 3, 4, 4))
    x0.requires_grad_()
    if backend == "eager":
        ops.forward_noise(x0, rows(), t, noise=z, impl=impl).sum().backward()
        assert x0.grad is not None
    else:
        with pytest.raises(RuntimeError, match="has no gradient"):
            ops.forward_noise(x0, rows(), t, noise=z, impl=impl)


def test_empty(impl):
    x0, out, z, t = make((0, 3, 4, 4))
    assert ops.forward_noise(x0, rows(), t, noise=z, impl=impl).shape == x0.shape
    assert ops.forward_noise_loss(out, x0, rows(), t, noise=z, impl=impl).shape == (0,)


BAD = {
    "x0 is": {"x0": torch.zeros(2, 3, 4, dtype=torch.int32)},
    "coeffs is": {"coeffs": torch.zeros(5, 3)},
    "t is": {"t": torch.zeros(3, dtype=torch.int64)},
    "exactly one": {"key": 1, "noise": torch.zeros(2, 3, 4)},
    "noise is": {"key": None, "noise": torch.zeros(2, 3, 5)},
    "key is 1.5": {"key": 1.5},
    "step is -1": {"step": -1},
    "offset is": {"offset": -4},
    "dtype is": {"dtype": torch.float64},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input(sentence):
    call = {"x0": torch.zeros(2, 3, 4), "coeffs": torch.zeros(5, 4), "key": 0}
    call |= {"t": torch.zeros(2, dtype=torch.int64)} | BAD[sentence]
    with pytest.raises(ValueError, match=sentence):
        ops.forward_noise(**call)


@pytest.mark.parametrize(
    "sentence, changed",
    [
        ("loss is 'l3'", {"loss": "l3"}),
        ("reduction is 'sum'", {"reduction": "sum"}),
        ("model_out is", {"model_out": torch.zeros(2, 3, 5)}),
        ("weights is", {"weights": torch.zeros(3)}),
    ],
)
def test_bad_loss_input(sentence, changed):
    call = {"model_out": torch.zeros(2, 3, 4), "x0": torch.zeros(2, 3, 4)}
    call |= {"coeffs": torch.zeros(5, 4), "t": torch.zeros(2, dtype=torch.int64), "key": 0}
    with pytest.raises(ValueError, match=sentence):
        ops.forward_noise_loss(**call | changed)


def test_a_kept_graph_keeps_its_gradient():
    """Who edits a gradient, or takes two, leaves the next backward pass as it was."""
    x0, out, rows, t = (torch.rand(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.rand(8, 4), None)
    out.requires_grad_()
    t = torch.tensor([1, 5])
    loss = ops.forward_noise_loss(out, x0, rows, t, key=3, reduction="mean")
    (first,) = torch.autograd.grad(loss, out, retain_graph=True)
    truth = first.clone()
    first.data.mul_(7)
    (second,) = torch.autograd.grad(loss, out, retain_graph=True)
    assert torch.equal(second, truth)
    (last,) = torch.autograd.grad(loss, out)
    assert torch.equal(last, truth)
    loss = ops.forward_noise_loss(out, x0, rows, t, key=3, reduction="mean")
    many = torch.autograd.grad(loss, out, torch.tensor([1.0, 2.0]), is_grads_batched=True)[0]
    torch.testing.assert_close(many, torch.stack([truth, 2 * truth]))
