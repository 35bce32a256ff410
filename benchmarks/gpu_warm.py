"""Compiles the Triton kernels of every n-th GPU benchmark into Triton's cache: gpu_warm.py PART N.

One call per case, and the tiny U-Net of gpu_anchors.py, untimed. torch.compile's baselines are left
out: Inductor keeps on disk which of its configurations was fastest, and on a busy GPU that would be
the wrong one.
"""

import contextlib
import sys

import torch
from bench_gpu import all_cases
from gpu_anchors import graph_sampling
from gpu_device import Cuda, StandIn


def warm(device, part: int, parts: int, mode: str = "default") -> int:
    """→ how many cases ran."""
    ran = 0
    for case in all_cases(device, mode)[part::parts]:
        with contextlib.suppress(Exception), torch.set_grad_enabled(case.grad):
            case.contenders["triton"](case.inputs(0))()
            ran += 1
        device.free()
        if not device.healthy():
            break
    return ran


if __name__ == "__main__":
    device = StandIn() if "--stand-in" in sys.argv else Cuda()
    mode = "full" if "--full" in sys.argv else "default"
    if sys.argv[1] == "0" and not device.stand_in:
        graph_sampling(device, few=1, many=2)
    warm(device, int(sys.argv[1]), int(sys.argv[2]), mode)
