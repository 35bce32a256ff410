"""Who may import whom, what an import costs, and life without Triton and the extension."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Inside engine, a module may import only from the layers before its own.
LAYERS = (
    "device dispatch presets schedules layouts diffusers_config importance output decoded verdict"
    " torchrun optimizer low_weights",
    "distributed",
    "ops addend cli inception execution run_lock checkpoint_file dealing metrics winograd",
    "likelihood blocks fashion_mnist pictures patterns memory_format decoding picture_folder",
    "diffusion unet hugging_face rewrite fused_scheduler program conv2d_bf16 images",
    "embedded",
    "data prepacked coefficients guidance classifier curves backend diffusers_schedulers parallel"
    " stepping",
    "samplers foreign acceleration update",
    "checkpoint",
    "evaluation",
    "cache plots guard signals",
    "drawing",
    "trainer domain_classifier resume train_config",
    "train sample scores",
    "scoring train_classifier ablation_report verification",
    "evaluate ablation verify",
    "ablate",
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer.split()}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, function bodies included; relative ones start with a dot.

    Imports for type checkers alone, under `if TYPE_CHECKING`, are not among them.
    """
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"{base}.{alias.name}".replace("..", ".") for alias in node.names} | {base}
    return found


def run(code: str, cwd: Path = ROOT, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_nothing_of_engine(path):
    names = imports(path)
    assert not [n for n in names if n.split(".")[0] == "engine"]
    assert not [n for n in names if "reference" in n], "a fast file must not import the reference"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "engine").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_engine_imports_downward(path):
    names = imports(path)
    first, *inside = path.relative_to(ROOT / "engine").with_suffix("").parts
    if first != "dispatch":
        assert not [n for n in names if ".kernels" in n], "only dispatch.py imports back ends"
    if first == "__init__":
        return
    if inside:  # a package like ops has one rank; its own modules may import each other
        names = {name for name in names if name.startswith("..") or not name.startswith(".")}
    for name in names:
        parts = name.lstrip(".").split(".")
        if not name.startswith("."):
            parts = parts[1:] if parts[0] == "engine" else []
        target = parts[0] if parts else None
        if (
            target in RANK or (ROOT / "engine" / f"{target}.py").is_file()
        ):  # a new file needs a rank
            assert RANK[target] < RANK[first], f"{first} imports {target}"


def test_nothing_is_unpickled():
    """A pickle runs whatever its maker likes: no file of anybody's is read as one."""
    paths = [
        p for folder in ("engine", "kernels", "benchmarks") for p in (ROOT / folder).rglob("*")
    ]
    paths = [path for path in paths if path.suffix == ".py"] + [ROOT / "setup.py"]
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    loads = []
    for path in paths:
        assert not {name.split(".")[0] for name in imports(path)} & banned, path
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called, given = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            if called.endswith(("torch.load", "load_state_dict_from_url", "torch.jit.load")):
                loads.append(path.name)
                assert getattr(given.get("weights_only"), "value", None) is True, (path, called)
            if called in ("np.load", "numpy.load"):
                loads.append(path.name)
                assert getattr(given.get("allow_pickle"), "value", None) is False, (path, called)
    assert {"foreign.py", "inception.py"} <= set(loads) and loads.count("foreign.py") == 2


def test_only_the_bindings_include_torch():
    sources = {p for s in ("*.cpp", "*.cu", "*.h") for p in (ROOT / "csrc").rglob(s)}
    bindings = set((ROOT / "csrc").glob("ops*"))
    assert {"ops.h", "ops.cpp", "ops_noise.cpp"} <= {p.name for p in bindings}
    assert len(sources - bindings) > 5
    for source in sources - bindings:
        assert not re.search(r'#include.*(torch/|"(\.\./)?ops)', source.read_text()), source


def test_import_is_cheap_and_initialises_nothing():
    code = (
        "import torch, sys, time; before = set(sys.modules);"
        "s = time.perf_counter(); import engine;"
        "print(time.perf_counter() - s, 'triton' in set(sys.modules) - before,"
        "torch.cuda.is_initialized(), any(m.startswith('engine.') for m in sys.modules))"
    )
    seconds, *initialised = run(code).split()
    assert float(seconds) < 0.3
    assert initialised == ["False"] * 3


BLOCKED = """
import sys, importlib.abc, pathlib
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)
import torch
def refuse(path): raise OSError('blocked')
torch.ops.load_library = refuse
import engine
from engine import ops, schedules
model = engine.UNet(image_size=8, in_channels=1, model_channels=8, channel_mult=(1,),
                    num_res_blocks=1, num_groups=4)
process = engine.Diffusion(schedules.betas('cosine', 10))
process.loss(model, torch.rand(2, 1, 8, 8)).backward()
assert model.conv_out.weight.grad.any()
print(engine.sample(model, process, (1, 1, 8, 8)).shape)
for impl in ('native', 'triton'):
    try: ops.noise(0, 0, 0, (4,), impl=impl)
    except RuntimeError as error: print(error)
"""


def test_without_triton_and_extension_eager_trains():
    out = run(BLOCKED)
    assert "torch.Size([1, 1, 8, 8])" in out
    assert "Triton is not installed" in out and "pip install" in out
    assert "native was requested and cannot serve" in out


def test_diffusers_and_hugging_face_kernels_import_beside_us():
    pytest.importorskip("diffusers")
    pytest.importorskip("kernels", reason="Hugging Face kernels is not installed")
    code = (
        "import kernels; assert hasattr(kernels, 'get_kernel'), kernels;"
        "import diffusers; from diffusers import UNet2DModel; import engine.kernels.reference;"
        "print(UNet2DModel.__name__)"
    )
    assert "UNet2DModel" in run(code)


def test_we_never_take_the_name_kernels():
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    assert str(ROOT / "kernels") not in run(code)


def test_environment_variable_selects_and_is_checked(tmp_path):
    code = (
        "import torch; from engine import dispatch, ops; module = dispatch.module;"
        "dispatch.module = lambda op, name: print(name) or module(op, name);"
        "ops.noise(0, 0, 0, (4,));"
        "print(ops.group_norm_silu(torch.ones(1, 4, 2, 2), None, None, 2).shape)"
    )
    for backend in ("eager", "native"):
        *used, shape = run(code, ENGINE_BACKEND=backend).splitlines()
        assert set(used) == {backend} and "[1, 4, 2, 2]" in shape
    assert "native" in run(code, ENGINE_BACKEND="auto")
    with pytest.raises(AssertionError, match="ENGINE_BACKEND='cuda' is unknown"):
        run(code, ENGINE_BACKEND="cuda")


def test_explain_names_every_back_end_and_the_choice():
    code = (
        "import torch, engine; x = torch.ones(2, 8, 4, 4).transpose(2, 3)[..., 1:];"
        "engine.explain('group_norm_silu', x, None, None, 2);"
        "q = torch.ones(1, 1, 4, 8); engine.explain('attention', q, q, q);"
        "engine.explain('noise', 0, 0, 0, (4,));"
        "c = torch.ones(3, 5); engine.explain('reverse_step', x, x, c, 0, key=1)"
    )
    out = run(code, TRITON_INTERPRET="0")
    assert out.count("← auto") == 4 and "needs a CUDA tensor" in out
    assert out.count("native serves") == 4 and "copy them once" in out
