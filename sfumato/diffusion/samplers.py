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

import numpy as np
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
    k, n, w = _by_weight(g, path)
    for i in range(len(g.t) - 1):
        x0 = _denoised(denoise, x, g.t[i])
        ahead = _first_order(x, x0, g, i)
        if g.sigma[i + 1] > 0:
            slope = (x - g.alpha[i] * x0) / g.sigma[i] - k * x0
            x0 = _denoised(denoise, ahead, g.t[i + 1])
            slope = slope + (ahead - g.alpha[i + 1] * x0) / g.sigma[i + 1] - k * x0
            ahead = (n[i + 1] / n[i]) * x + (n[i + 1] * (w[i + 1] - w[i]) / 2) * slope
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


def sample_dpmpp_single_sde(
    denoise: Denoise, x: Float[Tensor, " b *rest"], ts: Float[Tensor, " times"], path: Path, *, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver++ of the reverse SDE, singlestep of order 2 with a call in the middle of lambda (k-diffusion's dpmpp_sde). Two calls a step, one in
    a step to sigma = 0 or from alpha = 0.

    The noise up to the middle is part of the noise of the whole step, as on one Brownian path.
    """
    if noise is None:
        raise ValueError("this sampler needs noise: pass noise(i) -> unit Gaussian noise of the shape of x")
    x, g = _state(x), _grid(path, ts)
    for i in range(len(g.t) - 1):
        x0 = _denoised(denoise, x, g.t[i])
        h = g.lam[i + 1] - g.lam[i]
        if not math.isfinite(h):
            x = x0 if g.sigma[i + 1] == 0 else g.alpha[i + 1] * x0 + g.sigma[i + 1] * noise(i).to(x)
        else:
            half = path.t_of_lambda(torch.tensor(g.lam[i] + h / 2, dtype=torch.float64))
            alpha, sigma = float(path.alpha(half)), float(path.sigma(half))
            a, b = noise(i).to(x), noise(i).to(x)
            middle = sigma / g.sigma[i] * math.exp(-h / 2) * x - alpha * math.expm1(-h) * x0 + sigma * (-math.expm1(-h)) ** 0.5 * a
            x0 = _denoised(denoise, middle, float(half))
            before, after = g.sigma[i] / g.alpha[i] - sigma / alpha, sigma / alpha - g.sigma[i + 1] / g.alpha[i + 1]
            whole = (before**0.5 * a + after**0.5 * b) / (before + after) ** 0.5
            kept = g.sigma[i + 1] / g.sigma[i] * math.exp(-h)
            x = kept * x - g.alpha[i + 1] * math.expm1(-2 * h) * x0 + g.sigma[i + 1] * (-math.expm1(-2 * h)) ** 0.5 * whole
        yield Step(i, g.t[i + 1], x, x0)


def sample_lms(
    denoise: Denoise, x: Float[Tensor, " b *rest"], ts: Float[Tensor, " times"], path: Path, *, order: int = 4, noise: Noise | None = None
) -> Iterator[Step]:
    """Linear multistep of the last `order` slopes (k-diffusion's lms): the polynomial through them is integrated exactly, however times are spaced.
    One call a step. No noise is used.

    In the variables of Heun's method: y = x / n, dy/dw = eps (or eps - D), w = sigma / n. Its first step is of order 1, and so the whole of order 2,
    with more of the errors gone the shorter that is.
    """
    x, g = _state(x), _grid(path, ts)
    k, n, w = _by_weight(g, path)
    slopes: list[Tensor] = []
    for i in range(len(g.t) - 1):
        x0 = _denoised(denoise, x, g.t[i])
        slopes = [(x - g.alpha[i] * x0) / g.sigma[i] - k * x0, *slopes][:order]
        if i == 0:
            x = _first_order(x, x0, g, i)
        else:
            shares = _integrals([w[i - j] for j in range(len(slopes))], w[i], w[i + 1])
            x = (n[i + 1] / n[i]) * x + n[i + 1] * sum(c * d for c, d in zip(shares, slopes, strict=True))
        yield Step(i, g.t[i + 1], x, x0)


def _by_weight(g: _Grid, path: Path) -> tuple[float, list[float], list[float]]:
    """k, n = alpha + k sigma, and w = sigma / n at each of the times: k is 1 where alpha can be 0."""
    k = float(path.reaches_zero)
    n = [a + k * s for a, s in zip(g.alpha, g.sigma, strict=True)]
    return k, n, [s / m for s, m in zip(g.sigma, n, strict=True)]


def _integrals(knots: list[float], start: float, end: float) -> list[float]:
    """Of Lagrange's polynomials, which are 1 at one knot and 0 at the others, from start to end."""
    found = []
    for j, at in enumerate(knots):
        others = [v - start for m, v in enumerate(knots) if m != j]
        whole = np.poly1d(others, r=True) / math.prod(at - start - v for v in others) if others else np.poly1d([1.0])
        found.append(float(whole.integ()(end - start)))
    return found


def sample_plms(
    denoise: Denoise, x: Float[Tensor, " b *rest"], ts: Float[Tensor, " times"], path: Path, *, noise: Noise | None = None
) -> Iterator[Step]:
    """PLMS (arXiv 2202.09778, Alg. 2): first-order steps along the mean of the last four slopes that Adams and Bashforth weigh for equal steps, and
    so of order 2 on others. One call a step, two in the first. No noise is used. Slopes are those of the path, whatever the network predicts.
    """
    x, g = _state(x), _grid(path, ts)
    k, n, w = _by_weight(g, path)
    slopes: list[Tensor] = []
    for i in range(len(g.t) - 1):
        x0 = _denoised(denoise, x, g.t[i])
        slopes = [(x - g.alpha[i] * x0) / g.sigma[i] - k * x0, *slopes][:4]
        if i == 0:
            ahead, slope = _first_order(x, x0, g, i), slopes[0]
            if g.sigma[1] > 0:
                x0 = _denoised(denoise, ahead, g.t[1])
                slope = (slope + (ahead - g.alpha[1] * x0) / g.sigma[1] - k * x0) / 2
        else:
            slope = sum(c * d for c, d in zip(ADAMS[len(slopes)], slopes, strict=True))
        if i or g.sigma[1] > 0:
            ahead = (n[i + 1] / n[i]) * x + n[i + 1] * (w[i + 1] - w[i]) * slope
        x = ahead
        yield Step(i, g.t[i + 1], x, x0)


ADAMS = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}  # of equal steps, the last slope first


def sample_unipc(
    denoise: Denoise, x: Float[Tensor, " b *rest"], ts: Float[Tensor, " times"], path: Path, *, noise: Noise | None = None
) -> Iterator[Step]:
    """UniPC of order 2 with B(h) = e^h - 1 (arXiv 2302.04867, Alg. 1 and 2): each predicted x is corrected by what the network says there, in the
    call that the next step needs anyhow, and so of order 3. One call a step. No noise is used. Its first and last predictions are first-order.
    """
    x, g = _state(x), _grid(path, ts)
    before: list[tuple[float, Tensor]] = []  # (lambda, D) of the steps before, the last first
    start = x
    for i in range(len(g.t) - 1):
        x0 = _denoised(denoise, x, g.t[i])
        if before and math.isfinite(before[0][0]):
            x = _unipc_step(start, x0, before, g, i - 1)
        before = [(g.lam[i], x0), *(b for b in before if math.isfinite(b[0]))][:2]
        start = x
        x = _unipc_step(x, None, before[: 1 if g.sigma[i + 1] == 0 else 2], g, i)
        yield Step(i, g.t[i + 1], x, x0)


def _unipc_step(x: Tensor, after: Tensor | None, before: list[tuple[float, Tensor]], g: _Grid, i: int) -> Tensor:
    """From time i to the next, by D there and earlier; with `after`, D at the end of the step, the corrected one."""
    (lam, x0), *earlier = before
    h = g.lam[i + 1] - lam
    b = math.expm1(-h)
    x = g.sigma[i + 1] / g.sigma[i] * x - g.alpha[i + 1] * b * x0
    if after is None and not earlier:
        return x
    ratios, slopes = [(at - lam) / h for at, _ in earlier], [(d - x0) * (h / (at - lam)) for at, d in earlier]
    if after is None:
        return x - g.alpha[i + 1] * b / 2 * slopes[0]
    if not earlier:
        return x - g.alpha[i + 1] * b / 2 * (after - x0)
    first = b / -h - 1  # phi_2 and phi_3 of -h, in the paper's equation 5
    wanted = np.array([first, (first / -h - 1 / 2) * 2]) / b
    shares = np.linalg.solve(np.array([[1.0, 1.0], [ratios[0], 1.0]]), wanted)
    return x - g.alpha[i + 1] * b * (float(shares[0]) * slopes[0] + float(shares[1]) * (after - x0))


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
    "dpmpp_sde": SamplerInfo(sample_dpmpp_single_sde, 2, 2, stochastic=True),
    "dpmpp_3m_sde": SamplerInfo(partial(sample_dpmpp_sde, order=3), 2, 1, stochastic=True),
    "lms": SamplerInfo(sample_lms, 2, 1),
    "plms": SamplerInfo(sample_plms, 2, 1),
    "unipc": SamplerInfo(sample_unipc, 3, 1),
    "lcm": SamplerInfo(sample_lcm, 0, 1, stochastic=True),
}


def sampler(name: str) -> SamplerInfo:
    """The table's line for a name. Raises ValueError that names the nearest."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler (='{name}') must be one of {', '.join(SAMPLERS)}{nearest(name, SAMPLERS)}")
    return SAMPLERS[name]
