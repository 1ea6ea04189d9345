"""How sure a figure is: 95 % intervals by the bootstrap or the jackknife, and paired tests of which differences are real."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

DRAWS = 1000
LEVELS = (2.5, 97.5)
Z95 = 1.959964  # of the normal distribution


def bootstrap(statistic: Callable[..., Any], *columns: np.ndarray, seed: int = 0, draws: int = DRAWS) -> list[float]:
    """The 95 % percentile interval of statistic(*columns), which works along the last axis; rows of all columns are drawn together.

    [nan, nan] where there are no rows.
    """
    n = len(columns[0])
    if any(len(c) != n for c in columns):
        raise ValueError(f"columns must have as many rows as each other, not {[len(c) for c in columns]}")
    if n == 0:
        return [math.nan, math.nan]
    rows = np.random.Generator(np.random.PCG64(seed)).integers(0, n, (draws, n))
    values = statistic(*(np.asarray(c, dtype=np.float64)[rows] for c in columns))
    finite = values[np.isfinite(values)]
    return [float(v) for v in np.percentile(finite, LEVELS)] if len(finite) else [math.nan, math.nan]


def mean_interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """[mean, low, high] of the mean of values "n"; of shares (values that are all 0 or 1) Wilson's interval, which is never of no width."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) and np.isin(values, (0.0, 1.0)).all():
        return [float(values.mean()), *share_interval(float(values.mean()), len(values))]
    return [float(values.mean()) if len(values) else math.nan, *bootstrap(lambda a: a.mean(-1), values, seed=seed)]


def share_interval(share: float, n: int) -> list[float]:
    """The 95 % interval of a share of n (Wilson 1927)."""
    z2 = Z95**2 / n
    middle, half = (share + z2 / 2) / (1 + z2), math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def jackknife(whole: float, without: np.ndarray) -> list[float]:
    """The normal 95 % interval of a statistic from its values with each of the blocks left out (Tukey 1958)."""
    g = len(without)
    if g < 2:
        return [math.nan, math.nan]
    spread = math.sqrt((g - 1) / g * float(np.square(without - without.mean()).sum()))
    return [whole - Z95 * spread, whole + Z95 * spread]


def paired_test(a: np.ndarray, b: np.ndarray, seed: int = 0, draws: int = 10_000) -> dict[str, Any]:
    """Whether the mean of paired values "n" differs: the difference a - b, its interval, and p of the sign-flip permutation test, two-sided.

    Exact where there are few pairs (all 2^n signs), else by `draws` random signs; p is never 0: it counts the observed signs too.
    """
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if d.ndim != 1 or not len(d):
        raise ValueError(f"a paired test needs two columns of the same length, not {np.shape(a)} and {np.shape(b)}")
    if not np.isfinite(d).all():
        raise ValueError(f"a paired test needs finite values: {int((~np.isfinite(d)).sum())} of {len(d)} pairs are not")
    n, observed = len(d), abs(d.mean())
    if 2**n <= draws:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        p = float(np.mean(np.abs(signs @ d) / n >= observed * (1 - 1e-12)))
    else:
        rng = np.random.Generator(np.random.PCG64(seed))
        hits = sum(int((np.abs((1 - 2 * rng.integers(0, 2, (100, n))) @ d) / n >= observed * (1 - 1e-12)).sum()) for _ in range(draws // 100))
        p = (hits + 1) / (draws // 100 * 100 + 1)
    low, high = bootstrap(lambda x: x.mean(-1), d, seed=seed)
    return {"difference": float(d.mean()), "interval": [low, high], "p": p, "n": n, "real": p < 0.05}


def holm(ps: list[float]) -> list[float]:
    """p values of several tests, adjusted so that the chance of any false alarm stays below the level (Holm 1979)."""
    order, adjusted, highest = np.argsort(ps), [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted
