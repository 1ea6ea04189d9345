"""The first stage: image -> latents -> image. A KL-VAE and a VQGAN are this one network with another bottleneck.

Latents that leave `encode` and enter `decode` are standardised per channel with statistics measured after training
(`measure_latents`), so that a generator always sees unit variance.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.codecs.bottlenecks.kl import KL, KLConfig, split
from sfumato.codecs.convnets import ConvnetConfig, decoder, encoder
from sfumato.core.seams import Latents, LatentSpec

DEAD_BELOW = 0.1  # a channel whose std is below this fraction of the median carries no information


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Networks and bottleneck of a codec."""

    kind: str = "autoencoder"
    convnet: ConvnetConfig = field(default_factory=ConvnetConfig)
    bottleneck: KLConfig = field(default_factory=KLConfig)


class Autoencoder(nn.Module):
    """See `sfumato.core.seams.Codec`. Images are in [-1, 1]; their sides must be multiples of the factor."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder(config.convnet, config.bottleneck.encoder_channels)
        self.bottleneck = KL(config.bottleneck)
        self.decoder = decoder(config.convnet, config.bottleneck.channels)
        self.register_buffer("latent_mean", torch.zeros(config.bottleneck.channels))
        self.register_buffer("latent_std", torch.ones(config.bottleneck.channels))

    @property
    def spec(self) -> LatentSpec:
        c = self.config
        mean, std = tuple(self.latent_mean.tolist()), tuple(self.latent_std.tolist())
        return LatentSpec(image_channels=c.convnet.image_channels, latent_channels=c.bottleneck.channels, factor=c.convnet.factor, mean=mean, std=std)

    def forward(
        self, x: Float[Tensor, "b c h w"], noise: Float[Tensor, "b zc zh zw"] | None = None
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, ""], dict[str, Tensor]]:
        """Reconstruction, bottleneck loss, statistics: what training needs."""
        self._check(x)
        z, loss, stats = self.bottleneck(self.encoder(x), noise)
        return self.decoder(z).float(), loss, stats

    def encode(self, x: Float[Tensor, "b c h w"], *, noise: Float[Tensor, "b zc zh zw"] | None = None) -> Latents:
        """Posterior mean and std "b c h/f w/f" in standardised units; with `noise` the mean is a sample instead."""
        self._check(x)
        mean, std = split(self.encoder(x))
        if noise is not None:
            mean = mean + std * noise
        live = (self.latent_std > 0)[:, None, None]
        scale = torch.where(live, self.latent_std[:, None, None], 1.0)
        return Latents(mean=(mean - self.latent_mean[:, None, None]) / scale * live, std=std / scale * live)

    def decode(self, z: Float[Tensor, "b zc zh zw"]) -> Float[Tensor, "b c h w"]:
        """Standardised latents -> image in about [-1, 1] (not clamped)."""
        return self.decoder(z * self.latent_std[:, None, None] + self.latent_mean[:, None, None]).float()

    def _check(self, x: Tensor) -> None:
        c = self.config.convnet
        if x.ndim != 4 or x.shape[1] != c.image_channels or x.shape[2] % c.factor or x.shape[3] % c.factor:
            raise ValueError(f"images must be 'b {c.image_channels} h w' with sides that are multiples of {c.factor}, not of shape {tuple(x.shape)}")


@torch.no_grad()
def measure_latents(codec: Autoencoder, batches: Iterable[Float[Tensor, "_ c h w"]]) -> None:
    """Sets the codec's per-channel statistics from posterior means over `batches` of images.

    Dead channels (std below 0.1 of the median) get std 0: they encode to zero and always decode from their mean.
    """
    total, square, n = 0.0, 0.0, 0
    for x in batches:
        mean = split(codec.encoder(x))[0].cpu().double()
        total, square, n = total + mean.sum((0, 2, 3)), square + mean.square().sum((0, 2, 3)), n + mean.numel() // mean.shape[1]
    if n < 2:
        raise ValueError("measure_latents needs at least two latent cells")
    mean = total / n
    std = (square / n - mean.square()).clamp_min(0).sqrt()
    codec.latent_mean.copy_(mean)
    codec.latent_std.copy_(torch.where(std < DEAD_BELOW * std.median(), 0.0, std))
