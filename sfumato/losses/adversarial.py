"""Adversarial losses of scores, of which large ones mean real; gradient penalties; and the weight that balances them with reconstruction.

Losses take the scores as the network gives them, without a sigmoid; several scores a picture (patches) are averaged. A penalty looks at the norm of
d score / d x of each picture, where the paper says: at real pictures, at generated ones, between them, or beside real ones.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["minimax", "non-saturating", "least-squares", "hinge", "wasserstein", "relativistic"]
KINDS: tuple[str, ...] = get_args(Kind)


def discriminator_loss(kind: Kind, real: Float[Tensor, " *rest"], fake: Float[Tensor, " *rest"]) -> Float[Tensor, ""]:
    """What a discriminator minimises.

    minimax, non-saturating: -log sigma(real) - log(1 - sigma(fake)) (arXiv 1406.2661, eq. 1); least-squares: (real - 1)^2 / 2 + (fake + 1)^2 / 2
    (arXiv 1611.04076, eq. 8); hinge: max(0, 1 - real) + max(0, 1 + fake) (arXiv 1705.02894, eq. 7); wasserstein: fake - real (1701.07875, eq. 2);
    relativistic: -log sigma(real - fake), in pairs (arXiv 1807.00734; 2501.05441, eq. 2).
    """
    match kind:
        case "minimax" | "non-saturating":
            return F.softplus(-real).mean() + F.softplus(fake).mean()
        case "least-squares":
            return ((real - 1).square().mean() + (fake + 1).square().mean()) / 2
        case "hinge":
            return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        case "wasserstein":
            return fake.mean() - real.mean()
        case "relativistic":
            return F.softplus(fake - real).mean()
    raise ValueError(f"kind (={kind!r}) must be one of {', '.join(KINDS)}")


def generator_loss(kind: Kind, fake: Float[Tensor, " *rest"], real: Float[Tensor, " *rest"] | None = None) -> Float[Tensor, ""]:
    """What a generator minimises of the scores of its pictures; relativistic compares them in pairs with those of `real` ones.

    minimax: log(1 - sigma(fake)), which saturates where the discriminator is sure (arXiv 1406.2661, eq. 1); non-saturating: -log sigma(fake) (its
    section 3); least-squares: (fake - 1)^2 / 2 (arXiv 1611.04076, eq. 8 with c = 1); hinge and wasserstein: -fake (arXiv 1802.05957, eq. 17;
    1701.07875, Alg. 1); relativistic: -log sigma(fake - real) (arXiv 1807.00734; 2501.05441, eq. 2).
    """
    match kind:
        case "minimax":
            return -F.softplus(fake).mean()
        case "non-saturating":
            return F.softplus(-fake).mean()
        case "least-squares":
            return (fake - 1).square().mean() / 2
        case "hinge" | "wasserstein":
            return -fake.mean()
        case "relativistic":
            if real is None:
                raise ValueError("relativistic compares with real pictures: give their scores as real")
            return F.softplus(real - fake).mean()
    raise ValueError(f"kind (={kind!r}) must be one of {', '.join(KINDS)}")


def middle(kind: Kind, real: Float[Tensor, " *rest"], fake: Float[Tensor, " *rest"]) -> Float[Tensor, ""]:
    """The score above which a picture counts as taken for real: 0, or where scores mean something by their differences only, halfway."""
    return (real.mean() + fake.mean()) / 2 if kind in ("wasserstein", "relativistic") else real.new_zeros(())


# --- gradient penalties -------------------------------------------------------------------------------------------------------------------------


def squared_slopes(scores: Float[Tensor, " *patches"], x: Float[Tensor, " b *rest"]) -> Float[Tensor, " b"]:
    """|d score / d x|^2 of each picture, the scores summed over patches; differentiable once more. x must require a gradient."""
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def r1_penalty(scores: Float[Tensor, " *patches"], x: Float[Tensor, " b *rest"]) -> Float[Tensor, ""]:
    """E |d score / d x|^2 / 2 (arXiv 1801.04406, eq. 9): R1 at real pictures, R2 at generated ones. x must require a gradient."""
    return squared_slopes(scores, x).mean() / 2


def slope_penalty(
    scores: Float[Tensor, " *patches"], x: Float[Tensor, " b *rest"], *, target: float = 1.0, one_sided: bool = False
) -> Float[Tensor, ""]:
    """E (|d score / d x| - target)^2: WGAN-GP between real and generated pictures (arXiv 1704.00028, eq. 3), DRAGAN beside real ones
    (arXiv 1705.07215, eq. 3). `one_sided` counts only slopes above the target (arXiv 1709.08894, eq. 8). x must require a gradient.
    """
    return towards(squared_slopes(scores, x), target, one_sided=one_sided)


def towards(squared: Float[Tensor, " b"], target: float = 1.0, *, one_sided: bool = False) -> Float[Tensor, ""]:
    """That penalty, of squared slopes that are there already."""
    norm = (squared + 1e-12).sqrt() - target  # the root has no slope at 0
    return (F.relu(norm) if one_sided else norm).square().mean()


def between(real: Float[Tensor, " b *rest"], fake: Float[Tensor, " b *rest"], u: Float[Tensor, " b"]) -> Float[Tensor, " b *rest"]:
    """u real + (1 - u) fake: where WGAN-GP looks, u uniform in [0, 1]."""
    u = u.reshape(-1, *[1] * (real.ndim - 1)).to(real)
    return u * real + (1 - u) * fake


def beside(real: Float[Tensor, " b *rest"], u: Float[Tensor, " b *rest"], way: Float[Tensor, " b"], reach: float = 0.5) -> Float[Tensor, " b *rest"]:
    """real + way * reach * std(real) * u, std over all of the batch: where the code of DRAGAN looks, u and `way`, one a picture, uniform in [0, 1].
    (Its paper's eq. 3 has Gaussian noise there.)
    """
    return real + way.reshape(-1, *[1] * (real.ndim - 1)).to(real) * (reach * real.std()) * u


def lecam_penalty(real: Float[Tensor, " *rest"], fake: Float[Tensor, " *rest"], average: Float[Tensor, " 2"]) -> Float[Tensor, ""]:
    """E (real - average of fake)^2 + E (fake - average of real)^2, with running averages (real, fake) of the scores (arXiv 2104.03310, eq. 7)."""
    return (real - average[1]).square().mean() + (fake - average[0]).square().mean()


def adaptive_weight(
    reconstruction: Float[Tensor, " *shape"], adversarial: Float[Tensor, " *shape"], *, most: float, eps: float = 1e-4
) -> Float[Tensor, ""]:
    """|gradient of the reconstruction| / (|gradient of the adversarial loss| + eps), both on the last layer (arXiv 2012.09841, eq. 7)."""
    return (reconstruction.norm() / (adversarial.norm() + eps)).clamp(0, most)
