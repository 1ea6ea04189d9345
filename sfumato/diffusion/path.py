"""The road from data to noise: x_t = alpha(t) x0 + sigma(t) noise, t in [0, 1], clean at 0 and noise at 1.

Rectified flow (arXiv 2209.03003), variance preserving (arXiv 2006.11239, cosine: arXiv 2102.09672 without its offset, as in
arXiv 2202.00512) and variance exploding (arXiv 2206.00364) are this one equation with other alpha and sigma. The log-SNR is
lambda = log(alpha / sigma), half of the logarithm of the signal-to-noise ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional as F

from sfumato.core.config import nearest

PathKind = Literal["rf", "vp-cosine", "vp-linear"]
Betas = Literal["scaled_linear", "linear", "squaredcos_cap_v2"]
Schedule = Literal["uniform", "lambda", "karras", "edm", "ays", "ays-xl"]
Spacing = Literal["leading", "leading-open", "trailing", "linspace", "linspace-open", "linspace-exact", "lcm"]
T_MIN, LAMBDA_MAX = 1e-3, math.log(999)  # where schedules in lambda end, for lambda itself has none: sigma / alpha in [1 / 999, 999]
EDM_RANGE = (0.002, 80.0)  # of sigma / alpha (arXiv 2206.00364, table 1)
ALIGNED = {  # sigma / alpha after each of ten steps, found for Stable Diffusion 1.5 and SDXL (arXiv 2404.14507); the last stands for 0
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays-xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
MOST_BETAS = 100_000
OF_LCM = 50  # times that a consistency model of Stable Diffusion learned
LEAST_ALPHA = 2.0**-12  # what stands for 0 where the last step of a discrete model is to be pure noise


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """Which path. The betas are those of "vp-linear" (Stable Diffusion: linear in their square root, "scaled_linear") and else unused; with
    `zero_snr` they are scaled until the last step is noise alone (arXiv 2305.08891, Alg. 1).
    """

    kind: PathKind = "rf"
    num_betas: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    betas: Betas = "scaled_linear"
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(PathKind):
            raise ValueError(f"path (='{self.kind}') must be one of {', '.join(get_args(PathKind))}{nearest(self.kind, get_args(PathKind))}")
        if self.betas not in get_args(Betas):
            raise ValueError(f"betas (='{self.betas}') must be one of {', '.join(get_args(Betas))}{nearest(self.betas, get_args(Betas))}")
        if not 1 <= self.num_betas <= MOST_BETAS:
            raise ValueError(f"num_betas (={self.num_betas}) must be from 1 to {MOST_BETAS:,}: Stable Diffusion has 1000")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start (={self.beta_start}) and beta_end (={self.beta_end}) must satisfy 0 < beta_start <= beta_end < 1: "
                "each is the share of variance that a step replaces by noise"
            )


@dataclass(frozen=True)
class Path:
    """alpha, sigma and the inverse of lambda: each takes an fp32 or fp64 tensor of any shape and gives one of that shape and dtype.

    `reaches_zero`: alpha(1) is 0 exactly, so that x at t = 1 holds nothing of the data and sigma / alpha is infinite there.
    """

    kind: str
    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    t_of_lambda: Callable[[Tensor], Tensor]
    reaches_zero: bool

    def lam(self, t: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """log(alpha / sigma): falls with t; +inf where sigma is 0, -inf where alpha is 0."""
        return self.alpha(t).log() - self.sigma(t).log()

    def coefficients(self, t: Float[Tensor, " ..."], like: Float[Tensor, " b ..."]) -> tuple[Float[Tensor, " ..."], Float[Tensor, " ..."]]:
        """alpha and sigma at t "b" (or one t), as "b 1 ..." to multiply `like` "b ..." with, in its dtype but at least fp32."""
        shape, dtype = t.shape + (1,) * (like.ndim - t.ndim), torch.promote_types(like.dtype, torch.float32)
        return self.alpha(t).to(dtype).reshape(shape), self.sigma(t).to(dtype).reshape(shape)

    def mix(self, x0: Float[Tensor, " b *rest"], noise: Float[Tensor, " b *rest"], t: Float[Tensor, " b"]) -> Float[Tensor, " b *rest"]:
        """x_t = alpha x0 + sigma noise, noise unit Gaussian; at least fp32."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0 + sigma * noise


def make_path(config: PathConfig) -> Path:
    """The path that a config names."""
    match config.kind:
        case "rf":
            return Path("rf", lambda t: 1 - t, lambda t: t, lambda lam: torch.sigmoid(-lam), True)
        case "vp-cosine":
            return _vp_cosine()
        case "vp-linear":
            return _vp_linear(config)


def _vp_cosine() -> Path:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2). The cosine is written as a sine, which is 0 exactly at t = 1."""
    right = math.pi / 2
    return Path(
        "vp-cosine",
        lambda t: torch.sin(right * (1 - t)),
        lambda t: torch.sin(right * t),
        lambda lam: torch.atan(torch.exp(-lam)) / right,
        True,
    )


def _vp_linear(config: PathConfig) -> Path:
    """alpha^2 = product of (1 - beta) at t = i / num_betas, between them linear in lambda, and in log(alpha) before the first (arXiv 2112.10752).

    Step i = 0 ... num_betas - 1 of the discrete model is at t = (i + 1) / num_betas; t = 0 is the clean image, before any step.
    """
    n = config.num_betas
    log_alpha = _log_alpha(config)
    knots, first = log_alpha - torch.expm1(2 * log_alpha).neg().log() / 2, float(log_alpha[0])  # lambda, falling

    def halves(t: Tensor, sign: int) -> Tensor:
        """log(alpha) of sign 1, log(sigma) of sign -1."""
        here, place = knots.to(t), (t * n).clamp(0, n)
        low = (place.floor() - 1).clamp(0, max(n - 2, 0)).long()
        lam = torch.lerp(here[low], here[(low + 1).clamp_max(n - 1)], (place - 1 - low).clamp_min(0))
        start = place * first
        return torch.where(place < 1, start if sign > 0 else torch.expm1(2 * start).neg().log() / 2, F.logsigmoid(2 * sign * lam) / 2)

    def t_of_lambda(lam: Tensor) -> Tensor:
        here = knots.to(lam)
        high = torch.searchsorted(-here, -lam.contiguous()).clamp(1, max(n - 1, 1))
        inside = high + (lam - here[high - 1]) / (here[high.clamp_max(n - 1)] - here[high - 1]) if n > 1 else torch.ones_like(lam)
        start = F.logsigmoid(2 * lam) / 2 / first  # alpha^2 = sigmoid(2 lambda) on every VP path
        return (torch.where(lam > here[0], start, inside) / n).clamp(0, 1)

    return Path("vp-linear", lambda t: halves(t, 1).exp(), lambda t: halves(t, -1).exp(), t_of_lambda, False)


def _log_alpha(config: PathConfig) -> Tensor:
    """After each step of the discrete model, fp64."""
    n = config.num_betas
    match config.betas:
        case "scaled_linear":
            betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, n, dtype=torch.float64).square()
        case "linear":
            betas = torch.linspace(config.beta_start, config.beta_end, n, dtype=torch.float64)
        case "squaredcos_cap_v2":  # arXiv 2102.09672, eq. 17
            bar = ((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2).cos().square()
            betas = (1 - bar[1:] / bar[:-1]).clamp_max(0.999)
    log_alpha = torch.log1p(-betas).cumsum(0) / 2
    if not config.zero_snr:
        return log_alpha
    alpha = log_alpha.exp()
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return alpha.clamp_min(LEAST_ALPHA).log()


def ve_path(sigma_max: float = 80.0, rho: float = 7.0) -> Path:
    """alpha = 1, sigma = sigma_max t^rho: uniform steps in t are then EDM's schedule (arXiv 2206.00364, eq. 5, sigma_min = 0).

    For denoisers that know about large sigma: nothing here scales x_t down to unit variance.
    """
    if not (sigma_max > 0 and rho > 0):
        raise ValueError(f"sigma_max (={sigma_max}) and rho (={rho}) must be > 0: EDM has 80 and 7")
    return Path("ve", torch.ones_like, lambda t: sigma_max * t**rho, lambda lam: torch.exp(-(lam + math.log(sigma_max)) / rho), False)


def timesteps(path: Path, steps: int, *, schedule: Schedule = "uniform", shift: float = 1.0) -> Float64[Tensor, " {steps+1}"]:
    """Times that fall to exactly 0, from exactly 1 but for "edm" and "ays", which begin where their sigma / alpha is the largest.

    "uniform" in t; "lambda" uniform in log-SNR (arXiv 2206.00927), which others call exponential; "karras" uniform in (sigma / alpha)^(1/7) (arXiv
    2206.00364, eq. 5). They end with a step from t = 0.001, or from where sigma / alpha is 1 / 999, to 0. "edm": as "karras", with sigma / alpha
    from 80 to 0.002, as far as the path has that. "ays", "ays-xl": the ten steps that were found for Stable Diffusion 1.5 and SDXL (arXiv
    2404.14507), and others from those by interpolation of log-SNR. `shift` s then moves every time to
    s t / (1 + (s - 1) t) (arXiv 2403.03206, eq. 23): above 1 more steps go to the noisy end, as large pictures need.
    ValueError for what is out of range.
    """
    if steps < 1:
        raise ValueError(f"steps (={steps}) must be >= 1: every step calls the network at least once")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift (={shift}) must be > 0 and finite: 1 leaves the times as they are")
    t = _unshifted(path, steps, schedule)
    return shift * t / (1 + (shift - 1) * t)


def discrete_times(
    steps: int, *, spacing: Spacing = "leading", num_betas: int = 1000, offset: int = 1, ends: Literal["clean", "first"] = "clean"
) -> Float64[Tensor, " {steps+1}"]:
    """Times at which a discrete model is asked, for whom step i = 0 ... num_betas - 1 is at t = (i + 1) / num_betas, as diffusers spaces them.

    "leading": every (num_betas // steps)-th step from 0 on, `offset` later; "leading-open": the same of one step more, without the first (of
    DPM-Solver and UniPC there); "trailing" (arXiv 2305.08891, table 2): from the last step backwards;
    "linspace": from the first to the last step, rounded; "linspace-open": of one more, without the first; "linspace-exact": not rounded.
    "lcm": evenly from fifty that models for few steps learned (arXiv 2310.04378, section 4.3).
    After the last of them comes the clean picture, t = 0, or with `ends` "first" what the first step leaves, at t = 1 / num_betas. ValueError for
    what is out of range.
    """
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing (='{spacing}') must be one of {', '.join(get_args(Spacing))}{nearest(spacing, get_args(Spacing))}")
    most = OF_LCM if spacing == "lcm" else num_betas
    if not 1 <= steps <= most:
        raise ValueError(f"steps (={steps}) must be from 1 to {most}")
    match spacing:
        case "leading" | "leading-open":
            more = int(spacing == "leading-open")
            at = torch.arange(more, steps + more, dtype=torch.float64).flip(0) * (num_betas // (steps + more)) + offset
            if not 0 <= float(at[-1]) <= float(at[0]) < num_betas:
                raise ValueError(f"steps (={steps}) with offset (={offset}) would go beyond the {num_betas} steps of the model: take fewer")
        case "trailing":
            at = (num_betas - torch.arange(steps, dtype=torch.float64) * (num_betas / steps)).round() - 1
        case "linspace" | "linspace-exact":
            at = torch.linspace(0, num_betas - 1, steps, dtype=torch.float64).flip(0)
            at = at.round() if spacing == "linspace" else at
        case "lcm":
            learned = torch.arange(OF_LCM, 0, -1, dtype=torch.float64) * (num_betas // OF_LCM) - 1
            at = learned[(torch.arange(steps, dtype=torch.float64) * OF_LCM / steps).floor().long()]
        case "linspace-open":
            at = torch.linspace(0, num_betas - 1, steps + 1, dtype=torch.float64).round()[1:].flip(0)
    last = 0.0 if ends == "clean" or bool(at[-1] == 0) else 1 / num_betas
    return torch.cat([(at + 1) / num_betas, at.new_tensor([last])])


def _unshifted(path: Path, steps: int, schedule: str) -> Tensor:
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule (='{schedule}') must be one of {', '.join(get_args(Schedule))}{nearest(schedule, get_args(Schedule))}")
    if schedule == "uniform" or (steps == 1 and schedule not in ALIGNED):
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    low, high = path.lam(torch.tensor([1.0, T_MIN], dtype=torch.float64)).clamp(-LAMBDA_MAX, LAMBDA_MAX).tolist()
    if schedule == "edm":
        least, most = EDM_RANGE
        low, high = max(low, -math.log(most)), min(max(high, -math.log(least)), LAMBDA_MAX)
    lam = torch.linspace(low, high, steps, dtype=torch.float64)
    if schedule in ("karras", "edm"):
        lam = -7 * torch.linspace(math.exp(-low / 7), math.exp(-high / 7), steps, dtype=torch.float64).log()
    if schedule in ALIGNED:
        known = -np.log(ALIGNED[schedule])
        lam = torch.from_numpy(np.interp(np.linspace(0, 1, steps + 1)[:-1], np.linspace(0, 1, len(known)), known)).clamp_min(low)
    start = path.t_of_lambda(lam[:1]) if schedule in ("edm", *ALIGNED) else torch.ones(1, dtype=torch.float64)
    return torch.cat([start, path.t_of_lambda(lam[1:]), torch.zeros(1, dtype=torch.float64)])
