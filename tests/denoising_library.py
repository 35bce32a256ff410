"""denoising-diffusion-pytorch without torchvision: the package imports it, not every file does.

Its U-Net for classifier-free guidance is in one that does not.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

PACKAGE = "denoising_diffusion_pytorch"


def package():
    pytest.importorskip("einops")
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        pytest.skip(f"could not import '{PACKAGE}'")
    return found


def from_file(name: str):
    """A module of the package, by its file: the package's own __init__ is not run."""
    path = Path(package().origin).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # Dynamo imports it
    spec.loader.exec_module(module)
    return module
