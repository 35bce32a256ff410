"""Clipping, AdamW and the average of the weights in one pass: PyTorch's bits, and its state."""

import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import dispatch
from engine.optimizer import AdamW
from engine.update import OnePass, Update, choose_update, refusal

pytestmark = pytest.mark.skipif(
    bool(dispatch.absence("adamw", "native")), reason="the extension is not built"
)
X86 = platform.machine().lower() in ("x86_64", "amd64")
SHAPES = [(16, 8, 3, 3), (4, 8, 1, 1), (5, 1, 3, 3), (7,), (3, 5), (), (0, 3), (1031,), (9001,)]
INACTIVE, ACTIVE = 1e9, 1.0


def same(mine, theirs) -> None:
    """Bit for bit; elsewhere than on x86 PyTorch has other instructions, and other last bits."""
    for p, q in zip(mine, theirs, strict=True):
        assert p.dtype == q.dtype and p.shape == q.shape and strides(p) == strides(q)
        torch.testing.assert_close(
            p, q, **dict(rtol=0, atol=0) if X86 else dict(rtol=1e-5, atol=1e-7)
        )


def strides(t: torch.Tensor) -> list[int]:
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


class Steps:
    """Parameters with their update; gradients that are the same for all of one seed."""

    def __init__(self, make=choose_update, clip=INACTIVE, layout=torch.channels_last, **options):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
        weights = [p.to(memory_format=layout) if p.dim() == 4 else p for p in weights]
        self.weights = [torch.nn.Parameter(p) for p in weights]
        self.averages = {str(i): p.detach().clone() for i, p in enumerate(self.weights)}
        options = {"lr": 0.01, "weight_decay": 0.02, "fused": True} | options
        self.optimizer = AdamW(self.weights, **options)
        self.update = make(self.optimizer, self.averages, clip)
        self.generator = torch.Generator().manual_seed(1)

    def gradients(self) -> None:
        for p in self.weights:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=self.generator))

    def run(self, count=4):
        for k in range(count):
            self.gradients()
            self.update.norm()
            self.update.step(0.9 if k == 0 else 0.03)
            self.update.zero_grad()
        return self

    def tensors(self):
        states = [self.optimizer.state[p] for p in self.weights]
        assert all(list(state) == ["step", "exp_avg", "exp_avg_sq"] for state in states)
        return [*self.weights, *self.averages.values(), *(t for s in states for t in s.values())]


class SameNorm(Update):
    """PyTorch's passes, which clip by the norm that ours found."""

    def norm(self):
        there = [p.grad for p in self.parameters]
        norm = torch.ops.engine.adamw_norm(there)
        coefficient = torch.clamp(self.clip / (norm + 1e-6), max=1.0)  # clip_grad_norm_'s lines
        torch._foreach_mul_(there, coefficient)
        return norm


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_bits_of_pytorch(layout, decay):
    mine = Steps(layout=layout, weight_decay=decay).run()
    assert type(mine.update) is OnePass
    same(mine.tensors(), Steps(Update, layout=layout, weight_decay=decay).run().tensors())
    options = {"clip": ACTIVE, "layout": layout, "weight_decay": decay, "betas": (0.3, 0.95)}
    same(Steps(**options).run().tensors(), Steps(SameNorm, **options).run().tensors())


def test_clipping_is_pytorch_s_but_for_the_norm_s_last_bits():
    mine, theirs = (Steps(make, ACTIVE).run().tensors() for make in (choose_update, Update))
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["default", "avx2"])
def test_bits_of_pytorch_on_lesser_instruction_sets(name):
    code = "import test_update as t; t.test_bits_of_pytorch(t.torch.channels_last, 0.02)"
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": name,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parent, check=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm(dtype):
    """Closer to the truth than PyTorch's, the same bits on one thread and on two, any layout."""
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(shape, generator=generator).to(dtype) for shape in (*SHAPES, (300, 301))]
    grads[0] = grads[0].to(memory_format=torch.channels_last)
    grads += [torch.randn(64, dtype=dtype)[::3], torch.ones(1, dtype=dtype).expand(50)]
    truth = torch.cat([g.double().flatten() for g in grads]).norm().item()
    norm, threads, found = dispatch.function("adamw", "norm", "native"), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(norm(grads).item())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == pytest.approx(truth, rel=2e-7)


def test_same_bits_on_two_threads():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(Steps(clip=ACTIVE).run().tensors())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_element_is_in_the_norm(value, dtype):
    """3e19 is finite, its square is not."""
    for size, place in ((1, 0), (17, 16), (5000, 4096), (9001, 8999)):
        grad = torch.zeros(size, dtype=dtype)
        grad[place] = value
        found = torch.ops.engine.adamw_norm([torch.ones(3), grad]).item()
        assert math.isnan(found) if math.isnan(value) else found == math.inf


def test_bfloat16_gradients_and_weights_at_any_address():
    """As float32 gradients of the same values; every tensor begins an odd number of elements into
    its memory; the bfloat16 weights are the new weights, rounded."""
    for n in (1, 7, 16, 33, 4097):
        generator = torch.Generator().manual_seed(n)

        def odd(dtype=torch.float32, n=n):
            return torch.zeros(n + 3, dtype=dtype)[3:]

        rows = []
        for dtype in (torch.float32, torch.bfloat16):
            generator.manual_seed(n)
            tensors = [odd() for _ in range(4)]
            tensors[0].copy_(torch.randn(n, generator=generator))
            grad = odd(dtype).copy_(torch.randn(n, generator=generator).bfloat16())
            w, m, v, average = tensors
            low, step = odd(torch.bfloat16), torch.tensor(4.0)
            lists = ([w], [grad], [m], [v], [step], [average], [low])
            options = (torch.tensor(0.7), 0.1, 0.9, 0.999, 1e-8, 0.02, 0.03)
            torch.ops.engine.adamw_step(*lists, *options)
            assert torch.equal(low, w.bfloat16()) and step == 5 and w.all()
            rows.append([w, m, v, average, low])
        assert all(torch.equal(p, q) for p, q in zip(*rows, strict=True))


def test_gradients_and_moments_of_another_layout():
    """A loaded state has the layout that it was saved in."""

    def second_half(make):
        before = Steps(make, layout=torch.contiguous_format).run(2)
        after = Steps(make)
        after.optimizer.load_state_dict(before.optimizer.state_dict())
        for _ in range(2):
            for i, p in enumerate(after.weights):
                p.grad = torch.linspace(-1, i, p.numel()).view(p.shape)  # contiguous
            after.update.norm()
            after.update.step(0.1)
        return after.tensors()

    same(second_half(choose_update), second_half(Update))


def test_a_parameter_without_gradient_and_groups():
    """Its average moves, it has no state; each group has its options."""

    def run(make):
        steps = Steps(make)
        first, second = steps.weights[:4], steps.weights[4:]
        groups = [{"params": first}, {"params": second, "lr": 0.1, "betas": (0.5, 0.9)}]
        optimizer = AdamW(groups, lr=0.01, weight_decay=0.0, fused=True)
        steps.optimizer, steps.update = optimizer, make(optimizer, steps.averages, INACTIVE)
        for _ in range(2):
            steps.gradients()
            steps.weights[0].grad = steps.weights[7].grad = None
            steps.averages["0"].mul_(2)
            steps.update.norm()
            steps.update.step(0.1)
        assert steps.weights[0] not in steps.optimizer.state
        states = [t for p in steps.optimizer.state for t in steps.optimizer.state[p].values()]
        return [*steps.weights, *steps.averages.values(), *states]

    same(run(choose_update), run(Update))
    nothing = Steps()
    assert nothing.update.norm() == 0
    nothing.update.step(0.1)
    assert not nothing.optimizer.state


@pytest.mark.parametrize("first, then", [(Update, choose_update), (choose_update, Update)])
def test_one_goes_on_where_the_other_was(first, then):
    whole = Steps(Update).run(4)
    half = Steps(first).run(2)
    rest = Steps(then)
    rest.generator = half.generator
    for mine, theirs in (
        (rest.weights, half.weights),
        (rest.averages.values(), half.averages.values()),
    ):
        for p, q in zip(mine, theirs, strict=True):
            p.data.copy_(q)
    rest.optimizer.load_state_dict(half.optimizer.state_dict())
    for _ in range(2):
        rest.gradients()
        rest.update.norm()
        rest.update.step(0.03)
    same(rest.tensors(), whole.tensors())


def test_autograd_knows_that_the_weights_were_written():
    steps = Steps()
    loss = (steps.weights[4] ** 2).sum()
    steps.run(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_where_pytorch_s_passes_serve(monkeypatch):
    assert type(Steps(amsgrad=True).update) is Update
    assert "amsgrad" in refusal(Steps(amsgrad=True).optimizer)
    double = AdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))])
    assert refusal(double) == "it needs whole float32 parameters on the CPU"
    monkeypatch.setenv("ENGINE_BACKEND", "eager")
    assert type(Steps().update) is Update
    monkeypatch.setenv("ENGINE_BACKEND", "triton")  # which has no such kernel
    assert type(Steps().update) is OnePass


@pytest.mark.parametrize(
    "place, bad, sentence",
    [
        (1, [], "grads must have a tensor for each weight: 1, not 0"),
        (5, [torch.zeros(2, 3)] * 2, "averages must have a tensor for each weight: 1, not 2"),
        (0, [torch.zeros(2, 3).double()], "weights must be float32 CPU tensors"),
        (0, [torch.zeros(2, 6)[:, ::2]], "weights must have no holes in memory"),
        (1, [torch.zeros(2, 3).half()], "a gradient must be a float32 or bfloat16 CPU tensor"),
        (1, [torch.zeros(3, 2)], "a gradient must have the shape of"),
        (2, [torch.zeros(3, 2).t()], "exp_avgs must lie in memory as the weights do"),
        (3, [torch.zeros(6)], "exp_avg_sqs must have the shape of"),
        (4, [torch.zeros((), dtype=torch.int64)], "steps must be float32 CPU tensors of one"),
        (6, [torch.zeros(2, 3)], "lows must be bfloat16 CPU tensors"),
        (6, [torch.zeros(3, 2).bfloat16().t()], "lows must lie in memory as the weights do"),
        (7, torch.zeros(2), "grad_scale must be a float32 CPU tensor of one element"),
    ],
)
def test_bad_calls(place, bad, sentence):
    lists = [[torch.zeros(2, 3)] for _ in range(4)]
    steps = torch.zeros(())
    arguments = [*lists, [steps], [], [torch.zeros(2, 3).bfloat16()], torch.ones(())]
    arguments[place] = bad
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.engine.adamw_step(*arguments, 0.1, 0.9, 0.999, 1e-8, 0.0, 0.1)
    assert steps == 0
