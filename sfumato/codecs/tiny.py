"""The tiny autoencoders that stand in for Stable Diffusion's (TAESD, github.com/madebyollin/taesd): a hundredth of the work, for previews and hurry.

Their latents are those of the checkpoint, standardised; every encoding is a point, not a distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.core.config import at_least
from sfumato.core.seams import Latents, LatentSpec

LARGEST = 3.0  # of a latent: beyond it they are bent, so that a decoder sees nothing that it never learned


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """`blocks` at each side, the picture's first; the decoder has as many, from the other end. Without `encodes` there is a decoder alone."""

    kind: str = "tiny"
    image_channels: int = 3
    latent_channels: int = 4
    width: int = 64
    blocks: tuple[int, ...] = (1, 3, 3, 3)
    encodes: bool = True

    def __post_init__(self) -> None:
        at_least(1, image_channels=self.image_channels, latent_channels=self.latent_channels, width=self.width, sides=len(self.blocks))


class Block(nn.Module):
    """Three convolutions beside a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return (self.conv(x) + x).relu()


def encoder(config: TinyConfig) -> nn.Sequential:
    """Picture in [0, 1] -> latents."""
    w = config.width
    layers: list[nn.Module] = [nn.Conv2d(config.image_channels, w, 3, padding=1)]
    for level, count in enumerate(config.blocks):
        layers += [nn.Conv2d(w, w, 3, 2, 1, bias=False)] if level else []
        layers += [Block(w) for _ in range(count)]
    return nn.Sequential(*layers, nn.Conv2d(w, config.latent_channels, 3, padding=1))


def decoder(config: TinyConfig) -> nn.Sequential:
    """Latents -> picture in [0, 1]."""
    w = config.width
    layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, w, 3, padding=1), nn.ReLU()]
    for level, count in enumerate(reversed(config.blocks)):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(w, w, 3, padding=1, bias=False)] if level else []
        layers += [Block(w) for _ in range(count)]
    return nn.Sequential(*layers, nn.Conv2d(w, config.image_channels, 3, padding=1))


class TinyAutoencoder(nn.Module):
    """See `Codec`."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.spec = LatentSpec(
            image_channels=config.image_channels, latent_channels=config.latent_channels, factor=2 ** (len(config.blocks) - 1),
            mean=(0.0,) * config.latent_channels, std=(1.0,) * config.latent_channels,
        )  # fmt: skip
        if config.encodes:
            self.encoder = encoder(config)
        self.decoder = decoder(config)

    def encode(self, x: Float[Tensor, "b c h w"], *, noise: Float[Tensor, "b d _ _"] | None = None) -> Latents:
        """Picture in [-1, 1] -> latents without spread. Raises ValueError where there is a decoder alone."""
        if not self.config.encodes:
            raise ValueError("vae has a decoder alone, and an init picture must be encoded: put its taesd_encoder file beside it, or leave --vae out")
        z = self.encoder((x + 1) / 2)
        return Latents(mean=z, std=torch.zeros_like(z))

    def decode(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        """Latents -> picture in [-1, 1]."""
        return self.decoder(LARGEST * torch.tanh(z / LARGEST)) * 2 - 1
