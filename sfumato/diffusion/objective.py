"""What a denoiser is trained for: the mean squared error of its prediction, at times drawn more often from the middle.

Logit-normal times: t = sigmoid(P_mean + P_std z), z unit Gaussian (arXiv 2403.03206, eq. 19). They hardly ever reach the ends, where a
sampler begins and finishes, so a share of the times is uniform.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.core.config import nearest
from sfumato.core.seams import Cond
from sfumato.diffusion.path import Path
from sfumato.diffusion.precond import Prediction, check_prediction, target

TimeSampling = Literal["uniform", "logit-normal"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """`uniform_fraction` of logit-normal times are uniform; P_mean above 0 trains noisier times. `min_snr_gamma`: see `snr_weight`."""

    prediction: Prediction = "flow"
    t_sampling: TimeSampling = "logit-normal"
    P_mean: float = 0.0
    P_std: float = 1.0
    uniform_fraction: float = 0.1
    min_snr_gamma: float | None = None

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        known = get_args(TimeSampling)
        if self.t_sampling not in known:
            raise ValueError(f"t_sampling (='{self.t_sampling}') must be one of {', '.join(known)}{nearest(self.t_sampling, known)}")
        if not self.P_std > 0:
            raise ValueError(f"P_std (={self.P_std}) must be > 0: it spreads the times, arXiv 2403.03206 has 1")
        if not 0 <= self.uniform_fraction <= 1:
            raise ValueError(f"uniform_fraction (={self.uniform_fraction}) must be in [0, 1]: 0 draws every time logit-normal")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma (={self.min_snr_gamma}) must be > 0, or None for no weighting: arXiv 2303.09556 has 5")


def draw_t(config: ObjectiveConfig, u: Float[Tensor, " b"], choose: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Times in [0, 1] from two independent uniform draws in (0, 1): u gives the time, choose which distribution it is of."""
    if config.t_sampling == "uniform":
        return u
    t = torch.sigmoid(config.P_mean + config.P_std * torch.special.ndtri(u))
    return torch.where(choose < config.uniform_fraction, u, t)


def snr_weight(prediction: Prediction, t: Float[Tensor, " b"], path: Path, gamma: float) -> Float[Tensor, " b"]:
    """Weights of a prediction's squared error that make it min(SNR, gamma) times that of x0 (arXiv 2303.09556).

    SNR = alpha^2 / sigma^2. Written so that nothing is infinite at the ends.
    """
    data, noise = path.alpha(t).square(), path.sigma(t).square()
    match prediction:
        case "x0":
            return (data / noise).clamp_max(gamma)
        case "eps":
            return (gamma * noise / data).clamp_max(1)
        case "v":
            return torch.minimum(data, gamma * noise) / (data + noise).square()
        case "flow":
            return torch.minimum(data, gamma * noise)


def loss(
    net: Callable[[Tensor, Tensor, Cond], Tensor],
    x0: Float[Tensor, " b *rest"],
    noise: Float[Tensor, " b *rest"],
    t: Float[Tensor, " b"],
    cond: Cond,
    path: Path,
    config: ObjectiveConfig,
    weight: Float[Tensor, " b"] | None = None,
    live: Bool[Tensor, " c"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Mean over samples of weight times squared error, at least in fp32. The noise is unit Gaussian.

    `live` says which channels count: those that a codec leaves dead hold nothing to learn.

    Stats: "mse" without weights, and "target_square", the error of a network that always says 0.
    Raises ValueError where the path does not have the prediction.
    """
    wanted = target(config.prediction, x0, noise, t, path)
    wanted = wanted.to(torch.promote_types(wanted.dtype, torch.float32))
    out = net(path.mix(x0, noise, t), t, cond).to(wanted.dtype)
    if live is not None:
        out, wanted = out[:, live], wanted[:, live]
    mse = (out - wanted).square().flatten(1).mean(1)
    weighted = mse if weight is None else mse * weight
    if config.min_snr_gamma is not None:
        weighted = weighted * snr_weight(config.prediction, t, path, config.min_snr_gamma).to(mse.dtype)
    return weighted.mean(), {"mse": mse.detach().mean(), "target_square": wanted.detach().square().mean()}
