"""Deep features kept from step to step: exact where all are computed or change along a line, fewer whole calls, guidance that comes and goes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato.core.seams import Cond
from sfumato.diffusion.deepcache import DeepCache, onward
from sfumato.diffusion.unet import UNet, UNetConfig

CONFIG = UNetConfig(widths=(32, 64), blocks=1, depths=(1, 0), heads=(2, 2), context=16)


@pytest.fixture(scope="module")
def net() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG).eval().requires_grad_(False)


class Counting:
    def __init__(self, net: UNet) -> None:
        self.net, self.wholes, self.shallows = net, 0, 0

    def whole(self, *args: object) -> tuple[Tensor, Tensor]:
        self.wholes += 1
        return self.net.whole(*args)  # type: ignore[arg-type]

    def shallow(self, *args: object) -> Tensor:
        self.shallows += 1
        return self.net.shallow(*args)  # type: ignore[arg-type]


def told(rows: int) -> Cond:
    return Cond(text=torch.randn(rows, 5, 16, generator=torch.Generator().manual_seed(1)))


def test_a_shallow_step_with_its_own_features_is_the_whole_one(net: UNet) -> None:
    x, t, cond = torch.randn(2, 4, 12, 8), torch.full((2,), 0.5), told(2)
    out, deep = net.whole(x, t, cond)
    assert torch.equal(out, net(x, t, cond))
    torch.testing.assert_close(net.shallow(x, t, cond, deep), out, atol=1e-6, rtol=1e-5)


def test_every_third_step_is_whole(net: UNet) -> None:
    counting, x, cond = Counting(net), torch.randn(1, 4, 8, 8), told(1)
    cached = DeepCache(counting.whole, counting.shallow, 3)
    for t in torch.linspace(1, 0.1, 10):
        cached(x, t.reshape(1), cond)
    assert (counting.wholes, counting.shallows) == (4, 6)


def test_features_that_change_along_a_line_are_exact() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    at = lambda t: a + t * b  # noqa: E731
    torch.testing.assert_close(onward([(0.9, at(0.9)), (0.7, at(0.7))], 0.55, 2), at(0.55), atol=1e-5, rtol=1e-5)
    assert torch.equal(onward([(0.9, at(0.9))], 0.5, 1), at(0.9)[:1])


def test_guidance_may_begin_and_end_between_whole_steps(net: UNet) -> None:
    """In one call of both, and in a call for each."""
    x, times = torch.randn(1, 4, 8, 8), torch.linspace(1, 0.1, 10)
    for together in (True, False):
        counting = Counting(net)
        cached = DeepCache(counting.whole, counting.shallow, 4)
        for i, t in enumerate(times):
            guides = 2 <= i <= 5
            if guides and together:
                found = cached(torch.cat([x, x]), t.expand(2), told(2))
                assert found.shape == (2, 4, 8, 8)
            else:
                for _ in range(1 + guides):
                    assert cached(x, t.reshape(1), told(1)).shape == (1, 4, 8, 8)
        assert counting.wholes == (4 if together else 5), "three by their turn, and where guidance begins; by itself it has a turn of its own as well"


def test_of_one_whole_step_each_nothing_is_left_out(net: UNet) -> None:
    cached, x, cond = DeepCache(net.whole, net.shallow, 1), torch.randn(1, 4, 8, 8), told(1)
    for t in (0.9, 0.5, 0.1):
        assert torch.equal(cached(x, torch.tensor([t]), cond), net(x, torch.tensor([t]), cond))


def test_features_of_another_text_are_not_taken(net: UNet) -> None:
    """As with guidance 0, where only what guidance leans on is asked for, and outside of its interval only the condition."""
    counting, x = Counting(net), torch.randn(1, 4, 8, 8)
    cached, other = DeepCache(counting.whole, counting.shallow, 4), Cond(text=torch.zeros(1, 5, 16))
    for t, cond in ((0.9, other), (0.8, other), (0.7, told(1)), (0.6, told(1))):
        out = cached(x, torch.tensor([t]), cond)
        if t in (0.9, 0.7):
            assert torch.equal(out, net(x, torch.tensor([t]), cond))
    assert (counting.wholes, counting.shallows) == (2, 2)
