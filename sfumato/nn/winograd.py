"""Convolutions of 3 x 3 by fewer products on CPUs: Winograd's minimal filtering (arXiv 1509.09308).

16 results of one channel come of 6 x 6 numbers by 36 products instead of 144. These are summed over channels as 36 matrix products, whose matrices
are four times as large as the weights; to begin and to end with, tiles are multiplied by constants.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import polynomial
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, TILE = 4, 6  # results of a tile, and numbers that they are made of
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)  # and infinity: of few digits, of which errors stay small (arXiv 1803.10986)
NARROWEST, WIDEST = 256, 640 * 1280  # channels below which constants cost more than products save; in x out above which matrices take too much memory
FEWEST = 16 * 16  # tiles from which on matrices are worth making for one call
BAND = 2**25  # bytes of tiles at a time, which the process keeps when they are freed
HERE = platform.machine() in ("x86_64", "AMD64")  # where it was measured
MADE = f"tiles of {SIDE} at {POINTS}, {NARROWEST} to {WIDEST}" if HERE else "no tiles"  # what a graph has of them
WRITTEN: ContextVar[bool] = ContextVar("written", default=False)
_GIVING = threading.Lock()


@cache
def constants() -> tuple[Float[Tensor, "16 36"], Float[Tensor, "36 9"], Float[Tensor, "36 36"]]:
    """What results are made of products by, what weights and what tiles are multiplied by (Toom and Cook: polynomials at some points)."""
    points = np.array(POINTS)
    at = lambda n: np.vstack([np.vander(points, n, increasing=True), np.eye(n)[-1:]])  # noqa: E731  values there of 1, x, ... x^(n-1)
    others = [np.delete(points, i) for i in range(len(points))]
    slopes = np.array([*(np.prod(p - o) for p, o in zip(points, others, strict=True)), 1.0])
    through = np.array([*(np.append(polynomial.polyfromroots(o), 0.0) for o in others), polynomial.polyfromroots(points)])
    results, weights, tiles = (torch.from_numpy(np.kron(m, m)).float() for m in (at(SIDE).T, at(3) / slopes[:, None], through))
    return results, weights, tiles


def matrices(weight: Float[Tensor, "cout cin 3 3"]) -> Float[Tensor, "36 cin cout"]:
    """What the weights are to tiles."""
    out, cin = weight.shape[:2]
    return (constants()[1] @ weight.detach().float().reshape(-1, 9).T).view(-1, out, cin).transpose(1, 2)


def convolved(x: Float[Tensor, "b cin h w"], by: Float[Tensor, "36 cin cout"], bias: Float[Tensor, " cout"]) -> Float[Tensor, "b cout h w"]:
    """F.conv2d(x, weight, bias, padding=1) with `by` = matrices(weight). In a trace it is right for any shape."""
    height, width = x.shape[2:]
    rows, columns = -(-height // SIDE), -(-width // SIDE)
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, columns * SIDE + 1 - width, 1, rows * SIDE + 1 - height))
    if torch.jit.is_tracing():
        y = _tiled(x, by, rows, columns) + bias
    else:
        band = max(1, BAND // (4 * TILE**2 * max(by.shape[1:]) * columns * len(x)))
        parts = [(top, min(band, rows - top)) for top in range(0, rows, band)]
        y = torch.cat([_tiled(x[:, SIDE * top : SIDE * (top + n) + 2], by, n, columns) for top, n in parts], dim=1).add_(bias)
    return y[:, :height, :width].permute(0, 3, 1, 2)


def _tiled(x: Float[Tensor, "b high wide cin"], by: Float[Tensor, "36 cin cout"], rows: int, columns: int) -> Float[Tensor, "b h2 w2 cout"]:
    """Of so many rows and columns of tiles, with what lies around them."""
    to_results, _, to_products = constants()
    b, high, wide, cin = x.shape
    lines = (torch.arange(b)[:, None] * high + torch.arange(rows) * SIDE)[None, None, :, :, None] + torch.arange(TILE)[:, None, None, None, None]
    places = torch.arange(columns) * SIDE + torch.arange(TILE)[:, None, None, None]
    x = x.reshape(-1, cin)[(lines * wide + places).reshape(-1)]  # each number of a tile, then each tile
    products = torch.matmul((to_products @ x.reshape(TILE**2, -1)).reshape(TILE**2, -1, cin), by)
    y = (to_results @ products.reshape(TILE**2, -1)).reshape(SIDE, SIDE, b, rows, columns, -1)
    return y.permute(2, 3, 0, 4, 1, 5).reshape(b, rows * SIDE, columns * SIDE, -1)


class Conv3x3(nn.Conv2d):
    """nn.Conv2d(cin, cout, 3, padding=1), by tiles where that is faster: with the matrices that it was given, or in large pictures that nothing is to
    be learned of.
    """

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(cin, cout, 3, padding=1)
        self.by: Tensor | None = None

    @property
    def fits(self) -> bool:
        cin, cout = self.in_channels, self.out_channels
        return HERE and min(cin, cout) >= NARROWEST and cin * cout <= WIDEST and self.padding_mode == "zeros"

    def _worth(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or WRITTEN.get():
            return False
        whole = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return whole and self.fits and not torch.is_grad_enabled() and x.shape[0] * x.shape[2] * x.shape[3] >= FEWEST * SIDE**2

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        by = None if self.by is not None and WRITTEN.get() else self.by
        if by is None and self._worth(x):
            by = matrices(self.weight)
        return super().forward(x) if by is None else convolved(x, by, self.bias)  # type: ignore[arg-type]


@contextmanager
def given(network: nn.Module) -> Iterator[None]:
    """With matrices for all convolutions of a network that they fit; one thread after the other."""
    fit = [m for m in network.modules() if isinstance(m, Conv3x3) and m.fits]
    with _GIVING:
        try:
            for m in fit:
                m.by = matrices(m.weight).contiguous()
            yield
        finally:
            for m in fit:
                m.by = None


@contextmanager
def as_written() -> Iterator[None]:
    """Without tiles: convolutions as they are counted everywhere, and what tiles are compared with."""
    token = WRITTEN.set(True)
    try:
        yield
    finally:
        WRITTEN.reset(token)


def numbers(network: nn.Module) -> int:
    """How many the matrices are more than the weights."""
    return sum((TILE**2 - 9) * m.in_channels * m.out_channels for m in network.modules() if isinstance(m, Conv3x3) and m.fits)
