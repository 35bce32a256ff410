"""Writes into engine/evidence.json which back ends passed an op's tests on this GPU."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import torch

from engine import dispatch

ROOT = Path(__file__).parent.parent


def sources(op: str, backend: str) -> list[Path]:
    """The files whose change makes a proof of this back end's op worthless."""
    if backend == "triton":
        names = {"triton_base.py", "boundary.py"}
        names |= {
            "rms_norm_silu": {"group_norm_silu_tiles.py"},
            "reverse_step": {"noise.py"},
            "forward_noise": {"noise.py", "reverse_step.py", "reverse_step_general.py"},
        }.get(op, set())
        names |= {p.name for p in (ROOT / "kernels").glob(f"{op}*.py")}
        return sorted(ROOT / "kernels" / name for name in names)
    found = {ROOT / "setup.py", *(ROOT / "csrc").glob("*.h"), ROOT / "csrc/ops.cpp"}
    found |= {*(ROOT / "csrc").glob(f"ops_{op}*")}
    found |= {*(ROOT / "csrc/cuda").glob(f"{op}*"), *(ROOT / "csrc/cuda").glob("*.h")}
    return sorted(found)


def digest(op: str, backend: str) -> str:
    content = b"".join(path.name.encode() + path.read_bytes() for path in sources(op, backend))
    return hashlib.sha256(content).hexdigest()[:16]


def version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(package)
    except PackageNotFoundError:
        return "none"


def unknown(report) -> bool:
    """Whether a failed report names no op that could lose its entry for it.

    test_clusters and test_blocked fail for kernels that nothing takes. What is reported of a worker
    that died (pytest-xdist) is of no phase of a test, and knows no properties: anything may be lost
    with it.
    """
    if not report.failed or "op" in dict(report.user_properties):
        return False
    ran = report.when in ("setup", "call", "teardown")
    untaken = report.nodeid.split("::")[-1].startswith(("test_clusters[", "test_blocked["))
    return not (ran and untaken)


def counts(config, exitstatus: int, unknown: bool = False) -> bool:
    """Whether a run of this configuration that ended so ran every op test, and was told of each.

    In parallel (pytest-xdist) the workers' reports arrive here, but not what they deselected, and a
    worker may die: there a failure that names no op (unknown) spoils the run.
    """
    option = config.option
    if config.args_source.name == "ARGS" or getattr(option, "ignore", None):
        return False
    if hasattr(config, "workerinput"):
        return False
    if not getattr(option, "numprocesses", None):
        return exitstatus in (0, 1)
    chosen = ("keyword", "markexpr", "deselect", "lf", "stepwise", "ignore_glob")
    if unknown or any(getattr(option, name, None) for name in chosen):
        return False
    return exitstatus in (0, 1)


def record(gpu: str, passed: Counter, failed: Counter, file: Path) -> dict:
    """passed, failed: cases per (op, back end). What failed anywhere loses its entry."""
    known = json.loads(file.read_text()) if file.exists() else {}
    ops = known.setdefault(gpu, {})
    for op, backend in {*passed, *failed}:
        if backend not in ("native", "triton"):
            continue
        ops.setdefault(op, {}).pop(backend, None)
        if not failed[op, backend]:
            ops[op][backend] = {
                "cases": passed[op, backend],
                "sources": digest(op, backend),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "triton": version("triton"),
            }
    file.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    dispatch._evidence.cache_clear()
    return known
