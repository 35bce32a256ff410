"""engine.accelerate: somebody's model on our ops, in place, until `undo`."""

import weakref

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .backend import Backend
from .rewrite import Report

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Modules are keys, and no handle keeps one alive: a dictionary on the module itself would be copied
# and pickled with it.
_handles: "weakref.WeakKeyDictionary[nn.Module, Handle]" = weakref.WeakKeyDictionary()


class Handle:
    """What `accelerate` returned: `report` and `undo`. A context manager: undoes at its end."""

    def __init__(self, modules: list[nn.Module], inner: str, channels_last: bool):
        self.inner, self.channels_last = inner, channels_last
        self._modules = [weakref.ref(module) for module in modules]
        self._backends = [Backend(inner) for _ in modules]
        self._relaid: list[weakref.ref] = []
        for module, backend in zip(modules, self._backends, strict=True):
            if channels_last:
                self._relaid += [weakref.ref(t) for t in _to_channels_last(module)]
            _compile(module, backend)

    @property
    def report(self) -> Report:
        """What was replaced and what was left, of every graph compiled so far: none before the
        first call."""
        whole = Report()
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
        for reference in self._relaid:
            if (t := reference()) is not None:
                _lay(t, torch.contiguous_format)
        self._relaid = []

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"engine.accelerate(inner={self.inner!r}): {self.report}"


def accelerate(model, inner: str = "eager", channels_last: bool = True) -> Handle:
    """Runs the model on our ops from its next call on: torch.compile(backend="engine") in place.

    model: an nn.Module, or a diffusers pipeline, of which every part with a GroupNorm is taken (of
    an autoencoder its encoder and decoder). Classes, parameters, state-dict keys and hooks stay
    what they are; copies and pickles of the model are plain ones. inner: "eager" runs the rewritten
    graph as it is, "inductor" compiles it further, which takes a minute. channels_last: lays the
    weights of convolutions so that everything between them follows; code that takes the other
    layout for granted (x.view(n, -1) of a picture, in or behind the model) needs False or reshape.
    The first call compiles, and once more the first with other sizes. Hooks that are registered
    after it are not seen, as with torch.compile: undo, register, accelerate. Kernels have no second
    derivative: undo for a loss on gradients. The same call again returns the same handle; another
    one takes its place.
    Raises ValueError for an unknown `inner`, a model that is no module or has none to take, and one
    that torch.compile has already compiled.
    """
    modules = _targets(model)
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
    handle = Handle(modules, inner, channels_last)
    for module in modules:
        _handles[module] = handle
    return handle


def _targets(model) -> list[nn.Module]:
    """The modules to compile."""
    if isinstance(model, nn.Module):
        return _halves(model)
    parts = getattr(model, "components", None)
    if not isinstance(parts, dict):
        raise ValueError(
            f"accelerate: model is {type(model).__name__}, expected an nn.Module or a pipeline "
            "with components"
        )
    found = []
    for part in parts.values():
        if isinstance(part, nn.Module) and any(isinstance(m, nn.GroupNorm) for m in part.modules()):
            found += _halves(part)
    if not found:
        raise ValueError(f"accelerate: no part of {type(model).__name__} has a GroupNorm")
    return found


def _halves(module: nn.Module) -> list[nn.Module]:
    """An autoencoder is called through encode and decode: its halves. Any other module itself."""
    halves = [getattr(module, name, None) for name in ("encoder", "decoder")]
    if hasattr(module, "decode") and all(isinstance(half, nn.Module) for half in halves):
        return halves
    return [module]


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


def _to_channels_last(module: nn.Module) -> list[torch.Tensor]:
    """Lays weights of convolutions channels_last; returns those that lay otherwise."""
    changed = []
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, (nn.Conv2d, nn.Conv3d)) or not isinstance(weight, nn.Parameter):
            continue
        # With one channel a weight is contiguous in both ways, and `contiguous` would return it as
        # it is; but a convolution goes by the strides, and everything behind it follows.
        form = _FORMATS[weight.dim()]
        laid = torch.empty_like(weight, memory_format=form, device="meta")
        if weight.is_contiguous() and weight.stride() != laid.stride() and _alone(weight):
            _lay(weight, form)
            changed.append(weight)
    return changed


def _alone(t: torch.Tensor) -> bool:
    """Whether nobody else holds its memory: another process, or a buffer of many parameters."""
    shared = t.device.type == "cpu" and t.is_shared()
    return not shared and t.untyped_storage().nbytes() == t.numel() * t.element_size()


def _lay(t: torch.Tensor, form: torch.memory_format) -> None:
    """Within inference mode too: what is trained later must be an ordinary tensor."""
    with torch.inference_mode(t.is_inference()):
        t.data = torch.empty_like(t, memory_format=form).detach().copy_(t.data)
