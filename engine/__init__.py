"""A diffusion engine on its own kernels: ops, U-Net, diffusion, samplers, training."""

import importlib
import importlib.util
import os
import sys

__version__ = "0.1.0"

# The kernels lie beside this package, in ./kernels, or, once installed, inside it; never as a
# top-level `kernels`: that name is Hugging Face's.
if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    __path__.append(os.path.dirname(os.path.abspath(__path__[0])))

# name → module that has it; imported on first use, so that `import engine` costs nothing.
_HOME = {
    "Classifier": "classifier",
    "Diffusion": "diffusion",
    "EngineDDIMScheduler": "diffusers_schedulers",
    "EngineDDPMScheduler": "diffusers_schedulers",
    "EngineDPMSolverMultistepScheduler": "diffusers_schedulers",
    "UNet": "unet",
    "accelerate": "acceleration",
    "explain": "ops",
    "load": "checkpoint",
    "noise": "ops",
    "sample": "samplers",
    "verify": "verification",
}
_MODULES = ("checkpoint", "ops", "samplers", "schedules")

_REGISTRY = "torch._dynamo.backends.registry"


class _NameBackend:
    """Names backend="engine" to Dynamo as soon as Dynamo is there: importing it takes 1.6 s.

    An installed engine has an entry point; this is for a tree that is not installed.
    """

    def find_spec(self, name, path=None, target=None):
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), _name_backend(module))
        return spec


def _name_backend(registry) -> None:
    from importlib.metadata import EntryPoint

    known = EntryPoint("engine", "engine.backend:engine", "torch_dynamo_backends")
    registry._BACKENDS.setdefault("engine", known)


if _REGISTRY in sys.modules:
    _name_backend(sys.modules[_REGISTRY])
else:
    sys.meta_path.insert(0, _NameBackend())


def __getattr__(name: str):
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module 'engine' has no attribute '{name}'")
    module = importlib.import_module(f"{__name__}.{_HOME.get(name, name)}")
    return getattr(module, name) if name in _HOME else module


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
