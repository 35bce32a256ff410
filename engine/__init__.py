"""A diffusion engine on its own kernels: ops, U-Net, diffusion, samplers, training."""

import importlib
import os

__version__ = "0.1.0"

# The source tree has the kernels beside this package, in ./kernels; an installed package, inside.
# They are never a top-level `kernels`: that name belongs to Hugging Face's package.
if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    __path__.append(os.path.dirname(os.path.abspath(__path__[0])))

# name → module that has it; imported on first use, so that `import engine` costs nothing.
_HOME = {
    "Diffusion": "diffusion",
    "UNet": "unet",
    "explain": "ops",
    "load": "checkpoint",
    "noise": "ops",
    "sample": "samplers",
}


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in ("ops", "schedules"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'engine' has no attribute '{name}'")
