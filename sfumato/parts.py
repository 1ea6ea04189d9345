"""The parts of a codec by their usual names, for short scripts: see `examples/vqgan_in_python.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sfumato.codecs.bottlenecks.vq import VQ, VQConfig
from sfumato.codecs.convnets import ConvnetConfig, decoder, encoder
from sfumato.data.folder import pixels_of, scan, split
from sfumato.gans.discriminators import PatchConfig, PatchDiscriminator
from sfumato.nn.backbones import over

SMALL = {"image_channels": 3, "widths": (32, 64, 128), "encoder_blocks": (1, 1, 1), "decoder_blocks": (1, 1, 1)}


def Encoder(channels: int, **more: Any) -> nn.Module:
    """Pictures "b 3 h w" -> latents "b channels h/8 w/8"; `more` are fields of `ConvnetConfig`."""
    return encoder(ConvnetConfig(**{**SMALL, **more}), channels)


def Decoder(channels: int, **more: Any) -> nn.Module:
    """Latents -> pictures; the mirror of `Encoder`."""
    return decoder(ConvnetConfig(**{**SMALL, **more}), channels)


def Quantizer(num_embeddings: int, embedding_dim: int, **more: Any) -> VQ:
    """Latents -> (codes, loss, statistics); `more` are fields of `VQConfig`. After the optimiser's step, `update(statistics)`."""
    return VQ(VQConfig(size=num_embeddings, channels=embedding_dim, **more))


def Discriminator(**more: Any) -> PatchDiscriminator:
    """Pictures -> scores of their patches; `more` are fields of `PatchConfig`."""
    return PatchDiscriminator(PatchConfig(**more))


def pictures(folder: str | Path, size: int = 64) -> tuple[Tensor, Tensor]:
    """(training, test) pictures of a folder over white, "n 3 size size" in [-1, 1]. Raises ValueError where there are none."""
    found = scan(folder)
    train, test = (over(pixels_of(found, part, size).pixels[:].float() / 255) * 2 - 1 for part in split(found.entries))
    return train, test if len(test) else train
