"""A recorded step gives the bits of the step; what cannot be recorded is not."""

import contextlib
import gc
import threading

import pytest
import torch
from small_unet import OPTIONS, SMALL, alive, inputs
from torch.utils._python_dispatch import TorchDispatchMode

import engine
from engine import blocks, conv2d_bf16, dispatch, embedded, program
from engine.prepacked import for_sampling
from engine.program import Recorded, record

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(
    not (BF16 and conv2d_bf16.available()), reason="oneDNN's are not recorded"
)
needs_native = pytest.mark.skipif(
    bool(dispatch.absence("program", "native")), reason="the extension is not built"
)
pytestmark = needs_native
STEPS = torch.arange(0, 40, 2)


def twin(**options):
    model = alive(engine.UNet(**{**SMALL, **options})).eval()
    with torch.autocast("cpu", torch.bfloat16):
        return model, for_sampling(model, True)


def poison(*sizes):
    """Not a number, in the memory that is given out next."""
    del [torch.full((n,), float("nan")) for n in sizes for _ in range(8)][:]


@needs_bf16
@pytest.mark.parametrize("option", OPTIONS)
def test_bits_of_the_step(option):
    """Of every kind of call, whatever was in memory before; at other t and x than those of the
    recording."""
    model, net = twin(**OPTIONS[option])
    x, _, y = inputs(model)
    x = torch.cat((x, x.flip(2))).bfloat16()
    y = None if y is None else y.repeat(2)
    with torch.inference_mode():
        for n, form in ((4, torch.contiguous_format), (1, torch.channels_last)):
            net.expect(STEPS, n, None if y is None else y[:n])
            for step in (0, 6, 6, 38, 2):
                images = torch.randn_like(x[:n]).contiguous(memory_format=form)
                poison(64, 512, 4096)
                found = net(images, torch.full((n,), step))
                expected = net.denoise(images, net.embedding(net.row[step]))
                assert torch.equal(found, expected) and found.isfinite().all()
                assert found.stride() == expected.stride()
    made = list(net.recorded.programs.values())
    assert len(made) == 2 and all(made)


@needs_bf16
def test_threads_change_no_bit():
    """Neither those of a step, nor several that sample at once."""
    _, net = twin(**OPTIONS["three levels"])
    with torch.inference_mode():
        net.expect(STEPS, 2)
        x, t = torch.randn(2, 2, 32, 32).bfloat16(), torch.full((2,), 4)
        for _ in range(3):
            expected = net(x, t)
        threads = torch.get_num_threads()
        try:
            for n in (1, 2):
                torch.set_num_threads(n)
                assert torch.equal(net(x, t), expected)
        finally:
            torch.set_num_threads(threads)
    found, rows = [], net.embedding(net.row[4])
    run = next(iter(net.recorded.programs.values()))

    def work():
        with torch.inference_mode():
            found.extend(run(x, rows) for _ in range(8))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 24 and all(torch.equal(out, expected) for out in found)


@needs_bf16
@pytest.mark.parametrize("many", ["MANY", "MANY_LARGE"])
def test_only_many_steps_are_recorded(many, monkeypatch):
    """A recording takes the time of two; of large pictures less is won."""
    if many == "MANY_LARGE":
        monkeypatch.setattr(embedded, "LARGE", 2 * 8 * 8)
    _, net = twin()
    x, t = torch.randn(1, 2, 8, 8).bfloat16(), torch.zeros(1)
    for steps, expected in ((getattr(embedded, many) - 1, []), (getattr(embedded, many), [True])):
        net.expect(torch.arange(steps), 1)
        with torch.inference_mode():
            for _ in range(3):
                net(x, t)
        assert [bool(p) for p in net.recorded.programs.values()] == expected


@needs_bf16
@pytest.mark.parametrize("how", ["modules", "operators"])
def test_who_follows_every_call_sees_every_step(how):
    """A program calls no module, and no operator that a dispatch mode would see."""
    _, net = twin()
    x, t, seen = torch.randn(1, 2, 8, 8).bfloat16(), torch.zeros(1), []

    class Follows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[-1] += 1
            return func(*args, **(kwargs or {}))

    def follow(module, args, y):
        seen[-1] += 1

    net.expect(STEPS, 1)
    with contextlib.ExitStack() as stack, torch.inference_mode():
        for _ in range(4):
            net(x, t)
        if how == "operators":
            stack.enter_context(Follows())
        else:
            handle = torch.nn.modules.module.register_module_forward_hook(follow)
            stack.callback(handle.remove)
        for _ in range(4):
            seen.append(0)
            net(x, t)
    assert len(set(seen)) == 1 and seen[0] > 20


def test_with_gradients_there_is_no_program():
    recorded, (x, rows) = Recorded(), operands()
    x.requires_grad_()
    for _ in range(4):
        assert recorded(lambda x, rows: torch.exp(x), x, rows).requires_grad
    assert not recorded.programs


@needs_bf16
def test_norms_that_change_in_place_are_seen():
    model, net = twin()
    x, t = torch.randn(1, 2, 8, 8).bfloat16(), torch.zeros(1)
    with torch.inference_mode():
        net.expect(STEPS, 1)
        before = [net(x, t) for _ in range(3)][-1]
    with torch.no_grad():
        model.norm_out.weight.mul_(3)
    with torch.inference_mode():
        after = net(x, t)
        assert torch.equal(after, net.denoise(x, net.embedding(net.row[0])))
    assert not torch.equal(after, before)


def operands(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, 4, 6, generator=g).to(dtype), torch.randn(2, 16, generator=g)


WEIGHT = torch.linspace(0.5, 2, 16)
FUNCTIONS = {
    "a pair, halves of one tensor": lambda x, rows: engine.ops.group_norm_silu(
        tuple(torch.cat((x, x), 1).clone().split([4, 12], 1)), WEIGHT, None, 4, add=rows
    ),
    "rows of rows": lambda x, rows: engine.ops.group_norm_silu(
        x, WEIGHT[:8], WEIGHT[8:], 2, scale=rows[:, 4:12], shift=rows[:, 8:]
    ),
    "a part of x": lambda x, rows: engine.ops.group_norm_silu(x[1:], WEIGHT[:8], None, 2) @ x[0].mT,
    "attention of a part": lambda x, rows: engine.ops.attention_qkv(
        rows.view(2, 1, 16).expand(2, 20, 16).clone()[:, 2:, 1:13], 2
    ),
    "layouts and dtypes": lambda x, rows: (
        x.to(torch.float16)
        .contiguous(memory_format=torch.channels_last)
        .permute(0, 2, 3, 1)
        .float()
        .clone()
    ),
    "lists": lambda x, rows: torch.cat((x.unflatten(1, (2, 4)).sum(2), x), 1),
    "a view at the end": lambda x, rows: torch.sigmoid(rows)[:, 3:9].t(),
    "nothing at all": lambda x, rows: x,
    "a constant alone": lambda x, rows: torch.exp(WEIGHT),
    "zeros around": lambda x, rows: torch.nn.functional.pad(x, (0, 1, 2, 1)),
    "numbers": lambda x, rows: torch.nn.functional.interpolate(x, scale_factor=2.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_operators(name, dtype):
    """Of every dtype; x and rows may lie elsewhere in a larger tensor at every call."""
    function, (x, rows) = FUNCTIONS[name], operands(dtype)
    if name == "a part of x" and dtype != torch.float32:
        pytest.skip("products of 16 bits are another kernel's")
    with torch.inference_mode():
        out, run = record(function, x, rows)
        assert run is not None and torch.equal(out, function(x, rows))
        for offset in (1, 0, 3):
            large = torch.randn(5, *x.shape[1:]).to(dtype), torch.randn(5, 16)
            part = [t[offset : offset + 2] for t in large]
            poison(64, 512)
            assert torch.equal(run(*part), function(*part))


KEPT = torch.ones(2, 16)
REFUSED = {
    "writes": lambda x, rows: torch.exp(x).mul_(rows[0, 0]),
    "writes what was there": lambda x, rows: torch.exp(x).mul_(torch.ones_like(rows[0, 0])),
    "writes to a constant": lambda x, rows: KEPT.copy_(rows),
    "asks for a number": lambda x, rows: torch.exp(x) if x.sum().item() < 1e9 else x,
    "gives a number": lambda x, rows: torch.mul(x, 2.5),
    "another dtype": lambda x, rows: torch.exp(x.double()),
    "empty": lambda x, rows: torch.exp(x[:0]),
    "takes a string": lambda x, rows: torch.ops.aten.gelu(x, approximate="tanh"),
    "pads by a string": lambda x, rows: torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular"),
    "draws": lambda x, rows: torch.bernoulli(x.sigmoid()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_program(name):
    with torch.inference_mode():
        out, run = record(REFUSED[name], *operands())
    assert run is None and isinstance(out, torch.Tensor)


def test_what_does_not_repeat_has_no_program(monkeypatch):
    monkeypatch.setattr(program.Program, "__call__", lambda self, x, rows: torch.exp(x) + 1)
    recorded, (x, rows) = Recorded(), operands()
    with torch.inference_mode():
        for _ in range(4):
            assert torch.equal(recorded(lambda x, rows: torch.exp(x), x, rows), torch.exp(x))
    assert list(recorded.programs.values()) == [False]


def test_registers_are_freed_as_soon_as_nobody_reads_them():
    """A program's memory is that of the step, not that of all its results."""
    tower = lambda x, rows: torch.exp(torch.sin(torch.exp(torch.sin(x)))) @ rows[0, :6]  # noqa: E731
    x, rows = operands()
    with torch.inference_mode():
        recorder = program._Recorder(x, rows)
        with recorder:
            out = tower(x, rows)
    code, result = recorder.code, recorder.register(out)
    numbers, freed = program._with_frees(code, result), []
    plain = [n for instruction, _ in code for n in instruction]
    while numbers:
        n = next((len(i) for i, _ in code if i == numbers[: len(i)]), 0)
        if not n:
            assert numbers[0] == program.FREE
            n = 2 + numbers[1]
            freed.append(numbers[2:n])
        numbers = numbers[n:]
    everything = sorted(r for registers in freed for r in registers)
    assert everything == [r for r in range(len(recorder.kinds)) if r != result]
    assert max(map(len, freed)) <= 3 and len(plain) > 0


def test_programs_go_with_their_owners():
    with torch.inference_mode():
        _, run = record(lambda x, rows: torch.exp(x), *operands())
        number, call = run.number, dispatch.module("program", "native").program_run
        assert torch.equal(call(number, *operands()), torch.exp(operands()[0]))
        del run
        gc.collect()
        with pytest.raises(RuntimeError, match=f"there is no program {number}"):
            call(number, *operands())


@pytest.mark.parametrize(
    "change",
    [
        lambda x, rows: (x[:1], rows),
        lambda x, rows: (x.double(), rows),
        lambda x, rows: (x.contiguous(memory_format=torch.channels_last), rows),
        lambda x, rows: (x, rows[:, :8]),
        lambda x, rows: (x, rows[0]),
    ],
)
def test_other_tensors_than_recorded(change):
    with torch.inference_mode():
        _, run = record(lambda x, rows: torch.exp(x), *operands())
        with pytest.raises(RuntimeError, match="is not as it was when the program was recorded"):
            run(*change(*operands()))


def test_a_norms_weight_that_lies_elsewhere():
    """The kernel reads it by its address."""
    norm = blocks.GroupNormSiLU(4, 8, 1e-5)
    x, rows = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    with torch.inference_mode():
        _, run = record(lambda x, rows: norm(x), x, rows)
        norm.weight.data = torch.randn(16)[::2]
        with pytest.raises(RuntimeError, match="is no longer contiguous on the CPU"):
            run(x, rows)


@pytest.mark.parametrize("code", [[], [5], [2, 0, 1, 1], [99]])
def test_broken_programs_are_errors(code):
    native, (x, rows) = dispatch.module("program", "native"), operands()
    header = [3, 2, 4, 2, 8, 4, 6, 4, 192, 24, 6, 1, 6, 2, 2, 16, 2, 16, 1, 6]
    number = native.program_new([], [], header + code)
    with pytest.raises((RuntimeError, IndexError)):
        native.program_run(number, x, rows)
    native.program_free(number)


def test_a_process_that_records_imports_no_compiler():
    """It would take a second, and hundreds of megabytes."""
    code = """
import sys, torch
from engine.program import record
with torch.inference_mode():
    assert record(lambda x, rows: torch.exp(x), torch.ones(2, 2), torch.ones(1, 1))[1] is not None
assert "torch._dynamo" not in sys.modules
"""
    from test_imports import run

    run(code)
