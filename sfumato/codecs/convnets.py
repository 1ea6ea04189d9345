"""Convolutional encoders and decoders that are cheap on a CPU: space-to-depth at the edge, most compute at low resolution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sfumato.nn.layers import Activation, Norm, ResBlock, activation_of, norm_of


@dataclass(frozen=True, kw_only=True)
class ConvnetConfig:
    """An encoder and a decoder that mirror each other, level 0 at the highest resolution.

    The factor from image to latent is `patch * 2 ** (len(widths) - 1)`; with `vector` n, n x n of its cells become one: with pictures of n cells a
    side, one vector a picture.
    """

    kind: str = "convnet"
    image_channels: int = 4
    patch: int = 2
    widths: tuple[int, ...] = (64, 128, 256)
    encoder_blocks: tuple[int, ...] = (1, 2, 2)
    decoder_blocks: tuple[int, ...] = (2, 3, 2)
    vector: int = 0
    norm: Norm = "group"
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        if self.patch < 1 or self.image_channels < 1:
            raise ValueError(f"patch (={self.patch}) and image_channels (={self.image_channels}) must be at least 1")
        if not len(self.widths) == len(self.encoder_blocks) == len(self.decoder_blocks) >= 1:
            raise ValueError(f"widths (={self.widths}), encoder_blocks and decoder_blocks must have the same length, one number a level")
        if self.vector < 0:
            raise ValueError(f"vector (={self.vector}) must be at least 0: the cells of a side that become one, 0 leaves the grid")
        if any(w % 16 for w in self.widths):
            raise ValueError(f"widths (={self.widths}) must be multiples of 16: the norms have 16 groups")

    @property
    def factor(self) -> int:
        return self.patch * 2 ** (len(self.widths) - 1) * max(self.vector, 1)


def encoder(config: ConvnetConfig, out_channels: int) -> nn.Sequential:
    """Image "b c h w" -> features "b out_channels h/f w/f"."""
    layers: list[nn.Module] = [nn.PixelUnshuffle(config.patch), nn.Conv2d(config.image_channels * config.patch**2, config.widths[0], 3, padding=1)]
    for level, (width, blocks) in enumerate(zip(config.widths, config.encoder_blocks, strict=True)):
        if level:
            layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * config.widths[level - 1], width, 1)]
        layers += [ResBlock(width, config.norm, config.activation) for _ in range(blocks)]
    width, n = config.widths[-1], config.vector
    last = nn.Conv2d(width, out_channels, n, stride=n) if n else nn.Conv2d(width, out_channels, 3, padding=1)
    return nn.Sequential(*layers, norm_of(config.norm, width), activation_of(config.activation), last)


def decoder(config: ConvnetConfig, in_channels: int) -> nn.Sequential:
    """Latents "b in_channels h w" -> image "b c h*f w*f"."""
    width, n = config.widths[-1], config.vector
    layers: list[nn.Module] = [nn.ConvTranspose2d(in_channels, width, n, stride=n) if n else nn.Conv2d(in_channels, width, 3, padding=1)]
    for level in reversed(range(len(config.widths))):
        width = config.widths[level]
        layers += [ResBlock(width, config.norm, config.activation) for _ in range(config.decoder_blocks[level])]
        if level:
            layers += [nn.Conv2d(width, 4 * config.widths[level - 1], 1), nn.PixelShuffle(2)]
    out = nn.Conv2d(config.widths[0], config.image_channels * config.patch**2, 3, padding=1)
    return nn.Sequential(*layers, norm_of(config.norm, config.widths[0]), activation_of(config.activation), out, nn.PixelShuffle(config.patch))
