"""How far two sets of pictures are apart, from their features: functions of (real, fake), "n d" and "m d".

Moments stream in constant memory. What needs all pairs (kernel distance, precision, recall, density, coverage) shares one pass over tiles of the
Gram matrices, so memory stays bounded and features are multiplied once.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.metrics.intervals import jackknife

TILE = 1000  # rows of a Gram tile; also the size of KID's usual subsets
NEIGHBOURS = 5  # of precision, recall, density and coverage, as their paper has it
MOST_HELD = 4096  # rows of which a whole kernel matrix is held
FEW = 2048  # below this a Frechet distance says more of n than of the pictures


def check_features(real: Tensor, fake: Tensor, least: int = 2) -> None:
    """Raises ValueError for sets that have fewer than `least` rows or different widths, or hold what is not finite, and names the first such row."""
    for name, x in (("real", real), ("fake", fake)):
        if x.ndim != 2 or len(x) < least:
            raise ValueError(f"{name} features (={tuple(x.shape)}) must be of {least} pictures at least")
        bad = ~torch.isfinite(x.sum(1, dtype=torch.float64))
        if bad.any():
            rows = torch.nonzero(bad).flatten().tolist()
            raise ValueError(f"{name} features of {len(rows)} pictures are not finite, such as number {rows[0]}: look at these pictures first")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real and fake features have {real.shape[1]} and {fake.shape[1]} dimensions: take both from one network")


def remarks(real: int, fake: int, dimensions: int) -> list[str]:
    """What a reader of a Frechet distance should know of how many pictures it is made from."""
    n = min(real, fake)
    said = []
    if n < FEW:
        said.append(f"{n} pictures are few for a Frechet distance (below {FEW:,}): it is biased upwards")
    if n < dimensions:
        said.append(f"{n} pictures are fewer than the {dimensions} feature dimensions: covariances are singular")
    return [*said, "read the kernel distance (KID)"] if said else []


def _mixed(n: int) -> Tensor:
    """Rows in an order that knows nothing of them, the same for equal n: files lie sorted by kind, and blocks of one kind differ too much."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(0)).permutation(n))


# --- Frechet distance ---------------------------------------------------------------------------------------------------------------------------


class Moments:
    """Mean and covariance of features that come in parts, in fp64 and constant memory (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Float[Tensor, "_ d"]) -> Moments:
        x = features.double()
        if not torch.isfinite(x).all():
            raise ValueError("features are not finite: look at these pictures first")
        if not len(x):
            return self
        part = Moments()
        part.n, part.mean = len(x), x.mean(0)
        centred = x - part.mean
        part.scatter = centred.T @ centred
        return self.merge(part)

    def merge(self, other: Moments) -> Moments:
        """Takes in what another has seen."""
        if self.n == 0 or other.n == 0:
            if self.n == 0:
                self.n, self.mean, self.scatter = other.n, other.mean, other.scatter
            return self
        shift, total = other.mean - self.mean, self.n + other.n
        self.scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.n * other.n / total)
        self.mean = self.mean + shift * (other.n / total)
        self.n = total
        return self

    @property
    def covariance(self) -> Tensor:
        """Unbiased, "d d"."""
        if self.n < 2:
            raise ValueError(f"a covariance needs two pictures at least, not {self.n}")
        return self.scatter / (self.n - 1)


def root(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """R with R^T R = covariance, of which negative eigenvalues (rounding) are 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def spread(moments: Moments) -> Float[Tensor, "r d"]:
    """R with R^T R = covariance. Few pictures span few dimensions, which are found first: then R has one row for each of those."""
    covariance, rank = moments.covariance, moments.n - 1
    if 2 * rank > len(covariance):
        return root(covariance)
    some = torch.randn(len(covariance), rank, generator=torch.Generator().manual_seed(0), dtype=covariance.dtype)
    basis = torch.linalg.qr(covariance @ some).Q
    return root(basis.T @ covariance @ basis) @ basis.T


def frechet_distance(real: Moments, fake: Moments, *, real_root: Tensor | None = None) -> float:
    """Squared Frechet (Wasserstein-2) distance of two Gaussians (arXiv 1706.08500, equation 6).

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)); the last trace is the sum of the singular values of R1 R2^T with C = R^T R, which stays
    exact where covariances are singular. The real R may be given.
    """
    a, b = real.covariance, fake.covariance
    if a.shape != b.shape:
        raise ValueError(f"real and fake features have {len(a)} and {len(b)} dimensions: take both from one network")
    cross = torch.linalg.svdvals((spread(real) if real_root is None else real_root) @ spread(fake).T).sum()
    return max(0.0, float((real.mean - fake.mean).square().sum() + a.trace() + b.trace() - 2 * cross))


def frechet_interval(real: Float[Tensor, "n d"], fake: Float[Tensor, "m _"], *, blocks: int = 10) -> list[float]:
    """The 95 % interval of the Frechet distance by leaving out blocks of both sets: of its spread, not of its bias (see `frechet_infinity`)."""
    check_features(real, fake, 2 * blocks)
    parts = [[Moments().update(p) for p in x[_mixed(len(x))].tensor_split(blocks)] for x in (real, fake)]

    def distance(left_out: int | None) -> float:
        sides = []
        for side in parts:
            whole = Moments()
            for i, part in enumerate(side):
                if i != left_out:
                    whole.merge(part)
            sides.append(whole)
        return frechet_distance(*sides)

    return jackknife(distance(None), np.array([distance(i) for i in range(blocks)]))


def frechet_infinity(
    real: Float[Tensor, "n d"], fake: Float[Tensor, "m _"], *, points: int = 15, seed: int = 0
) -> tuple[float, list[tuple[int, float]]]:
    """The Frechet distance of infinitely many fake samples from these real ones, and the (m, distance) that a line in 1/m was laid through
    (arXiv 1911.07023).

    Subsets of the fake features of `points` sizes, evenly from half to all of them; the real ones stay as they are, and so does what their own
    number adds. Raises ValueError for fewer than 2 d fake ones: the distance is no line in 1/m there.
    """
    check_features(real, fake)
    if len(fake) < (least := 2 * fake.shape[1]):
        raise ValueError(f"an extrapolation needs at least twice as many samples as feature dimensions ({least:,}), not {len(fake):,}")
    moments = Moments().update(real)
    r, order = root(moments.covariance), torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).permutation(len(fake)))
    sizes = np.unique(np.linspace(len(fake) // 2, len(fake), points).astype(int))
    growing, found = Moments(), []
    for start, n in zip([0, *sizes[:-1]], sizes, strict=True):  # each subset is the one before and some more
        growing.update(fake[order[start:n]])
        found.append((int(n), frechet_distance(moments, growing, real_root=r)))
    slope_and_limit = np.polyfit([1 / n for n, _ in found], [d for _, d in found], 1)
    return float(slope_and_limit[1]), found


# --- all pairs: kernel distance, precision, recall, density, coverage -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """What one pass over all pairs of features gives.

    `kid` is the unbiased kernel distance of the whole sets, `kid_interval` its 95 % interval by leaving out blocks. Per fake picture: `inside`,
    whether it lies in the real set's neighbourhoods (precision is their mean), and `covers`, of how many (density); per real picture: `reached`,
    whether it lies in the fake set's neighbourhoods (recall), and `covered`, whether a fake picture lies in its own (coverage).
    """

    kid: float
    kid_interval: list[float]
    inside: np.ndarray
    covers: np.ndarray
    reached: np.ndarray
    covered: np.ndarray
    k: int

    @property
    def precision(self) -> float:
        return float(self.inside.mean())

    @property
    def recall(self) -> float:
        return float(self.reached.mean())

    @property
    def density(self) -> float:
        return float(self.covers.mean() / self.k)

    @property
    def coverage(self) -> float:
        return float(self.covered.mean())


def compare_pairs(real: Float[Tensor, "n d"], fake: Float[Tensor, "m _"], *, k: int = NEIGHBOURS, tile: int = 0) -> Pairs:
    """Kernel distance (KID, arXiv 1801.01401), precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797).

    In the dtype of the features; sums are fp64. Neighbourhoods reach to the k-th nearest of the own set, borders excluded. `tile` rows are
    compared at once; 0 takes TILE, of small sets a tenth, so that there are blocks to leave out. Raises ValueError where a set has not more than
    k pictures.
    """
    check_features(real, fake, max(k + 1, 2))
    mixed = [_mixed(len(x)) for x in (real, fake)]
    real, fake = real[mixed[0]], fake[mixed[1]]
    tile = tile or max(min(TILE, len(real) // 10, len(fake) // 10), 1)
    n, m, d = len(real), len(fake), real.shape[1]
    squares_real, squares_fake = real.square().sum(1), fake.square().sum(1)
    radius_real, within_real = _within(real, squares_real, k, tile)
    radius_fake, within_fake = _within(fake, squares_fake, k, tile)
    covers = torch.zeros(m, dtype=torch.int64)
    reached, covered = [], []
    across = torch.zeros(-(-n // tile), -(-m // tile), dtype=torch.float64)
    for i in range(0, n, tile):
        mine = slice(i, i + tile)
        nearest, deepest = (torch.full((len(real[mine]),), float("inf"), dtype=real.dtype) for _ in range(2))  # fake one; in a fake one's radius
        for j in range(0, m, tile):
            theirs = slice(j, j + tile)
            gram = real[mine] @ fake[theirs].T
            across[i // tile, j // tile] = _total(_kernel(gram, d))
            apart = gram.mul_(-2).add_(squares_real[mine, None]).add_(squares_fake[theirs]).clamp_min_(0)
            covers[theirs] += (apart < radius_real[mine, None]).view(torch.uint8).sum(0, dtype=torch.int32)
            nearest = nearest.minimum(apart.amin(1))
            deepest = deepest.minimum(apart.sub_(radius_fake[theirs]).amin(1))
        reached.append(deepest < 0)
        covered.append(nearest < radius_real[mine])
    kid, interval = _kid_of(within_real, within_fake, across, n, m, tile)
    columns = zip((covers > 0, covers, torch.cat(reached), torch.cat(covered)), (*mixed[1:], *mixed[1:], *mixed[:1], *mixed[:1]), strict=True)
    return Pairs(kid, interval, *(c[order.argsort()].numpy().astype(np.float64) for c, order in columns), k)


def pair_intervals(real: Float[Tensor, "n d"], fake: Float[Tensor, "m _"], pairs: Pairs, *, blocks: int = 10) -> dict[str, list[float]]:
    """95 % intervals of precision, recall, density and coverage by leaving out blocks of both sets.

    A bootstrap over pictures would take the neighbourhoods as given, and be too narrow; these hold the truth a little more often than they say.
    """
    order = [_mixed(len(x)).tensor_split(blocks) for x in (real, fake)]
    without = []
    for i in range(blocks):
        kept = [x[torch.cat([p for j, p in enumerate(o) if j != i])] for x, o in zip((real, fake), order, strict=True)]
        without.append(compare_pairs(kept[0], kept[1], k=pairs.k))
    names = ("precision", "recall", "density", "coverage")
    return {name: jackknife(getattr(pairs, name), np.array([getattr(w, name) for w in without])) for name in names}


def _kernel(gram: Tensor, d: int) -> Tensor:
    """(x.y / d + 1)^3."""
    return (gram / d).add_(1).pow_(3)


def _total(kernel: Tensor) -> Tensor:
    """Rows in their own dtype, their sums in fp64."""
    return kernel.sum(1).sum(dtype=torch.float64)


def _within(x: Tensor, squares: Tensor, k: int, tile: int) -> tuple[Tensor, Tensor]:
    """Of one set: the squared distance of each row to its k-th nearest other row, and the kernel's sums over blocks, a row with itself left out.

    Each pair of blocks is multiplied once and read both ways.
    """
    starts = range(0, len(x), tile)
    sums = torch.zeros(len(starts), len(starts), dtype=torch.float64)
    best = [x.new_empty(len(x[s : s + tile]), 0) for s in starts]  # of each block's rows, the k smallest so far
    for i, j in itertools.combinations_with_replacement(range(len(starts)), 2):
        mine, theirs = slice(starts[i], starts[i] + tile), slice(starts[j], starts[j] + tile)
        gram = x[mine] @ x[theirs].T
        kernel = _kernel(gram, x.shape[1])
        sums[i, j] = sums[j, i] = _total(kernel) - (kernel.diagonal().sum(dtype=torch.float64) if i == j else 0)
        apart = gram.mul_(-2).add_(squares[mine, None]).add_(squares[theirs])
        if i == j:
            apart.fill_diagonal_(float("inf"))
        for block, dim in ((i, 1),) if i == j else ((i, 1), (j, 0)):
            few = apart.topk(min(k, apart.shape[dim]), dim=dim, largest=False).values
            best[block] = torch.cat([best[block], few if dim else few.T], 1)
            best[block] = best[block].topk(min(k, best[block].shape[1]), dim=1, largest=False).values
    return torch.cat([b[:, k - 1] for b in best]).clamp_min_(0), sums


def _kid_of(xx: Tensor, yy: Tensor, xy: Tensor, n: int, m: int, tile: int) -> tuple[float, list[float]]:
    """The unbiased estimate from sums over blocks, and its interval by leaving out the i-th block of both sets."""
    sizes = [np.array([min(tile, total - s) for s in range(0, total, tile)], dtype=np.float64) for total in (n, m)]
    a, b, c = (t.numpy() for t in (xx, yy, xy))

    def estimate(keep_x: np.ndarray, keep_y: np.ndarray) -> float:
        nx, ny = sizes[0][keep_x].sum(), sizes[1][keep_y].sum()
        inner = a[np.ix_(keep_x, keep_x)].sum() / (nx * (nx - 1)) + b[np.ix_(keep_y, keep_y)].sum() / (ny * (ny - 1))
        return float(inner - 2 * c[np.ix_(keep_x, keep_y)].sum() / (nx * ny))

    every = [np.arange(len(s)) for s in sizes]
    whole = estimate(*every)
    groups = min(len(every[0]), len(every[1]))
    without = [estimate(*(np.delete(e, np.flatnonzero(e % groups == g)) for e in every)) for g in range(groups)] if groups > 1 else []
    return whole, jackknife(whole, np.array(without))


def kernel_distance(real: Float[Tensor, "n d"], fake: Float[Tensor, "m _"]) -> float:
    """Squared maximum mean discrepancy under the kernel (x.y / d + 1)^3 (KID, arXiv 1801.01401), unbiased: around 0 for equal distributions.

    Features as they come from a network; in fp64. Raises ValueError for fewer than two rows.
    """
    check_features(real, fake)
    real, fake, d = real.double(), fake.double(), real.shape[1]

    def total(a: Tensor, b: Tensor) -> float:
        return sum(float(_kernel(part @ b.T, d).sum()) for part in a.split(TILE))

    def within(a: Tensor) -> float:
        own = float(((a.square().sum(1) / d + 1) ** 3).sum())  # each with itself
        return (total(a, a) - own) / (len(a) * (len(a) - 1))

    return within(real) + within(fake) - 2 * total(real, fake) / (len(real) * len(fake))


def subset_size(real: int, fake: int, size: int = TILE) -> int:
    """How many pictures a subset of `kid_subsets` has."""
    n = min(real, fake)
    return size if n > size else max(n // 2, 2)


def kid_subsets(real: Float[Tensor, "n d"], fake: Float[Tensor, "m _"], *, subsets: int = 100, size: int = TILE, seed: int = 0) -> np.ndarray:
    """The kernel distances of random subsets, "subsets": their mean and spread are what is published as KID. Of sets that are no larger than `size`
    subsets of half of them. The kernel is computed once where it fits into memory.
    """
    check_features(real, fake)
    n, m, d = len(real), len(fake), real.shape[1]
    size = subset_size(n, m, size)
    rng = np.random.Generator(np.random.PCG64(seed))
    draws = [(rng.choice(n, size, replace=False), rng.choice(m, size, replace=False)) for _ in range(subsets)]
    if max(n, m) > MOST_HELD:
        return np.array([kernel_distance(real[torch.from_numpy(i)], fake[torch.from_numpy(j)]) for i, j in draws])
    x, y = real.double(), fake.double()
    xx, yy, xy = (_kernel(a @ b.T, d).numpy() for a, b in ((x, x), (y, y), (x, y)))

    def of(i: np.ndarray, j: np.ndarray) -> float:
        within = [(k[np.ix_(r, r)].sum() - k[r, r].sum()) / (size * (size - 1)) for k, r in ((xx, i), (yy, j))]
        return float(sum(within) - 2 * xy[np.ix_(i, j)].mean())

    return np.array([of(i, j) for i, j in draws])


# --- other distances ----------------------------------------------------------------------------------------------------------------------------


def gaussian_distance(real: Float[Tensor, "n d"], fake: Float[Tensor, "m _"], *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """`scale` times the squared maximum mean discrepancy of unit-length features under exp(-|x - y|^2 / (2 sigma^2)), with each row's own pair
    counted (arXiv 2401.09603); with CLIP features it is called CMMD.
    """
    check_features(real, fake)
    x, y = (f.double() / f.double().norm(dim=1, keepdim=True) for f in (real, fake))

    def mean(a: Tensor, b: Tensor) -> float:
        return sum(float(torch.exp((part @ b.T - 1) / sigma**2).sum()) for part in a.split(TILE)) / (len(a) * len(b))

    return scale * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def inception_score(logits: Float[Tensor, "n classes"], *, splits: int = 10) -> tuple[float, float]:
    """exp(E KL(p(y|x) | p(y))), mean and spread over splits (arXiv 1606.03498). Of Inception's own logits only; elsewhere it means nothing."""
    check_features(logits, logits, 1)
    if len(logits) < splits:
        raise ValueError(f"an Inception score of {splits} splits needs {splits} pictures at least, not {len(logits)}")
    scores = []
    for part in logits.double().log_softmax(1).tensor_split(splits):
        p = part.exp()
        scores.append(float((p * (part - part.logsumexp(0) + math.log(len(part)))).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))
