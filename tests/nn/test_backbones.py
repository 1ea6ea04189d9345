from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data
from torch import Tensor

from sfumato.nn.backbones import efficientnet_lite0, over, resize


def photograph(name: str) -> Tensor:
    """A middle square of one of scikit-image's photographs, "1 3 224 224" in [-1, 1]."""
    u8 = getattr(data, name)()
    side = min(u8.shape[:2])
    top, left = (u8.shape[0] - side) // 2, (u8.shape[1] - side) // 2
    x = torch.from_numpy(np.ascontiguousarray(u8[top : top + side, left : left + side])).permute(2, 0, 1)[None].float()
    return resize(x / 127.5 - 1, 224)


@pytest.mark.parametrize(("name", "classes"), [("chelsea", {281, 282, 283, 284, 285}), ("coffee", {967})])
def test_it_knows_photographs(name: str, classes: set[int]) -> None:
    """ImageNet's classes: 281-285 are domestic cats, 967 is espresso. Fails if any weight landed in the wrong place."""
    with torch.no_grad():
        top = efficientnet_lite0()(photograph(name))[0].topk(3).indices.tolist()
    assert classes & set(top)


def test_features_do_not_depend_on_the_batch() -> None:
    x = torch.cat([photograph("chelsea"), photograph("coffee"), photograph("chelsea").flip(-1)])
    network = efficientnet_lite0()
    with torch.no_grad():
        together = network.pooled(x)
        alone = torch.cat([network.pooled(row[None]) for row in x])
    assert together.shape == (3, 1280)
    assert (together - alone).abs().max() < 1e-5
    assert (together[0] - together[1]).abs().max() > 0.1


def test_maps_are_at_strides_2_to_32() -> None:
    maps = efficientnet_lite0().maps(torch.zeros(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    assert len(efficientnet_lite0().maps(torch.zeros(1, 3, 64, 64), last=10)) == 4


def test_later_blocks_do_not_change_the_maps_already_found() -> None:
    x = photograph("coffee")
    with torch.no_grad():
        for short, long in zip(efficientnet_lite0().maps(x, last=4), efficientnet_lite0().maps(x), strict=False):
            assert torch.equal(short, long)


def test_it_is_frozen() -> None:
    network = efficientnet_lite0()
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_over() -> None:
    rgba = torch.tensor([0.2, 0.1, 0.0, 0.5])[None, :, None, None]
    assert torch.allclose(over(rgba).flatten(), torch.tensor([0.7, 0.6, 0.5]))
    assert torch.allclose(over(rgba, 0.0).flatten(), torch.tensor([0.2, 0.1, 0.0]))


def test_resize_is_antialiased_and_exact_where_nothing_changes() -> None:
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(resize(x, 32), x)
    stripes = torch.ones(1, 1, 64, 64)
    stripes[..., ::2] = -1
    assert resize(stripes, 16)[..., 2:-2].abs().max() < 0.1
