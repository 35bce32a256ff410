"""How the kernels of group_norm_silu are cut: every kind of Triton program, the plan, and
what only a GPU can prove: clusters and the cooperative kernel."""

import pytest
import torch
from budget import FORWARD, assert_within_budget
from conftest import DEVICE
from engine.kernels import reference
from test_group_norm_silu import DTYPES, as_layout, check, make_inputs

from engine import dispatch

OP = "group_norm_silu"


@pytest.fixture(params=["walk", "large"])
def triton_kind(request, monkeypatch):
    """Tiles so small that small tensors take the path of large ones; → the plans made."""
    plans = pytest.importorskip("engine.kernels.group_norm_silu_plan")
    from engine.kernels import group_norm_silu, group_norm_silu_bwd

    monkeypatch.setattr(plans, "RESIDENT", {"fwd": 16, "bwd": 16})
    monkeypatch.setattr(plans, "WALK", {"fwd": 256, "bwd": 256})
    monkeypatch.setattr(plans, "LARGE", 128)
    monkeypatch.setattr(plans, "CHUNK", 256)
    monkeypatch.setattr(plans, "FEW", 0)
    if request.param == "large":
        monkeypatch.setattr(plans, "L2_SHARE", 0)
    made, plan = [], plans.plan

    def spy(shape, device):
        made.append(plan(shape, device))
        return made[-1]

    for module in (group_norm_silu, group_norm_silu_bwd):
        monkeypatch.setattr(module, "plan", spy)
    yield made
    assert made and {p.kind for p in made} == {request.param}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape, groups", [((2, 12, 5, 7), 4), ((1, 20, 6, 8), 2)], ids=str)
@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.skipif(bool(dispatch.absence(OP, "triton")), reason="Triton is not installed")
def test_every_kind_of_triton_program(triton_kind, shape, groups, layout, first):
    inputs = make_inputs(shape, torch.float32, ("add", "scale"))
    if first:
        a, b = inputs.pop("x").split([first, shape[1] - first], 1)
        inputs = {"x": as_layout(a.clone(), layout), "x2": as_layout(b.clone(), layout), **inputs}
    else:
        inputs["x"] = as_layout(inputs["x"], layout)
    check("triton", inputs, groups, ("add", "scale"), dy_layout="channels_last")


CLUSTERED = {  # (N, C, H, W), groups: of 96 to 192 KB in 16-bit dtypes, 3 to 8 blocks
    "planes": ((2, 4, 128, 128), 1),
    "pieces of planes": ((1, 6, 128, 160), 2),
    "many channels": ((2, 72, 64, 64), 4),
}


@pytest.mark.skipif(DEVICE != "cuda", reason="clusters need a GPU of sm_90 or newer")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("name", CLUSTERED)
def test_clusters(name, first, dtype):
    """What CLUSTERS of kernels/native.py waits for: the unproven kernel against the proven one."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need sm_90")
    check_unproven("group_norm_silu_fwd_cluster", *CLUSTERED[name], first, dtype, "contiguous")


GRADIENTS = ("dx", "dx2", "dweight", "dbias", "dadd", "dscale", "dshift")
BLOCKED = {  # (N, C, H, W), groups: larger than a block; `waves` are 5 or more of an H100's
    "waves": ((9, 64, 180, 184), 16),
    "three channels": ((2, 15, 197, 203), 5),
    "one group": ((1, 520, 30, 30), 1),
}


@pytest.mark.skipif(DEVICE != "cuda", reason="tests/test_cuda_emulated_blocked.py runs it here")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("name", BLOCKED)
def test_blocked(name, first, layout, dtype):
    """What BLOCKED of kernels/native.py waits for."""
    check_unproven("group_norm_silu_fwd_blocked", *BLOCKED[name], first, dtype, layout, bwd=True)


def check_unproven(op, shape, groups, first, dtype, layout, bwd=False):
    """The unproven kernel against the proven one, three times, with the same bits."""
    inputs = make_inputs(shape, dtype, ("add", "scale", "shift"))
    x = inputs.pop("x")
    halves = x.split([first, shape[1] - first], 1) if first else [x]
    halves = [*(as_layout(t.clone(), layout) for t in halves), None][:2]
    rest = (*inputs.values(), groups, 1e-5, True)
    truth = reference.group_norm_silu(
        x.double(), *(inputs[k].double() for k in ("weight", "bias")), groups,
        **{k: inputs[k].double() for k in ("add", "scale", "shift")},
    )  # fmt: skip
    plain = torch.ops.engine.group_norm_silu_fwd(*halves, *rest)
    found = [getattr(torch.ops.engine, op)(*halves, *rest, True) for _ in range(3)]
    assert_within_budget(found[0][0], truth, plain[0], factor=FORWARD)
    for a, b in zip(found[0][1:], plain[1:], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))
    if not bwd:
        return
    ops = torch.ops.engine
    for dy_layout in ("contiguous", "channels_last"):
        dy = as_layout(torch.randn_like(x), dy_layout)
        args = (dy, *halves, *inputs.values(), *plain[1:], groups, True)
        proven = ops.group_norm_silu_bwd(*args)
        found = [ops.group_norm_silu_bwd_blocked(*args, True) for _ in range(3)]
        for name, a, b in zip(GRADIENTS, found[0], proven, strict=True):
            if not b.numel():
                continue
            allowed = (2 * torch.finfo(b.dtype).eps + 1e-4) * b.abs().max()  # sums in other orders
            assert ((a - b).abs().max() <= allowed).item(), name
        for again in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))


SET = {  # (N, C, S): how bfloat16 in 32 groups is cut on an H100, contiguous and channels_last
    (128, 128, 1024): ("resident resident", "resident large"),
    (128, 384, 1024): ("resident walk", "walk large"),
    (64, 192, 4096): ("walk walk", "large large"),
    (8, 128, 65536): ("large large", "large large"),
    (16, 640, 1024): ("walk walk", "walk large"),
    (2, 640, 1024): ("walk walk", "walk walk"),
    (2, 2560, 64): ("resident resident", "resident resident"),
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SET, ids=str)
def test_the_plan_is_a_function_of_shape_and_device(shape, last):
    plans = pytest.importorskip("engine.kernels.group_norm_silu_plan")
    n, c, s = shape
    kinds = []
    for stage in ("fwd", "bwd"):
        found = plans.plan(plans.Shape(stage, n, c // 32, s, 32, 2, (last, last)), plans.Device())
        covered = found.slabs * found.block_g, found.c_chunks * found.block_c
        assert covered[0] >= 32 and covered[1] >= found.block_g * c // 32
        assert found.s_chunks * found.tiles * found.block_s >= s
        kinds.append(found.kind)
    assert " ".join(kinds) == SET[shape][last]
    tiny = plans.Device(l2=1)  # nothing to walk twice in
    shape = plans.Shape("fwd", n, c // 32, s, 32, 2, (last, last))
    assert plans.plan(shape, tiny).kind != "walk"
