"""Distances between sets of pictures, against independent formulas and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from sfumato.metrics.distribution import kernel_distance
from sfumato.metrics.diversity import copied, nearest
from sfumato.metrics.features import picture_features


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def test_kernel_distance_is_the_double_sum() -> None:
    x, y = normal(7, 5, 0).double().numpy(), normal(9, 5, 1, 0.5).double().numpy()
    k = lambda a, b: (float(np.dot(a, b)) / 5 + 1) ** 3  # noqa: E731
    within = [np.mean([k(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j]) for a in (x, y)]
    across = np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(torch.tensor(x), torch.tensor(y)) == pytest.approx(sum(within) - 2 * across, rel=1e-12)


def test_kernel_distance_is_unbiased_and_grows_with_a_shift() -> None:
    same = [kernel_distance(normal(50, 8, 2 * s), normal(50, 8, 2 * s + 1)) for s in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 200**0.5
    apart = [np.mean([kernel_distance(normal(50, 8, 2 * s), normal(50, 8, 2 * s + 1, shift)) for s in range(20)]) for shift in (0.2, 0.5, 1.0)]
    assert 0 < apart[0] < apart[1] < apart[2]
    with pytest.raises(ValueError, match=r"real features \(=\(1, 8\)\) must be of 2 pictures at least"):
        kernel_distance(normal(1, 8, 0), normal(50, 8, 1))


def test_the_nearest_is_found_and_a_row_is_not_its_own() -> None:
    known = normal(3000, 16, 0)
    rows = torch.tensor([5, 1024, 2999])
    distance, found = nearest(known[rows] * 3, known)  # length does not matter
    assert found.tolist() == rows.tolist()
    assert float(distance.abs().max()) < 1e-5
    distance, found = nearest(known, known, same=True)
    assert not bool((found == torch.arange(3000)).any())
    unit = known.double() / known.double().norm(dim=1, keepdim=True)
    far = 1 - unit @ unit.T
    far.fill_diagonal_(np.inf)
    torch.testing.assert_close(distance.double(), far.min(1).values, atol=1e-5, rtol=0)


def test_copies_are_counted() -> None:
    known = normal(200, 32, 0)
    own = nearest(known, known, same=True)[0]
    drawn = torch.cat([known[:30] + 0.01 * normal(30, 32, 1), normal(70, 32, 2)])
    assert copied(nearest(drawn, known)[0], own) == pytest.approx(0.3)


def test_features_tell_pictures_apart_at_any_size() -> None:
    def at(size: int) -> torch.Tensor:
        shots = [Image.fromarray(getattr(photographs, n)()).convert("RGBA").resize((size, size)) for n in ("astronaut", "coffee", "chelsea")]
        return torch.from_numpy(np.stack([np.asarray(s) for s in shots])).permute(0, 3, 1, 2)

    a, larger, smaller = (picture_features(at(size)) for size in (128, 256, 96))
    for other in (larger, smaller):
        distance, found = nearest(other, a)
        assert found.tolist() == [0, 1, 2]
        assert float(distance.max()) < 0.5 * float(nearest(a, a, same=True)[0].min())
