"""Distances between sets, against closed forms, independent formulas and the packages that define them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from prdc import compute_prdc
from vendi_score import vendi

from sfumato.metrics.distribution import (
    Moments,
    compare_pairs,
    frechet_distance,
    frechet_infinity,
    frechet_interval,
    gaussian_distance,
    inception_score,
    kernel_distance,
    kid_subsets,
    pair_intervals,
    remarks,
    subset_size,
)
from sfumato.metrics.diversity import (
    intra_class_distance,
    mode_coverage,
    modes_of,
    ms_ssim_diversity,
    nearest,
    pairwise_distance,
    vendi_score,
)
from sfumato.metrics.pairwise import ms_ssim


def normal(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift).double()


def mixed(n: int, d: int, seed: int) -> torch.Tensor:
    """Correlated features."""
    turn = normal(d, d, 99) / d**0.5 + torch.eye(d)
    return normal(n, d, seed) @ turn


# --- Frechet ------------------------------------------------------------------------------------------------------------------------------------


def test_moments_in_parts_are_those_of_the_whole() -> None:
    x = mixed(1000, 24, 0) + 1e4  # far from 0: a sum of squares would lose its digits
    m = Moments()
    for part in x.split([1, 333, 0, 500, 166]):
        m.update(part)
    np.testing.assert_allclose(m.mean.numpy(), x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(m.covariance.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-8, atol=1e-8)


def test_frechet_distance_is_the_formula() -> None:
    x, y = mixed(500, 32, 0), 1.3 * mixed(400, 32, 1) + 0.2
    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    shift = x.numpy().mean(0) - y.numpy().mean(0)
    theirs = shift @ shift + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(Moments().update(x), Moments().update(y)) == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_of_two_gaussians() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2 for axis-parallel ones, whose moments are set exactly."""
    d = 16
    s1, s2 = torch.linspace(0.5, 2, d, dtype=torch.float64), torch.linspace(2, 0.1, d, dtype=torch.float64)
    a, b = Moments(), Moments()
    a.n = b.n = 101
    a.mean, b.mean = torch.zeros(d, dtype=torch.float64), torch.full((d,), 0.3, dtype=torch.float64)
    a.scatter, b.scatter = 100 * torch.diag(s1**2), 100 * torch.diag(s2**2)
    assert frechet_distance(a, b) == pytest.approx(d * 0.09 + float((s1 - s2).square().sum()), rel=1e-9)


def test_frechet_distance_of_fewer_pictures_than_dimensions() -> None:
    x = normal(20, 64, 0)
    assert frechet_distance(Moments().update(x), Moments().update(x)) == pytest.approx(0, abs=1e-6)
    a, b = mixed(20, 640, 1), mixed(31, 640, 2)
    roots = [(v.double() - v.double().mean(0)) / (len(v) - 1) ** 0.5 for v in (a, b)]  # with them the trace is exact, and no covariance is needed
    exact = (a.double().mean(0) - b.double().mean(0)).square().sum() + sum(r.square().sum() for r in roots)
    exact = exact - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    assert frechet_distance(Moments().update(a), Moments().update(b)) == pytest.approx(float(exact), rel=1e-9)
    shifted = [frechet_distance(Moments().update(x), Moments().update(x + s)) for s in (0.1, 0.2, 0.4)]
    assert shifted == pytest.approx([64 * s**2 for s in (0.1, 0.2, 0.4)], rel=1e-6)


def test_the_limit_is_nearer_to_the_truth_than_the_distance() -> None:
    real, fake = normal(20_000, 16, 0), normal(1_000, 16, 1)
    limit, points = frechet_infinity(real, fake)
    assert len(points) == 15
    assert points[0][1] > 1.5 * points[-1][1] > 0
    assert abs(limit) < points[-1][1] / 2


def test_the_limit_of_few_samples_is_that_of_endless_ones() -> None:
    """As many real ones as fake ones, four times the dimensions: beside the same real ones and a Gaussian known exactly."""
    d, n, found, truth = 32, 128, [], []
    for seed in range(12):
        real, fake = normal(n, d, 2 * seed), normal(n, d, 2 * seed + 1)
        endless = Moments()
        endless.n, endless.mean, endless.scatter = 1001, torch.zeros(d, dtype=torch.float64), 1000 * torch.eye(d, dtype=torch.float64)
        limit, points = frechet_infinity(real, fake)
        found.append((limit, points[-1][1]))
        truth.append(frechet_distance(Moments().update(real), endless))
    limit, raw = np.mean(found, axis=0)
    assert raw > 1.6 * np.mean(truth)
    assert limit == pytest.approx(np.mean(truth), rel=0.25)
    with pytest.raises(ValueError, match=r"twice as many samples as feature dimensions \(64\), not 63"):
        frechet_infinity(normal(100, d, 0), normal(63, d, 1))


# --- all pairs ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [0, 7, 64, 1000])
def test_pairs_are_those_of_prdc_and_of_the_kernel_distance(tile: int) -> None:
    real, fake = mixed(300, 8, 0), 0.8 * mixed(260, 8, 1) + 0.2
    ours = compare_pairs(real, fake, tile=tile)
    theirs = compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(ours, name) == pytest.approx(theirs[name], rel=1e-6), name
        assert 0.05 < theirs[name] < 2, "the case tells nothing"
    assert ours.kid == pytest.approx(kernel_distance(real, fake), rel=1e-9)


def test_equal_sets_are_ideal_and_a_shift_is_seen() -> None:
    x = mixed(400, 16, 0)
    same = compare_pairs(x, x.clone())
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density == pytest.approx(1, abs=0.3)
    apart = [compare_pairs(x, mixed(400, 16, 1) + s) for s in (0.0, 0.5, 1.0, 2.0)]
    kids, precisions = [p.kid for p in apart], [p.precision for p in apart]
    assert kids == sorted(kids)
    assert precisions == sorted(precisions, reverse=True)


def test_single_precision_is_near_enough() -> None:
    real, fake = torch.relu(mixed(2000, 64, 0)), torch.relu(mixed(2000, 64, 1) + 0.1)
    a, b = compare_pairs(real, fake), compare_pairs(real.float(), fake.float())
    for name in ("kid", "precision", "recall", "density", "coverage"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-3), name


def test_the_interval_of_the_kernel_distance_holds_the_truth() -> None:
    """Of equal distributions the truth is 0: nine in ten intervals of 95 % must hold it at least."""
    hits = 0
    for s in range(40):
        low, high = compare_pairs(normal(200, 8, 2 * s), normal(200, 8, 2 * s + 1)).kid_interval
        hits += low <= 0 <= high
    assert hits >= 34


def test_subsets_have_the_mean_of_the_whole() -> None:
    real, fake = mixed(600, 8, 0), mixed(500, 8, 1) + 0.3
    values = kid_subsets(real, fake, subsets=50, size=100)
    assert values.mean() == pytest.approx(kernel_distance(real, fake), abs=4 * values.std() / 50**0.5 + 0.02)


def test_what_cannot_be_compared_is_refused() -> None:
    x = normal(50, 8, 0)
    bad = x.clone()
    bad[7, 3] = float("nan")
    for real, fake, message in (
        (x[:1], x, "real features"),
        (x, bad, "fake features of 1 pictures are not finite, such as number 7"),
        (x, x[:, :4], "8 and 4 dimensions"),
        (x[:5], x, "6 pictures at least"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_pairs(real, fake)
    with pytest.raises(ValueError, match="not finite"):
        Moments().update(bad)
    with pytest.raises(ValueError, match="two pictures at least, not 1"):
        _ = Moments().update(x[:1]).covariance
    assert len(remarks(5000, 5000, 1280)) == 0
    assert remarks(2000, 5000, 1280)[-1] == "read the kernel distance (KID)"
    assert len(remarks(2000, 5000, 1280)) == 2
    assert len(remarks(1000, 5000, 1280)) == 3


# --- the others ---------------------------------------------------------------------------------------------------------------------------------


def test_gaussian_distance_is_the_double_sum() -> None:
    x, y = normal(9, 6, 0), normal(11, 6, 1)
    u, v = (a.numpy() / np.linalg.norm(a.numpy(), axis=1, keepdims=True) for a in (x, y))
    k = lambda a, b: np.exp(-np.square(a[:, None] - b[None]).sum(-1) / 200).mean()  # noqa: E731
    assert gaussian_distance(x, y) == pytest.approx(1000 * (k(u, u) + k(v, v) - 2 * k(u, v)), rel=1e-6)
    assert gaussian_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_inception_score_of_known_predictions() -> None:
    sure = 100.0 * torch.eye(10).repeat(20, 1)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert inception_score(sure, splits=1)[0] == pytest.approx(10, rel=1e-3)
    assert inception_score(torch.zeros(200, 10))[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="10 pictures at least, not 3"):
        inception_score(sure[:3])


def test_vendi_score_is_that_of_its_package() -> None:
    for x in (normal(60, 16, 0), normal(12, 40, 1)):
        unit = torch.nn.functional.normalize(x, dim=1).numpy()
        assert vendi_score(x) == pytest.approx(vendi.score_K(unit @ unit.T), rel=1e-6)
    assert vendi_score(normal(1, 8, 0).expand(30, 8)) == pytest.approx(1)
    assert vendi_score(torch.eye(7)) == pytest.approx(7)


def test_pairwise_and_intra_class_distance_are_the_double_sum() -> None:
    x = normal(20, 6, 0)
    unit = torch.nn.functional.normalize(x, dim=1).numpy()
    far = 1 - unit @ unit.T
    assert pairwise_distance(x) == pytest.approx(far[~np.eye(20, dtype=bool)].mean(), rel=1e-9)
    labels = np.array(["a"] * 8 + ["b"] * 11 + ["c"])
    parts = [far[:8, :8], far[8:19, 8:19]]
    wanted = np.mean([p[~np.eye(len(p), dtype=bool)].mean() for p in parts])
    assert intra_class_distance(x, labels) == pytest.approx(wanted, rel=1e-9)
    with pytest.raises(ValueError, match="2 pictures at least"):
        pairwise_distance(x[:1])


def test_modes_that_are_never_drawn_are_missed() -> None:
    centres = 10 * torch.eye(6)
    real = torch.cat([c + 0.3 * normal(50, 6, i).float() for i, c in enumerate(centres)])
    found = modes_of(real, 6)
    assert sorted((found @ centres.T).argmax(1).tolist()) == list(range(6))
    some = mode_coverage(real, real[:150], found)
    assert some["covered"] == pytest.approx(0.5)
    assert some["total_variation"] == pytest.approx(0.5)
    assert mode_coverage(real, real, found)["total_variation"] == 0


def test_ms_ssim_diversity_never_compares_a_picture_with_itself() -> None:
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    values = ms_ssim_diversity(x, pairs=20)
    np.testing.assert_allclose(values, 1 - float(ms_ssim(x[:1], x[1:])), rtol=1e-9)
    assert ms_ssim_diversity(x[:1].expand(5, 3, 32, 32), pairs=8).max() == pytest.approx(0, abs=1e-9)


def test_growing_subsets_are_measured_as_each_would_be_alone() -> None:
    g = torch.Generator().manual_seed(3)
    real, fake = torch.randn(200, 24, generator=g).double(), (torch.randn(90, 24, generator=g) * 1.2 + 0.1).double()
    _, found = frechet_infinity(real, fake, points=6, seed=5)
    order = torch.from_numpy(np.random.Generator(np.random.PCG64(5)).permutation(90))
    assert [n for n, _ in found] == [45, 54, 63, 72, 81, 90]
    for n, distance in found:
        alone = frechet_distance(Moments().update(real), Moments().update(fake[order[:n]]))
        assert distance == pytest.approx(alone, rel=1e-6)


def test_an_interval_of_the_frechet_distance_is_as_wide_as_it_scatters() -> None:
    """Two Gaussians at distance 8: over 40 pairs of samples the intervals hold it, and their width is that of the scatter."""
    g = torch.Generator().manual_seed(4)
    distances, widths, held = [], [], []
    for _ in range(40):
        a, b = torch.randn(400, 8, generator=g).double(), torch.randn(400, 8, generator=g).double() + 1
        low, high = frechet_interval(a, b)
        distances.append(frechet_distance(Moments().update(a), Moments().update(b)))
        widths.append((high - low) / (2 * 1.96))
        held.append(low < 8 < high)
    assert np.mean(held) > 0.8
    assert np.mean(widths) == pytest.approx(np.std(distances), rel=0.25)


def test_subsets_of_the_kernel_distance_are_those_of_single_ones() -> None:
    g = torch.Generator().manual_seed(5)
    real, fake = torch.randn(60, 8, generator=g), torch.randn(50, 8, generator=g) + 0.3
    held = kid_subsets(real, fake, subsets=5, size=20, seed=1)
    rng = np.random.Generator(np.random.PCG64(1))
    for value in held:
        i, j = rng.choice(60, 20, replace=False), rng.choice(50, 20, replace=False)
        assert value == pytest.approx(kernel_distance(real[torch.from_numpy(i)], fake[torch.from_numpy(j)]), rel=1e-9, abs=1e-12)
    assert (subset_size(60, 50), subset_size(5_000, 3_000)) == (25, 1_000)


def test_intervals_do_not_know_how_the_pictures_are_sorted() -> None:
    """Folders come sorted by kind: blocks of one kind each would differ far more than blocks of all kinds."""
    g = np.random.Generator(np.random.PCG64(6))
    kinds = np.sort(g.integers(0, 10, 400))
    sorted_rows = torch.from_numpy(3 * g.standard_normal((10, 8))[kinds] + g.standard_normal((400, 8)))
    mixed = torch.from_numpy(g.permutation(400))
    real = normal(400, 8, 7)
    wide, narrow = (np.ptp(frechet_interval(real, x)) for x in (sorted_rows, sorted_rows[mixed]))
    assert wide == pytest.approx(narrow, rel=0.6)
    of_kid = [np.ptp(compare_pairs(real, x).kid_interval) for x in (sorted_rows, sorted_rows[mixed])]
    assert of_kid[0] == pytest.approx(of_kid[1], rel=0.6)
    by_row = [compare_pairs(real, x).inside for x in (sorted_rows, sorted_rows[mixed])]
    assert np.array_equal(by_row[0][mixed.numpy()], by_row[1]), "each row keeps its own value"


def test_intervals_of_neighbourhoods_hold_what_they_should() -> None:
    """Both sets drawn anew 40 times; a bootstrap over pictures held density and coverage three times in four."""
    g = np.random.Generator(np.random.PCG64(8))
    centres = 2 * g.standard_normal((15, 8))
    draw = lambda: torch.from_numpy(centres[g.integers(0, 15, 200)] + g.standard_normal((200, 8)))  # noqa: E731
    found = []
    for _ in range(40):
        a, b = draw(), draw()
        pairs = compare_pairs(a, b)
        found.append((pairs, pair_intervals(a, b, pairs)))
    for name in ("precision", "recall", "density", "coverage"):
        mean = np.mean([getattr(p, name) for p, _ in found])
        assert sum(i[name][0] <= mean <= i[name][1] for _, i in found) >= 36, name


def test_what_is_no_number_is_named_by_every_metric() -> None:
    x, bad = normal(40, 8, 0), normal(40, 8, 1)
    bad[7, 3] = float("nan")
    for metric in (compare_pairs, kernel_distance, kid_subsets, gaussian_distance, frechet_interval, nearest):
        with pytest.raises(ValueError, match="not finite, such as number 7"):
            metric(x, bad)
    for alone in (pairwise_distance, vendi_score, inception_score):
        with pytest.raises(ValueError, match="not finite, such as number 7"):
            alone(bad)
    with pytest.raises(ValueError, match="2 pictures at least"):
        vendi_score(x[:1])
