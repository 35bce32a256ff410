"""The error budget of design: the same for every test, and nothing loosens it.

Truth is the reference in float64 on the same, already rounded inputs. A kernel may be wrong by
factor × (what plain PyTorch in the tested dtype is wrong by + one rounding step of that dtype).
"""

import torch

FORWARD, GRADIENT = 2.0, 3.0


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return (got.double() - truth.double()).abs().max().item()


def assert_within_budget(
    got, truth, plain, *, factor: float, what: str = "output", scale: float | None = None
) -> None:
    """got, plain: results in the tested dtype; truth: float64. NaN anywhere fails.

    scale: the size that one rounding step is taken of, max |truth| unless given: a result that is
    zero only because its terms cancel has their size, not its own.
    """
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)} != {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    scale = truth.abs().max().item() if scale is None else scale
    step = torch.finfo(got.dtype).eps * scale
    allowed = factor * (error(plain, truth) + step)
    found = error(got, truth)
    assert found <= allowed, (
        f"{what}: error {found:.3e} over the budget {allowed:.3e} ({got.dtype})"
    )
