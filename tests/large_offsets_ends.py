"""The back ends of large_offsets.py, on torch tensors, of whose launches and loops the ends run."""

import ctypes
import importlib.util
from functools import partial

import torch


def triton_ends():
    """The Triton launchers, of whose grids the interpreter runs the ends."""
    import triton.language as tl
    from engine.kernels import (
        attention,
        group_norm_silu,
        group_norm_silu_bwd,
        group_norm_silu_bwd_large,
        group_norm_silu_plan,
        noise,
        rms_norm_silu,
    )
    from engine.kernels import reverse_step as step
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    executor, set_dim, set_idx = (
        interpreter.GridExecutor,
        builder.set_grid_dim,
        builder.set_grid_idx,
    )
    run_all = executor.__call__

    def run_ends(self, *args, **kwargs):
        ends = run_ends.count
        (count,) = self.grid
        assert count < 2**31, f"{count} programs: more than one launch has"
        cut = max(0, count - 2 * ends)
        self.grid = (count - cut,)
        builder.set_grid_dim = lambda *_: set_dim(count, 1, 1)
        builder.set_grid_idx = lambda x, y, z: set_idx(x if x < ends else x + cut, y, z)
        run_all(self, *args, **kwargs)

    executor.__call__ = run_ends
    executor._restore_args_dev = lambda *_: None  # would copy all of each tensor onto itself
    # Shorter loops: more chunks, more of them merged at a time.
    group_norm_silu_plan.MAX_CHUNKS = 1 << 16
    group_norm_silu_bwd.MERGE = group_norm_silu_bwd_large.MERGE = tl.constexpr(4096)
    return {
        "ends": partial(setattr, run_ends, "count"),
        "fwd": group_norm_silu.group_norm_silu_fwd,
        "bwd": group_norm_silu.group_norm_silu_bwd,
        "rms_fwd": rms_norm_silu.rms_norm_silu_fwd,
        "rms_bwd": rms_norm_silu.rms_norm_silu_bwd,
        "noise": noise.noise_fwd,
        "step": step.reverse_step_fwd,
        "attention": attention.attention_fwd,
        "attention_bwd": attention.attention_bwd,
    }


def cuda_ends(library: str):
    """The emulated CUDA launchers, of whose grids the ends run."""
    import emulation

    ops = emulation.load(library, "engine_emu")
    return {
        "ends": ctypes.CDLL(library).cuda_on_cpu_run_ends,
        "fwd": ops.group_norm_silu_fwd,
        "bwd": ops.group_norm_silu_bwd,
        "noise": ops.noise_fwd,
        "step": ops.reverse_step_fwd,
    }


def native_ends(library: str):
    """The CPU kernels through NumPy, of whose loops the last items run."""
    spec = importlib.util.spec_from_file_location("native_module", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def array(t):  # (N, C, S) or (N, S, C)
        last = not t.is_contiguous()
        return (t.squeeze(-1).transpose(1, 2) if last else t.squeeze(-1)).numpy(), last

    def tensor(a, last):
        t = torch.from_numpy(a)
        return (t.transpose(1, 2) if last else t).unsqueeze(-1)

    units, elements = -2, -64  # of loops over groups or samples, over elements
    names = ("weight", "bias", "add", "scale", "shift")

    def present(operands):
        return {k: t.numpy() for k, t in zip(names, operands, strict=True) if t is not None}

    def fwd(x, x2, *rest):
        *operands, groups, eps, silu = rest
        a, last = array(x)
        y, *stats = module.group_norm_silu_fwd(a, last, present(operands), groups, eps, silu, units)
        return tensor(y, last), *(torch.from_numpy(t) for t in stats)

    def bwd(dy, x, x2, *rest):
        *operands, mean, rstd, groups, silu = rest
        (d, d_last), (a, last) = array(dy), array(x)
        stats = mean.numpy(), rstd.numpy()
        g = module.group_norm_silu_bwd(d, d_last, a, last, present(operands), *stats, silu, units)
        return tensor(g["x"], last), None, *(torch.from_numpy(g[k]) for k in names)

    def rms_fwd(x, weight, scale, shift, eps, silu):
        a, last = array(x)
        given = {"scale": scale.numpy(), "shift": shift.numpy()}
        y, rstd = module.rms_norm_silu_fwd(a, last, given, eps, silu, units)
        return tensor(y, last), torch.from_numpy(rstd)

    def rms_bwd(dy, x, weight, scale, shift, rstd, silu):
        (d, d_last), (a, last) = array(dy), array(x)
        given = {"scale": scale.numpy(), "shift": shift.numpy()}
        g = module.rms_norm_silu_bwd(d, d_last, a, last, given, rstd.numpy(), silu, units)
        grads = (torch.from_numpy(g[k]) for k in ("weight", "scale", "shift"))
        return tensor(g["x"], last), *grads

    def noise(out, seed, step, stream, offset):
        module.noise(out.numpy(), seed.item(), step.item(), stream, offset, elements)

    def step(x, out, coeffs, step, seed, noise, clip, offset):
        (a, last), (b, b_last) = array(x), array(out)
        key = (step.item(), 0 if seed is None else seed.item())
        z, z_last = (None, False) if noise is None else array(noise)
        rest = (coeffs.numpy(), *key, z, z_last, clip, offset, elements)
        return tensor(module.reverse_step_fwd(a, last, b, b_last, *rest), last)

    norms = {"fwd": fwd, "bwd": bwd, "rms_fwd": rms_fwd, "rms_bwd": rms_bwd}
    return {"ends": int, **norms, "noise": noise, "step": step}
