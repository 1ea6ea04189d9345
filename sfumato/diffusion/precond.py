"""What a network predicts, and how that becomes x0: with x_t = alpha x0 + sigma noise,

eps = noise, v = alpha noise - sigma x0 (arXiv 2202.00512), flow = d x_t / dt = noise - x0 on the rectified flow (arXiv 2209.03003).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.core.config import nearest
from sfumato.core.seams import Cond
from sfumato.diffusion.path import Path

Prediction = Literal["v", "eps", "x0", "flow"]


def check_prediction(prediction: str, path: Path | None = None) -> None:
    """ValueError where there is no such prediction, or the path does not have it."""
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction (='{prediction}') must be one of {', '.join(get_args(Prediction))}{nearest(prediction, get_args(Prediction))}")
    if prediction == "flow" and path is not None and path.kind != "rf":
        raise ValueError(f"prediction (='flow') needs the path 'rf', not '{path.kind}': use 'v' there")


def target(
    prediction: Prediction, x0: Float[Tensor, " b *rest"], noise: Float[Tensor, " b *rest"], t: Float[Tensor, " b"], path: Path
) -> Float[Tensor, " b *rest"]:
    """What a perfect network would say of x_t = mix(x0, noise, t)."""
    check_prediction(prediction, path)
    match prediction:
        case "x0":
            return x0
        case "eps":
            return noise
        case "flow":
            return noise - x0
        case "v":
            alpha, sigma = path.coefficients(t, x0)
            return alpha * noise - sigma * x0


def to_x0(
    prediction: Prediction, out: Float[Tensor, " b *rest"], x_t: Float[Tensor, " b *rest"], t: Float[Tensor, " b"], path: Path
) -> Float[Tensor, " b *rest"]:
    """A network's output for x_t at t -> x0.

    "v", "x0" and "flow" are exact at both ends. "eps" says nothing of x0 where alpha is 0: x0 is 0 there, the mean of standardised
    latents, so that a first-order step from t = 1 keeps the noise and adds no data.
    """
    check_prediction(prediction, path)
    alpha, sigma = path.coefficients(t, x_t)
    match prediction:
        case "x0":
            return out
        case "eps":
            return _ratio(x_t - sigma * out, alpha)
        case "flow":
            return x_t - sigma * out
        case "v":
            return (alpha * x_t - sigma * out) / (alpha.square() + sigma.square())  # the divisor is 1 on VP paths


def from_x0(
    prediction: Prediction, x0: Float[Tensor, " b *rest"], x_t: Float[Tensor, " b *rest"], t: Float[Tensor, " b"], path: Path
) -> Float[Tensor, " b *rest"]:
    """The inverse of `to_x0`: x0 -> the output that stands for it.

    Where sigma is 0 nothing is known of the noise, and it is taken as 0.
    """
    alpha, sigma = path.coefficients(t, x_t)
    return target(prediction, x0, _ratio(x_t - alpha * x0, sigma), t, path)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where below is 0."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1), 0)


@dataclass(frozen=True)
class Precond:
    """A network `net(x_t, t, cond) -> prediction` as a `Predict`: x_t and t in [0, 1] -> x0, at least fp32.

    x_t has about unit variance on the rf and VP paths and goes in unscaled (c_in = 1), and so do the channels of `cond.concat`.
    With `dtype` the network's x_t is cast to it (t to no less than fp32); the way back to x0 keeps the dtype of x_t.
    ValueError for an unknown prediction, and for "flow" on another path than "rf".
    """

    net: Callable[[Tensor, Tensor, Cond], Tensor]
    prediction: Prediction
    path: Path
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_prediction(self.prediction, self.path)

    def __call__(self, x_t: Float[Tensor, " b *rest"], t: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, " b *rest"]:
        if self.dtype is None:
            out = self.net(x_t, t, cond)
        else:
            out = self.net(x_t.to(self.dtype), t.to(torch.promote_types(self.dtype, torch.float32)), cond)
        return to_x0(self.prediction, out.to(torch.promote_types(x_t.dtype, torch.float32)), x_t, t, self.path)
