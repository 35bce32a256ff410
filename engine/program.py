"""A network's step without Python: its operators, recorded once, then run by the extension.

At batch 1 a step's 140 operators took 20-300 µs each, and Python another 25 µs between two of them:
by then the caches are full of weights, not of Python. `record` runs a function once and writes down
which operators it calls on what; a `Program` is that list, run in one call by
csrc/ops_program.cpp: norms and attention straight by their kernels, all else through PyTorch's
dispatcher, with the arguments that it had. The kernels are the same, and so are the bits.

Recorded are functions of two tensors on the CPU, (x, rows) → a tensor. Whatever else they read is a
constant: what changes in place is seen, what takes its place is not. One operator that writes to an
operand, takes a string (as oneDNN's packed convolutions do) or gives something else than tensors,
and there is no program; nor where it does not repeat at once what it was recorded from.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import dispatch
from .ops.layout import is_dense

# The numbers of csrc/ops_program.cpp.
NORM, ATTENTION, CALL, VIEW, FREE, COPY = range(6)
NONE, REGISTER, CONSTANT, INT, FLOAT, BOOL, INTS, TENSORS, OPTIONAL, FLOATS = range(10)
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALAR_TYPE = {torch.float32: 6, torch.bfloat16: 15, torch.float16: 5}
CONSTANT_PADDING = 3  # ATen/native/PadNd.h
COPIES = ("aten::clone", "aten::contiguous", "aten::to", "aten::_to_copy")


class Program:
    """(x, rows) → what the recorded function gives, for tensors of the sizes, strides and dtypes of
    the recording; without gradients."""

    def __init__(self, constants: list[Tensor], strings: list[str], code: list[int]) -> None:
        native = dispatch.module("program", "native")
        self.number = native.program_new(constants, strings, code)
        self.run = native.program_run
        weakref.finalize(self, native.program_free, self.number)

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.run(self.number, x, rows)


class Recorded:
    """Calls one function (x, rows) → a tensor; by its program from the third call of a kind on."""

    def __init__(self) -> None:
        self.programs = {}

    def __call__(self, function: Callable, x: Tensor, rows: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return function(x, rows)
        kind = x.shape, x.stride(), x.dtype, rows.shape, rows.stride(), rows.dtype
        program = self.programs.get(kind)
        if program:
            return program(x, rows)
        if kind not in self.programs:
            self.programs[kind] = None  # what packs weights, or asks who serves, does it now
        elif program is None:
            out, program = record(function, x, rows)
            self.programs[kind] = program or False
            return out
        return function(x, rows)


def record(function: Callable, x: Tensor, rows: Tensor) -> tuple[Tensor, Program | None]:
    """What the function gives, and its program; None where it has none."""
    usable = x.is_cpu and rows.is_cpu and {x.dtype, rows.dtype} <= set(DTYPE)
    if not usable or dispatch.absence("program", "native"):
        return function(x, rows), None
    recorder = _Recorder(x, rows)
    with recorder:
        expected = function(x, rows)
    program = recorder.program(expected)
    return expected, program if program and _repeats(program, x, rows, expected) else None


def _repeats(program: Program, x: Tensor, rows: Tensor, expected: Tensor) -> bool:
    try:
        found = program(x, rows)
    except RuntimeError:  # an argument that the extension's interface to the dispatcher lacks
        return False
    if found.stride() != expected.stride() or found.dtype != expected.dtype:
        return False
    return torch.equal(found.nan_to_num(), expected.nan_to_num())


class _Refused(Exception):
    pass


class _Kind(NamedTuple):
    """What a register holds."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class _Recorder(TorchDispatchMode):
    def __init__(self, x: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.code = []  # (numbers, the registers that they touch) of each instruction
        self.touched = []
        self.constants, self.strings, self.whole = [], {}, True
        self.kinds = []  # of each register
        self.owner = {}  # storage → register of the tensor that came with it last
        self.views = {}  # (register, shape, stride, offset) → register
        self.header = [n for t in (x, rows) for n in self.described(t)]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: PyTorch would import its compiler, for 0.8 s, to tell it to stay out."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.whole:
            try:
                self.note(func, args, kwargs or {}, out)
            except _Refused:
                self.whole = False
        return out

    def program(self, out: Tensor) -> Program | None:
        if not self.whole:
            return None
        try:
            result = self.register(out)
        except _Refused:
            return None
        header = [len(self.kinds), result, *self.header]
        return Program(self.constants, list(self.strings), header + _with_frees(self.code, result))

    # ---- what an operator did -------------------------------------------------------------------

    def note(self, func, args: tuple, kwargs: dict, out) -> None:
        schema = func._schema
        outs = out if isinstance(out, (tuple, list)) else (out,)
        if any(a.alias_info and a.alias_info.is_write for a in schema.arguments):
            raise _Refused
        if not outs or not all(isinstance(t, Tensor) for t in outs):
            raise _Refused
        read = {_storage(t) for t in args if isinstance(t, Tensor)}
        views = [_storage(t) in read for t in outs]
        if all(views):  # `register` finds them
            return
        if any(views) or any(r.type.kind() != "TensorType" for r in schema.returns):
            raise _Refused
        if schema.name == "engine::group_norm_silu_fwd":
            self.norm(*args, y=outs[0])
        elif schema.name == "engine::attention_qkv_fwd" and args[2] == "3hd":
            self.attention(*args, out=outs[0])
        elif schema.name in COPIES:
            source = self.register(args[0])
            self.emit(COPY, [source, self.scalar_type(outs[0]), *self.made(outs[0])])
        elif schema.name == "aten::pad" and not kwargs and args[2:] in ((), ("constant",)):
            same = torch.ops.aten._pad_enum.default._schema  # what it calls, without a string
            self.call(same, (*args[:2], CONSTANT_PADDING), {}, outs)
        else:
            self.call(schema, args, kwargs, outs)

    def norm(self, x, x2, weight, bias, add, scale, shift, groups, eps, silu, y) -> None:
        both = [t for t in (x, x2) if t is not None]
        if not all(map(is_dense, both)):
            raise _Refused
        last = not all(t.is_contiguous() for t in both)
        numbers = [DTYPE[x.dtype], *self.place(x), *self.place(x2)]
        numbers += [*y.shape[:2], 0 if x2 is None else x2.shape[1], y[0, 0].numel(), groups]
        numbers += [int(last), int(silu), _bits(eps)]
        numbers += [-1 if t is None else self.constant(t) for t in (weight, bias)]
        for t in (add, scale, shift):
            row = [0, 0] if t is None else [DTYPE[t.dtype], t.stride(0)]
            numbers += [*row, *self.place(t)]
        self.emit(NORM, numbers + self.made(y))

    def attention(self, qkv, heads, order, scale, out) -> None:
        n, s, c = qkv.shape
        if qkv.stride(2) != 1:
            raise _Refused
        numbers = [DTYPE[qkv.dtype], *self.place(qkv), n, heads, s, c // (3 * heads)]
        numbers += [qkv.stride(0), qkv.stride(1), _bits(scale)]
        self.emit(ATTENTION, numbers + self.made(out))

    def call(self, schema, args: tuple, kwargs: dict, outs) -> None:
        numbers = [self.string(schema.name), self.string(schema.overload_name)]
        numbers.append(len(schema.arguments))
        for i, argument in enumerate(schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            numbers += self.argument(value, argument.type)
        self.emit(CALL, [*numbers, len(outs), *map(self.own, outs)])

    def argument(self, value, kind) -> list[int]:
        """As the schema names its type: the extension hands on bits."""
        optional = kind.kind() == "OptionalType"
        name = str(kind.getElementType() if optional else kind)
        if value is None and optional:
            return [NONE]
        return [OPTIONAL] * optional + self.value(value, name)

    def value(self, value, name: str) -> list[int]:
        if name.startswith("List[") and isinstance(value, (list, tuple)):
            return self.values(list(value), name)
        if name == "Tensor" and isinstance(value, Tensor):
            if _storage(value) not in self.owner:
                return [CONSTANT, self.constant(value)]
            return [REGISTER, self.register(value)]
        if name == "int" and type(value) is int:
            return [INT, value]
        if name == "bool" and type(value) is bool:
            return [BOOL, int(value)]
        if name == "float" and type(value) in (int, float):
            return [FLOAT, _bits(value)]
        raise _Refused  # a str too: PyTorch's dispatcher keeps a copy of each, 48 bytes, for good

    def values(self, values: list, name: str) -> list[int]:
        if not values:
            return [INTS, 0]
        if name == "List[int]" and all(type(n) is int for n in values):
            return [INTS, len(values), *values]
        if name == "List[float]" and all(type(n) is float for n in values):
            return [FLOATS, len(values), *map(_bits, values)]
        if name == "List[Tensor]" and all(isinstance(t, Tensor) for t in values):
            return [TENSORS, len(values), *map(self.register, values)]
        raise _Refused

    # ---- registers ------------------------------------------------------------------------------

    def emit(self, kind: int, numbers: list[int]) -> None:
        self.code.append(([kind, *numbers], self.touched))
        self.touched = []

    def own(self, t: Tensor) -> int:
        """A register for a tensor in memory of its own."""
        if t.layout != torch.strided or not t.is_cpu or t.numel() == 0:
            raise _Refused
        self.owner[_storage(t)] = len(self.kinds)
        return self.add(t)

    def add(self, t: Tensor) -> int:
        self.kinds.append(_Kind(t.shape, t.stride(), t.storage_offset(), t.dtype))
        self.touched.append(len(self.kinds) - 1)
        return len(self.kinds) - 1

    def place(self, t: Tensor | None) -> list[int]:
        """(register, elements past its first): what a kernel reads by its address."""
        if t is None:
            return [-1, 0]
        base = self.owner.get(_storage(t))
        if base is None or t.dtype != self.kinds[base].dtype:
            raise _Refused
        self.touched.append(base)
        return [base, t.storage_offset() - self.kinds[base].offset]

    def register(self, t: Tensor) -> int:
        """That of this very tensor, which may be a view of the one that came with its storage."""
        base, skip = self.place(t)
        kind = self.kinds[base]
        if t.shape == kind.shape and t.stride() == kind.stride and skip == 0:
            return base
        key = base, t.shape, t.stride(), skip
        if key not in self.views:
            before, self.touched = self.touched, [base]
            self.views[key] = number = self.add(t)
            self.emit(VIEW, [number, base, t.dim(), *t.shape, t.dim(), *t.stride(), skip])
            self.touched = before
        self.touched.append(self.views[key])
        return self.views[key]

    def made(self, t: Tensor) -> list[int]:
        return [self.own(t), t.dim(), *t.shape, t.dim(), *t.stride()]

    def described(self, t: Tensor) -> list[int]:
        return [*self.made(t)[1:], self.scalar_type(t)]

    def scalar_type(self, t: Tensor) -> int:
        if t.dtype not in SCALAR_TYPE:
            raise _Refused
        return SCALAR_TYPE[t.dtype]

    def constant(self, t: Tensor) -> int:
        for i, known in enumerate(self.constants):
            if known is t:
                return i
        self.constants.append(t)
        return len(self.constants) - 1

    def string(self, s: str) -> int:
        return self.strings.setdefault(s, len(self.strings))


def _with_frees(code: list[tuple[list[int], list[int]]], result: int) -> list[int]:
    """The numbers of all instructions; after each the registers that no later one touches."""
    last = {register: i for i, (_, touched) in enumerate(code) for register in touched}
    last.pop(result, None)
    numbers = []
    for i, (instruction, touched) in enumerate(code):
        numbers += instruction
        done = sorted({register for register in touched if last.get(register) == i})
        if done:
            numbers += [FREE, len(done), *done]
    return numbers


def _storage(t: Tensor) -> int:
    """What tells a tensor's memory from others'; weights in oneDNN's layout have no storage."""
    return t.untyped_storage().data_ptr() if t.layout == torch.strided else -id(t)


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]
