from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sfumato.nn.ema import ema_copy, ema_update

LATE = 10**9  # the early ramp is long over


def pair(value: float) -> tuple[nn.Linear, nn.Linear]:
    network = nn.Linear(3, 2)
    average = ema_copy(network)
    with torch.no_grad():
        for p in average.parameters():
            p.zero_()
        for p in network.parameters():
            p.fill_(value)
    return average, network


@given(st.integers(1, 64), st.floats(50, 5000), st.integers(1, 20))
def test_closed_form_towards_a_constant(images: int, half_life: float, steps: int) -> None:
    average, network = pair(4.0)
    for _ in range(steps):
        ema_update(average, network, images=images, half_life=half_life, seen=LATE)
    expected = 4.0 * (1 - 0.5 ** (images * steps / half_life))
    for p in average.parameters():
        assert torch.allclose(p, torch.full_like(p, expected), rtol=1e-4, atol=1e-5)


def test_after_the_half_life_half_is_left_whatever_the_batch() -> None:
    for images in (1, 10, 100):
        average, network = pair(1.0)
        for _ in range(100 // images):
            ema_update(average, network, images=images, half_life=100.0, seen=LATE)
        assert average.weight.mean().item() == pytest.approx(0.5, abs=1e-5)


def test_early_on_the_half_life_is_five_percent_of_what_was_seen() -> None:
    average, network = pair(1.0)
    ema_update(average, network, images=10, half_life=1e9, seen=200)
    assert average.weight.mean().item() == pytest.approx(0.5, abs=1e-6)


def test_the_first_update_forgets_the_random_start() -> None:
    average, network = pair(3.0)
    ema_update(average, network, images=32, half_life=1e6, seen=0)
    assert torch.equal(average.weight, network.weight)


def test_buffers_are_copied() -> None:
    network = nn.BatchNorm1d(3)
    average = ema_copy(network)
    network.running_mean.fill_(5.0)
    network.num_batches_tracked.fill_(7)
    ema_update(average, network, images=1, half_life=1e6, seen=LATE)
    assert (average.running_mean == 5).all()
    assert average.num_batches_tracked == 7


def test_the_copy_is_frozen_and_its_own() -> None:
    network = nn.Linear(2, 2).train()
    average = ema_copy(network)
    assert not average.training
    assert network.training
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in network.parameters())
    with torch.no_grad():
        network.weight.fill_(9.0)
    assert not (average.weight == 9).any()
