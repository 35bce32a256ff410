"""Starts this project's commands, or a piece of Python, in two processes through torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def torchrun(*arguments, cwd, processes=2, options=(), timeout=240, **environment):
    """`torchrun --nproc-per-node=2 ARGUMENTS` → the ended process; TimeoutExpired if it hangs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *launcher, *options, *map(str, arguments)],
        cwd=cwd,
        env={**given, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
