"""Adversarial losses of scores, of which large ones mean real, their penalties, and the weight that balances them with reconstruction."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["hinge", "non-saturating", "least-squares"]


def discriminator_loss(kind: Kind, real: Float[Tensor, " *rest"], fake: Float[Tensor, " *rest"]) -> Float[Tensor, ""]:
    """hinge (arXiv 1705.02894): (max(0, 1 - real) + max(0, 1 + fake)) / 2; non-saturating (arXiv 1406.2661): softplus; least-squares (1611.04076)."""
    match kind:
        case "hinge":
            return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        case "non-saturating":
            return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
        case "least-squares":
            return ((real - 1).square().mean() + (fake + 1).square().mean()) / 4
    raise ValueError(f"kind (={kind!r}) must be hinge, non-saturating or least-squares")


def generator_loss(kind: Kind, fake: Float[Tensor, " *rest"]) -> Float[Tensor, ""]:
    """What a generator minimises of the scores of its pictures."""
    match kind:
        case "hinge":
            return -fake.mean()
        case "non-saturating":
            return F.softplus(-fake).mean()
        case "least-squares":
            return (fake - 1).square().mean() / 2
    raise ValueError(f"kind (={kind!r}) must be hinge, non-saturating or least-squares")


def r1_penalty(scores: Float[Tensor, " *patches"], x: Float[Tensor, " *rest"]) -> Float[Tensor, ""]:
    """Mean over pictures of |d scores / d x|^2 / 2, the scores summed over patches (arXiv 1801.04406, equation 9). x must require a gradient."""
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean() / 2


def lecam_penalty(real: Float[Tensor, " *rest"], fake: Float[Tensor, " *rest"], average: Float[Tensor, " 2"]) -> Float[Tensor, ""]:
    """E (real - average of fake)^2 + E (fake - average of real)^2, with running averages (real, fake) of the scores (arXiv 2104.03310, eq. 7)."""
    return (real - average[1]).square().mean() + (fake - average[0]).square().mean()


def adaptive_weight(
    reconstruction: Float[Tensor, " *shape"], adversarial: Float[Tensor, " *shape"], *, most: float, eps: float = 1e-4
) -> Float[Tensor, ""]:
    """|gradient of the reconstruction| / (|gradient of the adversarial loss| + eps), both on the last layer (arXiv 2012.09841, eq. 7)."""
    return (reconstruction.norm() / (adversarial.norm() + eps)).clamp(0, most)
