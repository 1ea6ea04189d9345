"""The nearest code is the nearest code: against fp64, with duplicates, any shape, in any dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.nn.nearest import nearest_index


def exact(z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    return torch.cdist(z.double(), e.double(), compute_mode="donot_use_mm_for_euclid_dist")


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 70), k=st.integers(1, 300), d=st.integers(1, 20), seed=st.integers(0, 1000), spread=st.floats(0.01, 30))
def test_what_is_found_is_as_near_as_anything(n: int, k: int, d: int, seed: int, spread: float) -> None:
    g = torch.Generator().manual_seed(seed)
    z, e = torch.randn(n, d, generator=g), spread * torch.randn(k, d, generator=g)
    found = nearest_index(z, e)
    assert found.shape == (n,)
    if n:
        apart = exact(z, e)
        chosen = apart.gather(1, found[:, None])[:, 0]
        scale = e.square().sum(1).max() + z.square().sum(1)
        assert ((chosen.square() - apart.amin(1).square()).abs() <= 1e-6 * scale).all()


def test_of_equal_codes_the_first_is_taken() -> None:
    e = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    assert torch.equal(nearest_index(e, e), torch.arange(200).repeat(3))


@pytest.mark.parametrize("k", [1, 127, 128, 129, 1000])
def test_every_block_is_looked_at(k: int) -> None:
    e = torch.nn.functional.normalize(torch.randn(k, 16, generator=torch.Generator().manual_seed(k)), dim=1)
    assert torch.equal(nearest_index(e + 1e-4, e), torch.arange(k))


def test_half_precision_is_compared_in_fp32() -> None:
    g = torch.Generator().manual_seed(1)
    z, e = torch.randn(500, 8, generator=g).bfloat16(), torch.randn(64, 8, generator=g).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_index(z, e), nearest_index(z.float(), e.float()))


def test_what_cannot_be_looked_up_is_said() -> None:
    with pytest.raises(ValueError, match="with the same d"):
        nearest_index(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        nearest_index(torch.zeros(2, 3), torch.full((2, 3), float("nan")))
