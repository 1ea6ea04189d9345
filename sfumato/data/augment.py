"""Varied pictures from fixed drawings: placement, mirroring, named recolouring, several things, and simple opaque grounds.

What is drawn is a `Scene`, plain data made from a random stream; `render` turns scenes into tensors and `sfumato.data.captions` turns
them into words, so that picture and caption always agree. All pixels are RGBA with premultiplied alpha in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.15, 0.16),
    "orange": (0.96, 0.53, 0.10),
    "yellow": (0.98, 0.82, 0.18),
    "green": (0.25, 0.66, 0.27),
    "blue": (0.17, 0.44, 0.87),
    "purple": (0.55, 0.28, 0.77),
    "pink": (0.97, 0.51, 0.70),
    "brown": (0.52, 0.32, 0.18),
    "black": (0.13, 0.13, 0.15),
    "white": (0.94, 0.94, 0.95),
    "grey": (0.55, 0.56, 0.58),
}
GROUNDS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float], float]] = {  # upper colour, lower colour, horizon
    "garden": ((0.62, 0.85, 0.98), (0.45, 0.75, 0.33), 0.62),
    "beach": ((0.53, 0.82, 0.96), (0.96, 0.87, 0.62), 0.66),
    "snow": ((0.75, 0.86, 0.95), (0.97, 0.98, 1.00), 0.64),
    "sea": ((0.72, 0.90, 0.98), (0.16, 0.47, 0.75), 0.55),
    "desert": ((0.98, 0.80, 0.55), (0.90, 0.66, 0.36), 0.64),
    "night": ((0.07, 0.09, 0.25), (0.13, 0.16, 0.30), 0.70),
    "room": ((0.96, 0.91, 0.82), (0.70, 0.51, 0.36), 0.72),
    "sky": ((0.45, 0.74, 0.97), (0.85, 0.94, 1.00), 1.00),
}


@dataclass(frozen=True)
class Placed:
    """One drawing on the canvas. `scale` is its side in canvas sides, `angle` in degrees anticlockwise, dx right and dy down in canvas sides."""

    drawing: int
    scale: float = 1.0
    angle: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    flip: bool = False
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a picture shows, from back to front. `kind`: one | count (several of one thing) | pair (two side by side) | scene (on a ground)."""

    items: tuple[Placed, ...]
    kind: str = "one"
    ground: str | None = None


@dataclass(frozen=True, kw_only=True)
class Variety:
    """How far pictures may stray from the drawings; the rates are probabilities.

    `place` is the rate of a changed placement, within `scale` and +-`angle` degrees; where scale begins at 1 or above, the canvas stays filled.
    `flip` is the rate of mirroring where meaning allows; `count`, `pair` and `scene` are rates of their own kinds.
    """

    place: float = 0.7
    scale: tuple[float, float] = (0.7, 1.0)
    angle: float = 12.0
    flip: float = 0.5
    recolour: float = 0.25
    count: float = 0.0
    pair: float = 0.0
    scene: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "recolour", "count", "pair", "scene"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} (={getattr(self, name)}) must be between 0 and 1: it is a rate")
        if self.count + self.pair + self.scene > 1:
            raise ValueError(f"count + pair + scene (={self.count + self.pair + self.scene}) must be at most 1: they are rates of one choice")


STILL = Variety(place=0.0, scale=(1.0, 1.0), angle=0.0, recolour=0.0)  # as the drawings are, or mirrored


def draw_scene(
    rng: np.random.Generator,
    variety: Variety,
    drawing: int,
    may_flip: bool,
    partners: Sequence[tuple[int, bool]] = (),
    may_recolour: bool = True,
) -> Scene:
    """A scene about `drawing`. `partners` are the (drawing, may_flip) that may stand beside it, of the same style."""
    kind = rng.choice(("count", "pair", "scene", "one"), p=_rates(variety, bool(partners)))
    colour = str(rng.choice(list(COLOURS))) if rng.random() < variety.recolour else None
    placed = Placed(drawing, flip=bool(may_flip and rng.random() < variety.flip), colour=colour if may_recolour else None)
    if kind == "count":
        return Scene(_in_a_row([placed] * int(rng.integers(2, 4)), rng), kind)
    if kind == "pair":
        other, other_flips = partners[int(rng.integers(len(partners)))]
        return Scene(_in_a_row([placed, Placed(other, flip=bool(other_flips and rng.random() < variety.flip))], rng), kind)
    if kind == "scene":
        ground = str(rng.choice(list(GROUNDS)))
        return Scene((_place(placed, rng, replace(variety, scale=(0.5, 0.75)), low=True),), kind, ground)
    return Scene((_place(placed, rng, variety) if rng.random() < variety.place else placed,))


def _rates(v: Variety, partners: bool) -> list[float]:
    pair = v.pair if partners else 0.0
    return [v.count, pair, v.scene, 1 - v.count - pair - v.scene]


def _place(item: Placed, rng: np.random.Generator, v: Variety, low: bool = False) -> Placed:
    scale = float(rng.uniform(*v.scale))
    room = max(1 - scale, 0.0) / 2 + 0.02
    if v.scale[0] >= 1:  # nothing is ever made smaller: pictures that fill the canvas, and go on doing so
        room = max((scale - 1) / 2 - 0.01, 0.0)
    dx, dy = rng.uniform(-room, room, 2)
    dy = abs(dy) if low else dy
    return replace(item, scale=scale, angle=float(rng.uniform(-v.angle, v.angle)), dx=float(dx), dy=float(dy))


def _in_a_row(items: list[Placed], rng: np.random.Generator) -> tuple[Placed, ...]:
    n = len(items)
    if n == 3:  # two behind, one in front
        spots = [(-0.23, -0.22), (0.23, -0.22), (0.0, 0.22)]
        scale = 0.46
    else:
        spots = [(-0.24, 0.0), (0.24, 0.0)]
        scale = 0.5
    jitter = rng.uniform(-0.02, 0.02, (n, 2))
    return tuple(replace(p, scale=scale, dx=x + float(j[0]), dy=y + float(j[1])) for p, (x, y), j in zip(items, spots, jitter, strict=True))


def recolour(rgba: Float[Tensor, "b 4 h w"], colour: Float[Tensor, "b 3"]) -> Float[Tensor, "b 4 h w"]:
    """Tints drawings: their mean lightness becomes `colour`, darker parts go to black and lighter ones to white.

    rgba is premultiplied, both are in [0, 1]; alpha is unchanged.
    """
    alpha = rgba[:, 3:]
    straight = rgba[:, :3] / alpha.clamp_min(1e-4)
    luma = (straight * straight.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True).clamp(0, 1)
    middle = ((luma * alpha).sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True).clamp_min(1e-4)).clamp(0.2, 0.85)
    tint = colour[:, :, None, None]
    below = tint * (luma / middle).clamp(max=1)
    above = (1 - tint) * ((luma - middle) / (1 - middle)).clamp(0, 1) * 0.8
    return torch.cat([(below + above) * alpha, alpha], dim=1)


def ground(name: str, size: int) -> Float[Tensor, "4 {size} {size}"]:
    """An opaque ground: two flat halves that meet softly at the horizon; the night has stars, the sky is one gradient."""
    upper, lower, horizon = (torch.tensor(v) for v in GROUNDS[name])
    y = (torch.arange(size) + 0.5) / size
    t = y if name == "sky" else ((y - horizon) * size / 2 + 0.5).clamp(0, 1)
    rgb = torch.lerp(upper[:, None], lower[:, None], t[None])[:, :, None].expand(3, size, size).clone()
    if name == "night":
        stars = np.random.Generator(np.random.PCG64(7)).integers(0, size, (max(size // 6, 1), 2))
        for row, column in stars[stars[:, 0] < 0.6 * size]:
            rgb[:, row, column] = 0.95
    return torch.cat([rgb, torch.ones(1, size, size)])


def halved(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h/2 w/2"]:
    """Means of two by two."""
    rows = x[:, :, 0::2] + x[:, :, 1::2]
    return (rows[..., 0::2] + rows[..., 1::2]) / 4


def place(rgba: Float[Tensor, "b 4 s s"], items: Sequence[Placed], size: int) -> Float[Tensor, "b 4 {size} {size}"]:
    """Moves drawings as `items` say and samples them at `size`: bilinear at twice the size, then averaged, so that it does not alias."""
    stays = [rgba.shape[-1] == 2 * size and i == Placed(i.drawing, flip=i.flip, colour=i.colour) for i in items]
    still, moving = ([i for i, stay in enumerate(stays) if stay == wanted] for wanted in (True, False))
    out = rgba.new_empty(len(items), 4, size, size)
    if still:
        out[still] = halved(rgba[still])
        mirrored = [i for i in still if items[i].flip]
        out[mirrored] = out[mirrored].flip(3)
    if moving:
        out[moving] = _moved(rgba[moving], [items[i] for i in moving], size)
    return out


def _moved(rgba: Tensor, items: Sequence[Placed], size: int) -> Tensor:
    angle = torch.tensor([math.radians(i.angle) for i in items])
    scale = torch.tensor([i.scale for i in items])
    mirror = torch.tensor([-1.0 if i.flip else 1.0 for i in items])
    shift = torch.tensor([[2 * i.dx, 2 * i.dy] for i in items])
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    linear = torch.stack([torch.stack([mirror * cos, -mirror * sin], 1), torch.stack([sin, cos], 1)], 1)
    theta = torch.cat([linear, -(linear @ shift[:, :, None])], dim=2)
    grid = F.affine_grid(theta, [len(items), 4, 2 * size, 2 * size], align_corners=False)
    return halved(F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False))


@runtime_checkable
class Rows(Protocol):
    """Pictures that are not all in memory: `pixels[rows]` is uint8 "b 4 s s"."""

    def __getitem__(self, rows: Tensor) -> Tensor: ...


def render(pixels: UInt8[Tensor, "n 4 s s"] | Rows, scenes: Sequence[Scene], size: int) -> Float[Tensor, "{len(scenes)} 4 {size} {size}"]:
    """Scenes over the drawings `pixels` -> pictures in [0, 1]; both are premultiplied."""
    canvas = torch.zeros(len(scenes), 4, size, size)
    for row, scene in enumerate(scenes):
        if scene.ground is not None:
            canvas[row] = ground(scene.ground, size)
    for layer in range(max(len(s.items) for s in scenes)):
        rows = [i for i, s in enumerate(scenes) if len(s.items) > layer]
        items = [scenes[i].items[layer] for i in rows]
        rgba = pixels[torch.tensor([p.drawing for p in items])].float() / 255
        tinted = [i for i, p in enumerate(items) if p.colour is not None]
        if tinted:
            rgba[tinted] = recolour(rgba[tinted], torch.tensor([COLOURS[items[i].colour] for i in tinted]))  # type: ignore[index]
        moved = place(rgba, items, size)
        canvas[rows] = moved + canvas[rows] * (1 - moved[:, 3:])
    return canvas.clamp_(0, 1)
