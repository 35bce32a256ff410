"""Which instruction sets the CPU kernels may use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name, highest", [("default", 0), ("avx2", 1), ("avx512", 2), ("", 2)])
def test_pytorchs_switch_holds_for_our_kernels(built, name, highest):
    """ATEN_CPU_CAPABILITY, read when the first kernel asks."""
    code = "import native_build; print(native_build.load().isa_level())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": name}
    if not name:
        del environment["ATEN_CPU_CAPABILITY"]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.split()[-1]) == min(highest, built.isa_level())
