"""How much a model repeats: itself, and the pictures it learned from."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def nearest(x: Float[Tensor, "n d"], known: Float[Tensor, "m d"], *, same: bool = False) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Cosine distance in [0, 2] of each row to the nearest of `known`, and which that is; `same`: they are one set, a row is not its own."""
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
    return float((drawn < own.median() / 2).float().mean())
