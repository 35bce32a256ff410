"""How `verify` judges: each result against a budget taken from the model's own rounding."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

OUTPUT, GRADIENT = 2.0, 3.0  # as the kernels' own tests (tests/budget.py)
FEW = 32  # of so few numbers the untouched model's error may happen to be far below its usual
DOUBT = 0.5  # an own error beyond this share says nothing about another model
SHOWN = 10  # failing parameters in the table


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison; sizes and errors are Euclidean norms."""

    kind: str  # "output", "input", "all" (parameters together) or "parameter": of those, gradients
    name: str
    shape: tuple[int, ...]
    size: float  # of the true result
    own: float  # error of the untouched model
    error: float  # error of the accelerated model
    used: float  # share of the budget that the error takes; more than 1 fails
    note: str = ""  # what is wrong, where it is no number

    @property
    def what(self) -> str:
        return self.name if self.kind == "output" else f"gradient of {self.name}"

    @property
    def ok(self) -> bool:
        return not self.note and self.used <= 1

    def relative(self, value: float) -> float:
        return value / self.size if self.size else value


def tensors_of(value, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's result by name: of tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield name, torch.view_as_real(value) if value.is_complex() else value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from tensors_of(inner, f"{name} {key}" if name == "output" else f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from tensors_of(inner, f"{name} {i}" if name == "output" else f"{name}.{i}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        yield from tensors_of(fields, name)


def judge(found, plain, truth, eps: float) -> list[Row]:
    """Rows for the outputs, the inputs' gradients, all parameters' gradients and each one's.

    found, plain, truth: results of the accelerated model, of the untouched one, and in high
    precision, with `outputs`, `inputs` and `parameters`, dicts of tensors. eps: one rounding.
    """
    outputs, inputs, parameters = (
        {
            name: tuple(getattr(r, part).get(name) for r in (found, plain, truth))
            for name in {**getattr(plain, part), **getattr(found, part)}
        }
        for part in ("outputs", "inputs", "parameters")
    )
    usual = _usual([*outputs.values(), *parameters.values()])
    rows = [_tensor("output", name, *three, eps, usual) for name, three in outputs.items()]
    for name, three in inputs.items():
        if any(t is not None for t in three):
            rows.append(_tensor("input", name, *three, eps, usual))
    return rows + _parameters(parameters, eps)


def _tensor(kind: str, name: str, got, plain, truth, eps: float, usual: float) -> Row:
    """One tensor, by the Euclidean norm and by the largest element."""
    factor = OUTPUT if kind == "output" else GRADIENT
    note = _mismatch(got, plain, truth)
    if note or not plain.is_floating_point():
        if not note and not torch.equal(got, plain):
            note = "differs"
        return Row(kind, name, () if plain is None else tuple(plain.shape), 0, 0, 0, 0, note)
    used = 0.0
    for norm in (_largest, _norm):
        size, own, error = norm(truth), norm(plain, truth), norm(got, truth)
        allowed = own + (eps + (usual if plain.numel() < FEW else 0)) * size
        used = max(used, _share(error, factor * allowed))
    if not math.isfinite(own) or not math.isfinite(size):
        note = "the untouched model's own result is not finite"
    return Row(kind, name, tuple(plain.shape), size, own, error, used, note)


def _parameters(threes: dict[str, tuple], eps: float) -> list[Row]:
    """The whole gradient, and each parameter's, which may be zero by construction."""
    threes = {n: three for n, three in threes.items() if any(t is not None for t in three)}
    rows, fit = [], {}
    for name, three in threes.items():
        note = _mismatch(*three)
        if note:
            shape = () if three[1] is None else tuple(three[1].shape)
            rows.append(Row("parameter", name, shape, 0, 0, 0, 0, note))
        else:
            got, plain, truth = three
            fit[name] = _norm(truth), _norm(plain, truth), _norm(got, truth), tuple(plain.shape)
    if not fit:
        return rows
    size, own, error = (math.hypot(*(values[i] for values in fit.values())) for i in range(3))
    used = _share(error, GRADIENT * (own + eps * size))
    note = "" if math.isfinite(own) else "the untouched model's own result is not finite"
    whole = Row("all", f"all {len(fit)} parameters", (), size, own, error, used, note)
    floor, rate = eps * size / math.sqrt(len(fit)), own / size if size else 0.0
    for name, (size, own, error, shape) in fit.items():
        used = _share(error, GRADIENT * (own + rate * size + floor))
        rows.append(Row("parameter", name, shape, size, own, error, used))
    return [whole, *rows]


def _mismatch(got, plain, truth) -> str:
    """What is wrong before any number is looked at."""
    if plain is None or truth is None:
        return "" if got is None else "is there, and the untouched model has none"
    if got is None:
        return "is missing"
    if got.shape != plain.shape:
        return f"has shape {tuple(got.shape)} instead of {tuple(plain.shape)}"
    if got.dtype != plain.dtype:
        return f"is {got.dtype} instead of {plain.dtype}".replace("torch.", "")
    return ""


def _usual(threes: list[tuple]) -> float:
    """The untouched model's relative error over all results together."""
    fit = [t for t in threes if not _mismatch(*t) and t[1] is not None and t[1].is_floating_point()]
    size = math.hypot(*(_norm(truth) for _, _, truth in fit))
    own = math.hypot(*(_norm(plain, truth) for _, plain, truth in fit))
    return own / size if size else 0.0


def _norm(t: Tensor, other: Tensor | None = None) -> float:
    t = t.double() if other is None else t.double() - other.double()
    return torch.linalg.vector_norm(t).item()


def _largest(t: Tensor, other: Tensor | None = None) -> float:
    if not t.numel():
        return 0.0
    t = t.double() if other is None else t.double() - other.double()
    return t.abs().max().item()


def _share(error: float, allowed: float) -> float:
    if error == 0:
        return 0.0
    found = error / allowed if allowed else math.inf
    return math.inf if math.isnan(found) else found


def identical(found, plain) -> bool:
    """Whether all results have the same bits."""
    for part in ("outputs", "inputs", "parameters"):
        a, b = getattr(found, part), getattr(plain, part)
        if a.keys() != b.keys():
            return False
        for name in a:
            if (a[name] is None) != (b[name] is None):
                return False
            if a[name] is not None and not torch.equal(a[name], b[name]):
                return False
    return True


def differs(found, plain, share: float = 0.01) -> bool:
    """Whether an output is off by more than what the order of additions may do."""
    pairs = [(found.outputs.get(name), t) for name, t in plain.outputs.items()]
    return any(a is None or a.shape != b.shape or _norm(a, b) > share * _norm(b) for a, b in pairs)


def doubts(rows: list[Row]) -> list[str]:
    """Why the untouched model's own error is no measure, if it is none."""
    for row in rows:
        share = row.relative(row.own)
        if row.kind in ("output", "all") and not row.note and share > DOUBT:
            return [
                f"cannot be judged: the untouched model's own {row.what} is wrong by {share:.0%}; "
                "if it draws random numbers (dropout), call model.eval() first"
            ]
    return []


def lines(result) -> list[str]:
    """The table of a Verification."""
    parameters = sorted((r for r in result.rows if r.kind == "parameter"), key=lambda r: -r.used)
    bad = [r for r in parameters if not r.ok]
    shown = [r for r in result.rows if r.kind != "parameter"] + (bad[:SHOWN] or parameters[:1])
    width = max((len(r.what) for r in shown), default=0)
    text = [
        f"{result.model} on {result.device}, {result.precision}; true: a {result.truth} run",
        f"{'relative error':{width}}  {'its own':>9}  {'accelerated':>11}  {'of budget':>9}",
    ]
    for r in shown:
        numbers = f"{r.relative(r.own):9.1e}  {r.relative(r.error):11.1e}  {r.used:9.2f}"
        verdict = "" if r.ok else "  WRONG"
        if r.note:
            numbers, verdict = f"WRONG: {r.note}", ""
        elif r.kind == "parameter" and r.ok:
            verdict = f"  the worst of {len(parameters)}"
        text.append(f"{r.what:{width}}  {numbers}{verdict}")
    if bad[SHOWN:]:
        text.append(f"… and {len(bad) - SHOWN} parameters more")
    for what, (before, after) in result.seconds.items():
        ratio = before / after if after else math.inf
        text.append(
            f"{what}: {before * 1e3:.2f} ms, accelerated {after * 1e3:.2f} ms: {ratio:.2f} ×"
        )
    text.append(f"first accelerated call: {result.first_call:.1f} s")
    if result.report is not None:
        text.append(str(result.report))
    if result.identical:
        text.append("every result has the untouched model's bits")
    return [*text, *result.notes, "ok" if result.ok else "NOT OK"]
