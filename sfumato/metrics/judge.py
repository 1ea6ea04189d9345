"""A judge: a small network that names the class and the style of a picture, and shares nothing with what it judges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.nn.backbones import resize
from sfumato.nn.layers import ResBlock

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Residual blocks at a quarter of `size`, then at an eighth and a sixteenth; as many outputs as there are labels and styles."""

    kind: str = "judge"
    size: int = 64
    widths: tuple[int, int, int] = (64, 128, 256)
    blocks: tuple[int, int, int] = (2, 2, 1)
    labels: int = 0
    styles: int = 0

    def __post_init__(self) -> None:
        if self.size < 16 or self.size % 16:
            raise ValueError(f"size (={self.size}) must be a multiple of 16")
        if max(self.labels, self.styles) < 2:
            raise ValueError(f"a judge needs two labels or two styles to tell apart, not {self.labels} and {self.styles}")


class JudgeNet(nn.Module):
    """RGB "b 3 s s" in [-1, 1] -> logits over labels and over styles."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [nn.PixelUnshuffle(4), nn.Conv2d(48, config.widths[0], 3, padding=1)]
        for i, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
            if i:
                layers.append(nn.Conv2d(config.widths[i - 1], width, 3, stride=2, padding=1))
            layers += [ResBlock(width) for _ in range(blocks)]
        self.trunk = nn.Sequential(*layers, nn.GroupNorm(16, config.widths[-1]), nn.SiLU())
        self.label = nn.Linear(config.widths[-1], config.labels)
        self.style = nn.Linear(config.widths[-1], config.styles)

    def forward(self, x: Float[Tensor, "b 3 s s"]) -> tuple[Float[Tensor, "b labels"], Float[Tensor, "b styles"]]:
        pooled = self.trunk(x).mean((2, 3))
        return self.label(pooled), self.style(pooled)


@dataclass(frozen=True)
class Judge:
    """A trained judge: column i of its logits is of labels[i], of styles[i]. `digest` is of its pack, `images` how long it learned."""

    network: JudgeNet
    labels: list[str]
    styles: list[str]
    digest: str
    images: int
    scores: dict[str, float]

    @torch.no_grad()
    def __call__(self, rgb: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b labels"], Float[Tensor, "b styles"]]:
        """Logits for pictures in [0, 1], over white where they had transparency."""
        found = [self.network(resize(p, self.network.config.size) * 2 - 1) for p in rgb.split(BATCH)]
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])
