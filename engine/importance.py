"""Loss-aware importance sampling of t (Nichol & Dhariwal 2021, §3.3)."""

import math

import torch
from torch import Tensor


class LossAwareSampler:
    """Draws t ~ p with p_t ∝ √E[L_t²], which lessens the variance of the bound's gradient (eq. 18).

    E[L_t²] is the mean over the last `history` losses of t. Until every t has that many, t is
    uniform and every weight 1. Then p is mixed with a little of the uniform distribution,
    p_t = (1 − u) √E[L_t²]/Σ + u/T, so that no t is forgotten.

        t, weights = sampler.sample(n, generator)
        losses = diffusion.loss(model, x0, t=t, reduction="none")
        (weights * losses).mean().backward()     # E_p[L_t/(T p_t)] is the mean of L_t over all t
        sampler.update(t, losses.detach())

    T        diffusion steps
    history  losses kept per t
    uniform  u, share of the uniform distribution

    The state is `state_dict`: losses (T, history) float64 and counts (T,) int64, on the CPU. With
    several processes, give each of them the t and losses of all.
    """

    def __init__(self, T: int, *, history: int = 10, uniform: float = 0.001) -> None:
        if T < 1 or history < 1 or not 0 <= uniform <= 1:
            raise ValueError(
                f"T is {T}, history {history}, uniform {uniform}: "
                "expected 1 or more, 1 or more, and a share 0 … 1"
            )
        self.T, self.history, self.uniform = T, history, uniform
        self.losses = torch.zeros(T, history, dtype=torch.float64)  # a ring per t
        self.counts = torch.zeros(T, dtype=torch.int64)  # losses of t seen so far

    @property
    def filled(self) -> int:
        """How many t have a whole history; at T the warm-up is over."""
        return int((self.counts >= self.history).sum())

    @property
    def warm(self) -> bool:
        return self.filled == self.T

    def probabilities(self) -> Tensor:  # (T,) float64
        """p_t, which add up to 1."""
        size = (self.losses**2).mean(1).sqrt()
        if not self.warm or not size.any():
            return torch.full((self.T,), 1 / self.T, dtype=torch.float64)
        return (1 - self.uniform) * size / size.sum() + self.uniform / self.T

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """→ t (n,) int64 and weights 1/(T p_t) (n,) float32, on the CPU.

        They follow from the generator's state and the history alone.
        """
        if not self.warm:
            return torch.randint(self.T, (n,), generator=generator), torch.ones(n)
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True, generator=generator)
        return t, (1 / (self.T * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Takes in the losses L_t (n,), unweighted, of steps t (n,); the oldest ones drop out."""
        if t.shape != losses.shape or t.dim() != 1:
            raise ValueError(
                f"t is {tuple(t.shape)} and losses {tuple(losses.shape)}, expected (n,) each"
            )
        values = losses.tolist()
        if not all(map(math.isfinite, values)):
            raise ValueError("a loss is not finite: leave out the whole step")
        for step, value in zip(t.tolist(), values, strict=True):
            self.losses[step, self.counts[step] % self.history] = value
            self.counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError for a state of another T or history, or one that no losses leave."""
        for name, mine in self.state_dict().items():
            found = state.get(name)
            if found is None or found.shape != mine.shape or found.dtype != mine.dtype:
                what = "missing" if found is None else f"{tuple(found.shape)} {found.dtype}"
                raise ValueError(
                    f"the t sampler's {name} is {what}, expected {tuple(mine.shape)} {mine.dtype}"
                )
            if not found.isfinite().all() or (name == "counts" and found.lt(0).any()):
                raise ValueError(f"the t sampler's {name} are no losses' that were finite")
            mine.copy_(found)
