"""From noise to a picture: samplers of the probability flow, for every path, given only a denoiser D(x, t) = E[x0 | x].

The first-order step all of them are made of, x' = alpha' D + (sigma' / sigma) (x - alpha D), is DDIM (arXiv 2010.02502, eq. 12), and
Euler in sigma / alpha as well. A sampler is a generator with one `Step` a step, and the result is the last x; progress, preview and
cancelling are the caller's loop, and so is `torch.no_grad`. State is at least fp32, and the coefficients are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.core.config import nearest
from sfumato.core.seams import Denoise
from sfumato.diffusion.path import Path

Noise = Callable[[int], Tensor]  # step i -> unit Gaussian noise "b ..." like x, one stream a sample


class Step(NamedTuple):
    """After step i: `x` is at time `t`, and `x0` is the last denoised picture on the way there."""

    i: int
    t: float
    x: Float[Tensor, " b *rest"]
    x0: Float[Tensor, " b *rest"]


class _Grid(NamedTuple):
    """Coefficients at each of the times, as Python floats."""

    t: list[float]
    alpha: list[float]
    sigma: list[float]
    lam: list[float]


def _grid(path: Path, ts: Tensor) -> _Grid:
    ts = ts.detach().cpu().double()
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(f"steps (={ts.numel() - 1}) must be >= 1: ts is of shape {tuple(ts.shape)}, and needs (steps + 1,) times")
    if not (ts[0] <= 1 and ts[-1] >= 0 and bool((ts.diff() < 0).all())):
        raise ValueError(f"ts (={ts.tolist()}) must fall strictly, from at most 1 to at least 0: see sfumato.diffusion.path.timesteps")
    return _Grid(*(v.tolist() for v in (ts, path.alpha(ts), path.sigma(ts), path.lam(ts))))


def _state(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _denoised(denoise: Denoise, x: Tensor, t: float) -> Tensor:
    """D(x, t), with t as "b" in the dtype of x."""
    return denoise(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device)).to(x.dtype)


def _first_order(x: Tensor, x0: Tensor, g: _Grid, i: int, s_up: float = 0.0) -> Tensor:
    """x' = alpha' D + (s_down / sigma) (x - alpha D), s_down^2 + s_up^2 = sigma'^2: room for noise of std s_up."""
    s_down = max(g.sigma[i + 1] ** 2 - s_up**2, 0.0) ** 0.5 if s_up else g.sigma[i + 1]
    return g.alpha[i + 1] * x0 + (s_down / g.sigma[i]) * (x - g.alpha[i] * x0)


def sample_ddim(
    denoise: Denoise, x: Float[Tensor, " b *rest"], ts: Float[Tensor, " times"], path: Path, *, eta: float = 0.0, noise: Noise | None = None
) -> Iterator[Step]:
    """DDIM (arXiv 2010.02502) from x at ts[0] along the falling times ts, one more than steps. Order 1.

    eta is the share of noise that is fresh: 0 none (Euler), 1 ancestral sampling. s_up = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)
    (eq. 16, on any path). Raises ValueError where eta is not in [0, 1], or above 0 without `noise`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta (={eta}) must be in [0, 1]: 0 adds no noise, 1 is ancestral sampling")
    if eta > 0 and noise is None:
        raise ValueError(f"eta (={eta}) above 0 needs noise: pass noise(i) -> unit Gaussian noise of the shape of x")
    x, g = _state(x), _grid(path, ts)
    for i in range(len(g.t) - 1):
        x0 = _denoised(denoise, x, g.t[i])
        kept = g.alpha[i] * g.sigma[i + 1] / (g.alpha[i + 1] * g.sigma[i])
        s_up = eta * g.sigma[i + 1] * max(1 - kept**2, 0.0) ** 0.5
        x = _first_order(x, x0, g, i, s_up)
        if s_up > 0:
            x = x + s_up * noise(i).to(x)
        yield Step(i, g.t[i + 1], x, x0)


def sample_heun(
    denoise: Denoise, x: Float[Tensor, " b *rest"], ts: Float[Tensor, " times"], path: Path, *, noise: Noise | None = None
) -> Iterator[Step]:
    """Heun's method (arXiv 2206.00364, Alg. 1). Order 2, two calls a step, one in a step to sigma = 0. No noise is used.

    With n = alpha, y = x / n and w = sigma / n the flow is dy/dw = eps, where eps = (x - alpha D) / sigma. Where alpha can be 0,
    n = alpha + sigma instead, and dy/dw = eps - D.
    """
    x, g = _state(x), _grid(path, ts)
    k = float(path.reaches_zero)
    n = [a + k * s for a, s in zip(g.alpha, g.sigma, strict=True)]
    for i in range(len(g.t) - 1):
        x0 = _denoised(denoise, x, g.t[i])
        ahead = _first_order(x, x0, g, i)
        if g.sigma[i + 1] > 0:
            slope = (x - g.alpha[i] * x0) / g.sigma[i] - k * x0
            x0 = _denoised(denoise, ahead, g.t[i + 1])
            slope = slope + (ahead - g.alpha[i + 1] * x0) / g.sigma[i + 1] - k * x0
            dw = g.sigma[i + 1] / n[i + 1] - g.sigma[i] / n[i]
            ahead = (n[i + 1] / n[i]) * x + (n[i + 1] * dw / 2) * slope
        x = ahead
        yield Step(i, g.t[i + 1], x, x0)


def sample_dpmpp_2m(
    denoise: Denoise, x: Float[Tensor, " b *rest"], ts: Float[Tensor, " times"], path: Path, *, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M) (arXiv 2211.01095, Alg. 2): the first-order step with D extrapolated in lambda. Order 2, one call a step. No noise is used.

    Its first and last steps are first-order; so is the second where the first began at alpha = 0, infinitely far away in lambda.
    """
    x, g = _state(x), _grid(path, ts)
    steps, before = len(g.t) - 1, None
    for i in range(steps):
        x0 = _denoised(denoise, x, g.t[i])
        ahead = x0
        if before is not None and i < steps - 1:
            inverse_2r = 0.5 * (g.lam[i + 1] - g.lam[i]) / (g.lam[i] - g.lam[i - 1])
            ahead = x0 + inverse_2r * (x0 - before)
        x, before = _first_order(x, ahead, g, i), x0
        yield Step(i, g.t[i + 1], x, x0)


def sample_dpmpp_sde(
    denoise: Denoise, x: Float[Tensor, " b *rest"], ts: Float[Tensor, " times"], path: Path, *, order: int = 2, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver++ of the reverse SDE, multistep, `order` 2 or 3 (arXiv 2211.01095, section 5, and k-diffusion's dpmpp_3m_sde): D extrapolated in
    lambda by the last two or three, the noise of the SDE exact. One call a step.

    With h = lambda' - lambda: x' = (sigma' / sigma) e^-h x + alpha' (1 - e^-2h) D + corrections + sigma' sqrt(1 - e^-2h) noise. What diffusers calls
    sde-dpmsolver++ of order 3 has another sign in its last correction, which does not vanish with h; k-diffusion's is the one here.
    """
    if noise is None:
        raise ValueError("this sampler needs noise: pass noise(i) -> unit Gaussian noise of the shape of x")
    x, g = _state(x), _grid(path, ts)
    before: list[tuple[float, Tensor]] = []  # (h, D) of the steps before, the last first
    for i in range(len(g.t) - 1):
        x0 = _denoised(denoise, x, g.t[i])
        h = g.lam[i + 1] - g.lam[i]
        x = (g.sigma[i + 1] / g.sigma[i] * math.exp(-h)) * x + (g.alpha[i + 1] * -math.expm1(-2 * h)) * x0
        if g.sigma[i + 1] > 0:
            x = x + g.alpha[i + 1] * _corrections(x0, 2 * h, h, before) + g.sigma[i + 1] * (-math.expm1(-2 * h)) ** 0.5 * noise(i).to(x)
        before = [(h, x0), *before][: order - 1] if h < math.inf else []
        yield Step(i, g.t[i + 1], x, x0)


def _corrections(x0: Tensor, g: float, h: float, before: list[tuple[float, Tensor]]) -> Tensor:
    """What the slopes of D add in a step of h, by the D's before."""
    slopes = []
    for length, earlier in before:
        later = x0 if not slopes else before[len(slopes) - 1][1]
        slopes.append((later - earlier) * (h / length))
    if not slopes:
        return torch.zeros_like(x0)
    if len(slopes) == 1:
        return -math.expm1(-g) / 2 * slopes[0]
    r0, r1 = (length / h for length, _ in before)
    bend = (slopes[0] - slopes[1]) / (r0 + r1)
    phi2 = math.expm1(-g) / g + 1
    return phi2 * (slopes[0] + r0 * bend) - (phi2 / g - 0.5) * bend


def sample_lcm(
    denoise: Denoise, x: Float[Tensor, " b *rest"], ts: Float[Tensor, " times"], path: Path, *, noise: Noise | None = None
) -> Iterator[Step]:
    """Multistep consistency sampling (arXiv 2303.01469, Alg. 1, and 2310.04378): the denoised picture, noised anew at every step. For models
    distilled for it, in 2 to 8 steps.
    """
    if noise is None:
        raise ValueError("this sampler needs noise: pass noise(i) -> unit Gaussian noise of the shape of x")
    x, g = _state(x), _grid(path, ts)
    for i in range(len(g.t) - 1):
        x0 = _denoised(denoise, x, g.t[i])
        x = x0 if g.sigma[i + 1] == 0 else g.alpha[i + 1] * x0 + g.sigma[i + 1] * noise(i).to(x0)
        yield Step(i, g.t[i + 1], x, x0)


class SamplerInfo(NamedTuple):
    """`function(denoise, x, ts, path, *, noise=None)`, its order of convergence (of stochastic ones in mean and variance; 0: it does not
    converge, and is for models distilled for it), network calls a step, and whether it needs noise.
    """

    function: Callable[..., Iterator[Step]]
    order: int
    calls_per_step: int
    stochastic: bool = False


SAMPLERS = {
    "euler": SamplerInfo(partial(sample_ddim, eta=0.0), 1, 1),
    "ddim": SamplerInfo(sample_ddim, 1, 1),
    "ancestral": SamplerInfo(partial(sample_ddim, eta=1.0), 1, 1, stochastic=True),
    "heun": SamplerInfo(sample_heun, 2, 2),
    "dpmpp_2m": SamplerInfo(sample_dpmpp_2m, 2, 1),
    "dpmpp_2m_sde": SamplerInfo(sample_dpmpp_sde, 2, 1, stochastic=True),
    "dpmpp_3m_sde": SamplerInfo(partial(sample_dpmpp_sde, order=3), 2, 1, stochastic=True),
    "lcm": SamplerInfo(sample_lcm, 0, 1, stochastic=True),
}


def sampler(name: str) -> SamplerInfo:
    """The table's line for a name. Raises ValueError that names the nearest."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler (='{name}') must be one of {', '.join(SAMPLERS)}{nearest(name, SAMPLERS)}")
    return SAMPLERS[name]
