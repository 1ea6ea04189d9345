"""Pictures of several shapes in one training."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfumato.data.buckets import BatchOrder, bucket_sizes, fitted, nearest_size


@given(st.integers(1, 16), st.sampled_from([8, 16, 64]))
def test_sizes_have_about_as_many_pixels_and_the_square_is_among_them(n: int, step: int) -> None:
    side = n * step
    sizes = bucket_sizes(side, step)
    assert (side, side) in sizes
    for h, w in sizes:
        assert h % step == w % step == 0
        assert h * w <= side * side < (max(h, w) + step) * min(h, w)
        assert max(h, w) <= 2 * min(h, w)
    assert sizes == sorted((w, h) for h, w in sizes)


def test_the_known_sizes_at_512() -> None:
    assert bucket_sizes(512, 64) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    with pytest.raises(ValueError, match=r"bucket \(=48\) must be a divisor of the side \(=512\)"):
        bucket_sizes(512, 48)


def test_each_picture_goes_where_least_is_cut() -> None:
    sizes = bucket_sizes(512, 64)
    assert nearest_size(1000, 1000, sizes) == (512, 512)
    assert nearest_size(1600, 900, sizes) == (384, 640)
    assert nearest_size(900, 1600, sizes) == (640, 384)
    assert nearest_size(4000, 100, sizes) == (384, 640)


def test_a_picture_is_cut_to_its_middle_and_what_is_transparent_kept_whole() -> None:
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (60, 0, 140, 100))  # only the middle is seen at a size of 2 : 1 turned
    tall = np.asarray(fitted(image, (100, 50)))
    assert tall.shape == (100, 50, 3)
    assert (tall == (0, 0, 255)).all()
    sticker = Image.new("RGBA", (200, 100), (255, 0, 0, 255))
    whole = np.asarray(fitted(sticker, (100, 50)))
    assert whole.shape == (100, 50, 4)
    assert (whole[:, :, 3] > 128).sum() == 25 * 50
    assert fitted(image, (64, 64)).size == (64, 64)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 3))
def test_every_batch_is_of_one_group_and_every_row_comes_as_often(sizes: list[int], batch: int, seed: int) -> None:
    rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    order, again = BatchOrder(rows, batch, seed), BatchOrder(rows, batch, seed)
    seen: Counter[int] = Counter()
    for k in range(2 * sum(sizes)):
        positions = np.arange(k * batch, (k + 1) * batch)
        found = order.rows(positions)
        assert set(found) <= set(rows[order.group(k * batch)])
        seen.update(found.tolist())
        if k % 3 == 0:  # a pure function of the position, in parts too
            assert np.array_equal(found, np.concatenate([again.rows(positions[i : i + 1]) for i in range(batch)]))
    assert set(seen.values()) == {2 * batch}
