"""Differentiable changes of the pictures that a discriminator sees, so that few pictures last longer: the same for real and generated ones.

DiffAugment (arXiv 2006.10738) changes every picture; ADA (arXiv 2006.06676) changes each in each way with a probability p, low enough for the
generator not to learn the changes themselves. Random numbers come from torch's own generator, which the training loop seeds before each step.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Augment = Literal["none", "diffaugment", "ada"]
SHIFT, HOLE = 1 / 8, 1 / 2  # of the side: DiffAugment's translation and cutout


def diffaugment(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Brightness, saturation and contrast, a shift by an eighth at most, and a hole of half the side (arXiv 2006.10738, section 4); zeros outside."""
    return _holed(_shifted(_coloured(x)))


def _coloured(x: Tensor) -> Tensor:
    """Of RGB; what a fourth channel holds stays."""
    rgb, rest = x[:, :3], x[:, 3:]
    brighter, saturation, contrast = torch.rand(3, len(x), 1, 1, 1, device=x.device, dtype=x.dtype)
    rgb = rgb + brighter - 0.5
    grey = rgb.mean(1, keepdim=True)
    rgb = (rgb - grey) * (2 * saturation) + grey
    middle = rgb.mean((1, 2, 3), keepdim=True)
    return torch.cat([(rgb - middle) * (contrast + 0.5) + middle, rest], dim=1)


def _shifted(x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    dy, dx = (torch.randint(-round(n * SHIFT), round(n * SHIFT) + 1, (b, 1), device=x.device) for n in (h, w))
    rows, columns = (torch.arange(n, device=x.device) + d for n, d in ((h, dy), (w, dx)))  # where a pixel comes from
    inside = ((rows >= 0) & (rows < h))[:, None, :, None] & ((columns >= 0) & (columns < w))[:, None, None, :]
    at = torch.arange(b, device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[at, rows.clamp(0, h - 1)[:, :, None], columns.clamp(0, w - 1)[:, None, :]].permute(0, 3, 1, 2)
    return moved * inside


def _holed(x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    inside = []
    for n in (h, w):
        side = round(n * HOLE)
        first = torch.randint(-(side // 2), n + 1 - side // 2, (b, 1), device=x.device)
        places = torch.arange(n, device=x.device)
        inside.append((places >= first) & (places < first + side))
    return x * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


def ada(x: Float[Tensor, "b c h w"], p: float | Float[Tensor, ""]) -> Float[Tensor, "b c h w"]:
    """Mirroring, quarter turns, shifts, scaling, rotation and changes of colour, each with probability p (arXiv 2006.06676, appendix B, without its
    filters and corruptions). Differentiable once: a penalty on slopes is to look at what this returns. p 0 changes nothing.
    """
    where, same = _placed(x, p), torch.eye(3, device=x.device, dtype=x.dtype)
    rows = (where != same).any(2).any(1).nonzero()[:, 0]  # the others stay, to the last bit
    if len(rows):
        grid = F.affine_grid(where[rows, :2], [len(rows), *x.shape[1:]], align_corners=False)
        x = x.index_copy(0, rows, F.grid_sample(x[rows], grid, mode="bilinear", padding_mode="reflection", align_corners=False))
    turn, add = _tinted(x, p)
    rows = ((turn != same).any(2).any(1) | (add != 0).any(1)).nonzero()[:, 0]
    if len(rows):
        rgb = torch.einsum("bij,bjhw->bihw", turn[rows], x[rows, :3]) + add[rows, :, None, None]
        x = x.index_copy(0, rows, torch.cat([rgb, x[rows, 3:]], dim=1))
    return x


def _placed(x: Tensor, p: float | Tensor) -> Tensor:
    """Which place each pixel comes from, as matrices "b 3 3" of coordinates in [-1, 1]."""
    b, one = len(x), torch.ones(len(x), device=x.device, dtype=x.dtype)

    def happens(chance: float | Tensor = 1.0) -> Tensor:
        return torch.rand(b, device=x.device) < p * chance

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(b, device=x.device, dtype=x.dtype) * (high - low) + low

    def normal(std: float) -> Tensor:
        return torch.randn(b, device=x.device, dtype=x.dtype) * std

    some = 1 - (1 - (p if isinstance(p, Tensor) else torch.tensor(p))).clamp(0, 1).sqrt()  # either of two rotations with probability p
    out = _scale(torch.where(happens() & (uniform(0, 1) < 0.5), -one, one), one)
    out = out @ _turn(torch.where(happens(), torch.randint(0, 4, (b,), device=x.device) * (math.pi / 2), 0 * one).to(x))
    pixel = 2 / x.shape[-1]
    moved = happens()
    out = out @ _move(*(torch.where(moved, (uniform(-0.25, 0.25) / pixel).round() * pixel, 0 * one) for _ in range(2)))
    size = torch.where(happens(), torch.exp2(normal(0.2)), one)
    out = out @ _scale(size, size)
    before, after = (torch.where(torch.rand(b, device=x.device) < some, uniform(-math.pi, math.pi), 0 * one) for _ in range(2))
    out = out @ _turn(before)
    wide = torch.where(happens(), torch.exp2(normal(0.2)), one)
    out = out @ _scale(wide, 1 / wide) @ _turn(after)
    moved = happens()
    return out @ _move(*(torch.where(moved, normal(0.25), 0 * one) for _ in range(2)))


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def _scale(x: Tensor, y: Tensor) -> Tensor:
    o, i = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[x, o, o], [o, y, o], [o, o, i]])


def _turn(angle: Tensor) -> Tensor:
    o, i, c, s = torch.zeros_like(angle), torch.ones_like(angle), angle.cos(), angle.sin()
    return _matrix([[c, -s, o], [s, c, o], [o, o, i]])


def _move(x: Tensor, y: Tensor) -> Tensor:
    o, i = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[i, o, x], [o, i, y], [o, o, i]])


def _tinted(x: Tensor, p: float | Tensor) -> tuple[Tensor, Tensor]:
    """What is made of RGB in [-1, 1]: a matrix "b 3 3" and what is added "b 3"."""
    b, like = len(x), {"device": x.device, "dtype": x.dtype}
    eye, one = torch.eye(3, **like).expand(b, 3, 3), torch.ones(b, **like)  # type: ignore[call-overload]
    grey = torch.full((3, 3), 1 / 3, **like)  # type: ignore[call-overload]  # onto the axis of greys

    def happens() -> Tensor:
        return torch.rand(b, device=x.device) < p

    add = torch.where(happens(), torch.randn(b, **like) * 0.2, 0 * one)[:, None].expand(b, 3)  # type: ignore[call-overload]
    contrast = torch.where(happens(), torch.exp2(torch.randn(b, **like) * 0.5), one)  # type: ignore[call-overload]
    flipped = (happens() & (torch.rand(b, device=x.device) < 0.5)).to(x)
    angle = torch.where(happens(), (torch.rand(b, **like) * 2 - 1) * math.pi, 0 * one)  # type: ignore[call-overload]
    saturation = torch.where(happens(), torch.exp2(torch.randn(b, **like)), one)  # type: ignore[call-overload]
    of = lambda v: v[:, None, None]  # noqa: E731
    turn = of(contrast) * eye
    turn = (eye - 2 * of(flipped) * grey) @ turn  # brightness mirrored
    axis = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], **like) / 3**0.5  # type: ignore[call-overload]
    hue = of(angle.cos()) * eye + of(angle.sin()) * axis + of(1 - angle.cos()) * grey
    turn = (grey + (eye - grey) * of(saturation)) @ hue @ turn
    return turn, (turn @ add[:, :, None])[:, :, 0]
