"""A diffusion engine on its own kernels: ops, U-Net, diffusion, samplers, training."""

import importlib
import os

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
    "explain": "ops",
    "load": "checkpoint",
    "noise": "ops",
    "sample": "samplers",
    "verify": "verification",
}
_MODULES = ("checkpoint", "ops", "samplers", "schedules")


def __getattr__(name: str):
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module 'engine' has no attribute '{name}'")
    module = importlib.import_module(f"{__name__}.{_HOME.get(name, name)}")
    return getattr(module, name) if name in _HOME else module


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
