"""Convolutions by tiles: the same numbers as those that are written out, at every size, in a trace of any shape; and where they are left alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.nn import winograd
from sfumato.nn.winograd import Conv3x3, constants, convolved, matrices, numbers

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "HERE", True)


def filled(cin: int, cout: int) -> Conv3x3:
    return Conv3x3(cin, cout).requires_grad_(False)


def test_one_channel_is_what_the_paper_says() -> None:
    """F(4 x 4, 3 x 3): results of a tile are `to_results` (weights x numbers), each multiplied by its constants."""
    to_results, of_weights, to_products = (v.double() for v in constants())
    d, g = torch.randn(6, 6, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    y = to_results @ ((of_weights @ g.reshape(-1)) * (to_products @ d.reshape(-1)))
    torch.testing.assert_close(y.view(4, 4), F.conv2d(d[None, None], g[None, None])[0, 0], atol=1e-6, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.integers(1, 30), st.booleans())
def test_every_size(rows: int, cin: int, cout: int, high: int, wide: int, last: bool) -> None:
    x, w, b = torch.randn(rows, cin, high, wide), torch.randn(cout, cin, 3, 3), torch.randn(cout)
    x = x.to(memory_format=torch.channels_last) if last else x
    torch.testing.assert_close(convolved(x, matrices(w), b), F.conv2d(x, w, b, padding=1), atol=1e-4, rtol=1e-4)


def test_errors_are_those_of_rounding() -> None:
    """Beside exact numbers, with as many channels as there are: within thirty times those of a plain convolution."""
    x, w, b = torch.randn(1, 640, 32, 32), torch.randn(320, 640, 3, 3) / (9 * 640) ** 0.5, torch.zeros(320)
    exact = F.conv2d(x.double(), w.double(), b.double(), padding=1)
    off, plain = (float((y - exact).abs().max()) for y in (convolved(x, matrices(w), b), F.conv2d(x, w, b, padding=1)))
    assert off < min(30 * plain, 2e-5 * float(exact.abs().max()))


def test_bands_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = torch.randn(2, 8, 45, 22), torch.randn(8, 8, 3, 3), torch.randn(8)
    whole = convolved(x, matrices(w), b)
    monkeypatch.setattr(winograd, "BAND", 36 * 8 * 6 * 2 * 4 * 2)  # two rows of tiles
    torch.testing.assert_close(convolved(x, matrices(w), b), whole, atol=1e-5, rtol=1e-5)


class Three(nn.Module):
    """Two layers that matrices fit, and one that is too narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 256, 1), Conv3x3(256, 256), Conv3x3(256, 320), Conv3x3(320, 8)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@torch.no_grad()
def test_a_trace_is_right_for_other_shapes() -> None:
    net, small, large = Three(), torch.randn(1, 4, 8, 8), torch.randn(2, 4, 13, 22)
    expected = [net(x) for x in (small, large)]
    with winograd.given(net):
        assert [layer.by is not None for layer in net.layers[1:]] == [True, True, False]
        traced = torch.jit.trace(net, small, check_trace=False)
    assert all(layer.by is None for layer in net.layers[1:])
    assert numbers(net) == 27 * (256 * 256 + 256 * 320)
    for x, y in zip((small, large), expected, strict=True):
        torch.testing.assert_close(traced(x), y, atol=1e-4, rtol=1e-4)


def test_where_tiles_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """In large pictures without gradients, with the weights as they are now; not where something is learned, in halves, small or around edges."""
    taken: list[tuple[int, ...]] = []
    plain = winograd.convolved
    monkeypatch.setattr(winograd, "convolved", lambda x, by, bias: (taken.append(tuple(x.shape)), plain(x, by, bias))[1])
    layer, x = filled(256, 256), torch.randn(1, 256, 64, 64)
    with torch.no_grad():
        for change in (0.0, 1.0):
            layer.weight += change
            torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1), atol=2e-3, rtol=1e-4)
        assert len(taken) == 2
        layer(x[..., :60]), filled(128, 256)(x[:, :128]), filled(1024, 1024)(torch.randn(1, 1024, 64, 64)), layer.half()(x.half())
        with torch.autocast("cpu", torch.bfloat16):
            filled(256, 256)(x)
        other = filled(256, 256)
        other.padding_mode = "circular"
        other(x)
        with winograd.as_written():
            filled(256, 256)(x)
        monkeypatch.setattr(winograd, "HERE", False)
        filled(256, 256)(x)
    monkeypatch.setattr(winograd, "HERE", True)
    filled(256, 256)(x.requires_grad_(True)).sum().backward()
    assert len(taken) == 2
    assert x.grad is not None
