"""Errors of pixels, and the likelihood of a picture under what a decoder says of it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

CHARBONNIER = 1e-3


def layers_of(x: Float[Tensor, "b 4 h w"]) -> Float[Tensor, "b 7 h w"]:
    """Premultiplied RGBA in [-1, 1] -> over black, over white and alpha: an error in any of them is seen."""
    rgb, alpha = x[:, :3], x[:, 3:]
    return torch.cat([rgb, rgb + 1 - alpha, alpha], dim=1)


def pixel_loss(
    prediction: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
    *,
    l1: float = 1.0,
    mse: float = 0.0,
    charbonnier: float = 0.0,
    edges: float = 0.0,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Weighted absolute, squared, Charbonnier (sqrt(d^2 + 1e-6)) and finite-difference errors; in [-1, 1], premultiplied where c is 4."""
    d = layers_of(prediction) - layers_of(target) if prediction.shape[1] == 4 else prediction - target
    absolute, squared = d.abs().mean(), d.square().mean()
    loss = l1 * absolute + mse * squared
    if charbonnier:
        loss = loss + charbonnier * (d.square() + CHARBONNIER**2).sqrt().mean()
    if edges:
        loss = loss + edges * ((d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean())
    return loss, {"l1": absolute.detach(), "l2": squared.detach()}


def logistic_nll(x: Float[Tensor, "b c h w"], mean: Float[Tensor, "b c h w"], log_scale: Float[Tensor, " *scale"]) -> Float[Tensor, " b"]:
    """-log p(x) in nats of pictures of 256 levels in [-1, 1] under a logistic distribution that is integrated over each level, the outermost ones
    to infinity (arXiv 1606.04934, appendix). Summed over values of a picture.
    """
    half = 1 / 255
    x = (x * 127.5 + 127.5).round() / 127.5 - 1  # the middle of its level
    inverse = torch.exp(-log_scale)
    above, below = inverse * (x - mean + half), inverse * (x - mean - half)
    inside = torch.sigmoid(above) - torch.sigmoid(below)
    density = inverse * (x - mean)
    tail = density - log_scale - 2 * F.softplus(density) + math.log(2 * half)  # where the level is too thin to be integrated
    log_p = torch.where(inside > 1e-5, inside.clamp_min(1e-12).log(), tail)
    log_p = torch.where(x < -1 + half, F.logsigmoid(above), torch.where(x > 1 - half, -F.softplus(below), log_p))
    return -log_p.flatten(1).sum(1)
