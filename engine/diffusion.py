"""The forward process, its posterior, the parameterisations and the losses of DDPM.

Symbols as in Ho et al. 2020: q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I), t = 0 … T−1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, schedules

PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("small", "large", "learned_range")
LOSSES = ("l1", "l2", "huber")


class Diffusion:
    """The diffusion process of one noise schedule. Tables are float64 and cast where they are used.

    betas       (T,) noise schedule, 0 < β < 1 (schedules.betas)
    prediction  what the network predicts: "eps" the noise, "x0" the image, or
                "v" = √ᾱ ε − √(1−ᾱ) x_0 (Salimans & Ho 2022)
    variance    of the reverse step: "small" β̃_t, "large" β_t (Ho et al. 2020, §3.2), or
                "learned_range": the network's, between the two, from twice as many channels
                (Nichol & Dhariwal 2021, eq. 15); for sampling only, `loss` refuses it
    loss        "l1" |·|, "l2" (·)², "huber" smooth L1 with β = 1, between target and prediction
    """

    def __init__(
        self,
        betas: Tensor,
        *,
        prediction: str = "eps",
        variance: str = "small",
        loss: str = "l2",
    ) -> None:
        for name, value, choices in (
            ("prediction", prediction, PREDICTIONS),
            ("variance", variance, VARIANCES),
            ("loss", loss, LOSSES),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
        if isinstance(betas, str):
            raise ValueError(
                f"betas is {betas!r}, expected (T,) numbers: schedules.betas({betas!r}, 1000)"
            )
        beta = torch.as_tensor(betas, dtype=torch.float64).detach().cpu()
        if beta.dim() != 1 or len(beta) < 1 or not bool(((beta > 0) & (beta < 1)).all()):
            raise ValueError(f"betas is {tuple(beta.shape)}, expected (T,) with 0 < beta < 1")
        self.prediction, self.variance, self.loss_type = prediction, variance, loss
        self.T = len(beta)
        self.betas = beta
        self.alpha_bar = schedules.alpha_bar(beta)
        self.alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        self._tables: dict = {}

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (Ho et al. 2020, eq. 4). x0, noise (N, *); t (N,) int64.

        Raises ValueError for shapes and dtypes that do not fit, as the other methods do.
        """
        _check_like("noise", noise, "x0", x0)
        a = self._at("sqrt_alpha_bar", t, x0)
        s = self._at("sqrt_one_minus_alpha_bar", t, x0)
        return (a * x0 + s * noise).to(x0.dtype)

    def predict_x0(self, x_t: Tensor, t: Tensor, model_out: Tensor) -> Tensor:
        """x̂_0 from the network's output, not clipped.

        eps: (x_t − √(1−ᾱ) ε)/√ᾱ (Ho et al. 2020, eq. 15);  v: √ᾱ x_t − √(1−ᾱ) v;  x0: itself.
        """
        _check_like("model_out", model_out, "x_t", x_t)
        from_x, from_out = (self._at(name, t, x_t) for name in ("x0_from_x", "x0_from_out"))
        return from_x * x_t + from_out * model_out

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """q(x_{t−1} | x_t, x_0) (Ho et al. 2020, eq. 6–7) → mean (N, *), variance (N, 1, …).

        mean = √ᾱ_{t−1} β_t/(1−ᾱ_t) x_0 + √α_t (1−ᾱ_{t−1})/(1−ᾱ_t) x_t. The variance is the reverse
        step's choice: "small" β̃_t (zero at t = 0), "large" β_t, with β̃_1 at t = 0, where no noise
        is added; for "learned_range", which only the network knows, β̃_t.
        """
        _check_like("x0", x0, "x_t", x_t)
        c, d = (self._at(name, t, x_t) for name in ("posterior_x0", "posterior_x"))
        return c * x0 + d * x_t, self._at("posterior_variance", t, x_t)

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should predict for x_t = q_sample(x0, t, noise)."""
        _check_like("noise", noise, "x0", x0)
        if self.prediction == "eps":
            return noise
        if self.prediction == "x0":
            return x0
        a = self._at("sqrt_alpha_bar", t, x0)
        s = self._at("sqrt_one_minus_alpha_bar", t, x0)
        return a * noise - s * x0

    def loss(
        self,
        model: Callable,  # model(x_t, t) or model(x_t, t, y) → (N, C, H, W)
        x0: Tensor,  # (N, C, H, W) in [−1, 1]
        *,
        t: Tensor | None = None,  # (N,) int64, uniform over 0 … T−1 unless given
        noise: Tensor | None = None,  # (N, C, H, W), standard normal unless given
        y: Tensor | None = None,  # (N,) class labels
        key: int | Tensor | None = None,  # in place of noise: drawn in the kernels, never stored,
        step: int | Tensor = 0,  # as normals of (key, step, stream 2) of the noise contract
    ) -> Tensor:
        """L_simple = mean ℓ(target, model(x_t, t)) (Ho et al. 2020, eq. 14), a float32 scalar."""
        if self.variance == "learned_range":
            raise ValueError(
                "variance='learned_range' has no loss here: train with 'small' or 'large'"
            )
        if t is None:
            t = torch.randint(self.T, (x0.shape[0],), device=x0.device)
        _check_steps(t, x0.shape[0], self.T)

        def run(x_t: Tensor) -> Tensor:
            out = check_output(model(x_t, t) if y is None else model(x_t, t, y))
            if out.shape != x0.shape:
                raise ValueError(
                    f"the model returned {tuple(out.shape)}, "
                    f"expected {tuple(x0.shape)} like its input"
                )
            return out

        if key is not None:
            rows = self._rows_on(x0.device)
            draw = {"key": key, "step": step, "noise": noise}
            out = run(ops.forward_noise(x0, rows, t, **draw))
            loss = {"loss": self.loss_type, "reduction": "mean"}
            return ops.forward_noise_loss(out, x0, rows, t, **loss, **draw)
        if noise is None:
            noise = torch.randn_like(x0)
        out = run(self.q_sample(x0, t, noise)).float()
        target = self.target(x0, t, noise).float()
        distance = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}[self.loss_type]
        return distance(out, target)

    def forward_rows(self) -> Tensor:
        """(T, 4) float64 rows (a, b, p, q): x_t = a·x_0 + b·ε, target = p·x_0 + q·ε."""
        root, rest = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        zero, one = torch.zeros_like(root), torch.ones_like(root)
        p, q = {"eps": (zero, one), "x0": (one, zero), "v": (-rest, root)}[self.prediction]
        return torch.stack([root, rest, p, q], 1)

    def x0_rows(self) -> tuple[Tensor, Tensor]:
        """(T,) each: x̂_0 = row_x · x_t + row_out · model_out."""
        root, rest = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        if self.prediction == "eps":
            return 1 / root, -rest / root
        if self.prediction == "v":
            return root, -rest
        return torch.zeros_like(root), torch.ones_like(root)

    def _rows_on(self, device: torch.device) -> Tensor:  # (T, 4) float32
        if ("forward_rows", device) not in self._tables:
            self._tables["forward_rows", device] = self.forward_rows().float().to(device)
        return self._tables["forward_rows", device]

    def _table(self, name: str) -> Tensor:  # (T,) float64
        if name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"):
            return (self.alpha_bar if name == "sqrt_alpha_bar" else 1 - self.alpha_bar).sqrt()
        if name in ("x0_from_x", "x0_from_out"):
            return self.x0_rows()[name == "x0_from_out"]
        x0, x, variance = posterior_rows(self.alpha_bar, self.alpha_bar_prev, self.variance)
        return {"posterior_x0": x0, "posterior_x": x, "posterior_variance": variance}[name]

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Table entries for t, shaped to broadcast over `like` (N, *)."""
        _check_steps(t, like.shape[0], self.T)
        key = (name, like.device, like.dtype)
        if key not in self._tables:
            # Never below float32: in bfloat16, √ᾱ of neighbouring steps would be the same number.
            dtype = torch.promote_types(like.dtype, torch.float32)
            self._tables[key] = self._table(name).to(device=like.device, dtype=dtype)
        return self._tables[key][t].reshape(-1, *[1] * (like.dim() - 1))


def check_output(out: Tensor) -> Tensor:
    """The network's output. Raises ValueError if it is no tensor, as in diffusers' models."""
    if not isinstance(out, Tensor):
        hint = "; wrap the model so that it returns its .sample" if hasattr(out, "sample") else ""
        raise ValueError(
            f"the model returned {type(out).__name__}, expected a tensor like its input{hint}"
        )
    return out


def _check_steps(t: Tensor, n: int, T: int) -> None:
    found = f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else repr(t)
    if (
        not isinstance(t, Tensor)
        or t.shape != (n,)
        or t.dtype not in (torch.int64, torch.int32)  # others index as a mask, or not at all
    ):
        raise ValueError(f"t is {found}, expected ({n},) int64: one diffusion step per image")
    # Elsewhere a look at the values would wait for the device; a negative one counts from the end.
    if t.device.type == "cpu" and n and not torch.compiler.is_compiling():
        low, high = t.min().item(), t.max().item()
        if low < 0 or high >= T:
            raise ValueError(f"t reaches from {low} to {high}, expected steps 0 … {T - 1}")


def _check_like(name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    """Equal shapes: broadcasting would go on with numbers that nobody meant."""
    if tensor.shape != like.shape or not like.is_floating_point():
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} and {other} {tuple(like.shape)} {like.dtype}, "
            "expected the same shape (N, *), floating point"
        )


def posterior_rows(
    alpha_bar: Tensor, alpha_bar_prev: Tensor, variance: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of x_0 and x_t in the posterior mean, and the variance; (n,) float64 each.

    Written in ᾱ of this step and of the next lower kept one, so that it also serves runs that skip
    steps: α = ᾱ/ᾱ_prev, β = 1 − α.
    """
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    from_x0 = beta * alpha_bar_prev.sqrt() / (1 - alpha_bar)
    from_x = (1 - alpha_bar_prev) * alpha.sqrt() / (1 - alpha_bar)
    small = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    if variance != "large":
        return from_x0, from_x, small
    large = beta.clone()
    if len(large) > 1:
        large[0] = small[1]
    return from_x0, from_x, large


def log_variance_range(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> tuple[Tensor, Tensor]:
    """log β̃ and log β (n,) float64, between which a learned variance lies; β̃_1 for β̃_0 = 0."""
    small, large = (
        posterior_rows(alpha_bar, alpha_bar_prev, name)[2] for name in ("small", "large")
    )
    small = torch.cat([large[:1], small[1:]])
    return small.log(), (1 - alpha_bar / alpha_bar_prev).log()
