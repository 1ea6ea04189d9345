"""A mixture of Gaussians fitted to encodings: what a VAE draws from when N(0, I) is not where its encodings lie (arXiv 1903.12436)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.codecs.bottlenecks.vq import k_means
from sfumato.nn.nearest import nearest_index

PARTS = 10
SHRUNK = 0.1  # of a part's covariance towards its diagonal


@torch.no_grad()
def fit_mixture(z: Float[Tensor, "n d"], parts: int = PARTS, seed: int = 0) -> dict[str, Tensor]:
    """{"weights": "k", "means": "k d", "factors": "k d d"} of the k-means parts of z; covariances are shrunk, of few points to their diagonal."""
    z = z.cpu()
    parts = max(1, min(parts, len(z) // (4 * z.shape[1]) or 1))
    centres = k_means(z.float(), parts, seed=seed)
    own = nearest_index(z, centres)
    counts = torch.bincount(own, minlength=parts)
    means, factors = [], []
    for i in range(parts):
        x = z[own == i].double()
        centred = x - x.mean(0)
        covariance = centred.T @ centred / max(len(x) - 1, 1)
        share = max(SHRUNK, min(1.0, z.shape[1] / max(len(x), 1)))
        covariance = (1 - share) * covariance + share * torch.diag(covariance.diagonal() + 1e-6)
        means.append(x.mean(0).float())
        factors.append(torch.linalg.cholesky(covariance + 1e-6 * torch.eye(z.shape[1], dtype=torch.float64)).float())
    return {"weights": counts / counts.sum(), "means": torch.stack(means), "factors": torch.stack(factors)}


def draw_mixture(prior: dict[str, Tensor], generator: torch.Generator) -> Float[Tensor, " d"]:
    """One vector."""
    i = int(torch.multinomial(prior["weights"].double(), 1, generator=generator))
    return prior["means"][i] + prior["factors"][i] @ torch.randn(prior["means"].shape[1], generator=generator)
