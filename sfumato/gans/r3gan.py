"""The pair of R3GAN (arXiv 2501.05441): residual blocks of grouped convolutions without any normalisation, for a relativistic loss with R1 and R2."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.core.config import at_least
from sfumato.nn.layers import channels_at

SLOPE = 0.2


@dataclass(frozen=True, kw_only=True)
class R3GANConfig:
    """`width` channels at the largest side, twice as many at each half of it, `most` at most; `blocks` at each side, in which channels are `wider`
    times as many, convolved in groups of `group`. With `patch` 1 the largest side is the picture's, as in the paper; with 2 half of that, which takes
    less than half the time.
    """

    kind: str = "r3gan"
    width: int = 16
    most: int = 256
    blocks: int = 1
    wider: int = 2
    group: int = 16
    patch: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        at_least(1, width=self.width, most=self.most, blocks=self.blocks, wider=self.wider, group=self.group)
        for name in ("width", "most"):
            inner = getattr(self, name) * self.wider
            if inner % self.group:
                raise ValueError(f"{name} x wider (={inner}) must be a multiple of group (={self.group})")


def _scaled(layer: nn.Module, gain: float) -> nn.Module:
    """Weights whose outputs have `gain` times the deviation of their inputs."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    nn.init.normal_(weight, std=gain / weight[0].numel() ** 0.5)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class GroupedBlock(nn.Module):
    """x + 1x1(act(grouped 3x3(act(1x1(x))))). The last layer starts at zero; the others are scaled by depth^(-1/4) (Fixup, arXiv 1901.09321)."""

    def __init__(self, width: int, config: R3GANConfig, depth: int) -> None:
        super().__init__()
        inner = width * config.wider
        gain = (2 / (1 + SLOPE**2)) ** 0.5 * depth**-0.25
        self.enter = _scaled(nn.Conv2d(width, inner, 1), gain)
        self.mix = _scaled(nn.Conv2d(inner, inner, 3, padding=1, groups=inner // config.group), gain)
        self.leave = _scaled(nn.Conv2d(inner, width, 1, bias=False), 0.0)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        h = F.leaky_relu(self.mix(F.leaky_relu(self.enter(x), SLOPE)), SLOPE)
        return x + self.leave(h)


class R3GANGenerator(nn.Module):
    """Vector "b d" -> image "b c size size", about [-1, 1] but without a limit."""

    def __init__(self, config: R3GANConfig, vector: int, size: int, channels: int) -> None:
        super().__init__()
        widths = channels_at(config.width, config.most, size // config.patch)[::-1]
        depth = config.blocks * len(widths)
        self.base = nn.Parameter(torch.randn(widths[0], 4, 4))
        self.first = _scaled(nn.Linear(vector, widths[0], bias=False), 1.0)
        self.blocks = nn.ModuleList(nn.Sequential(*(GroupedBlock(w, config, depth) for _ in range(config.blocks))) for w in widths)
        self.wide = nn.ModuleList(_between(a, b) for a, b in itertools.pairwise(widths))
        self.last = _painted(widths[-1], channels, config.patch)
        self.colours: nn.Module = nn.Identity()

    def forward(self, v: Float[Tensor, "b d"]) -> Float[Tensor, "b c size size"]:
        x = self.blocks[0](self.base * self.first(v)[:, :, None, None])
        for widen, blocks in zip(self.wide, self.blocks[1:], strict=True):
            x = blocks(F.interpolate(widen(x), scale_factor=2, mode="bilinear", align_corners=False))
        return self.colours(self.last(x))


class R3GANDiscriminator(nn.Module):
    """Image "b c size size" -> features "b d"."""

    def __init__(self, config: R3GANConfig, size: int, channels: int) -> None:
        super().__init__()
        widths = channels_at(config.width, config.most, size // config.patch)
        depth = config.blocks * len(widths)
        first = nn.Conv2d(channels, widths[0], 1) if config.patch == 1 else nn.Conv2d(channels, widths[0], 4, 2, 1)
        self.first = _scaled(first, 1.0)
        self.blocks = nn.ModuleList(nn.Sequential(*(GroupedBlock(w, config, depth) for _ in range(config.blocks))) for w in widths)
        self.wide = nn.ModuleList(_between(a, b) for a, b in itertools.pairwise(widths))
        self.base = _scaled(nn.Conv2d(widths[-1], widths[-1], 4, groups=widths[-1], bias=False), 1.0)
        self.features, self.mixes = widths[-1], False

    @property
    def parts(self) -> list[nn.Module]:
        """From the picture on."""
        return [nn.ModuleList([self.first, self.blocks[0]]), *(nn.ModuleList(p) for p in zip(self.wide, self.blocks[1:], strict=True))]

    def forward(self, x: Float[Tensor, "b c size size"]) -> Float[Tensor, "b d"]:
        x = self.blocks[0](self.first(x))
        for widen, blocks in zip(self.wide, self.blocks[1:], strict=True):
            x = blocks(widen(F.avg_pool2d(x, 2)))
        return self.base(x)[:, :, 0, 0]


def _painted(width: int, channels: int, patch: int) -> nn.Module:
    """To pixels: 1x1, or twice the side with four of its inputs to each of them."""
    if patch == 1:
        return _scaled(nn.Conv2d(width, channels, 1, bias=False), 1.0)
    layer = nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False)
    nn.init.normal_(layer.weight, std=(4 * width) ** -0.5)
    return layer


def _between(a: int, b: int) -> nn.Module:
    return nn.Identity() if a == b else _scaled(nn.Conv2d(a, b, 1, bias=False), 1.0)
