"""The forward process, its posterior, the parameterisations and the losses of DDPM.

Symbols as in Ho et al. 2020: q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I), t = 0 … T−1.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import likelihood, ops, schedules

PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("small", "large", "learned_range")
SIMPLE_LOSSES = ("l1", "l2", "huber")
MIXED_LOSSES = ("hybrid", "l2_vlb")  # l2 for the mean, the bound for the variance
BOUND_LOSSES = ("vlb", "rescaled_vlb")
LOSSES = (*SIMPLE_LOSSES, *MIXED_LOSSES, *BOUND_LOSSES)


class Diffusion:
    """The diffusion process of one noise schedule. Tables are float64 and cast where they are used.

    betas       (T,) noise schedule, 0 < β < 1 (schedules.betas)
    prediction  what the network predicts: "eps" the noise, "x0" the image, or
                "v" = √ᾱ ε − √(1−ᾱ) x_0 (Salimans & Ho 2022)
    variance    of the reverse step: "small" β̃_t, "large" β_t (Ho et al. 2020, §3.2), or
                "learned_range": the network's, between the two (Nichol & Dhariwal 2021, eq. 15):
                of 2C output channels the last C are v, log σ² = f log β_t + (1 − f) log β̃_t with
                f = (v + 1)/2, v not bounded and β̃_1 for β̃_0 = 0
    loss        between target and prediction: "l1" |·|, "l2" (·)², "huber" smooth L1 with β = 1;
                or with L_t, a term of the variational bound in bits/dim (vlb_terms):
                "vlb" L_t; "rescaled_vlb" T L_t, whose mean over t is the bound without its prior;
                "hybrid" l2 + T/1000 L_t (eq. 16 there, λ = 0.001 for the sum over t); "l2_vlb"
                l2 + L_t, as the models of Dhariwal & Nichol 2021 were trained (the same at their
                T = 1000). In the last two L_t does not reach the mean: it trains the variance,
                which must be learned, and l2 the mean

    rescale_timesteps  the model knows t as t·1000/T, float32, whatever T: so do those of Nichol &
                Dhariwal 2021, trained with T = 4000 (checkpoint.load_openai, "iddpm-…")

    A model is called with t, or where `respaced` made the process from a longer one, with the
    longer one's: model_steps(t).
    """

    def __init__(
        self,
        betas: Tensor,
        *,
        prediction: str = "eps",
        variance: str = "small",
        loss: str = "l2",
        rescale_timesteps: bool = False,
    ) -> None:
        for name, value, choices in (
            ("prediction", prediction, PREDICTIONS),
            ("variance", variance, VARIANCES),
            ("loss", loss, LOSSES),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
        if loss in MIXED_LOSSES and variance != "learned_range":
            raise ValueError(
                f"loss={loss!r} trains a learned variance: give variance='learned_range', "
                f"or one of the losses {', '.join((*SIMPLE_LOSSES, *BOUND_LOSSES))}"
            )
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
        self.timesteps = torch.arange(self.T)  # what the model is called with
        if rescale_timesteps:
            self.timesteps = (self.timesteps.double() * (1000 / self.T)).float()
        self._own_steps = not rescale_timesteps  # t itself
        self._tables: dict = {}

    def respaced(self, steps: int | str | Sequence[int]) -> "Diffusion":
        """The process of the kept steps alone, for the same model (Nichol & Dhariwal 2021, eq. 19).

        ᾱ'_i = ᾱ_{S_i}, β'_i = 1 − ᾱ_{S_i}/ᾱ_{S_{i−1}}, with S as schedules.kept_steps(T, steps)
        gives it: a number, "10,15,20", "ddim50" …; `model_steps` has S. Raises ValueError as that.
        """
        kept = torch.tensor(schedules.kept_steps(self.T, steps))
        alpha_bar = self.alpha_bar[kept]
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        gap = torch.diff(kept, prepend=torch.tensor([-1]))
        beta = torch.where(gap == 1, self.betas[kept], 1 - alpha_bar / alpha_bar_prev)
        options = {"prediction": self.prediction, "variance": self.variance, "loss": self.loss_type}
        process = Diffusion(beta, **options)
        process.alpha_bar, process.alpha_bar_prev = alpha_bar, alpha_bar_prev
        process.timesteps = self.timesteps[kept]
        process._own_steps = torch.equal(process.timesteps, torch.arange(process.T))
        return process

    def model_steps(self, t: Tensor) -> Tensor:
        """What a model is called with for steps t, any shape."""
        if self._own_steps:
            return t
        return self._kept(("timesteps", t.device), lambda: self.timesteps.to(t.device))[t]

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
        model: Callable,  # model(x_t, t) or model(x_t, t, y) → (N, C, H, W); learned_range: 2C
        x0: Tensor,  # (N, C, H, W) in [−1, 1]
        *,
        t: Tensor | None = None,  # (N,) int64, uniform over 0 … T−1 unless given
        noise: Tensor | None = None,  # (N, C, H, W), standard normal unless given
        y: Tensor | None = None,  # (N,) class labels
        key: int | Tensor | None = None,  # in place of noise: drawn in the kernels, never stored,
        step: int | Tensor = 0,  # as normals of (key, step, stream 2) of the noise contract
        offset: int = 0,  # number of x0's first image in the whole batch that key and step draw for
        reduction: str = "mean",  # over the batch; "none" → (N,)
    ) -> Tensor:
        """The loss that the process was made with, a float32 scalar; the class tells them.

        "l2": L_simple = mean (target − model(x_t, t))² (Ho et al. 2020, eq. 14). For t from another
        distribution p than uniform, the unbiased loss is mean(loss(…, reduction="none")/(T p_t)).
        """
        simple = self.loss_type in SIMPLE_LOSSES
        if self.variance == "learned_range" and simple:
            raise ValueError(
                f"variance='learned_range' with loss={self.loss_type!r} leaves the variance "
                f"untrained: use one of {', '.join((*MIXED_LOSSES, *BOUND_LOSSES))}"
            )
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction is {reduction!r}, expected mean or none")
        if t is None:
            t = torch.randint(self.T, (x0.shape[0],), device=x0.device)
        _check_steps(t, x0.shape[0], self.T)
        draw = {"key": key, "step": step, "noise": noise}
        if key is not None:
            draw["offset"] = offset * x0[:1].numel() if len(x0) else 0
            x_t = ops.forward_noise(x0, self._rows_on(x0.device), t, **draw)
        else:
            draw["noise"] = noise = torch.randn_like(x0) if noise is None else noise
            x_t = self.q_sample(x0, t, noise)
        out = self.call(model, x_t, t, y)
        if simple:
            return self._simple_loss(out, x0, t, draw, reduction)
        mixed = self.loss_type in MIXED_LOSSES
        bound, _ = self.vlb_terms(x0, x_t, t, out, detach_mean=mixed)
        bound = bound * {"hybrid": self.T / 1000, "rescaled_vlb": self.T}.get(self.loss_type, 1)
        bound = bound.mean() if reduction == "mean" else bound
        if mixed:
            mean = out[:, : x0.shape[1]]
            return self._simple_loss(mean, x0, t, draw, reduction) + bound
        return bound

    def _simple_loss(self, out: Tensor, x0: Tensor, t: Tensor, draw: dict, reduction: str):
        name = self.loss_type if self.loss_type in SIMPLE_LOSSES else "l2"
        if draw["key"] is not None:
            options = {"loss": name, "reduction": reduction}
            return ops.forward_noise_loss(out, x0, self._rows_on(x0.device), t, **options, **draw)
        target = self.target(x0, t, draw["noise"]).float()
        distance = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}[name]
        losses = distance(out.float(), target, reduction=reduction)
        return losses if reduction == "mean" else losses.flatten(1).mean(1)

    def call(self, model: Callable, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """model(x_t, model_steps(t)[, y]) → (N, C, *), or (N, 2C, *) where it learned the variance.

        Raises ValueError for an output of another shape.
        """
        t = self.model_steps(t)
        out = check_output(model(x_t, t) if y is None else model(x_t, t, y))
        learned = self.variance == "learned_range"
        expected = (x_t.shape[0], (1 + learned) * x_t.shape[1], *x_t.shape[2:])
        if out.shape != expected:
            like = (
                "its input, with twice its channels: prediction and v" if learned else "its input"
            )
            raise ValueError(
                f"the model returned {tuple(out.shape)}, expected {expected} like {like}"
            )
        return out

    def vlb_terms(
        self,
        x0: Tensor,  # (N, C, *S) in [−1, 1]
        x_t: Tensor,  # (N, C, *S), q_sample(x0, t, noise)
        t: Tensor,  # (N,)
        model_out: Tensor,  # (N, C, *S); learned_range: (N, 2C, *S)
        *,
        clip: bool = False,  # x̂_0 to [−1, 1]
        detach_mean: bool = False,  # no gradient to the prediction, only to v
    ) -> tuple[Tensor, Tensor]:
        """L_t of the variational bound in bits/dim, and the mean of (x_0 − x̂_0)²; (N,) each.

        t > 0: KL(q(x_{t−1}|x_t, x_0) ‖ p(x_{t−1}|x_t)) (Ho et al. 2020, eq. 5). Both means are the
        posterior's, of x_0 and of x̂_0, so in units of its deviation √β̃_t they differ by
        √(SNR_{t−1} − SNR_t) (x_0 − x̂_0), SNR = ᾱ/(1−ᾱ) (Kingma et al. 2021), and a KL does
        not depend on the unit: x_t cancels, and with it most of the rounding.
        t = 0: −log p(x_0|x_1) of 8-bit values (eq. 13), with mean x̂_0 and β̃_1 for β̃_0 = 0.
        Float32 inside, or float64 for float64 x0.
        """
        out, v = model_out, None
        if self.variance == "learned_range":
            out, v = model_out.chunk(2, 1)
        x0_hat = self.predict_x0(x_t, t, out.detach() if detach_mean else out)
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        unit, log_small, delta = (
            self._at(name, t, x0) for name in ("posterior_unit", "log_small", "log_ratio")
        )
        if v is not None:
            delta = (v.to(delta.dtype) + 1) / 2 * delta
        bound = likelihood.bound_term(x0, x0_hat, t, unit, log_small, delta)
        return bound, ((x0 - x0_hat) ** 2).flatten(1).mean(1)

    def bits_per_dim(
        self,
        model: Callable,  # model(x_t, t) or model(x_t, t, y) → (N, C, H, W); learned_range: 2C
        x0: Tensor,  # (N, C, H, W) in [−1, 1]: 8-bit values k/127.5 − 1, or uint8
        *,
        y: Tensor | None = None,  # (N,) class labels
        clip: bool = True,  # each x̂_0 to [−1, 1]
        seed: int = 0,  # with offset, the whole of the randomness
        noise: Tensor | None = None,  # (T, N, C, H, W) in place of a seed
        offset: int = 0,  # number of the first image in the whole set: batches do not change bits
        progress: bool = False,
    ) -> likelihood.BitsPerDim:
        """Upper bound of −log₂ p(x_0) per dimension, with its terms, from one draw of x_t per step.

        total (N,) = prior (N,) + Σ_t vb (N, T), in bits/dim; mse, x0_mse (N, T): likelihood.py.
        T network calls in eval mode, without gradients. Float32, or float64 for float64 x0. Raises
        ValueError for x0 outside [−1, 1] and shapes that do not fit. Source: Ho et al. 2020, eq. 5
        and §3.3; Nichol & Dhariwal 2021, §3.
        """
        return likelihood.bits_per_dim(
            self,
            model,
            x0,
            y=y,
            clip=clip,
            seed=seed,
            noise=noise,
            offset=offset,
            progress=progress,
        )

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
        return self._kept(("forward_rows", device), lambda: self.forward_rows().float().to(device))

    def _kept(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._tables:
            with torch.inference_mode(False):  # else a backward pass could not save it later
                self._tables[key] = make()
        return self._tables[key]

    def _table(self, name: str) -> Tensor:  # (T,) float64
        if name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"):
            return (self.alpha_bar if name == "sqrt_alpha_bar" else 1 - self.alpha_bar).sqrt()
        if name in ("x0_from_x", "x0_from_out"):
            return self.x0_rows()[name == "x0_from_out"]
        if name in ("log_small", "log_ratio"):
            small, large = schedules.log_variance_range(self.alpha_bar, self.alpha_bar_prev)
            if name == "log_small":
                return small
            if self.variance == "large":
                large = self._table("posterior_variance").log()
            return torch.zeros_like(small) if self.variance == "small" else large - small
        if name == "posterior_unit":  # 0 at t = 0, where the posterior is a point
            snr = self.alpha_bar / (1 - self.alpha_bar)
            return torch.cat([torch.zeros_like(snr[:1]), -snr.diff()]).sqrt()
        x0, x, variance = schedules.posterior_rows(
            self.alpha_bar, self.alpha_bar_prev, self.variance
        )
        return {"posterior_x0": x0, "posterior_x": x, "posterior_variance": variance}[name]

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Table entries for t, shaped to broadcast over `like` (N, *)."""
        _check_steps(t, like.shape[0], self.T)
        key = (name, like.device, like.dtype)
        # Never below float32: in bfloat16, √ᾱ of neighbouring steps would be the same number.
        to = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        table = self._kept(key, lambda: self._table(name).to(**to))
        return table[t].reshape(-1, *[1] * (like.dim() - 1))


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
