"""denoising-diffusion-pytorch's U-Nets without what its trainer and its scores import.

torchvision would bring another torch, so the Makefile installs the package without what it asks
for. Its files import that at their top, and the U-Nets use none of it: a module that is not
installed stands there empty while a file is imported.
"""

import contextlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest

PACKAGE = "denoising_diffusion_pytorch"
UNUSED = (  # by the U-Nets
    *("torchvision", "ema_pytorch", "accelerate", "pytorch_fid", "pytorch_fid.fid_score"),
    *("pytorch_fid.inception", "scipy", "scipy.optimize"),
)


class _Empty(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def package():
    pytest.importorskip("einops")
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        pytest.skip(f"could not import '{PACKAGE}'")
    return found


@contextlib.contextmanager
def _stand_ins():
    """In the places of modules that are not installed; and of the package, whose __init__ imports
    all that it has."""
    place = Path(package().origin).parent
    names = [PACKAGE, *(name for name in UNUSED if not _installed(name))]
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = _Empty(name)
    sys.modules[PACKAGE].__path__ = [str(place)]
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def from_file(name: str):
    """A module of the package, by its file."""
    path = Path(package().origin).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # Dynamo imports it
    with _stand_ins():
        spec.loader.exec_module(module)
    return module
