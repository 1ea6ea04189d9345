"""How much a model repeats: itself, and the pictures it learned from."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sfumato.metrics.distribution import check_features
from sfumato.metrics.pairwise import ms_ssim

# --- memorisation -------------------------------------------------------------------------------------------------------------------------------


def nearest(x: Float[Tensor, "n d"], known: Float[Tensor, "m d"], *, same: bool = False) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Cosine distance in [0, 2] of each row to the nearest of `known`, and which that is; `same`: they are one set, a row is not its own."""
    check_features(x, known, 1)
    a, b = F.normalize(x, dim=1), F.normalize(known, dim=1)
    distances, rows = [], []
    for start in range(0, len(a), 1024):
        far = 1 - a[start : start + 1024] @ b.T
        if same:
            far[torch.arange(len(far)), torch.arange(start, start + len(far))] = float("inf")
        d, i = far.min(1)
        distances.append(d)
        rows.append(i)
    return torch.cat(distances), torch.cat(rows)


def copied(drawn: Float[Tensor, " n"], own: Float[Tensor, " m"]) -> float:
    """Share of drawn pictures that lie nearer to a training picture than half of what training pictures keep from each other (the median)."""
    if not len(drawn) or not len(own):
        raise ValueError(f"copies are counted among drawn pictures beside training ones: there are {len(drawn)} and {len(own)}")
    return float((drawn < own.median() / 2).float().mean())


# --- variety ------------------------------------------------------------------------------------------------------------------------------------


def pairwise_distance(x: Float[Tensor, "n d"]) -> float:
    """Mean cosine distance in [0, 2] of all pairs: 1 - (|sum u|^2 - n) / (n (n - 1)) with unit rows u, so no pair is looked at."""
    check_features(x, x)
    u, n = F.normalize(x.double(), dim=1), len(x)
    return float(1 - (u.sum(0).square().sum() - n) / (n * (n - 1)))


def intra_class_distance(x: Float[Tensor, "n d"], labels: np.ndarray) -> float:
    """Mean over classes of two pictures or more of their pairwise distance: low where a class has one picture only, drawn again and again."""
    rows = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    found = [pairwise_distance(x[torch.from_numpy(r)]) for r in rows if len(r) > 1]
    if not found:
        raise ValueError("an intra-class distance needs a class with two pictures at least")
    return float(np.mean(found))


def vendi_score(x: Float[Tensor, "n d"]) -> float:
    """exp of the entropy of the eigenvalues of K / n, K the cosine similarities (arXiv 2210.02410): as many as there are different pictures.

    Between 1 (all alike) and n (all orthogonal); by the smaller of the two Gram matrices, whose eigenvalues other than 0 are the same.
    """
    check_features(x, x)
    u = F.normalize(x.double(), dim=1)
    gram = u.T @ u if len(u) > u.shape[1] else u @ u.T
    values = torch.linalg.eigvalsh(gram / len(u)).clamp_min(0)
    values = values[values > 1e-15]
    return float(torch.exp(-(values * values.log()).sum()))


def ms_ssim_diversity(pictures: Float[Tensor, "n 3 h w"], *, pairs: int = 500, seed: int = 0) -> np.ndarray:
    """1 - MS-SSIM of random pairs of different pictures in [0, 1], "pairs" (the measure of arXiv 1610.09585 turned round)."""
    if len(pictures) < 2:
        raise ValueError(f"MS-SSIM diversity needs two pictures at least, not {len(pictures)}")
    rng = np.random.Generator(np.random.PCG64(seed))
    a = rng.integers(0, len(pictures), pairs)
    b = (a + rng.integers(1, len(pictures), pairs)) % len(pictures)
    parts = [(pictures[torch.from_numpy(a[i : i + 32])], pictures[torch.from_numpy(b[i : i + 32])]) for i in range(0, pairs, 32)]
    return np.concatenate([(1 - ms_ssim(x, y)).numpy() for x, y in parts])


def modes_of(real: Float[Tensor, "n d"], modes: int, seed: int = 0, rounds: int = 25) -> Float[Tensor, "modes d"]:
    """Centres of the real pictures by spherical k-means, begun far apart (k-means++): the kinds that samples should cover."""
    u, rng = F.normalize(real.float(), dim=1), np.random.Generator(np.random.PCG64(seed))
    modes = min(modes, len(u))
    chosen = [int(rng.integers(len(u)))]
    apart = 1 - u @ u[chosen[0]]
    for _ in range(modes - 1):
        weight = apart.clamp_min(0).double().numpy()
        chosen.append(int(rng.choice(len(u), p=weight / weight.sum())) if weight.sum() > 0 else int(rng.integers(len(u))))
        apart = torch.minimum(apart, 1 - u @ u[chosen[-1]])
    centres = u[chosen].clone()
    for _ in range(rounds):
        own = (u @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, own, u)
        filled = sums.norm(dim=1) > 0
        centres[filled] = F.normalize(sums[filled], dim=1)
    return centres


def mode_coverage(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], centres: Float[Tensor, "modes d"]) -> dict[str, object]:
    """Which share of the real pictures' modes the samples reach, and how their shares differ (total variation in [0, 1]).

    `real` and `fake` are the shares of each mode, for a map.
    """
    shares = [np.bincount((F.normalize(x.float(), dim=1) @ centres.T).argmax(1).numpy(), minlength=len(centres)) / len(x) for x in (real, fake)]
    there = shares[0] > 0
    return {
        "covered": float((shares[1][there] > 0).mean()),
        "total_variation": float(np.abs(shares[0] - shares[1]).sum() / 2),
        "real": shares[0].tolist(),
        "fake": shares[1].tolist(),
    }
