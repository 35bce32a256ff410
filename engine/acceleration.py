"""engine.accelerate: somebody's model on our ops, in place, until `undo`."""

import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.weak import WeakTensorKeyDictionary

from . import memory_format
from .backend import Backend
from .rewrite import Left, Report

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Modules are keys, and no handle keeps one alive: a dictionary on the module itself would be copied
# and pickled with it.
_handles: "weakref.WeakKeyDictionary[nn.Module, Handle]" = weakref.WeakKeyDictionary()


class Handle:
    """What `accelerate` returned: `report` and `undo`. A context manager: undoes at its end."""

    def __init__(
        self, modules: list[nn.Module], parts: list[Left], inner: str, channels_last: bool
    ):
        self.inner, self.channels_last = inner, channels_last
        self._parts = parts  # of a pipeline, those that were not taken
        self._modules = [weakref.ref(module) for module in modules]
        self._backends = [Backend(inner) for _ in modules]
        self._relaid = WeakTensorKeyDictionary()
        for module, backend in zip(modules, self._backends, strict=True):
            _compile(module, backend)
            if channels_last:
                memory_format.to_channels_last(module, self._relaid)
                module._compiled_call_impl = _laid_before(module, self._relaid)

    @property
    def report(self) -> Report:
        """What was replaced and what was left, of every graph compiled so far: none before the
        first call. Of a pipeline also the parts that were not taken."""
        whole = Report(left=list(self._parts))
        for backend in self._backends:
            whole.add(backend.report)
        return whole

    def undo(self) -> None:
        """The modules run as they did before, their weights lie as they did before."""
        for reference in self._modules:
            module = reference()
            if module is not None and _handles.get(module) is self:
                module._compiled_call_impl = None
                del _handles[module]
        memory_format.back(self._relaid)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"engine.accelerate(inner={self.inner!r}): {self.report}"


def accelerate(model, inner: str = "eager", channels_last: bool = True) -> Handle:
    """Runs the model on our ops from its next call on: torch.compile(backend="engine") in place.

    model: an nn.Module, or a diffusers pipeline, of which every part with a GroupNorm or a channel
    RMS norm is taken (of an autoencoder its encoder and decoder). Classes, parameters, state-dict
    keys and hooks stay what they are; copies and pickles of the model are plain ones. inner:
    "eager" runs the rewritten graph as it is, "inductor" compiles it further, which takes a minute.
    channels_last: lays the weights of convolutions so that everything between them follows, and
    those that are loaded later ahead of the next call; code that takes the other layout for granted
    (x.view(n, -1) of a picture, in or behind the model) needs False or reshape.
    The first call compiles, and once more the first with other sizes. Hooks that are registered
    after it are not seen, as with torch.compile: undo, register, accelerate. Kernels have no second
    derivative: undo for a loss on gradients. The same call again returns the same handle; another
    one takes its place.
    Raises ValueError for an unknown `inner`, a model that is no module or has none to take, and one
    that torch.compile has already compiled.
    """
    modules, parts = _targets(model)
    known = {id(h): h for module in modules if (h := _handles.get(module)) is not None}
    for handle in known.values():
        covered = {r() for r in handle._modules}.issuperset(modules)
        if covered and (handle.inner, handle.channels_last) == (inner, channels_last):
            return handle
    Backend(inner)  # refuses an unknown name before anything is undone
    for handle in known.values():
        handle.undo()
    for module in modules:
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"accelerate: {type(module).__name__} is already compiled: accelerate the module "
                'itself, or give torch.compile backend="engine"'
            )
    handle = Handle(modules, parts, inner, channels_last)
    for module in modules:
        _handles[module] = handle
    return handle


def _compile(self: nn.Module, backend: Backend) -> None:
    """As self.compile(backend=…), which passes over two: nn.Sequential, since Dynamo traces code of
    PyTorch's own only where other code calls it; and the ninth model of a class, since Dynamo keeps
    eight compilations of one code object. Both want code of their own around forward."""

    def forward(*args, **kwargs):
        return self.forward(*args, **kwargs)

    forward.__code__ = forward.__code__.replace(co_name=f"forward_{type(self).__name__}")
    traced = torch.compile(forward, backend=backend)
    hooked = torch.compile(self._call_impl, backend=backend)  # its own hooks run outside

    def call(*args, **kwargs):
        hooks = _has_any_global_hook() or any(getattr(self, name) for name in _HOOKS)
        return (hooked if hooks else traced)(*args, **kwargs)

    self._compiled_call_impl = call


def _laid_before(module: nn.Module, relaid: WeakTensorKeyDictionary) -> Callable:
    """The module's compiled call, ahead of it the weights that were exchanged since the last one:
    `load_state_dict(assign=True)` and diffusers' `from_pretrained` put in others, which lie as in
    their file. Two copies of a model would round differently, and the one would lose its speed."""
    compiled, reference = module._compiled_call_impl, weakref.ref(module)

    def call(*args, **kwargs):
        if not torch.compiler.is_compiling() and (found := reference()) is not None:
            memory_format.to_channels_last(found, relaid)
        return compiled(*args, **kwargs)

    return call


def _targets(model) -> tuple[list[nn.Module], list[Left]]:
    """The modules to compile, each once; of a pipeline also the parts that are none of them."""
    if isinstance(model, nn.Module):
        return _halves(model), []
    parts = getattr(model, "components", None)
    if not isinstance(parts, dict):
        raise ValueError(
            f"accelerate: model is {type(model).__name__}, expected an nn.Module or a pipeline "
            "with components"
        )
    found, left = [], []
    for name, part in parts.items():
        if not isinstance(part, nn.Module):
            continue
        if any(_is_norm(m) for m in part.modules()):
            found += _halves(part)
        else:
            why = f"{type(part).__name__} has neither a GroupNorm nor a channel RMS norm"
            left.append(Left("part of the pipeline", name, why))
    if not found:
        raise ValueError(
            f"accelerate: no part of {type(model).__name__} has a GroupNorm or a channel RMS norm"
        )
    return list(dict.fromkeys(found)), left


def _is_norm(module: nn.Module) -> bool:
    """Whether a norm of ours may stand for it.

    RMS norms are everybody's own: what they share is a weight of one number per channel, shaped to
    be multiplied with pictures, (1, C, 1, 1) or (C, 1, 1).
    """
    if isinstance(module, nn.GroupNorm):
        return True
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return False
    return any(
        3 <= p.dim() <= 5 and p.shape[0 if p.shape[0] > 1 else 1] == p.numel() > 1
        for p in module.parameters(recurse=False)
    )


def _halves(module: nn.Module) -> list[nn.Module]:
    """An autoencoder is called through encode and decode: its halves. Any other module itself."""
    halves = [getattr(module, name, None) for name in ("encoder", "decoder")]
    if hasattr(module, "decode") and all(isinstance(half, nn.Module) for half in halves):
        return halves
    return [module]
