"""Guidance: what a sampler asks of the network and of a classifier so that x̂_0 follows a label."""

import math
from collections.abc import Callable
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from .diffusion import check_output


def takes_labels(model: Callable) -> bool:
    """Whether a model is called with y: every one but a U-Net without classes."""
    return getattr(model, "label_embed", model) is not None


def find_null_label(
    model: Callable, y: Tensor | None, guidance: float | None, given: int | None
) -> int | None:
    """The label that means "no class"; None where guidance does without the other network output.

    That of the call, else of the model (UNet.null_label). Raises ValueError when there is none,
    when there is no y, or when the model takes no labels.
    """
    if guidance is None:
        return None
    if isinstance(guidance, bool) or not isinstance(guidance, Real) or not math.isfinite(guidance):
        raise ValueError(f"guidance is {guidance!r}, expected a finite number, or None for none")
    if y is None:
        raise ValueError(f"guidance is {guidance} without y: give (N,) class labels to guide to")
    if not takes_labels(model):
        raise ValueError(f"guidance is {guidance}, but this model is unconditional: leave it out")
    if guidance == 1:
        return None  # ε_u + 1·(ε_c − ε_u)
    label = getattr(model, "null_label", None) if given is None else given
    if label is None:
        raise ValueError(
            f"guidance is {guidance}, but the model has no null_label: use one that was trained "
            "with label dropout, or give the null_label that means no class"
        )
    return label


def network(
    model: Callable, y: Tensor | None, null_label: int | None, times: Tensor, batch: int
) -> Callable:
    """→ run(x, t) → the network's output, and that without the condition, or None.

    t is one of `times` for all of the batch, which a model that has `expect` is told beforehand.

    With a null label both come from one call on the doubled batch (x, x), labels (y, null): each is
    a slice of its result, which ops.reverse_step reads in place.
    """

    def plain(x: Tensor, t: Tensor) -> tuple[Tensor, None]:
        return check_output(model(x, t) if y is None else model(x, t, y)), None

    expect = getattr(model, "expect", lambda *_: None)
    if null_label is None:
        expect(times, batch, y)
        return plain
    labels = torch.cat([y, torch.full_like(y, null_label)])
    expect(times, 2 * batch, labels)

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        out = check_output(model(torch.cat([x, x]), torch.cat([t, t]), labels))
        return out[: x.shape[0]], out[x.shape[0] :]

    return both


def class_gradient(
    classifier: Callable,  # classifier(x, t) → (N, K) logits
    x: Tensor,  # (N, C, H, W) float32, x_t
    t: Tensor,  # (N,)
    y: Tensor,  # (N,) int64
    scale: float = 1.0,
) -> Tensor:
    """scale · ∇_x log p(y | x_t), (N, C, H, W) float32 (Dhariwal & Nichol 2021, §4.1).

    log p = log_softmax(logits)[y], in float32; each image's is its own, so that one backward pass
    of their sum gives all gradients. Works wherever gradients are off. Raises ValueError for logits
    that are no (N, K).
    """
    with torch.inference_mode(False), torch.enable_grad():
        # clones: what was made under inference_mode cannot be saved for a backward pass
        x, t, y = x.detach().clone().requires_grad_(), t.clone(), y.clone()
        logits = classifier(x, t)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"the classifier returned {found}, expected logits ({len(x)}, classes)"
            )
        if y.device.type == "cpu" and len(y) and not 0 <= y.min() <= y.max() < logits.shape[1]:
            raise ValueError(
                f"y reaches from {y.min()} to {y.max()}, and the classifier knows "
                f"{logits.shape[1]} classes: give 0 … {logits.shape[1] - 1}"
            )
        if not logits.requires_grad:
            raise ValueError("the classifier's logits have no gradient: take its no_grad off")
        log_p = F.log_softmax(logits.float(), dim=1).gather(1, y[:, None])
        return torch.autograd.grad(scale * log_p.sum(), x)[0]
