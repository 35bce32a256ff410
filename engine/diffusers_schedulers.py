"""diffusers' DDPM, DDIM and DPM-Solver schedulers, each step of which is one fused launch.

`pipe.scheduler = EngineDDPMScheduler.from_config(pipe.scheduler.config)`: the same configuration
and, for the same generator, the same step within rounding, by ops.reverse_step on noise drawn as
diffusers draws it. A step's numbers come from a table of rows, made on the host once per
set_timesteps; the row's number is known on the host as well, and nothing is read back from a GPU.
The scalars among them are float32, like the original's, so that both round alike: 1 − ᾱ_t/ᾱ_t' of a
short step has three right digits in float32.

What one launch cannot express, and whatever is unusual, takes the original's own step: a learned
variance that is no range, a row that is not finite (prediction_type "epsilon" at ᾱ = 0; diffusers'
fixed_large_log, √log β), sample_max_value < 1, a thresholded "dpmsolver" without ++, float64,
operands that broadcast, differ in device or are empty, torch.compile. Where a gradient is wanted,
and on a GPU on which the kernels have not been proved, eager PyTorch computes the row.

A pipeline saved with one of these names this module: import it before from_pretrained. DDIMPipeline
takes diffusers' DDIMScheduler whatever it is given: set pipe.scheduler after it was made.

A NaN in the model's output stays where it is; with thresholding the original spreads it.
"""

import copy
import math
from numbers import Integral

import torch
from torch import Tensor

from .fused_scheduler import Fused, host_first, like

try:
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
    from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ModuleNotFoundError as error:
    if error.name != "diffusers":
        raise
    raise ModuleNotFoundError(
        "Engine…Scheduler are subclasses of diffusers' schedulers: pip install diffusers",
        name="diffusers",
    ) from None

__all__ = [
    "EngineDDIMScheduler",
    "EngineDDPMScheduler",
    "EngineDPMSolverMultistepScheduler",
    "SchedulerMixin",  # diffusers looks for it here when it loads a pipeline with one of these
]


def _x0_columns(prediction: str, alpha_bar: Tensor, beta_bar: Tensor) -> dict[str, Tensor]:
    """x0 = a·x + b·out"""
    alpha, sigma = (alpha_bar**0.5).double(), (beta_bar**0.5).double()
    if prediction == "epsilon":
        return {"a": 1 / alpha, "b": -sigma / alpha}
    if prediction == "sample":
        return {"a": torch.zeros_like(alpha), "b": torch.ones_like(alpha)}
    if prediction == "v_prediction":
        return {"a": alpha, "b": -sigma}
    return {"a": alpha * math.nan}  # the original says what it expects


class EngineDDPMScheduler(Fused, DDPMScheduler):
    """DDPMScheduler with x_prev = c·bound(a·x + b·out) + d·x + s·z in one launch.

    (Ho et al. 2020, eq. 6, 7 and 11; Nichol & Dhariwal 2021, eq. 15, for learned_range.) sample and
    model_output: (N, C, *S) float32, bfloat16 or float16, with learned_range (N, 2·C, *S); float32
    inside. With thresholding and sample_max_value > 1 two launches more. What else takes the
    original's step, and raises as that does: see the module.
    """

    set_timesteps = host_first(DDPMScheduler.set_timesteps)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        """As DDPMScheduler.step; → DDPMSchedulerOutput or (prev_sample, pred_original_sample)."""
        found = self._fused_step(model_output, timestep, sample, generator)
        if found is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        if not return_dict:
            return found
        return DDPMSchedulerOutput(prev_sample=found[0], pred_original_sample=found[1])

    def _fused_step(self, model_output, timestep, sample, generator):
        kind = self.config.variance_type
        learned = kind == "learned_range"
        dtype, bound = self._dtype(sample, model_output, 1 + learned), self._bound()
        if dtype is None or bound is None or kind == "learned" or kind != self.variance_type:
            return None
        t = self._number(timestep)
        if not isinstance(t, Integral) or not 0 <= t < len(self.alphas_cumprod):
            return None
        settings = (self.config.prediction_type, kind, self.num_inference_steps)
        sources = (self.alphas_cumprod, self.timesteps)
        rows = self._table(sources, (*settings, self.custom_timesteps), self._build)
        if not rows.finite[t]:
            return None
        noise = None
        if t > 0:
            noise = randn_tensor(
                sample.shape, generator, model_output.device, dtype=model_output.dtype
            )
        x = sample.to(dtype)
        return self._launch(rows, t, x, model_output, noise, learned_range=learned, **bound)

    def _build(self) -> dict[str, Tensor]:
        alpha_bar = self.alphas_cumprod.cpu()
        t, previous = torch.arange(len(alpha_bar), device="cpu"), self._previous(len(alpha_bar))
        alpha_bar_prev = torch.where(previous >= 0, alpha_bar[previous.clamp(min=0)], 1.0)
        beta_bar, beta_bar_prev = 1 - alpha_bar, 1 - alpha_bar_prev
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha
        columns = _x0_columns(self.config.prediction_type, alpha_bar, beta_bar)
        columns["c"] = (alpha_bar_prev**0.5 * beta) / beta_bar
        columns["d"] = alpha**0.5 * beta_bar_prev / beta_bar
        variance = (beta_bar_prev / beta_bar * beta).clamp(min=1e-20)
        kind, first = self.config.variance_type, t == 0
        if kind == "learned_range":
            s = torch.ones_like(variance)
            columns["lo"] = torch.where(first, 0.0, variance.log())
            columns["hi"] = torch.where(first, 0.0, beta.log())
        elif kind == "fixed_small_log":
            s = (0.5 * variance.log()).exp()
        elif kind == "fixed_large":
            s = beta**0.5
        elif kind == "fixed_large_log":
            s = beta.log() ** 0.5
        else:
            s = variance**0.5
        columns["s"] = torch.where(first, 0.0, s)
        return {name: torch.where(previous < -1, math.nan, v) for name, v in columns.items()}

    def _previous(self, T: int) -> Tensor:
        """(T,) int64, the step that follows on t: −1 after the last, −2 for a t that is none."""
        if not (self.custom_timesteps or self.num_inference_steps):
            return torch.arange(-1, T - 1, device="cpu")
        steps = self._timesteps()
        found = [-2] * T
        for t, after in zip(reversed(steps), reversed([*steps[1:], -1]), strict=True):
            if 0 <= t < T and after < T:
                found[t] = after
        return torch.tensor(found, device="cpu")


class EngineDDIMScheduler(Fused, DDIMScheduler):
    """DDIMScheduler with √ᾱ'·x0 + √(1−ᾱ'−σ²)·ε + σ·z in one launch, x0 = bound(a·x + b·out).

    (Song et al. 2021, eq. 12.) ε is that of the bounded x0 with use_clipped_model_output, or where
    nothing bounds it: then all is linear in x0, x and z; else ε comes from model_output, which the
    launch takes as its fourth operand. Tensors as in EngineDDPMScheduler.

    From ᾱ = 0 with eta = 1, σ² = 1−ᾱ' and ε has no part. In float32 their difference can be −6e-8,
    by the last bit of ᾱ': for 10 or 250 trailing steps of rescale_betas_zero_snr on an AMD EPYC.
    The original then returns NaN (diffusers' issue 5969); here ε has no part.
    """

    set_timesteps = host_first(DDIMScheduler.set_timesteps)

    def step(
        self,
        model_output,
        timestep,
        sample,
        eta=0.0,
        use_clipped_model_output=False,
        generator=None,
        variance_noise=None,
        return_dict=True,
    ):
        """As DDIMScheduler.step; → DDIMSchedulerOutput or (prev_sample, pred_original_sample)."""
        given = (eta, use_clipped_model_output, generator, variance_noise)
        found = self._fused_step(model_output, timestep, sample, *given)
        if found is None:
            return super().step(model_output, timestep, sample, *given, return_dict)
        if not return_dict:
            return found
        return DDIMSchedulerOutput(prev_sample=found[0], pred_original_sample=found[1])

    def _fused_step(self, model_output, timestep, sample, eta, clipped, generator, noise):
        dtype, bound = self._dtype(sample, model_output), self._bound()
        if dtype is None or bound is None or not self.num_inference_steps:
            return None
        if not isinstance(eta, (int, float)) or (noise is not None and generator is not None):
            return None
        t = self._number(timestep)
        if not isinstance(t, Integral) or not 0 <= t < len(self.alphas_cumprod):
            return None
        linear = bool(clipped) or bound == {"clip": None}
        stride = self.config.num_train_timesteps // self.num_inference_steps
        rows = self._table(
            (self.alphas_cumprod, self.final_alpha_cumprod),
            (self.config.prediction_type, stride, eta, linear),
            lambda: self._build(stride, eta, linear),
        )
        if not rows.finite[t]:
            return None
        if eta <= 0:
            noise = None
        elif noise is None:
            noise = randn_tensor(
                model_output.shape, generator, model_output.device, dtype=model_output.dtype
            )
        elif not like(noise, sample) or torch.promote_types(noise.dtype, dtype) != dtype:
            return None
        raw = {} if linear else {"x0_prev": model_output}
        return self._launch(rows, t, sample.to(dtype), model_output, noise, **raw, **bound)

    def _build(self, stride: int, eta: float, linear: bool) -> dict[str, Tensor]:
        alpha_bar, last = self.alphas_cumprod.cpu(), self.final_alpha_cumprod.cpu()
        previous = torch.arange(len(alpha_bar), device="cpu") - stride
        alpha_bar_prev = torch.where(previous >= 0, alpha_bar[previous.clamp(min=0)], last)
        beta_bar = 1 - alpha_bar
        columns = _x0_columns(self.config.prediction_type, alpha_bar, beta_bar)
        variance = ((1 - alpha_bar_prev) / beta_bar) * (1 - alpha_bar / alpha_bar_prev)
        std = eta * variance**0.5
        left = 1 - alpha_bar_prev - std**2
        if abs(eta) <= 1:  # below zero by rounding alone
            left = left.clamp(min=0)
        direction = (left**0.5).double()  # what multiplies ε
        root, alpha, sigma = (v.double() ** 0.5 for v in (alpha_bar_prev, alpha_bar, beta_bar))
        columns["s"] = std if eta > 0 else torch.zeros_like(std)
        prediction = self.config.prediction_type
        if linear:  # ε = (x − √ᾱ x0)/√(1−ᾱ)
            columns["c"] = root - direction * alpha / sigma
            columns["d"] = direction / sigma
            return columns
        columns["c"] = root
        if prediction == "epsilon":
            columns["e"] = direction
        elif prediction == "sample":
            columns["d"], columns["e"] = direction / sigma, -direction * alpha / sigma
        else:
            columns["d"], columns["e"] = direction * sigma, direction * alpha
        return columns


class EngineDPMSolverMultistepScheduler(Fused, DPMSolverMultistepScheduler):
    """DPMSolverMultistepScheduler (Lu et al. 2022) with x_prev = c·m0 + d·x + e·m1 + g·m2 + s·z in
    one launch, which computes m0 = bound(a·x + b·out) too.

    m0 is the converted output (x0 for dpmsolver++, ε for dpmsolver), m1 and m2 are those of the
    steps before. Solver orders 1 to 3, midpoint and heun, every algorithm_type, sigmas and final
    steps of the original's: the coefficients are its own formulas, applied to unit vectors. The
    sde algorithms in float32 only. Tensors as in EngineDDPMScheduler.
    """

    clips = False
    set_timesteps = host_first(DPMSolverMultistepScheduler.set_timesteps)

    def _init_step_index(self, timestep) -> None:
        if self._begin_index is not None:
            self._step_index = self._begin_index
            return
        number = self._number(timestep)
        if number is None:
            super()._init_step_index(timestep)
            return
        # Of two equal timesteps the second is meant, as in the original.
        steps = self._timesteps()
        found = [i for i, t in enumerate(steps) if t == number] or [len(steps) - 1]
        self._step_index = found[min(1, len(found) - 1)]

    def step(
        self,
        model_output,
        timestep,
        sample,
        generator=None,
        variance_noise=None,
        return_dict=True,
    ):
        """As DPMSolverMultistepScheduler.step; → SchedulerOutput or (prev_sample,)."""
        x = self._fused_step(model_output, timestep, sample, generator, variance_noise)
        if x is None:
            given = (generator, variance_noise, return_dict)
            return super().step(model_output, timestep, sample, *given)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _fused_step(self, model_output, timestep, sample, generator, noise):
        config, n = self.config, len(self.timesteps)
        if self.num_inference_steps is None:
            return None
        if self.step_index is None:
            self._init_step_index(timestep)
        plus, sde = config.algorithm_type.endswith("++"), config.algorithm_type.startswith("sde")
        if config.variance_type in ("learned", "learned_range"):
            if config.prediction_type != "epsilon" or not isinstance(model_output, Tensor):
                return None
            model_output = model_output[:, :3]  # as the original does
        dtype, bound = self._dtype(sample, model_output), self._bound()
        if dtype is None or bound is None or (config.thresholding and not plus):
            return None
        if not plus and sample.dtype != model_output.dtype:  # ε has the model's, x_next as well
            return None
        order, step = self._order(n), self.step_index
        history = self.model_outputs[:-order:-1] if order > 1 else []
        if step >= n or not all(like(m, sample) for m in history):
            return None
        settings = ("algorithm_type", "prediction_type", "solver_type", "use_flow_sigmas")
        settings = (*(config.get(name) for name in settings), config.solver_order, n)
        rows = self._table((self.sigmas,), settings, lambda: self._build(n))
        row = (order - 1) * n + step
        if row >= len(rows.finite) or not rows.finite[row] or (sde and dtype != torch.float32):
            return None
        if not sde:
            noise = None
        elif noise is None:
            noise = randn_tensor(sample.shape, generator, sample.device, dtype=torch.float32)
        elif not isinstance(noise, Tensor) or noise.shape != sample.shape:
            return None
        else:
            noise = noise.to(sample.device, torch.float32)
        operands = dict(zip(("x0_prev", "grad"), history, strict=False))
        x = sample.to(dtype)
        x_next, m0 = self._launch(rows, row, x, model_output, noise, **operands, **bound)
        self.model_outputs = [*self.model_outputs[1:], m0]
        self.lower_order_nums = min(self.lower_order_nums + 1, config.solver_order)
        self._step_index += 1
        return x_next

    def _order(self, n: int) -> int:
        """How many converted outputs the original combines in this step."""
        config, left = self.config, n - 1 - self.step_index
        short = config.lower_order_final and n < 15
        last = config.euler_at_final or short or config.final_sigmas_type == "zero"
        most = 1 if left == 0 and last else 2 if left == 1 and short else 3
        return max(1, min(config.solver_order, self.lower_order_nums + 1, most))

    def _build(self, n: int) -> dict[str, Tensor]:
        probe = copy.copy(self)
        probe.sigmas, probe._step_index = self.sigmas.cpu(), torch.arange(n, device="cpu")[:, None]
        probe._threshold_sample = lambda x0: x0
        x, out = torch.eye(2, dtype=torch.float32, device="cpu").split(1)
        converted = probe.convert_model_output(out, sample=x).expand(n, 2)
        x, m0, m1, m2, z = torch.eye(5, dtype=torch.float32, device="cpu").split(1)
        given = {"sample": x, "noise": z}
        found = [probe.dpm_solver_first_order_update(m0, **given)]
        if self.config.solver_order > 1:
            found.append(probe.multistep_dpm_solver_second_order_update([m1, m0], **given))
        if self.config.solver_order > 2 and self.config.algorithm_type != "sde-dpmsolver":
            found.append(probe.multistep_dpm_solver_third_order_update([m2, m1, m0], **given))
        columns = zip(("d", "c", "e", "g1", "s"), torch.cat(found).unbind(1), strict=True)
        a, b = converted.repeat(len(found), 1).unbind(1)
        return {"a": a, "b": b, **dict(columns)}
