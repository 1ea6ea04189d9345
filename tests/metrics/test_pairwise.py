"""Pairwise metrics against scikit-image and torchmetrics, in fp64 to 1e-6."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import color, metrics
from skimage import data as photographs
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from sfumato.metrics.pairwise import PAIRWISE, PERFECT, colour_error, edge_error, ms_ssim, mse, over_both, psnr, ssim


def shots(side: int = 176) -> torch.Tensor:
    """Photographs "3 3 side side" in [0, 1]."""
    names = ("astronaut", "coffee", "chelsea")
    return torch.stack([torch.from_numpy(getattr(photographs, n)()[:side, :side].copy()).permute(2, 0, 1).double() / 255 for n in names])


def spoilt(x: torch.Tensor, amount: float = 0.1, seed: int = 0) -> torch.Tensor:
    return (x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)).clamp(0, 1)


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    x = shots()
    y = spoilt(x)
    a, b = (t.permute(0, 2, 3, 1).numpy() for t in (x, y))
    theirs = [metrics.peak_signal_noise_ratio(p, q, data_range=1.0) for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(y, x).numpy(), theirs, rtol=1e-6)
    theirs = [metrics.structural_similarity(p, q, data_range=1.0, channel_axis=2) for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(y, x).numpy(), theirs, rtol=1e-6)
    with pytest.raises(ValueError, match="7 x 7 pixels at least, not 6 x 6"):
        ssim(x[..., :6, :6], y[..., :6, :6])


@pytest.mark.parametrize("side", [176, 233])
def test_ms_ssim_is_that_of_torchmetrics(side: int) -> None:
    x = shots(side)
    y = spoilt(x, 0.2)
    theirs = multiscale_structural_similarity_index_measure(y, x, data_range=1.0, reduction="none", normalize="relu")
    np.testing.assert_allclose(ms_ssim(y, x).numpy(), theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("side", "scales"), [(175, 4), (64, 3), (40, 2), (20, 1), (11, 1)])
def test_ms_ssim_of_small_pictures_has_fewer_scales(side: int, scales: int) -> None:
    """With the weights of those scales, made to sum to 1: torchmetrics takes them as they are given."""
    x = shots()[..., :side, :side]
    y = spoilt(x)
    weights = np.array((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:scales])
    if scales > 1:
        betas = tuple((weights / weights.sum()).tolist())
        theirs = multiscale_structural_similarity_index_measure(y, x, data_range=1.0, reduction="none", normalize="relu", betas=betas)
        np.testing.assert_allclose(ms_ssim(y, x).numpy(), theirs.numpy(), rtol=1e-6)
    assert bool((ms_ssim(x, x) == 1).all())


def test_colour_error_is_that_of_scikit_image() -> None:
    x = shots()
    y = spoilt(x)
    lab = [color.rgb2lab(t.permute(0, 2, 3, 1).numpy()) for t in (x, y)]
    theirs = np.sqrt(np.square(lab[0] - lab[1]).sum(-1)).mean((1, 2))
    np.testing.assert_allclose(colour_error(x, y).numpy(), theirs, rtol=1e-4)


def test_edge_error_sees_edges_and_not_brightness() -> None:
    x = torch.zeros(1, 3, 16, 16)
    step = x.clone()
    step[..., 8:] = 0.5
    assert float(edge_error(x, x + 0.5)) == pytest.approx(0, abs=1e-9)
    assert float(edge_error(x, step)) == pytest.approx(0.5 / 2**0.5 * 2 / 16, rel=1e-6)  # two columns of 16 see half a step each


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 0.2))
def test_equal_pictures_are_ideal_and_more_noise_is_worse(seed: int, amount: float) -> None:
    x = shots(32)
    near, far = spoilt(x, amount, seed), spoilt(x, 3 * amount, seed)
    for name, (metric, _, better) in PAIRWISE.items():
        ideal, close, away = (float(metric(y, x).mean()) for y in (x, near, far))
        assert ideal == pytest.approx({"psnr": PERFECT, "ssim": 1.0, "ms_ssim": 1.0}.get(name, 0.0), abs=1e-9), name
        assert better * ideal > better * close > better * away, name
        assert metric(near, x).shape == (3,)


def test_an_error_that_one_ground_hides_is_seen_over_the_other() -> None:
    clear = torch.zeros(1, 4, 16, 16)
    white = clear.clone()
    white[:, :, 4:12, 4:12] = 1  # a white square on nothing: the same over white
    value = float(over_both(mse, white, clear))
    assert value == pytest.approx(0.5 * 64 / 256)
    assert float(over_both(mse, white[:, :3], clear[:, :3])) == pytest.approx(64 / 256)
