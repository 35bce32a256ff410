"""The name "engine" of torch.compile's backend, which an import gives, or an installation alone."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import engine
from engine.backend import engine as backend_function

ROOT = Path(__file__).parent.parent


def run(code: str, *path) -> str:
    """In a new process that finds `path` and nothing of this tree unless named."""
    preface = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", preface + code], cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPILE = """
import torch, torch.nn.functional as F
plain = lambda x: F.silu(F.group_norm(x, 2))
compiled = torch.compile(plain, backend="engine", options={"inner": "eager"})
x = torch.randn(2, 4, 3, 3)
assert torch.allclose(compiled(x), plain(x), atol=1e-5)
print("compiled", "engine.rewrite" in sys.modules)
"""


def test_an_installed_engine_is_found_without_an_import(tmp_path):
    """By the entry point that pyproject.toml declares, in metadata as an installer writes it."""
    text = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"\[project.entry-points.(\w+)\]\n(\w+) = \"(.+)\"", text)
    group, name, target = section.groups()
    folder = tmp_path / "aa_engine_under_test-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: aa-engine-under-test\nVersion: 0\n"
    )
    (folder / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    assert run(COMPILE, tmp_path, ROOT).split() == ["compiled", "True"]


def test_import_names_the_backend_and_does_not_import_dynamo():
    loaded = "print('torch._dynamo' in sys.modules, 'engine.backend' in sys.modules)"
    said = run(f"import engine\n{loaded}\n{COMPILE}", ROOT)
    assert said.split() == ["False", "False", "compiled", "True"]


def test_what_import_names_is_the_backend():
    registry = SimpleNamespace(_BACKENDS={})
    engine._name_backend(registry)
    assert registry._BACKENDS["engine"].load() is backend_function
