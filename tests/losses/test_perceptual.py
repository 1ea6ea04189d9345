from __future__ import annotations

import torch
from torch import Tensor

from sfumato.losses.perceptual import perceptual
from sfumato.nn.backbones import efficientnet_lite0


def two() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 2, 3, 64, 64, generator=g) * 2 - 1
    return a, b


def test_the_gradient_flows_into_the_prediction_only() -> None:
    a, b = (v.requires_grad_() for v in two())
    loss, _ = perceptual(efficientnet_lite0(), a, b)
    loss.backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()
    assert (a.grad.abs().amax((1, 2, 3)) > 0).all()
    assert b.grad is None
    assert all(p.grad is None for p in efficientnet_lite0().parameters())


def test_zero_for_equal_pictures_and_symmetric_otherwise() -> None:
    a, b = two()
    network = efficientnet_lite0()
    with torch.no_grad():
        assert perceptual(network, a, a)[0] == 0
        there, back = perceptual(network, a, b)[0], perceptual(network, b, a)[0]
    assert there > 0.01
    torch.testing.assert_close(there, back)


def test_statistics_name_each_resolution_and_average_to_the_loss() -> None:
    a, b = two()
    for last, maps in ((10, 4), (4, 3), (15, 5)):
        loss, stats = perceptual(efficientnet_lite0(), a, b, last)
        assert list(stats) == [f"perceptual_{i}" for i in range(maps)]
        torch.testing.assert_close(torch.stack(list(stats.values())).mean(), loss)


def test_a_gradient_step_brings_the_pictures_closer() -> None:
    a, b = two()
    a.requires_grad_()
    before, _ = perceptual(efficientnet_lite0(), a, b)
    before.backward()
    with torch.no_grad():
        after, _ = perceptual(efficientnet_lite0(), a - 0.05 * a.grad / a.grad.abs().mean() * 0.1, b)
    assert after < before


def test_blur_costs_more_than_a_small_shift_in_brightness() -> None:
    from skimage import data

    x = torch.from_numpy(data.chelsea()[:128, 150:278].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    blurred = torch.nn.functional.avg_pool2d(x, 9, 1, 4, count_include_pad=False)
    brighter = x + (blurred - x).square().mean().sqrt()
    with torch.no_grad():
        assert perceptual(efficientnet_lite0(), blurred, x)[0] > 2 * perceptual(efficientnet_lite0(), brighter, x)[0]
