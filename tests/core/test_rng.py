from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.core.rng import Philox, derive, numpy_rng, shuffled, torch_rng


def test_golden_values() -> None:
    """These numbers are part of every run's reproducibility: a change here changes every picture."""
    assert derive(0, "train/order", 0) == 9163976716712053287
    assert numpy_rng(0, "train/order").integers(0, 1000, 4).tolist() == [74, 298, 538, 433]
    normals = torch.randn(3, generator=torch_rng(0, "train/order"))
    torch.testing.assert_close(normals, torch.tensor([-0.3507367671, -0.5586249828, -1.2920355797]), rtol=1e-6, atol=1e-6)


@given(st.integers(0, 2**40), st.text(max_size=12), st.integers(0, 2**40))
def test_seeds_have_63_bits_and_differ_by_each_part(seed: int, purpose: str, index: int) -> None:
    four = [derive(seed, purpose, index), derive(seed + 1, purpose, index), derive(seed, purpose + "x", index), derive(seed, purpose, index + 1)]
    assert len(set(four)) == 4
    assert all(0 <= s < 2**63 for s in four)


@pytest.mark.parametrize("other", [(2, "noise", 3), (1, "order", 3), (1, "noise", 4)])
def test_streams_differ_by_each_part(other: tuple[int, str, int]) -> None:
    here = (1, "noise", 3)
    assert not np.array_equal(numpy_rng(*here).random(8), numpy_rng(*other).random(8))
    assert not torch.equal(torch.randn(8, generator=torch_rng(*here)), torch.randn(8, generator=torch_rng(*other)))


def test_a_stream_does_not_depend_on_what_ran_before() -> None:
    first = torch.randn(8, generator=torch_rng(5, "noise", 1))
    torch.manual_seed(99)
    torch.randn(3)
    np.random.default_rng().random()
    assert torch.equal(first, torch.randn(8, generator=torch_rng(5, "noise", 1)))


@given(st.integers(1, 40), st.integers(0, 100), st.integers(1, 4))
def test_every_epoch_visits_each_item_once(n: int, seed: int, epochs: int) -> None:
    order = shuffled(n, seed, "order", np.arange(n * epochs)).reshape(epochs, n)
    assert (np.sort(order, axis=1) == np.arange(n)).all()


def test_epochs_are_shuffled_differently() -> None:
    first, second = shuffled(50, 0, "order", np.arange(100)).reshape(2, 50)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(50))


@given(st.integers(1, 30), st.lists(st.integers(0, 200), max_size=60), st.integers(0, 60))
def test_any_chunking_and_any_order_of_asking_give_the_same(n: int, positions: list[int], cut: int) -> None:
    whole = shuffled(n, 3, "order", np.arange(201))
    asked = np.array(positions, dtype=np.int64)
    parts = [shuffled(n, 3, "order", part) for part in (asked[:cut], asked[cut:])]
    assert np.array_equal(np.concatenate(parts), whole[asked])


def test_noise_of_a_gpu_is_the_published_one() -> None:
    """What CUDA's generator gives for seed 0, as AUTOMATIC1111's interface writes it down; a second call goes on."""
    source = Philox(0)
    found = source.normal(3, 4)
    published = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564, -0.62285122, -0.32838709, -1.07454231, -0.36314407,
                 -1.67105067, 2.26550497]  # fmt: skip
    assert found.dtype == np.float32
    assert np.allclose(found.ravel(), published, atol=1e-6)
    assert not np.allclose(source.normal(3, 4), found)
    assert np.array_equal(Philox(0).normal(3, 4), found)
    many = Philox(2**40 + 5).normal(100_000)
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 1) < 0.02
