"""Whether pictures come out whole: failures, sharpness and blur, and how far figures move when a request is changed a little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

BLANK = 0.01  # standard deviation over all pixels, of a range of 1
SATURATED = 0.5  # share of pixels whose colour is driven to the ends of its range
BLURRED = 0.1  # of the reference's median sharpness

LAPLACE = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


def _grey(x: Tensor) -> Tensor:
    return (x.double() * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=x.device)[:, None, None]).sum(1, keepdim=True)


def sharpness(x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Variance of the Laplacian of the luma, of pictures in [0, 1] (Pech-Pacheco et al. 2000): low where nothing is sharp. Grows with contrast."""
    kernel = torch.tensor(LAPLACE, dtype=torch.float64, device=x.device)[None, None]
    return F.conv2d(_grey(x), kernel).var((1, 2, 3), correction=0)


def blur(x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """How little a picture changes when it is blurred once more, in [0, 1], 1 is wholly blurred (Crete et al. 2007); free of contrast."""
    grey, worst = _grey(x), []
    for kernel, along in ((torch.full((1, 1, 1, 9), 1 / 9), -1), (torch.full((1, 1, 9, 1), 1 / 9), -2)):
        pad = (4, 4, 0, 0) if along == -1 else (0, 0, 4, 4)
        soft = F.conv2d(F.pad(grey, pad, mode="replicate"), kernel.double().to(x.device))
        sharp_steps, soft_steps = (a.diff(dim=along).abs() for a in (grey, soft))
        lost = (sharp_steps - soft_steps).clamp_min(0).sum((1, 2, 3))
        all_steps = sharp_steps.sum((1, 2, 3))
        worst.append(torch.where(all_steps > 0, 1 - lost / all_steps.clamp_min(1e-12), torch.ones_like(lost)))
    return torch.stack(worst).max(0).values


def clipped(x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Share of pixels, neither white nor black, of which two channels or more are at 0 or 1: what too much guidance does."""
    end = ((x <= 0.5 / 255) | (x >= 1 - 0.5 / 255)).sum(1)
    same = x.amax(1) - x.amin(1) < 0.5 / 255
    return ((end >= 2) & ~same).double().mean((1, 2))


@dataclass(frozen=True)
class Usual:
    """What real pictures of the same size are like: the median of their sharpness, and the most that is clipped in any but one in a hundred."""

    sharpness: float
    clipped: float

    @classmethod
    def of(cls, real: Float[Tensor, "b 3 h w"]) -> Usual:
        return cls(float(sharpness(real).median()), float(clipped(real).quantile(0.99)))


def failures(x: Float[Tensor, "b 3 h w"], usual: Usual | None = None) -> dict[str, Bool[Tensor, " b"]]:
    """Which pictures in [0, 1] failed, by kind: not finite, blank (one colour), saturated, blurred.

    With `usual`, a picture that is as clipped as real ones are has not failed; without it none is called blurred.
    """
    finite = torch.isfinite(x).flatten(1).all(1)
    safe = torch.where(finite[:, None, None, None], x, torch.zeros_like(x))
    blank = safe.double().std((2, 3)).amax(1) < BLANK
    saturated = clipped(safe) > max(SATURATED, usual.clipped if usual else 0.0)
    soft = sharpness(safe) < BLURRED * usual.sharpness if usual else torch.zeros_like(finite)
    return {"not_finite": ~finite, "blank": blank & finite, "saturated": saturated & finite & ~blank, "blurred": soft & finite & ~blank}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation, range, and the standard deviation in parts of the mean, of one figure over seeds or settings."""
    v = np.asarray(values, dtype=np.float64)
    mean, deviation = float(v.mean()), float(v.std(ddof=1)) if len(v) > 1 else 0.0
    return {"mean": mean, "std": deviation, "min": float(v.min()), "max": float(v.max()), "relative": deviation / abs(mean) if mean else 0.0}


def spreads(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """`spread` of every figure that all runs have as a number: of one training over seeds, of one request over settings."""
    names = [k for k, v in runs[0].items() if isinstance(v, (int, float)) and not isinstance(v, bool)] if runs else []
    return {k: spread([float(r[k]) for r in runs]) for k in names if all(isinstance(r.get(k), (int, float)) for r in runs)}
